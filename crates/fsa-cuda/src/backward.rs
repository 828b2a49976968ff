//! Backward of stage `selected`: row statistics, one KV-major pass over five products, f32 sums to the dtype.
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
    ("backward_delta", "BackwardParams"),
    ("backward", "BackwardParams"),
    ("backward_merge", "BackwardParams"),
    ("backward_convert", "BackwardParams"),
    ("backward_clear", "BackwardParams"),
    ("backward_finish", "BackwardParams"),
];

/// Keys that a score tile covers.
const TILE_KEYS: usize = 64;
/// Most keys of a CTA; a larger block is cut into parts.
const MAX_CTA_KEYS: usize = 128;
/// Threads of a warpgroup.
const WARPGROUP: usize = 128;
/// Rows that a CTA of `backward_delta` takes.
const DELTA_ROWS: usize = 64;
/// Elements that a thread of `backward_merge`, and of `backward_convert` where they are f32, takes.
const MERGE_ELEMENTS: usize = 8;
const CONVERT_ELEMENTS: usize = 4;
/// Threads of the small kernels.
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
    if specialisation.set == KernelSet::Sm80 {
        return vec![("SMEM_BYTES", smem), ("WARPGROUP", main.threads), ("CTA_KEYS", main.cta_keys)];
    }
    let (smem_expression, threads) = if main.is_narrow {
        ("2 * RowTile::BYTES + 2 * STAGE_BYTES + 2 * DS_BYTES", "NARROW_THREADS")
    } else {
        ("2 * KeyTile::BYTES + 2 * STAGE_BYTES + GROUPS * DS_BYTES", "THREADS")
    };
    vec![("(FSA_BACKWARD_NARROW)", usize::from(main.is_narrow)), (smem_expression, smem), (threads, main.threads)]
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct BackwardKernels {
    bounds: Function<BackwardParams>,
    delta: Function<BackwardParams>,
    backward: Function<BackwardParams>,
    merge: Function<BackwardParams>,
    convert: Function<BackwardParams>,
    clear: Function<BackwardParams>,
    finish: Function<BackwardParams>,
    specialisation: Specialisation,
}

impl BackwardKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            bounds: module.function("backward_bounds")?,
            delta: module.function("backward_delta")?,
            backward: module.function("backward")?,
            merge: module.function("backward_merge")?,
            convert: module.function("backward_convert")?,
            clear: module.function("backward_clear")?,
            finish: module.function("backward_finish")?,
            specialisation: *specialisation,
        })
    }

    /// Whether the main kernel can finish sums of keys.
    pub(crate) fn finishes_sums(&self) -> bool {
        self.specialisation.set == KernelSet::Sm90 && !Main::of(&self.specialisation).is_narrow
    }

    /// Row statistics of the chunk, unless they are given, its sums for `heads` query heads, and gradients of queries in the
    /// dtype from partials or f32 sums.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        heads: usize,
        params: &BackwardParams,
    ) -> Result<()> {
        let (rows, heads) = (params.rows as usize, heads as u32);
        let small = |ctas: usize| dims([ctas as u32, heads, 1], SMALL_THREADS);
        if params.given_stats == 0 {
            self.delta.launch(stream, small(rows.div_ceil(DELTA_ROWS)), params)?;
        }
        let Specialisation { head_dim, query_sums, .. } = self.specialisation;
        let main = Main::of(&self.specialisation);
        let grid = [plan.max_units() as u32, main.parts as u32, heads / params.unit_heads as u32];
        let smem_bytes = smem_bytes(&self.specialisation) as u32;
        self.backward.launch(stream, LaunchDims { smem_bytes, ..dims(grid, main.threads) }, params)?;
        let convert = |elements: usize| {
            self.convert.launch(stream, small((rows * head_dim).div_ceil(elements * SMALL_THREADS)), params)
        };
        match query_sums {
            QuerySums::F32 => convert(CONVERT_ELEMENTS),
            QuerySums::Scaled => convert(MERGE_ELEMENTS),
            QuerySums::Partials => {
                let rows_per_cta = SMALL_THREADS / (head_dim / MERGE_ELEMENTS);
                self.merge.launch(stream, small(rows.div_ceil(rows_per_cta)), params)
            }
        }
    }

    /// Launches what goes over all blocks of some kv heads.
    pub(crate) fn over_blocks(
        &self,
        stream: &Stream,
        step: OverBlocks,
        plan: &IndexPlan,
        kv_heads: usize,
        params: &BackwardParams,
    ) -> Result<()> {
        let (function, parts) = match step {
            OverBlocks::Bounds => (&self.bounds, 1),
            OverBlocks::Clear => (&self.clear, 1),
            OverBlocks::Finish => (&self.finish, 2),
        };
        function.launch(stream, dims([plan.max_blocks as u32, kv_heads as u32, parts], SMALL_THREADS), params)
    }
}

/// Before the first and after the last launch of some kv heads.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OverBlocks {
    /// What the scale of sums has to know of the keys.
    Bounds,
    /// Zeros for the sums of blocks with several units.
    Clear,
    /// Gradients of keys and values in the dtype, where no unit finished them.
    Finish,
}

fn dims(grid: [u32; 3], threads: usize) -> LaunchDims {
    LaunchDims { grid, threads: threads as u32, smem_bytes: 0, overlaps: false }
}
