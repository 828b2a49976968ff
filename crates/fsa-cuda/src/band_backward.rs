//! Backward of the attention whose rows see an interval of keys: row statistics where the caller has none, then gradients of
//! queries tile of rows by tile of rows and of keys and values tile of keys by tile of keys. No sum depends on chance. Or, with
//! scaled sums, all of them tile of keys by tile of keys: gradients of queries are added up in memory.
//!
//! Kernel files: `kernels/band_backward_sm90.cuh`, `kernels/band_backward_sm80.cuh`, `kernels/band_sums_sm90.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BandBackwardParams, TILE_ROWS};
use crate::plan::{RowTiles, tile_bytes};
use crate::source::{QuerySums, Specialisation};
use std::sync::Arc;

/// Kernels of a file and what they take.
pub(crate) fn entry_points(specialisation: &Specialisation) -> &'static [(&'static str, &'static str)] {
    if is_one_pass(specialisation) {
        return &[
            ("band_delta", "BandBackwardParams"),
            ("band_sums_open", "BandBackwardParams"),
            ("band_sums", "BandBackwardParams"),
            ("band_sums_finish", "BandBackwardParams"),
            ("band_backward_merge", "BandBackwardParams"),
        ];
    }
    &[
        ("band_delta", "BandBackwardParams"),
        ("band_backward_queries", "BandBackwardParams"),
        ("band_backward_keys", "BandBackwardParams"),
        ("band_backward_merge", "BandBackwardParams"),
    ]
}

/// Whether gradients of queries are added up in memory, in the one pass over keys.
fn is_one_pass(specialisation: &Specialisation) -> bool {
    specialisation.query_sums == QuerySums::Scaled
}

/// Largest vectors whose tiles and sums fit a CTA of the kernels for Hopper.
pub(crate) const MAX_HOPPER_HEAD_DIM: usize = 128;
/// The length of vectors that the one pass is made for.
pub(crate) const SUMS_HEAD_DIM: usize = 128;
/// Stages of the kernels for Hopper: of the two passes; of score gradients in the one, and of rows there, in tiles of
/// [`TILE_ROWS`] and of [`WIDE_ROWS`].
const STAGES: usize = 2;
const GRADIENT_STAGES: usize = 2;
const ROW_STAGES: usize = 3;
const WIDE_ROW_STAGES: usize = 2;
/// Rows of a wide tile of the one pass.
pub(crate) const WIDE_ROWS: usize = 80;
/// A wide tile takes as long as 6 / 5 of one of [`TILE_ROWS`].
const WIDE_COST: [usize; 2] = [6, 5];
/// Tokens and heads that a CTA of `band_delta` takes.
const DELTA_TOKENS: usize = 8;
const DELTA_HEADS: usize = 8;
/// Bytes of gradients of queries that a CTA of `band_sums_open` and of `band_sums_finish` takes; keys that one of the former
/// looks at.
const TARGET_BYTES: usize = 16 << 10;
const OPEN_KEYS: usize = 64;
/// Most splits whose sum does not go ahead of another attention: it takes places from CTAs that are as long as all that is left. The sum of
/// more splits takes so long that it has to begin early.
const FEW_SPLITS: usize = 4;
/// Elements that a thread of `band_backward_merge` takes.
const MERGE_ELEMENTS: usize = 4;
/// Threads of the small kernels.
const SMALL_THREADS: usize = 256;

/// Rows of a tile of rows.
pub(crate) fn tile_rows(specialisation: &Specialisation) -> usize {
    match specialisation.set {
        KernelSet::Sm90 if !is_one_pass(specialisation) => 2 * TILE_ROWS,
        KernelSet::Sm90 if specialisation.wide_rows => WIDE_ROWS,
        _ => TILE_ROWS,
    }
}

/// The kernel that does the same in one pass, in wide tiles where groups of so many heads fill them well enough. Not of selected
/// blocks and window where these are all blocks: calls so short have too few tiles.
pub(crate) fn one_pass(kernel: &Specialisation, group_size: usize) -> Specialisation {
    let [rows, wide_rows] = [TILE_ROWS, WIDE_ROWS].map(|rows| RowTiles::filled_rows(group_size, rows));
    let pays = wide_rows * WIDE_COST[1] >= rows * WIDE_COST[0];
    let is_short = kernel.window_too && !kernel.block_mask;
    kernel.with_query_sums(QuerySums::Scaled).with_wide_rows(pays && !is_short)
}

/// Bytes of what a split leaves of a row of a gradient of keys: f32, or f16 and its factor in the one pass.
pub(crate) fn split_row_bytes(head_dim: usize, query_sums: QuerySums) -> usize {
    match query_sums {
        QuerySums::Scaled => 2 * head_dim + size_of::<f32>(),
        _ => 4 * head_dim,
    }
}

/// Keys of a step of the pass of queries.
pub(crate) fn step_keys(specialisation: &Specialisation) -> usize {
    match (specialisation.set, specialisation.head_dim) {
        (KernelSet::Sm90, _) => 128,
        (KernelSet::Sm80, 0..=128) => 64,
        (KernelSet::Sm80, 129..=192) => 32,
        (KernelSet::Sm80, _) => 16,
    }
}

/// Keys of a tile of keys.
pub(crate) fn tile_keys(specialisation: &Specialisation) -> usize {
    match specialisation.set {
        KernelSet::Sm80 if specialisation.head_dim <= 128 => 64,
        KernelSet::Sm80 => 32,
        KernelSet::Sm90 => 128,
    }
}

/// Tiles that pass through a portable CTA: two of what is read first and last, where they fit.
fn tiles_of_steps(head_dim: usize) -> usize {
    if head_dim <= 128 { 3 } else { 2 }
}

/// Threads of a CTA: on Hopper, two warpgroups multiply and a third brings in what they need.
fn threads(specialisation: &Specialisation) -> usize {
    match specialisation.set {
        KernelSet::Sm80 => 128,
        KernelSet::Sm90 => 384,
    }
}

/// Shared memory of a CTA on Hopper, in both passes: two tiles that stay and the stages of two that pass.
fn hopper_smem_bytes(specialisation: &Specialisation) -> usize {
    (2 + 2 * STAGES) * tile_bytes(tile_rows(specialisation), specialisation.head_dim)
}

/// Shared memory of a CTA of `band_backward_queries`: queries and gradients, then keys and values of the steps.
fn queries_smem_bytes(specialisation: &Specialisation) -> usize {
    if specialisation.set == KernelSet::Sm90 {
        return hopper_smem_bytes(specialisation);
    }
    let (head_dim, step) = (specialisation.head_dim, step_keys(specialisation));
    2 * tile_bytes(TILE_ROWS, head_dim) + tiles_of_steps(head_dim) * tile_bytes(step, head_dim)
}

/// Shared memory of a CTA of `band_backward_keys`: keys and values, then queries and gradients of the steps; where keys are few,
/// the scores of a step pass through it.
fn keys_smem_bytes(specialisation: &Specialisation) -> usize {
    if specialisation.set == KernelSet::Sm90 {
        return hopper_smem_bytes(specialisation);
    }
    let (head_dim, keys) = (specialisation.head_dim, tile_keys(specialisation));
    let rows = if head_dim <= 192 { TILE_ROWS } else { TILE_ROWS / 2 };
    let scores = if head_dim <= 128 { 0 } else { 2 * tile_bytes(32, 64) };
    2 * tile_bytes(keys, head_dim) + tiles_of_steps(head_dim) * tile_bytes(rows, head_dim) + scores
}

/// Shared memory of a CTA of `band_sums`: keys and values, the stages of rows and of score gradients, sums on their way.
fn sums_smem_bytes(specialisation: &Specialisation) -> usize {
    let (rows, keys, head_dim) = (tile_rows(specialisation), tile_keys(specialisation), specialisation.head_dim);
    let row_stages = if specialisation.wide_rows { WIDE_ROW_STAGES } else { ROW_STAGES };
    2 * tile_bytes(keys, head_dim)
        + 2 * row_stages * tile_bytes(rows, head_dim)
        + GRADIENT_STAGES * tile_bytes(rows, keys)
        + tile_bytes(rows, head_dim)
}

/// Shared memory of a CTA of the largest of the main kernels.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    if is_one_pass(specialisation) {
        return sums_smem_bytes(specialisation);
    }
    queries_smem_bytes(specialisation).max(keys_smem_bytes(specialisation))
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let (queries, keys) = (queries_smem_bytes(specialisation), keys_smem_bytes(specialisation));
    let (cta_keys, threads) = (tile_keys(specialisation), threads(specialisation));
    if is_one_pass(specialisation) {
        return vec![
            ("SUMS_SMEM_BYTES", sums_smem_bytes(specialisation)),
            ("SUM_ROWS", tile_rows(specialisation)),
            ("CTA_KEYS", cta_keys),
            ("THREADS", threads),
            ("DELTA_TOKENS", DELTA_TOKENS),
            ("DELTA_HEADS", DELTA_HEADS),
            ("MERGE_COLUMNS", MERGE_ELEMENTS),
            ("TARGET_BYTES", TARGET_BYTES),
            ("OPEN_KEYS", OPEN_KEYS),
        ];
    }
    match specialisation.set {
        KernelSet::Sm80 => vec![
            ("QUERIES_SMEM_BYTES", queries),
            ("KEYS_SMEM_BYTES", keys),
            ("CTA_KEYS", cta_keys),
            ("WARPGROUP", threads),
        ],
        KernelSet::Sm90 => vec![("SMEM_BYTES", queries), ("CTA_KEYS", cta_keys), ("THREADS", threads)],
    }
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct BandBackwardKernels {
    delta: Function<BandBackwardParams>,
    main: Main,
    merge: Function<BandBackwardParams>,
    specialisation: Specialisation,
}

/// The kernels for all gradients but what splits leave.
#[derive(Debug)]
enum Main {
    TwoPasses {
        queries: Function<BandBackwardParams>,
        keys: Function<BandBackwardParams>,
    },
    OnePass {
        open: Function<BandBackwardParams>,
        sums: Function<BandBackwardParams>,
        finish: Function<BandBackwardParams>,
    },
}

impl BandBackwardKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        let main = if is_one_pass(specialisation) {
            Main::OnePass {
                open: module.function("band_sums_open")?,
                sums: module.function("band_sums")?,
                finish: module.function("band_sums_finish")?,
            }
        } else {
            Main::TwoPasses {
                queries: module.function("band_backward_queries")?,
                keys: module.function("band_backward_keys")?,
            }
        };
        let (delta, merge) = (module.function("band_delta")?, module.function("band_backward_merge")?);
        Ok(Self { delta, main, merge, specialisation: *specialisation })
    }

    /// The statistics of the rows of the kv heads that `params` names.
    pub(crate) fn statistics(&self, stream: &Stream, params: &BandBackwardParams) -> Result<()> {
        let tokens = (params.band.total_q as usize).div_ceil(DELTA_TOKENS);
        let ctas = tokens * query_heads(params).div_ceil(DELTA_HEADS);
        self.delta.launch(stream, dims([ctas, 1, 1], SMALL_THREADS, 0), params)
    }

    /// Clears the sums of gradients of queries of the kv heads that `params` names and takes the bounds of keys; nothing where there are
    /// no such sums. Ahead of what makes the statistics of rows meanwhile.
    pub(crate) fn open(&self, stream: &Stream, params: &BandBackwardParams) -> Result<()> {
        let Main::OnePass { open, .. } = &self.main else { return Ok(()) };
        let of_bounds = (params.band.total_keys as usize).div_ceil(OPEN_KEYS) * params.num_kv_heads as usize;
        open.launch_ahead(stream, dims([self.targets(params).max(of_bounds), 1, 1], SMALL_THREADS, 0), params)
    }

    /// CTAs that go over all gradients of queries.
    fn targets(&self, params: &BandBackwardParams) -> usize {
        let row_bytes = self.specialisation.head_dim * self.specialisation.dtype().size_bytes();
        (params.band.total_q as usize * query_heads(params) * row_bytes).div_ceil(TARGET_BYTES)
    }

    /// Makes gradients of the sums of those of queries, and with `merges` adds up what splits left: in one launch where there are such sums.
    pub(crate) fn finish(&self, stream: &Stream, merges: bool, params: &BandBackwardParams) -> Result<()> {
        let Main::OnePass { finish, .. } = &self.main else {
            return if merges { self.merge(stream, false, params) } else { Ok(()) };
        };
        let ctas = self.targets(params) + if merges { self.merge_ctas(params) } else { 0 };
        let dims = LaunchDims { overlaps: true, ..dims([ctas, 1, 1], SMALL_THREADS, 0) };
        finish.launch(stream, dims, params)
    }

    /// All gradients of the kv heads that `params` names, but what splits leave; of those of queries the sums, where there are such, which are
    /// open. With `ahead` its CTAs go ahead of those of other streams. With `overlaps` those of one pass start under the end of the kernel
    /// ahead, and read tables and keys before they wait for that: these are older, and that one waited for them before it let this start.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        (tiles, ahead, overlaps): (&RowTiles, bool, bool),
        multiprocessors: usize,
        params: &BandBackwardParams,
    ) -> Result<()> {
        let kv_heads = params.num_kv_heads as usize;
        let threads = threads(&self.specialisation);
        let of_keys = [params.num_key_tiles as usize, kv_heads, params.splits as usize];
        match &self.main {
            Main::TwoPasses { queries, keys } => {
                let grid = match self.specialisation.set {
                    KernelSet::Sm80 => [tiles.ctas(), kv_heads, 1],
                    KernelSet::Sm90 => [(tiles.ctas() * kv_heads).min(multiprocessors), 1, 1],
                };
                queries.launch(stream, dims(grid, threads, queries_smem_bytes(&self.specialisation)), params)?;
                keys.launch(stream, dims(of_keys, threads, keys_smem_bytes(&self.specialisation)), params)?;
            }
            Main::OnePass { sums, .. } => {
                let dims = LaunchDims { overlaps, ..dims(of_keys, threads, sums_smem_bytes(&self.specialisation)) };
                if ahead { sums.launch_ahead(stream, dims, params)? } else { sums.launch(stream, dims, params)? }
            }
        }
        Ok(())
    }

    /// CTAs that add up what splits left: none where there is one.
    fn merge_ctas(&self, params: &BandBackwardParams) -> usize {
        if params.splits == 1 {
            return 0;
        }
        let elements = params.band.total_keys as usize * params.num_kv_heads as usize * self.specialisation.head_dim;
        elements.div_ceil(MERGE_ELEMENTS * SMALL_THREADS)
    }

    /// Adds up what splits left; nothing where there is one. `ahead` is that of what left it, and holds for many splits.
    pub(crate) fn merge(&self, stream: &Stream, ahead: bool, params: &BandBackwardParams) -> Result<()> {
        let dims = dims([self.merge_ctas(params), 1, 1], SMALL_THREADS, 0);
        let ahead = ahead && params.splits as usize > FEW_SPLITS;
        if ahead { self.merge.launch_ahead(stream, dims, params) } else { self.merge.launch(stream, dims, params) }
    }
}

fn query_heads(params: &BandBackwardParams) -> usize {
    params.num_kv_heads as usize * params.band.group_size as usize
}

fn dims(grid: [usize; 3], threads: usize, smem_bytes: usize) -> LaunchDims {
    let grid = grid.map(|ctas| ctas as u32);
    LaunchDims { grid, threads: threads as u32, smem_bytes: smem_bytes as u32, overlaps: false }
}
