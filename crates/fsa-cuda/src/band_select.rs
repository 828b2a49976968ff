//! Stage `compressed` and Stage `select` in one pass: the attention leaves scores of blocks and chooses by them.
//!
//! Kernel file: `kernels/band_select_sm90.cuh`.

use crate::band::{self, step_keys, tile_rows};
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::BandSelectParams;
use crate::select::{GROUP_KEYS, Scoring};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("band", "BandSelectParams")];

/// The warpgroups of the attention and the one that chooses.
const THREADS: usize = 512;
/// Warps that choose, and shared memory of each.
const CHOOSERS: usize = 4;
const CHOICE_BYTES: usize = 13760;
/// Tiles of a CTA whose scores are in memory: one is attended to while blocks of the other are chosen.
const SLOTS: usize = 2;
/// Steps whose scores are read together.
const PART_STEPS: usize = 4;
/// Longest vectors that it takes.
pub(crate) const MAX_HEAD_DIM: usize = 128;

/// True if it takes these windows with groups of `heads`, all of which vote. Of one head there are too many lists to choose beside the
/// attention: two passes are faster.
pub(crate) fn suits(scoring: &Scoring, heads: usize) -> bool {
    scoring.suits_hopper(heads) && scoring.steps == GROUP_KEYS && matches!(heads, 2 | 4 | 8 | 16)
}

/// Shared memory of a CTA.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    band::smem_bytes(specialisation) + CHOOSERS * CHOICE_BYTES
}

/// Bound on the steps that hold the blocks of `tokens` tokens.
pub(crate) fn max_steps(specialisation: &Specialisation, tokens: usize) -> usize {
    let blocks = step_keys(specialisation) / GROUP_KEYS;
    tokens.div_ceil(blocks * specialisation.block_size).max(1).next_multiple_of(PART_STEPS)
}

/// Memory for the scores of `ctas` CTAs and tiles of at most `max_steps` steps: of a row and step the sums of its blocks and their maximum.
pub(crate) fn scores_bytes(specialisation: &Specialisation, ctas: usize, max_steps: usize) -> usize {
    let words = step_keys(specialisation) / GROUP_KEYS + 1;
    ctas * SLOTS * tile_rows(specialisation) * words * max_steps * size_of::<f32>()
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![
        ("SMEM_BYTES", band::smem_bytes(specialisation)),
        ("CHOOSERS * sizeof(ChoiceMemory)", CHOOSERS * CHOICE_BYTES),
        ("SLOTS * CTA_ROWS * (GROUPS + 1) * 4", scores_bytes(specialisation, 1, 1)),
        ("PART_STEPS", PART_STEPS),
        ("STEP_KEYS", step_keys(specialisation)),
        ("CTA_ROWS", tile_rows(specialisation)),
        ("THREADS", THREADS),
    ]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct BandSelectKernel {
    band: Function<BandSelectParams>,
    smem_bytes: usize,
}

impl BandSelectKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { band: module.function("band")?, smem_bytes: smem_bytes(specialisation) })
    }

    /// Writes `out`, `lse` and the lists of all rows: `ctas` CTAs that take one tile after the other.
    pub(crate) fn launch(&self, stream: &Stream, ctas: usize, params: &BandSelectParams) -> Result<()> {
        let (grid, smem_bytes) = ([ctas as u32, 1, 1], self.smem_bytes as u32);
        self.band.launch(stream, LaunchDims { grid, threads: THREADS as u32, smem_bytes, overlaps: false }, params)
    }
}
