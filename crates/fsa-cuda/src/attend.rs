//! KV-major forward of stage `selected`: a block of keys against every row that chose it, a partial per pair.
//!
//! Kernel files: `kernels/attend_sm90.cuh`, `kernels/attend_sm80.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{AttendParams, TILE_ROWS};
use crate::plan::tile_bytes;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("attend", "AttendParams")];

/// One warpgroup, or four warps.
const THREADS: u32 = 128;
/// Query tiles in flight on Hopper.
const QUERY_STAGES: usize = 2;
/// Tiles of a portable CTA: what is left of 99 KB, which it can have on devices of 100 KB.
const PORTABLE_BYTES: usize = 95 << 10;

/// Shared memory of a CTA: key tile, value tile, query tiles.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let Specialisation { set, head_dim, block_size, .. } = *specialisation;
    let (block, queries) = (2 * tile_bytes(block_size, head_dim), tile_bytes(TILE_ROWS, head_dim));
    match set {
        KernelSet::Sm90 => block + QUERY_STAGES * queries,
        KernelSet::Sm80 if block + queries <= PORTABLE_BYTES => block + queries,
        // Steps of a block that does not fit pass through the tiles.
        KernelSet::Sm80 => 2 * tile_bytes(if head_dim <= 128 { 64 } else { 32 }, head_dim) + queries,
    }
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let mut constants = vec![("SMEM_BYTES", smem_bytes(specialisation)), ("WARPGROUP", THREADS as usize)];
    constants.push(match specialisation.set {
        KernelSet::Sm90 => ("QUERY_STAGES", QUERY_STAGES),
        KernelSet::Sm80 => ("MAX_SMEM_BYTES", PORTABLE_BYTES),
    });
    constants
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

    /// Attends the units of a chunk, of which there are at most `units`, for `heads` query heads. With `overlaps`, from
    /// the end of the kernel before it in the stream on.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        units: usize,
        heads: usize,
        overlaps: bool,
        params: &AttendParams,
    ) -> Result<()> {
        let grid = [units as u32, heads as u32, 1];
        self.attend.launch(stream, LaunchDims { grid, threads: THREADS, smem_bytes: self.smem_bytes, overlaps }, params)
    }
}
