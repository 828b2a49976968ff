//! Stage `select`: scores of blocks from the compressed keys, and their running top-k.
//!
//! Kernel files: `kernels/select_sm90.cuh`, `kernels/select_sm80.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{SelectParams, TILE_ROWS};
use crate::plan::{MAX_CTA_SMEM_BYTES, RowTiles, tile_bytes};
use crate::source::Specialisation;
use serde::Serialize;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("select", "SelectParams")];

/// Threads of a portable CTA, and on Hopper: some warpgroups score 64 rows each, another brings in what they need.
const WARPGROUP: usize = 128;
const CONSUMERS: usize = 3;
const HOPPER_THREADS: usize = (CONSUMERS + 1) * WARPGROUP;
/// Keys of a portable step, and the row of their probabilities in shared memory.
const STEP_KEYS: usize = 64;
const STEP_PITCH: usize = STEP_KEYS + 4;
/// What a CTA can have on devices of 100 KB.
const PORTABLE_BYTES: usize = 95 << 10;
/// Scores that a portable CTA keeps of all its tokens, if a step does not need more.
const KEPT_SCORES: usize = 2048;
/// On Hopper: stages of keys; keys whose sum is kept; buffers of these sums, and words between their rows.
const STAGES: usize = 2;
pub(crate) const GROUP_KEYS: usize = 4;
const SUM_BUFFERS: usize = 2;
const PAD: usize = 8;
/// On Hopper: places for the best blocks of a row; a token's candidates for them and what belongs to them.
const MAX_PLACES: usize = 24;
const CANDIDATE_BYTES: usize = 16 + 32 * size_of::<u64>();
/// On Hopper: scores of a token that are read at a time, and of a segment.
const CHUNK: usize = 32;
const MAX_SEGMENT: usize = 512;
/// Compressed keys of a block on Hopper, at most: no more than a step has.
const HOPPER_STEPS: usize = 64;

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
    /// Those of them that are not forced.
    pub places: usize,
    /// On Hopper, heads and groups of keys are added up in registers.
    pub direct: bool,
    /// On Hopper, steps of keys whose blocks' scores have room; 0 where blocks are offered step by step.
    pub segment_steps: usize,
}

impl Scoring {
    /// True if the kernel for Hopper takes these windows with `heads` voting heads, which share a tile.
    pub(crate) fn suits_hopper(&self, heads: usize) -> bool {
        let blocks = self.steps.is_multiple_of(GROUP_KEYS) && self.steps <= HOPPER_STEPS;
        self.reach <= 1 && blocks && self.places <= MAX_PLACES && heads <= 2 * TILE_ROWS
    }

    /// True if the kernel for Hopper adds up the groups and `heads` rows of a block in registers.
    pub(crate) fn is_direct(&self, heads: usize) -> bool {
        self.steps == GROUP_KEYS && matches!(heads, 1 | 2 | 4 | 8)
    }

    /// True if the kernel for Hopper collects the scores of many steps where `heads` vote: it has few tokens then, and few scores per step.
    pub(crate) fn has_segments(&self, heads: usize) -> bool {
        self.is_direct(heads) && heads > 1
    }
}

/// Rows of a tile.
pub(crate) fn tile_rows(specialisation: &Specialisation) -> usize {
    match specialisation.set {
        KernelSet::Sm80 => TILE_ROWS,
        KernelSet::Sm90 => CONSUMERS * TILE_ROWS,
    }
}

/// Keys of a step on Hopper.
fn hopper_step_keys(specialisation: &Specialisation) -> usize {
    if specialisation.head_dim <= 128 { 128 } else { 64 }
}

/// What a CTA on Hopper takes besides what it has per token: queries, keys, candidates of a row without work.
fn hopper_smem_bytes(specialisation: &Specialisation) -> usize {
    let (rows, keys) = (tile_rows(specialisation), hopper_step_keys(specialisation));
    tile_bytes(rows, specialisation.head_dim) + STAGES * tile_bytes(keys, specialisation.head_dim) + CANDIDATE_BYTES
}

/// Its sums, where they do not stay in registers.
fn hopper_sum_bytes(specialisation: &Specialisation) -> usize {
    let words = hopper_step_keys(specialisation) / GROUP_KEYS + PAD;
    SUM_BUFFERS * tile_rows(specialisation) * words * size_of::<f32>()
}

/// Shared memory of a CTA. Portable: keys, probabilities of a step, scores of the blocks that are not complete, lists.
pub(crate) fn smem_bytes(specialisation: &Specialisation, scoring: &Scoring) -> usize {
    let Scoring { tile_tokens, steps, reach, topk, segment_steps, .. } = *scoring;
    let word = size_of::<f32>();
    if specialisation.set == KernelSet::Sm90 {
        let blocks = segment_steps * hopper_step_keys(specialisation) / GROUP_KEYS;
        let segment = if segment_steps == 0 { 0 } else { (blocks.next_multiple_of(CHUNK) + PAD) * word };
        let sums = if scoring.direct { 0 } else { hopper_sum_bytes(specialisation) };
        return hopper_smem_bytes(specialisation) + tile_tokens * (CANDIDATE_BYTES + segment) + sums;
    }
    let open = (STEP_KEYS - 1 + reach) / steps + 2;
    let kept = (1 << (KEPT_SCORES / tile_tokens).max(1).ilog2()).max(open.next_power_of_two());
    let keys = tile_bytes(STEP_KEYS, specialisation.head_dim);
    keys + TILE_ROWS * STEP_PITCH * word + tile_tokens * (kept + 1) * word + tile_tokens * topk * 2 * word
}

/// `scoring` for tiles of at most its tokens and segments of at least its steps, if there are some, such that shared memory is at most
/// `most`; with one token if there is no such number.
pub(crate) fn fitting(specialisation: &Specialisation, scoring: &Scoring, most: usize) -> Scoring {
    let halves = std::iter::successors(Some(scoring.tile_tokens), |tokens| (*tokens > 1).then(|| tokens / 2));
    let mut all = halves.map(|tile_tokens| Scoring { tile_tokens, ..*scoring });
    let fits = |scoring: &Scoring| smem_bytes(specialisation, scoring) <= most;
    let fitting = all.find(fits).unwrap_or(Scoring { tile_tokens: 1, ..*scoring });
    if specialisation.set == KernelSet::Sm80 || fitting.segment_steps == 0 {
        return fitting;
    }
    let longest = MAX_SEGMENT * GROUP_KEYS / hopper_step_keys(specialisation);
    let longer = (1..=longest).rev().map(|segment_steps| Scoring { segment_steps, ..fitting });
    longer.into_iter().find(fits).unwrap_or(fitting)
}

/// Shared memory for the windows of the default configuration and groups of one head on the smallest devices that take the set.
pub(crate) fn usual_smem_bytes(specialisation: &Specialisation, topk: usize) -> usize {
    let steps = (specialisation.block_size / 16).max(1);
    let tile_tokens = tile_rows(specialisation);
    let scoring = Scoring { tile_tokens, steps, reach: 1, topk, places: topk, segment_steps: 0, direct: false };
    let most = if specialisation.set == KernelSet::Sm80 { PORTABLE_BYTES } else { MAX_CTA_SMEM_BYTES };
    smem_bytes(specialisation, &fitting(specialisation, &scoring, most))
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
            ("MAX_PLACES", MAX_PLACES),
            ("sizeof(Candidates)", CANDIDATE_BYTES),
            ("MAX_SEGMENT", MAX_SEGMENT),
            ("SEGMENT_PAD", PAD),
            ("SUM_BUFFERS * SUM_WORDS * 4", hopper_sum_bytes(specialisation)),
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
