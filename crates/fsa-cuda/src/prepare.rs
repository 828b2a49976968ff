//! Prefix sums of a batch on the device: tiles of rows, tiles of keys, compressed keys. One launch, of one CTA for a set of them, because
//! the host does not know the lengths.
//!
//! Kernel file: `kernels/prepare.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BatchTables, PrepareParams};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("prepare", "PrepareParams")];

/// Threads of the CTA: the scan's tree is written for this number.
const THREADS: u32 = 1024;

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
        self.launch_ctas(stream, 1, [*tables; 2])
    }

    /// The same of two sets of tables, side by side.
    pub(crate) fn launch_two(&self, stream: &Stream, tables: [BatchTables; 2]) -> Result<()> {
        self.launch_ctas(stream, 2, tables)
    }

    fn launch_ctas(&self, stream: &Stream, ctas: u32, tables: [BatchTables; 2]) -> Result<()> {
        let dims = LaunchDims { grid: [ctas, 1, 1], threads: THREADS, smem_bytes: 0, overlaps: false };
        self.prepare.launch(stream, dims, &PrepareParams { tables })
    }
}
