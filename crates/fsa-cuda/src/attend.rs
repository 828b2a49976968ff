//! KV-major forward of stage `selected`: a block of keys against every row that chose it, a partial per pair.
//!
//! Kernel file: `kernels/attend_sm90.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{AttendParams, TILE_ROWS};
use crate::plan::{IndexPlan, tile_bytes};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("attend", "AttendParams")];

/// One warpgroup.
const THREADS: u32 = 128;
/// Query tiles in flight.
const QUERY_STAGES: usize = 2;

/// Shared memory of a CTA: key tile, value tile, query tiles.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let Specialisation { head_dim, block_size, .. } = *specialisation;
    2 * tile_bytes(block_size, head_dim) + QUERY_STAGES * tile_bytes(TILE_ROWS, head_dim)
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("SMEM_BYTES", smem_bytes(specialisation)), ("QUERY_STAGES", QUERY_STAGES), ("WARPGROUP", THREADS as usize)]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct AttendKernel {
    attend: Function<AttendParams>,
    smem_bytes: u32,
}

impl AttendKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { attend: module.function("attend")?, smem_bytes: smem_bytes(specialisation) as u32 })
    }

    /// Attends the units of a chunk for `heads` query heads.
    pub(crate) fn launch(&self, stream: &Stream, plan: &IndexPlan, heads: usize, params: &AttendParams) -> Result<()> {
        let grid = [plan.max_units() as u32, heads as u32, 1];
        self.attend.launch(stream, LaunchDims { grid, threads: THREADS, smem_bytes: self.smem_bytes }, params)
    }
}
