//! Stage `select`: scores of blocks from the compressed keys, and their running top-k.
//!
//! Kernel files: `kernels/select_sm90.cuh`, `kernels/select_sm80.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{SelectParams, TILE_ROWS};
use crate::plan::{RowTiles, tile_bytes};
use crate::source::Specialisation;
use serde::Serialize;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("select", "SelectParams")];

/// Threads of a portable CTA, and on Hopper: two warpgroups score, a third brings in what they need.
const WARPGROUP: usize = 128;
const HOPPER_THREADS: usize = 3 * WARPGROUP;
/// Keys of a portable step, and the row of their probabilities in shared memory.
const STEP_KEYS: usize = 64;
const STEP_PITCH: usize = STEP_KEYS + 4;
/// What a CTA can have on devices of 100 KB.
const PORTABLE_BYTES: usize = 95 << 10;
/// Scores that a portable CTA keeps of all its tokens, if a step does not need more.
const KEPT_SCORES: usize = 2048;
/// On Hopper: stages of keys; keys whose sum is kept; buffers of these sums, and words between their rows.
const STAGES: usize = 2;
const GROUP_KEYS: usize = 4;
const SUM_BUFFERS: usize = 2;
const SUM_PAD: usize = 2;

/// What the shared memory of a CTA depends on besides the specialisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Scoring {
    /// Tokens of a tile.
    pub tile_tokens: usize,
    /// Compressed keys that start in a block.
    pub steps: usize,
    /// Compressed keys before a block that reach into it.
    pub reach: usize,
    /// Blocks that a row lists.
    pub topk: usize,
}

impl Scoring {
    /// True if the kernel for Hopper takes these windows with `heads` voting heads, which share a tile.
    pub(crate) fn suits_hopper(&self, heads: usize) -> bool {
        self.reach <= 1 && self.steps.is_multiple_of(GROUP_KEYS) && heads <= 2 * TILE_ROWS
    }
}

/// Rows of a tile.
pub(crate) fn tile_rows(specialisation: &Specialisation) -> usize {
    match specialisation.set {
        KernelSet::Sm80 => TILE_ROWS,
        KernelSet::Sm90 => 2 * TILE_ROWS,
    }
}

/// Keys of a step on Hopper.
fn hopper_step_keys(specialisation: &Specialisation) -> usize {
    if specialisation.head_dim <= 128 { 128 } else { 64 }
}

/// What a CTA on Hopper takes besides the lists: queries, keys, sums.
fn hopper_smem_bytes(specialisation: &Specialisation) -> usize {
    let (rows, keys) = (tile_rows(specialisation), hopper_step_keys(specialisation));
    let sums = SUM_BUFFERS * rows * (keys / GROUP_KEYS + SUM_PAD) * size_of::<f32>();
    tile_bytes(rows, specialisation.head_dim) + STAGES * tile_bytes(keys, specialisation.head_dim) + sums
}

/// Shared memory of a CTA. Portable: keys, probabilities of a step, scores of the blocks that are not complete, lists.
pub(crate) fn smem_bytes(specialisation: &Specialisation, scoring: &Scoring) -> usize {
    let Scoring { tile_tokens, steps, reach, topk } = *scoring;
    let word = size_of::<f32>();
    if specialisation.set == KernelSet::Sm90 {
        return hopper_smem_bytes(specialisation) + tile_tokens * (2 * topk + 2) * word;
    }
    let open = (STEP_KEYS - 1 + reach) / steps + 2;
    let kept = (1 << (KEPT_SCORES / tile_tokens).max(1).ilog2()).max(open.next_power_of_two());
    let keys = tile_bytes(STEP_KEYS, specialisation.head_dim);
    keys + TILE_ROWS * STEP_PITCH * word + tile_tokens * (kept + 1) * word + tile_tokens * topk * 2 * word
}

/// Tokens of a tile, at most those of `scoring`, whose shared memory is at most `most`; 1 if there is no such number.
pub(crate) fn fitting(specialisation: &Specialisation, scoring: &Scoring, most: usize) -> usize {
    let halves = std::iter::successors(Some(scoring.tile_tokens), |tokens| (*tokens > 1).then(|| tokens / 2));
    let fits =
        |tile_tokens: &usize| smem_bytes(specialisation, &Scoring { tile_tokens: *tile_tokens, ..*scoring }) <= most;
    halves.into_iter().find(fits).unwrap_or(1)
}

/// Shared memory for the windows of the default configuration and groups of one head; portable, where it is to fit the smallest
/// devices.
pub(crate) fn usual_smem_bytes(specialisation: &Specialisation, topk: usize) -> usize {
    let steps = (specialisation.block_size / 16).max(1);
    let scoring = Scoring { tile_tokens: tile_rows(specialisation), steps, reach: 1, topk };
    let most = if specialisation.set == KernelSet::Sm80 { PORTABLE_BYTES } else { usize::MAX };
    let tile_tokens = fitting(specialisation, &scoring, most);
    smem_bytes(specialisation, &Scoring { tile_tokens, ..scoring })
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    match specialisation.set {
        KernelSet::Sm80 => vec![
            ("STEP_KEYS", STEP_KEYS),
            ("KEY_WORDS", STEP_PITCH),
            ("SCORE_WORDS", KEPT_SCORES),
            ("WARPGROUP", WARPGROUP),
            ("KeyTile::BYTES", tile_bytes(STEP_KEYS, specialisation.head_dim)),
        ],
        KernelSet::Sm90 => vec![
            ("SMEM_BYTES", hopper_smem_bytes(specialisation)),
            ("STEP_KEYS", hopper_step_keys(specialisation)),
            ("CTA_ROWS", tile_rows(specialisation)),
            ("THREADS", HOPPER_THREADS),
        ],
    }
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct SelectKernel {
    select: Function<SelectParams>,
    set: KernelSet,
}

impl SelectKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { select: module.function("select")?, set: specialisation.set })
    }

    /// Writes the lists of all rows. On Hopper, CTAs that take one tile after the other, as many as run at a time.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        tiles: &RowTiles,
        (smem_bytes, multiprocessors): (usize, usize),
        params: &SelectParams,
    ) -> Result<()> {
        let heads = params.num_kv_heads as usize;
        let (grid, threads) = match self.set {
            KernelSet::Sm80 => ([tiles.num_tiles as u32, heads as u32, 1], WARPGROUP),
            KernelSet::Sm90 => ([(tiles.num_tiles * heads).min(multiprocessors) as u32, 1, 1], HOPPER_THREADS),
        };
        let (threads, smem_bytes) = (threads as u32, smem_bytes as u32);
        self.select.launch(stream, LaunchDims { grid, threads, smem_bytes, overlaps: false }, params)
    }
}
