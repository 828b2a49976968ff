//! Floating-point operations and least bytes of every stage, from shapes alone.

use super::PlanInput;
use crate::batch::Sequence;
use crate::stage::Stage;
use serde::Serialize;

/// Operations and least bytes of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Cost {
    /// Multiplications and additions of the forward's products.
    pub forward_flops: f64,
    /// The same of the backward: five products per pair where the forward has two.
    pub backward_flops: f64,
    /// Bytes of the forward when every input is read once and every output written once.
    pub forward_bytes: usize,
    /// The same of the backward.
    pub backward_bytes: usize,
}

impl Cost {
    /// Sum of two costs.
    pub fn plus(self, other: Self) -> Self {
        Self {
            forward_flops: self.forward_flops + other.forward_flops,
            backward_flops: self.backward_flops + other.backward_flops,
            forward_bytes: self.forward_bytes + other.forward_bytes,
            backward_bytes: self.backward_bytes + other.backward_bytes,
        }
    }
}

/// Number of (row, key) pairs that one head of `stage` computes for `sequence`. For `selected` this is
/// exact for selections made by stage `select`, which list `min(topk, own block + 1)` blocks, the own
/// one among them when `local_blocks >= 1`.
pub fn pairs(stage: Stage, sequence: &Sequence, config: &crate::NsaConfig) -> f64 {
    let positions = sequence.first_position..sequence.first_position + sequence.query_len();
    let visible = |position: usize| -> usize {
        match stage {
            Stage::Dense => position + 1,
            Stage::Window => (position + 1).min(config.window_size + 1),
            Stage::Compressed => visible_windows(position, config.kernel_size, config.kernel_stride),
            Stage::Selected => {
                let own = position / config.block_size;
                config.topk.min(own + 1).saturating_sub(1) * config.block_size + position % config.block_size + 1
            }
            _ => 0,
        }
    };
    positions.map(|position| visible(position) as f64).sum()
}

/// Number of compressed keys whose whole window lies at or before `position`.
pub(crate) fn visible_windows(position: usize, kernel_size: usize, kernel_stride: usize) -> usize {
    if position + 1 < kernel_size { 0 } else { (position + 1 - kernel_size) / kernel_stride + 1 }
}

/// Cost of an attention stage.
pub(super) fn attention_cost(stage: Stage, input: &PlanInput<'_>) -> Cost {
    let shape = &input.shape;
    let (d, dv) = (shape.head_dim as f64, shape.value_dim as f64);
    let all: f64 = input.batch.sequences().iter().map(|s| pairs(stage, s, input.config)).sum();
    let all = all * shape.num_q_heads as f64;
    let keys = match stage {
        Stage::Compressed => input.batch.total_compressed(input.config.kernel_size, input.config.kernel_stride),
        _ => shape.total_keys,
    };
    let size = shape.dtype.size_bytes();
    let query = shape.total_q * shape.num_q_heads * shape.head_dim * size;
    let out = shape.total_q * shape.num_q_heads * shape.value_dim * size;
    let key_value = keys * shape.num_kv_heads * (shape.head_dim + shape.value_dim) * size;
    let lse = shape.total_q * shape.num_q_heads * 4;
    Cost {
        forward_flops: all * 2.0 * (d + dv),
        backward_flops: all * 2.0 * (3.0 * d + 2.0 * dv),
        forward_bytes: query + key_value + out + lse,
        backward_bytes: 2 * query + 2 * key_value + 2 * out + lse,
    }
}

/// Cost of compressing keys and values.
pub(super) fn compress_cost(input: &PlanInput<'_>) -> Cost {
    let shape = &input.shape;
    let windows = input.batch.total_compressed(input.config.kernel_size, input.config.kernel_stride);
    let (d, dv) = (shape.head_dim, shape.value_dim);
    let per_window = if input.linear_compression { d * d + dv * dv } else { d + dv };
    let flops = 2.0 * (windows * shape.num_kv_heads * input.config.kernel_size) as f64 * per_window as f64;
    let bytes = (shape.total_keys + windows) * shape.num_kv_heads * (d + dv) * shape.dtype.size_bytes();
    Cost { forward_flops: flops, backward_flops: 2.0 * flops, forward_bytes: bytes, backward_bytes: 2 * bytes }
}

/// Cost of the block scores: one weighted sum per compressed probability.
pub(super) fn select_cost(input: &PlanInput<'_>) -> Cost {
    let config = input.config;
    let all: f64 = input.batch.sequences().iter().map(|s| pairs(Stage::Compressed, s, config)).sum();
    let weights = ((config.block_size + config.kernel_size) / config.kernel_stride - 1) as f64;
    let weights = weights * config.kernel_stride as f64 / config.block_size as f64;
    let forward_flops = 2.0 * weights * all * input.shape.num_q_heads as f64;
    let forward_bytes = input.shape.num_kv_heads * input.shape.total_q * config.topk * 4;
    Cost { forward_flops, forward_bytes, ..Cost::default() }
}

/// Cost of the inverse index: the selection is read twice and one entry per pair is written.
pub(super) fn index_cost(input: &PlanInput<'_>) -> Cost {
    let entries = input.shape.num_kv_heads * input.shape.total_q * input.config.topk * 4;
    Cost { forward_bytes: 2 * entries, backward_bytes: 2 * entries, ..Cost::default() }
}

/// Cost of a stage that touches every element once.
pub(super) fn elementwise_cost(stage: Stage, input: &PlanInput<'_>) -> Cost {
    let shape = &input.shape;
    let size = shape.dtype.size_bytes();
    let out = shape.total_q * shape.num_q_heads * shape.value_dim;
    let rotated = (shape.total_q * shape.num_q_heads + shape.total_keys * shape.num_kv_heads) * shape.head_dim;
    let (flops, backward, elements) = match stage {
        Stage::Combine => (6 * out, 12 * out, 4 * out),
        _ => (3 * rotated, 3 * rotated, 2 * rotated),
    };
    let bytes = elements * size;
    Cost {
        forward_flops: flops as f64,
        backward_flops: backward as f64,
        forward_bytes: bytes,
        backward_bytes: 2 * bytes,
    }
}

/// Bytes that the forward keeps for the backward.
pub(super) fn saved_bytes(input: &PlanInput<'_>) -> usize {
    let (shape, config) = (&input.shape, input.config);
    let size = shape.dtype.size_bytes();
    let (query, kv) = (shape.total_q * shape.num_q_heads, shape.num_kv_heads);
    let rotated = if input.rope { (query + shape.total_keys * kv) * shape.head_dim * size } else { 0 };
    let windows = input.batch.total_compressed(config.kernel_size, config.kernel_stride);
    let compressed = windows * kv * (shape.head_dim + shape.value_dim) * size;
    let branches = 3 * query * (shape.value_dim * size + 4);
    rotated + compressed + branches + kv * shape.total_q * config.topk * 4
}
