//! Second half of the forward of stage `selected`: the dense blocks of a query tile, and the merge of its partials.
//!
//! Kernel files: `kernels/reduce_sm90.cuh`, `kernels/reduce_sm80.cuh`.

use crate::arch::KernelSet;
use crate::attend::{PartialBytes, partial_constants};
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{ReduceParams, TILE_ROWS};
use crate::plan::{IndexPlan, tile_bytes};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("reduce", "ReduceParams")];

/// One warpgroup, or four warps.
const THREADS: u32 = 128;

/// Keys of a step. Portable CTAs have less shared memory for the keys of large heads.
fn step_keys(specialisation: &Specialisation) -> usize {
    let Specialisation { set, head_dim, block_size, .. } = *specialisation;
    block_size.min(if set == KernelSet::Sm80 && head_dim > 128 { 32 } else { 64 })
}

/// Shared memory of the tiles: queries, keys, values.
fn tiles_bytes(specialisation: &Specialisation) -> usize {
    let head_dim = specialisation.head_dim;
    tile_bytes(TILE_ROWS, head_dim) + 2 * tile_bytes(step_keys(specialisation), head_dim)
}

/// Shared memory of a CTA: the tiles, and the numbers per row and slot.
pub(crate) fn smem_bytes(specialisation: &Specialisation, slots: usize) -> usize {
    tiles_bytes(specialisation) + TILE_ROWS * slots * PartialBytes::of(specialisation).numbers
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let mut constants = vec![
        ("QueryTile::BYTES + 2 * KeyTile::BYTES", tiles_bytes(specialisation)),
        ("STEP_KEYS", step_keys(specialisation)),
        ("WARPGROUP", THREADS as usize),
    ];
    constants.extend(partial_constants(specialisation));
    constants
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct ReduceKernel {
    reduce: Function<ReduceParams>,
    specialisation: Specialisation,
}

impl ReduceKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { reduce: module.function("reduce")?, specialisation: *specialisation })
    }

    /// Tokens and heads of the boxes in which keys and values are copied.
    pub(crate) fn key_boxes(&self) -> [usize; 2] {
        [step_keys(&self.specialisation), 1]
    }

    /// Writes `out` and `lse` of a chunk for `heads` query heads. With `overlaps`, from the end of
    /// the kernel before it in the stream on.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        heads: usize,
        overlaps: bool,
        params: &ReduceParams,
    ) -> Result<()> {
        let grid = [plan.chunk_tiles as u32, heads as u32, 1];
        let smem_bytes = smem_bytes(&self.specialisation, plan.slots) as u32;
        self.reduce.launch(stream, LaunchDims { grid, threads: THREADS, smem_bytes, overlaps }, params)
    }
}
