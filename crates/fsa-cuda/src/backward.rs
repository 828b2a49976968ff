//! Backward of stage `selected`: what the pass needs of rows and keys, one KV-major pass over five products, sums to the dtype.
//!
//! Kernel files: `kernels/backward_sm90.cuh`, `kernels/backward_sm80.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BackwardParams, TILE_ROWS};
use crate::plan::{IndexPlan, tile_bytes};
use crate::source::{QuerySums, Specialisation};
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("backward_bounds", "BackwardParams"),
    ("backward_prepare", "BackwardParams"),
    ("backward", "BackwardParams"),
    ("backward_finish", "BackwardParams"),
];

/// Keys that a score tile covers.
const TILE_KEYS: usize = 64;
/// Most keys of a CTA; a larger block is cut into parts.
const MAX_CTA_KEYS: usize = 128;
/// Threads of a warpgroup.
const WARPGROUP: usize = 128;
/// Heads of a group that a unit may take, side by side in its tiles of rows, those that are best first.
pub(crate) const UNIT_HEADS: [usize; 2] = [4, 2];
/// Rows that a CTA of `backward_prepare` takes, of all its heads, or blocks.
const PREPARE_ROWS: usize = 64;
const PREPARE_BLOCKS: usize = 8;
/// Rows that a thread of `backward_finish` takes part in, where they are no partials.
const FINISH_STEPS: usize = 4;
/// Rows from which on they go ahead of main kernels of other lanes, which would keep them waiting; shorter ones have soon ended.
const AHEAD_ROWS: usize = 1 << 15;
/// Threads of all but the main kernel.
const SMALL_THREADS: usize = 256;

/// The main kernel of the file: there are two for Hopper, and a portable one.
struct Main {
    /// On Hopper: two warpgroups share 64 keys, so that the sums of the largest heads fit into registers; else there is
    /// one warpgroup per 64 keys.
    is_narrow: bool,
    /// Keys of a CTA, padded.
    cta_keys: usize,
    threads: usize,
    /// CTAs that share a block, side by side.
    parts: usize,
    /// Rows of all query and gradient tiles.
    tile_rows: usize,
    /// Keys of all tiles of score gradients, and of probabilities where they pass through shared memory.
    score_keys: usize,
}

impl Main {
    fn of(specialisation: &Specialisation) -> Self {
        let Specialisation { set, head_dim, block_size, query_sums, .. } = *specialisation;
        let query_partials = query_sums == QuerySums::Partials;
        if set == KernelSet::Sm80 {
            // Where there are partials, a CTA takes the parts in turn: they share a slot.
            let cta_keys = if head_dim <= 128 { TILE_KEYS } else { TILE_KEYS / 2 };
            let parts = if query_partials { 1 } else { block_size.div_ceil(cta_keys) };
            let tile_rows = 2 * if head_dim <= 192 { TILE_ROWS } else { TILE_ROWS / 2 };
            return Self { is_narrow: false, cta_keys, threads: WARPGROUP, parts, tile_rows, score_keys: 2 * cta_keys };
        }
        let is_narrow = head_dim == 256 && !query_partials;
        let cta_keys = if is_narrow { TILE_KEYS } else { block_size.clamp(TILE_KEYS, MAX_CTA_KEYS) };
        let threads = if is_narrow { 2 * WARPGROUP } else { cta_keys / TILE_KEYS * WARPGROUP };
        let score_keys = if is_narrow { 2 * TILE_KEYS } else { cta_keys };
        let parts = block_size.div_ceil(cta_keys);
        // Two stages of two tiles.
        Self { is_narrow, cta_keys, threads, parts, tile_rows: 4 * TILE_ROWS, score_keys }
    }
}

/// Shared memory of a CTA: key and value tiles, query and gradient tiles, score tiles.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let (main, head_dim) = (Main::of(specialisation), specialisation.head_dim);
    let scores = tile_bytes(main.score_keys, TILE_ROWS);
    2 * tile_bytes(main.cta_keys, head_dim) + tile_bytes(main.tile_rows, head_dim) + scores
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let main = Main::of(specialisation);
    let smem = smem_bytes(specialisation);
    let finish_rows = finish_rows(specialisation);
    let small = [("PREPARE_ROWS", PREPARE_ROWS), ("PREPARE_BLOCKS", PREPARE_BLOCKS), ("FINISH_ROWS", finish_rows)];
    if specialisation.set == KernelSet::Sm80 {
        let main = [("SMEM_BYTES", smem), ("WARPGROUP", main.threads), ("CTA_KEYS", main.cta_keys)];
        return main.into_iter().chain(small).collect();
    }
    let (smem_expression, threads) = if main.is_narrow {
        ("2 * RowTile::BYTES + 2 * STAGE_BYTES + 2 * DS_BYTES", "NARROW_THREADS")
    } else {
        ("2 * KeyTile::BYTES + 2 * STAGE_BYTES + GROUPS * DS_BYTES", "THREADS")
    };
    let is_narrow = ("(FSA_BACKWARD_NARROW)", usize::from(main.is_narrow));
    let of_main =
        [is_narrow, (smem_expression, smem), (threads, main.threads), ("TILE_HEADS", specialisation.unit_heads)];
    of_main.into_iter().chain(small).collect()
}

/// Rows that a CTA of `backward_finish` takes, of all its heads: sums or partials of 16 bytes a thread.
fn finish_rows(specialisation: &Specialisation) -> usize {
    let Specialisation { head_dim, query_sums, unit_heads, .. } = *specialisation;
    match query_sums {
        QuerySums::F32 => FINISH_STEPS * (SMALL_THREADS / (head_dim / 4)),
        QuerySums::Scaled => FINISH_STEPS * (SMALL_THREADS / (head_dim / 8) / unit_heads * unit_heads),
        QuerySums::Partials => SMALL_THREADS / (head_dim / 8),
    }
}

/// Whether units that have a block to themselves can finish its sums of keys.
pub(crate) fn finishes_sums(specialisation: &Specialisation) -> bool {
    specialisation.set == KernelSet::Sm90 && !Main::of(specialisation).is_narrow
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct BackwardKernels {
    bounds: Function<BackwardParams>,
    prepare: Function<BackwardParams>,
    backward: Function<BackwardParams>,
    finish: Function<BackwardParams>,
    specialisation: Specialisation,
}

/// Which of the launches that share sums of keys one is: before the first and after the last all of them are gone over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    pub is_first: bool,
    pub is_last: bool,
}

impl BackwardKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            bounds: module.function("backward_bounds")?,
            prepare: module.function("backward_prepare")?,
            backward: module.function("backward")?,
            finish: module.function("backward_finish")?,
            specialisation: *specialisation,
        })
    }

    /// What bounds the keys of every block of some kv heads, from which the bounds of the heads follow.
    pub(crate) fn launch_bounds(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        kv_heads: usize,
        params: &BackwardParams,
    ) -> Result<()> {
        self.bounds.launch(stream, dims([plan.max_blocks as u32, kv_heads as u32, 1], SMALL_THREADS), params)
    }

    /// All that some query heads and the rows of a chunk have part in: gradients of the queries, and sums of keys, which become
    /// gradients after the last turn.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        heads: usize,
        turn: Turn,
        params: &BackwardParams,
    ) -> Result<()> {
        let (rows, unit_heads) = (params.rows as usize, self.specialisation.unit_heads);
        let small = |kernel: &Function<BackwardParams>, cta_rows: usize, of_blocks: usize| {
            let of_rows = rows.div_ceil(cta_rows / unit_heads);
            let dims = dims([(of_rows + of_blocks) as u32, (heads / unit_heads) as u32, 1], SMALL_THREADS);
            if rows < AHEAD_ROWS {
                kernel.launch(stream, dims, params)
            } else {
                kernel.launch_ahead(stream, dims, params)
            }
        };
        let of_blocks = if turn.is_first { plan.max_blocks.div_ceil(PREPARE_BLOCKS) } else { 0 };
        small(&self.prepare, PREPARE_ROWS, of_blocks)?;
        let main = Main::of(&self.specialisation);
        let grid = [plan.max_units() as u32, main.parts as u32, (heads / unit_heads) as u32];
        let smem_bytes = smem_bytes(&self.specialisation) as u32;
        self.backward.launch(stream, LaunchDims { smem_bytes, ..dims(grid, main.threads) }, params)?;
        // Keys and values.
        let of_blocks = if turn.is_last { 2 * plan.blocks_with_sums() } else { 0 };
        small(&self.finish, finish_rows(&self.specialisation), of_blocks)
    }
}

fn dims(grid: [u32; 3], threads: usize) -> LaunchDims {
    LaunchDims { grid, threads: threads as u32, smem_bytes: 0, overlaps: false }
}
