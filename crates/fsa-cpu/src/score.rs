//! Block scores out of the same pass that computes compressed attention.
//!
//! The score of a block is a fixed weighted sum of compressed probabilities. A work item keeps, per row and
//! block, that sum of the *unnormalised* probabilities of the tiles seen so far; when the running
//! maximum of a row grows, its sums are multiplied by the same correction as its accumulators. At the end
//! the sums of the heads of a group are divided by their denominators and added. No score matrix exists,
//! only `rows of one tile x blocks`.

use crate::attend::RowState;
use crate::rows::scratch;
use crate::simd::{Isa, add, scale, sum_windows};
use fsa_core::{NsaConfig, ScoreHeads};
use std::ops::Range;

/// Unnormalised block scores of the rows of a work item.
#[derive(Debug, Default)]
pub(crate) struct BlockScores {
    /// `[rows, blocks]`.
    sums: Vec<f32>,
    /// Blocks that any row of the item can see.
    blocks: usize,
    /// Compressed keys per block: `block_size / kernel_stride`.
    steps: usize,
    /// Compressed keys before a block that overlap it: `kernel_size / kernel_stride - 1`.
    reach: usize,
    /// Moving sums of one row of probabilities.
    moving: Vec<f32>,
    /// Scores of one token over its group.
    total: Vec<f32>,
}

impl BlockScores {
    /// Starts a work item of `rows` rows whose last position is `last`.
    pub(crate) fn start(&mut self, config: &NsaConfig, rows: usize, last: usize) {
        self.blocks = last / config.block_size + 1;
        self.steps = config.block_size / config.kernel_stride;
        self.reach = config.kernel_size / config.kernel_stride - 1;
        scratch(&mut self.sums, rows * self.blocks).fill(0.0);
    }

    /// Adds the probabilities `[rows, columns]` of the compressed keys from `first_key` on.
    ///
    /// With `u[i] = sum over n of p[i - n]`, the score of block j is the sum of `u` over the `steps`
    /// compressed keys from `j * steps` on.
    pub(crate) fn add_strip(
        &mut self,
        isa: Isa,
        rows: Range<usize>,
        correction: &[f32],
        probabilities: &[f32],
        first_key: usize,
        columns: usize,
    ) {
        let (blocks, steps, reach) = (self.blocks, self.steps, self.reach);
        let touched = (first_key / steps).min(blocks);
        // Blocks before this tile were touched by earlier tiles; so may be the `reach` last keys' own.
        let scaled = ((first_key + reach) / steps + 1).min(blocks);
        let moving = scratch(&mut self.moving, columns + reach);
        for (r, row) in rows.enumerate() {
            let sums = &mut self.sums[row * blocks..(row + 1) * blocks];
            if correction[r] != 1.0 {
                scale(isa, &mut sums[..scaled], correction[r]);
            }
            let p = &probabilities[r * columns..(r + 1) * columns];
            sum_windows(isa, moving, p, reach, first_key % steps, steps, &mut sums[touched..]);
        }
    }

    /// Scores of one token: over all heads of its group, or of the first head only.
    pub(crate) fn token(
        &mut self,
        isa: Isa,
        state: &RowState,
        token: usize,
        group: usize,
        heads: ScoreHeads,
    ) -> &[f32] {
        let blocks = self.blocks;
        let total = scratch(&mut self.total, blocks);
        total.fill(0.0);
        let voters = match heads {
            ScoreHeads::GroupSum => group,
            ScoreHeads::FirstHead => 1,
        };
        for row in token * group..token * group + voters {
            let denominator = state.denominator[row];
            if denominator > 0.0 {
                add(isa, total, &self.sums[row * blocks..(row + 1) * blocks], 1.0 / denominator);
            }
        }
        total
    }
}
