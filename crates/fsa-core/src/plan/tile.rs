//! Tile choices of the CPU backend and the workspace that follows from them.
//!
//! Tiles depend on shapes only, never on the number of threads, so that results do not either.

use super::cost::{attention_cost, compress_cost, elementwise_cost, index_cost, select_cost};
use super::{PlanInput, Region, StagePlan};
use crate::stage::Stage;

/// Rows are padded to this many f32: one 512-bit register, two of 256 bits, four of 128.
pub const VECTOR: usize = 16;

/// Keys of a tile where no block size prescribes them: keys and values of 64 elements then take
/// 16 KiB each, which stay in the first-level cache together.
pub const KEYS_PER_TILE: usize = 64;

/// Query rows whose scores are alive at a time: 48 x 64 scores take 12 KiB, and 48 is a multiple of
/// the six rows of a register tile.
pub const STRIP_ROWS: usize = 48;

/// Query rows (tokens times heads of a group) of a query-major work item: a packed tile of keys and
/// values is used by this many rows, so packing costs a few percent, and 64 KiB of f32 rows and as
/// much of accumulators stay in the second-level cache.
pub const TILE_ROWS: usize = 256;

/// Windows of a work item of the compression.
pub const COMPRESS_WINDOWS: usize = 128;

/// Parts into which the tiles of keys of a backward are dealt.
pub const BACKWARD_PARTS: usize = 8;

/// Query rows of a chunk in the backward and least rows of one in selected attention.
pub const CHUNK_ROWS: usize = 2048;

/// Memory for the branch outputs of the whole operation when no state is kept for a backward: the
/// rows are then taken in slabs of this many bytes.
pub const SLAB_BYTES: usize = 64 << 20;

/// Rows of a slab of the whole operation without saved state.
pub fn slab_rows(num_q_heads: usize, value_dim: usize, element_bytes: usize) -> usize {
    (SLAB_BYTES / (3 * num_q_heads * (value_dim * element_bytes + 4)).max(1)).max(1)
}

/// Length of a row after padding.
pub const fn padded(dim: usize) -> usize {
    dim.next_multiple_of(VECTOR)
}

/// Tile of a query-major work item (dense, window, compressed).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryTile {
    /// Tokens of a work item; rows are tokens times `gqa_group_size`.
    pub tokens: usize,
    /// Keys of a tile.
    pub keys: usize,
}

/// Tile of dense, window and compressed attention.
pub fn query_tile(gqa_group_size: usize) -> QueryTile {
    QueryTile { tokens: (TILE_ROWS / gqa_group_size).max(1), keys: KEYS_PER_TILE }
}

/// Tile of compressed attention that also scores blocks. The scores of a work item, one f32 per row
/// and block, stay within 4 MiB down to a tile of one token.
pub fn select_tile(gqa_group_size: usize, num_blocks: usize) -> QueryTile {
    const SCORE_BYTES: usize = 4 << 20;
    let plain = query_tile(gqa_group_size);
    let fitting = SCORE_BYTES / (gqa_group_size * num_blocks.max(1) * 4);
    QueryTile { tokens: plain.tokens.min(fitting).max(1), ..plain }
}

/// Tile of selected attention: a chunk of tokens is attended by every block that any of them chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectedTile {
    /// Tokens of a work item.
    pub tokens: usize,
    /// Keys of a tile: the block size.
    pub keys: usize,
}

/// Tile of selected attention. A chunk is as long as it takes for a random selection to bring 256 rows
/// to an average block, within 2,048 and 8,192 rows, whose accumulators stay in the third-level cache. At
/// 32K tokens and the defaults 256 rows give 145 GFLOP/s, 128 give 135 and 64 give 115: packing a block
/// costs as much as attending to it with some ten rows.
pub fn selected_tile(gqa_group_size: usize, num_blocks: usize, topk: usize, block_size: usize) -> SelectedTile {
    let rows = (256 * num_blocks / topk.max(1)).clamp(CHUNK_ROWS, 4 * CHUNK_ROWS);
    SelectedTile { tokens: (rows / gqa_group_size).max(1), keys: block_size }
}

/// Tile of a KV-major backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackwardTile {
    /// Tokens of a chunk.
    pub tokens: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Parts into which the tiles of keys are dealt; each sums its own gradient of the query, and
    /// the parts are added in order. A fixed number, so that threads do not change the sums.
    pub parts: usize,
}

/// Tile of the backward of every attention stage.
pub fn backward_tile(gqa_group_size: usize, keys: usize) -> BackwardTile {
    BackwardTile { tokens: (CHUNK_ROWS / gqa_group_size).max(1), keys, parts: BACKWARD_PARTS }
}

fn f32s(count: usize) -> usize {
    count * 4
}

/// Tiles of packed keys and values, scores of a strip and rows of a work item.
fn forward_regions(input: &PlanInput<'_>, rows: usize, keys: usize, items: usize) -> Vec<Region> {
    let (d, dv) = (padded(input.shape.head_dim), padded(input.shape.value_dim));
    let copies = input.workers.min(items.max(1));
    vec![
        Region { name: "packed keys and values", bytes: f32s(keys * (d + dv)), copies },
        Region { name: "query rows and accumulators", bytes: f32s(rows * (d + dv + 2)), copies },
        Region { name: "scores of a strip", bytes: f32s(STRIP_ROWS * (2 * keys.max(d) + dv)), copies },
    ]
}

fn backward_regions(input: &PlanInput<'_>, keys: usize, total_keys: usize) -> Vec<Region> {
    let (d, dv) = (padded(input.shape.head_dim), padded(input.shape.value_dim));
    let tile = backward_tile(input.shape.gqa_group_size(), keys);
    let rows = tile.tokens * input.shape.gqa_group_size();
    let units = input.workers.div_ceil(tile.parts);
    let sums = input.shape.total_q * input.shape.num_q_heads * input.shape.head_dim;
    vec![
        Region { name: "packed keys and values", bytes: f32s(2 * keys * (d + dv)), copies: tile.parts * units },
        Region { name: "query and gradient rows", bytes: f32s(rows * (d + dv + 2)), copies: units },
        Region { name: "parts of the query gradient", bytes: f32s(rows * d), copies: tile.parts * units },
        Region { name: "key and value gradients of a head", bytes: f32s(total_keys * (d + dv)), copies: units },
        Region { name: "query gradient", bytes: f32s(sums), copies: 1 },
    ]
}

fn tiles_of(input: &PlanInput<'_>, tokens: usize) -> usize {
    let per_head: usize = input.batch.sequences().iter().map(|s| s.query_len().div_ceil(tokens)).sum();
    per_head * input.shape.num_kv_heads
}

/// Plan of dense, window or compressed attention.
pub(super) fn query_tile_plan(stage: Stage, input: &PlanInput<'_>) -> StagePlan {
    let group = input.shape.gqa_group_size();
    let tile = query_tile(group);
    let items = tiles_of(input, tile.tokens);
    let total_keys = match stage {
        Stage::Compressed => input.batch.total_compressed(input.config.kernel_size, input.config.kernel_stride),
        _ => input.batch.max_kv_len(),
    };
    StagePlan {
        stage,
        tile: format!("{} tokens x {group} heads against {} keys at a time", tile.tokens, tile.keys),
        work_items: items,
        forward_workspace: forward_regions(input, tile.tokens * group, tile.keys, items),
        backward_workspace: backward_regions(input, tile.keys, total_keys),
        cost: attention_cost(stage, input),
    }
}

/// Plan of the scores and the top-k, which run inside compressed attention.
pub(super) fn select_plan(input: &PlanInput<'_>) -> StagePlan {
    let group = input.shape.gqa_group_size();
    let blocks = input.batch.max_kv_len().div_ceil(input.config.block_size);
    let tile = select_tile(group, blocks);
    let items = tiles_of(input, tile.tokens);
    let mut forward_workspace = forward_regions(input, tile.tokens * group, tile.keys, items);
    forward_workspace.push(Region {
        name: "block scores of a tile",
        bytes: f32s((tile.tokens * group + 1) * blocks),
        copies: input.workers.min(items.max(1)),
    });
    StagePlan {
        stage: Stage::Select,
        tile: format!("inside compressed, {} tokens x {group} heads, {blocks} block scores a row", tile.tokens),
        work_items: items,
        forward_workspace,
        backward_workspace: Vec::new(),
        cost: select_cost(input),
    }
}

/// Plan of the inverse index, which selected attention builds per chunk.
pub(super) fn index_plan(input: &PlanInput<'_>) -> StagePlan {
    let group = input.shape.gqa_group_size();
    let blocks = input.batch.max_kv_len().div_ceil(input.config.block_size);
    let tile = selected_tile(group, blocks, input.config.topk, input.config.block_size);
    let items = tiles_of(input, tile.tokens);
    let copies = input.workers.min(items.max(1));
    StagePlan {
        stage: Stage::Index,
        tile: format!("chunks of {} tokens", tile.tokens),
        work_items: items,
        forward_workspace: vec![
            Region { name: "rows by block", bytes: tile.tokens * input.config.topk * 4, copies },
            Region { name: "offsets", bytes: (blocks + 1) * size_of::<usize>(), copies },
        ],
        backward_workspace: Vec::new(),
        cost: index_cost(input),
    }
}

/// Plan of selected attention.
pub(super) fn selected_plan(input: &PlanInput<'_>) -> StagePlan {
    let group = input.shape.gqa_group_size();
    let blocks = input.batch.max_kv_len().div_ceil(input.config.block_size);
    let tile = selected_tile(group, blocks, input.config.topk, input.config.block_size);
    let items = tiles_of(input, tile.tokens);
    StagePlan {
        stage: Stage::Selected,
        tile: format!(
            "chunks of {} tokens x {group} heads, rows gathered per block of {} keys",
            tile.tokens, tile.keys
        ),
        work_items: items,
        forward_workspace: forward_regions(input, tile.tokens * group, tile.keys, items),
        backward_workspace: backward_regions(input, tile.keys, input.batch.max_kv_len()),
        cost: attention_cost(Stage::Selected, input),
    }
}

/// Plan of the compression of keys and values.
pub(super) fn compress_plan(input: &PlanInput<'_>) -> StagePlan {
    let windows = input.batch.total_compressed(input.config.kernel_size, input.config.kernel_stride);
    let dim = padded(input.shape.head_dim.max(input.shape.value_dim));
    // A weighted sum loads the whole span of its windows; a product loads one place of every window at a
    // time, with the slice of the weight that belongs to it.
    let span = (COMPRESS_WINDOWS - 1) * input.config.kernel_stride + input.config.kernel_size;
    let (rows, weight) = if input.linear_compression { (COMPRESS_WINDOWS, dim * dim) } else { (span, 0) };
    let items = windows.div_ceil(COMPRESS_WINDOWS) * input.shape.num_kv_heads;
    let copies = input.workers.min(items.max(1));
    let regions = |weights: usize| {
        vec![
            Region { name: "window rows and sums", bytes: f32s((rows + COMPRESS_WINDOWS) * dim), copies },
            Region { name: "slice of the weight", bytes: f32s(weights * weight), copies },
        ]
    };
    StagePlan {
        stage: Stage::Compress,
        tile: format!("{COMPRESS_WINDOWS} windows of one head"),
        work_items: items,
        forward_workspace: regions(1),
        // The slice and its transpose.
        backward_workspace: regions(2),
        cost: compress_cost(input),
    }
}

/// Plan of a stage that touches every element once and needs no scratch memory.
pub(super) fn elementwise_plan(stage: Stage, input: &PlanInput<'_>) -> StagePlan {
    StagePlan {
        stage,
        tile: "one row at a time".into(),
        work_items: input.shape.total_q,
        forward_workspace: Vec::new(),
        backward_workspace: Vec::new(),
        cost: elementwise_cost(stage, input),
    }
}
