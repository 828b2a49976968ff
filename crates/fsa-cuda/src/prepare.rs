//! Prefix sums of a batch on the device: tiles of rows, tiles of keys, compressed keys. One launch, of one CTA for a set of them, because
//! the host does not know the lengths. And lists of blocks that need nothing else.
//!
//! Kernel file: `kernels/prepare.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BatchTables, BlockLists, PrepareParams};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("prepare", "PrepareParams")];

/// Threads of a CTA: the scan's tree is written for this number.
const THREADS: usize = 1024;

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct PrepareKernel {
    prepare: Function<PrepareParams>,
}

impl PrepareKernel {
    pub(crate) fn load(module: &Arc<Module>, _: &Specialisation) -> Result<Self> {
        Ok(Self { prepare: module.function("prepare")? })
    }

    /// Fills the tables that are not null.
    pub(crate) fn launch(&self, stream: &Stream, tables: &BatchTables) -> Result<()> {
        self.launch_ctas(stream, [*tables; 2], 1, BlockLists::default())
    }

    /// The same of two sets of tables, side by side.
    pub(crate) fn launch_two(&self, stream: &Stream, tables: [BatchTables; 2]) -> Result<()> {
        self.launch_ctas(stream, tables, 2, BlockLists::default())
    }

    /// The same of one set, and lists beside it.
    pub(crate) fn launch_with_lists(&self, stream: &Stream, tables: &BatchTables, lists: BlockLists) -> Result<()> {
        self.launch_ctas(stream, [*tables; 2], 1, lists)
    }

    fn launch_ctas(&self, stream: &Stream, tables: [BatchTables; 2], first: usize, lists: BlockLists) -> Result<()> {
        let lists = BlockLists { first_cta: first as i32, ..lists };
        let ctas = first + (lists.total_q as usize * lists.topk as usize).div_ceil(THREADS);
        let dims = LaunchDims { grid: [ctas as u32, 1, 1], threads: THREADS as u32, smem_bytes: 0, overlaps: false };
        self.prepare.launch(stream, dims, &PrepareParams { tables, lists })
    }
}
