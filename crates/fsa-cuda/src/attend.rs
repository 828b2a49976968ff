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

/// Bytes of a partial: its elements, and the numbers beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PartialBytes {
    /// As they are, or in 12 bits each: `kernels/block/partial_rows.cuh`.
    pub elements: usize,
    /// Its log-sum-exp and, if the elements are packed, their factor.
    pub numbers: usize,
}

impl PartialBytes {
    /// Those that a kernel writes.
    pub(crate) fn of(specialisation: &Specialisation) -> Self {
        let number = size_of::<f32>();
        if packs(specialisation) {
            return Self { elements: specialisation.head_dim * 12 / 8, numbers: 2 * number };
        }
        Self { elements: specialisation.head_dim * specialisation.dtype().size_bytes(), numbers: number }
    }
}

/// Whether partials have 12 bits an element: where reading and writing them is most of the time.
fn packs(specialisation: &Specialisation) -> bool {
    let Specialisation { set, is_bf16, head_dim, block_size, .. } = *specialisation;
    set == KernelSet::Sm90 && is_bf16 && head_dim == 128 && block_size <= 64
}

/// Shared memory of a CTA: key tile, value tile, query tiles; where partials are packed, the largest value that each warp found.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let Specialisation { set, head_dim, block_size, .. } = *specialisation;
    let (block, queries) = (2 * tile_bytes(block_size, head_dim), tile_bytes(TILE_ROWS, head_dim));
    let found = if packs(specialisation) { THREADS as usize / 32 * size_of::<f32>() } else { 0 };
    match set {
        KernelSet::Sm90 => block + QUERY_STAGES * queries + found,
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
    constants.extend(partial_constants(specialisation));
    constants
}

/// What the files that write and read partials must agree with.
pub(crate) fn partial_constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let bytes = PartialBytes::of(specialisation);
    match specialisation.set {
        KernelSet::Sm90 => vec![("PARTIAL_BYTES", bytes.elements), ("PARTIAL_NUMBERS * sizeof(f32)", bytes.numbers)],
        KernelSet::Sm80 => vec![("ROW_BYTES", bytes.elements)],
    }
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
