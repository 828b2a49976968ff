//! Stage `compressed` and Stage `select` in one pass: the attention leaves scores of blocks and chooses by them.
//!
//! Kernel files: `kernels/band_select_sm90.cuh`; `kernels/band_select_rows_sm90.cuh` of one head; `kernels/band_select_few_sm90.cuh` of one sequence with few keys.

use crate::band::{self, step_keys, tile_rows};
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::BandSelectParams;
use crate::plan::tile_bytes;
use crate::select::{GROUP_KEYS, Scoring};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("band", "BandSelectParams")];

/// Warpgroups of the attention: two that attend, and one that brings in what they need.
const WARPGROUPS: usize = 3;
const WARPGROUP: usize = 128;
/// Shared memory of a warp that chooses: of another warpgroup, or, of one head, of those that attend.
const CHOICE_BYTES: usize = 16384;
const ROW_CHOICE_BYTES: usize = 4160;
/// Steps whose scores are read together.
const PART_STEPS: usize = 4;
/// Tiles of a CTA of one sequence with few keys; rows and scores of one of its warps, which leave together.
const FEW_TILES: usize = 4;
const WARP_ROWS: usize = 16;
const SCORE_BYTES: usize = 2048;
/// Blocks of such a sequence.
pub(crate) const FEW_BLOCKS: usize = 32;
/// Longest vectors that it takes.
pub(crate) const MAX_HEAD_DIM: usize = 128;

/// True if it takes these windows with groups of `heads`, all of which vote.
pub(crate) fn suits(scoring: &Scoring, heads: usize) -> bool {
    scoring.suits_hopper(heads) && scoring.steps == GROUP_KEYS && matches!(heads, 1 | 2 | 4 | 8 | 16)
}

/// CTAs for `tiles` tiles of rows of each kv head: one after the other as many as the device has multiprocessors; of few keys fewer where that leaves none idle.
pub(crate) fn ctas(specialisation: &Specialisation, tiles: usize, kv_heads: usize, multiprocessors: usize) -> usize {
    if !specialisation.few_keys {
        return (tiles * kv_heads).min(multiprocessors);
    }
    let tiles_of_cta = (tiles * kv_heads).div_ceil(multiprocessors.max(1)).clamp(1, FEW_TILES);
    tiles.div_ceil(tiles_of_cta) * kv_heads
}

/// Tokens of the boxes that rows leave in, of a tile of `tile_tokens`.
pub(crate) fn box_tokens(specialisation: &Specialisation, tile_tokens: usize) -> usize {
    if specialisation.few_keys { tile_tokens * WARP_ROWS / tile_rows(specialisation) } else { tile_tokens }
}

/// Threads of a CTA. Of several heads one more warpgroup chooses; of one there are too many lists for it.
fn threads(specialisation: &Specialisation) -> usize {
    WARPGROUP * (WARPGROUPS + usize::from(!specialisation.one_head))
}

/// Tiles of a CTA whose scores are in memory: with warps of their own, blocks of one are chosen while the other is attended to.
fn slots(specialisation: &Specialisation) -> usize {
    if specialisation.one_head { 1 } else { 2 }
}

/// Shared memory of all warps that choose.
fn choice_bytes(specialisation: &Specialisation) -> usize {
    if specialisation.one_head {
        tile_rows(specialisation) / 16 * ROW_CHOICE_BYTES
    } else {
        WARPGROUP / 32 * CHOICE_BYTES
    }
}

/// Shared memory of a CTA.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    if specialisation.few_keys {
        let tile = tile_bytes(tile_rows(specialisation), specialisation.head_dim);
        return (2 + FEW_TILES) * tile + threads(specialisation) / 32 * SCORE_BYTES;
    }
    band::smem_bytes(specialisation) + choice_bytes(specialisation)
}

/// Bound on the steps that hold the blocks of `tokens` tokens.
pub(crate) fn max_steps(specialisation: &Specialisation, tokens: usize) -> usize {
    let blocks = step_keys(specialisation) / GROUP_KEYS;
    tokens.div_ceil(blocks * specialisation.block_size).max(1).next_multiple_of(PART_STEPS)
}

/// Memory for the scores of `ctas` CTAs and tiles of at most `max_steps` steps: of a row and step the sums of its blocks and their maximum.
pub(crate) fn scores_bytes(specialisation: &Specialisation, ctas: usize, max_steps: usize) -> usize {
    if specialisation.few_keys {
        return 0;
    }
    let words = step_keys(specialisation) / GROUP_KEYS + 1;
    ctas * slots(specialisation) * tile_rows(specialisation) * words * max_steps * size_of::<f32>()
}

/// True if those who choose for tiles of so many steps make masks of blocks, too: of several heads that have few, and always of few keys.
pub(crate) fn makes_masks(specialisation: &Specialisation, max_steps: usize) -> bool {
    specialisation.few_keys || (!specialisation.one_head && max_steps <= PART_STEPS)
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    if specialisation.few_keys {
        return vec![
            ("SMEM_BYTES", smem_bytes(specialisation)),
            ("TILES", FEW_TILES),
            ("WARP_ROWS", WARP_ROWS),
            ("GROUPS", FEW_BLOCKS),
            ("STEP_KEYS", FEW_BLOCKS * GROUP_KEYS),
            ("CTA_ROWS", tile_rows(specialisation)),
            ("THREADS", threads(specialisation)),
        ];
    }
    let memory = if specialisation.one_head {
        "CONSUMER_THREADS / 32 * sizeof(PairMemory)"
    } else {
        "CHOOSERS * sizeof(ChoiceMemory)"
    };
    vec![
        ("SMEM_BYTES", band::smem_bytes(specialisation)),
        (memory, choice_bytes(specialisation)),
        ("SLOTS * CTA_ROWS * (GROUPS + 1) * 4", scores_bytes(specialisation, 1, 1)),
        ("PART_STEPS", PART_STEPS),
        ("STEP_KEYS", step_keys(specialisation)),
        ("CTA_ROWS", tile_rows(specialisation)),
        ("THREADS", threads(specialisation)),
    ]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct BandSelectKernel {
    band: Function<BandSelectParams>,
    threads: usize,
    smem_bytes: usize,
}

impl BandSelectKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        let (threads, smem_bytes) = (threads(specialisation), smem_bytes(specialisation));
        Ok(Self { band: module.function("band")?, threads, smem_bytes })
    }

    /// Writes `out`, `lse` and the lists of all rows: `ctas` CTAs that take one tile after the other. With `overlaps` from the end of the kernel ahead, which
    /// makes the compressed keys and started behind the tables.
    pub(crate) fn launch(&self, stream: &Stream, ctas: usize, overlaps: bool, params: &BandSelectParams) -> Result<()> {
        let (grid, threads, smem_bytes) = ([ctas as u32, 1, 1], self.threads as u32, self.smem_bytes as u32);
        self.band.launch(stream, LaunchDims { grid, threads, smem_bytes, overlaps }, params)
    }
}
