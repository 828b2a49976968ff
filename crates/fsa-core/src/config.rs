//! Parameters of native sparse attention (NSA, arXiv 2502.11089) with the project's defaults.

use crate::error::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Which query heads of a group vote for the blocks of their kv head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreHeads {
    /// Probabilities are summed over the heads of the group: the NSA definition.
    #[default]
    GroupSum,
    /// Only the first head of the group votes: what the original FSA code does.
    FirstHead,
}

/// What is computed; nothing here depends on data or on a device.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NsaConfig {
    /// Tokens in one compression window (`l`). A multiple of `kernel_stride`.
    pub kernel_size: usize,
    /// Tokens between the starts of neighbouring windows (`s`).
    pub kernel_stride: usize,
    /// Tokens in one selectable block (`B`): 16, 32, 64, 128 or 256, a multiple of `kernel_stride`.
    pub block_size: usize,
    /// Blocks that a row may select (`T`).
    pub topk: usize,
    /// Blocks at the start of a sequence that every row selects.
    pub init_blocks: usize,
    /// Blocks up to and including a row's own that it always selects.
    pub local_blocks: usize,
    /// Earlier keys that the sliding window shows, besides the row's own position.
    pub window_size: usize,
    /// Which heads of a group vote.
    pub score_heads: ScoreHeads,
}

impl Default for NsaConfig {
    fn default() -> Self {
        Self {
            kernel_size: 32,
            kernel_stride: 16,
            block_size: 64,
            topk: 16,
            init_blocks: 1,
            local_blocks: 2,
            window_size: 512,
            score_heads: ScoreHeads::GroupSum,
        }
    }
}

/// Block sizes that the stages support.
pub const BLOCK_SIZES: [usize; 5] = [16, 32, 64, 128, 256];

impl NsaConfig {
    /// Checks every requirement; the error names the field.
    pub fn validate(&self) -> Result<()> {
        let (size, stride, block) = (self.kernel_size, self.kernel_stride, self.block_size);
        ensure(stride > 0, "kernel_stride", || "at least 1".into(), || stride.to_string())?;
        ensure(
            size > 0 && size.is_multiple_of(stride),
            "kernel_size",
            || format!("a positive multiple of kernel_stride {stride}"),
            || size.to_string(),
        )?;
        ensure(
            BLOCK_SIZES.contains(&block),
            "block_size",
            || "one of 16, 32, 64, 128, 256".into(),
            || block.to_string(),
        )?;
        ensure(
            block.is_multiple_of(stride),
            "block_size",
            || format!("a multiple of kernel_stride {stride}"),
            || block.to_string(),
        )?;
        let forced = self.init_blocks.saturating_add(self.local_blocks);
        ensure(
            self.topk > 0 && self.topk >= forced,
            "topk",
            || format!("at least init_blocks + local_blocks = {forced}, and at least 1"),
            || self.topk.to_string(),
        )
    }

    /// Weights with which the compressed keys `block_size / kernel_stride * j - reach + k` count in the
    /// score of block `j`, `k = 0, 1, ..`, with `reach = kernel_size / kernel_stride - 1`.
    ///
    /// For the defaults `[1, 2, 2, 2, 1]`, starting one compressed key before the block: the sum over
    /// m < B/s and n < l/s of the probability at `j * B/s + m - n`.
    pub fn score_weights(&self) -> Vec<f32> {
        let (steps, reach) = (self.block_size / self.kernel_stride, self.kernel_size / self.kernel_stride - 1);
        (0..steps + reach)
            .map(|k| (0..=reach).filter(|n| (reach..reach + steps).contains(&(k + n))).count() as f32)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_json() {
        let config = NsaConfig::default();
        config.validate().expect("defaults");
        let text = serde_json::to_string(&config).expect("serialises");
        assert_eq!(serde_json::from_str::<NsaConfig>(&text).expect("parses"), config);
        assert_eq!(serde_json::from_str::<NsaConfig>("{}").expect("defaults fill in"), config);
        assert!(serde_json::from_str::<NsaConfig>("{\"top_k\": 4}").is_err(), "a misspelt field is not ignored");
    }

    #[test]
    fn each_broken_requirement_names_its_field() {
        let base = NsaConfig::default();
        let broken = [
            (NsaConfig { kernel_stride: 0, ..base.clone() }, "kernel_stride"),
            (NsaConfig { kernel_size: 40, ..base.clone() }, "kernel_size"),
            (NsaConfig { block_size: 48, ..base.clone() }, "block_size"),
            (NsaConfig { kernel_size: 48, kernel_stride: 24, ..base.clone() }, "block_size"),
            (NsaConfig { topk: 2, ..base.clone() }, "topk"),
            (NsaConfig { topk: 0, init_blocks: 0, local_blocks: 0, ..base.clone() }, "topk"),
        ];
        for (config, field) in broken {
            let error = config.validate().expect_err(field);
            assert_eq!(error.argument(), Some(field), "{error}");
        }
    }

    #[test]
    fn score_weights_are_the_overlap_counts() {
        let weights = |kernel_size, kernel_stride, block_size| {
            NsaConfig { kernel_size, kernel_stride, block_size, ..NsaConfig::default() }.score_weights()
        };
        assert_eq!(weights(32, 16, 64), [1.0, 2.0, 2.0, 2.0, 1.0]);
        assert_eq!(weights(16, 16, 64), [1.0; 4]);
        assert_eq!(weights(64, 16, 16), [1.0; 4]);
        assert_eq!(weights(32, 8, 16), [1.0, 2.0, 2.0, 2.0, 1.0]);
    }
}
