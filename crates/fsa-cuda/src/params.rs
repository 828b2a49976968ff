//! Parameter structs and constants that Rust and the kernels share, declared here once.
//! CUDA has the same structs in `kernels/base/params.cuh`; every translation unit asserts sizes and offsets, so a drift of either side does not compile.

mod assertions;
mod declare;

use crate::driver::{Address, KernelParams, MapWords};
pub(crate) use assertions::assertions;
use declare::{Declared, device_structs};

/// Query rows of a tile.
pub(crate) const TILE_ROWS: usize = 64;

device_structs! {
    /// A `[tokens, heads, head_dim]` tensor; strides in elements.
    struct Tensor {
        data: Address,
        row_stride: i64,
        head_stride: i64,
    }

    /// Weights of the branches, three per row or per row and head.
    struct Gates {
        data: Address,
        row_stride: i64,
        head_stride: i64,
    }

    /// What becomes of an attention's rows where it is a branch of the whole; by default it is none.
    struct Branch {
        sum: Tensor,
        gates: Gates,
        number: i32,
        accumulate: i32,
        discards: i32,
    }

    /// One piece of work of a KV-major kernel. Written by the index, read by attend and backward.
    struct Unit {
        kv_row: i32,
        valid_keys: i32,
        first_token: i32,
        block: i32,
        entry_begin: i32,
        entry_count: i32,
        split: i32,
        sums_row: i32,
    }

    /// Up to 64 query rows of one sequence. Written by the index, read by all.
    struct Tile {
        token: i32,
        rows: i32,
        position: i32,
        block_base: i32,
        kv_row: i32,
        kv_len: i32,
        reserved: [i32; 2],
    }

    /// Where the sequences, tiles, blocks and chunks lie; the tables are filled on the device.
    struct Layout {
        cu_seqlens_q: Address,
        cu_seqlens_kv: Address,
        tile_base: Address,
        block_base: Address,
        chunk_token: Address,
        tiles: Address,
        batch: i32,
        total_q: i32,
        num_chunks: i32,
        chunk_tiles: i32,
        max_tiles: i32,
    }

    /// The inverse index: which rows chose a block, per kv head and chunk of query tiles.
    struct Index {
        topk_indices: Address,
        plane: Address,
        entries: Address,
        row_info: Address,
        units: Address,
        unit_counts: Address,
        block_sums: Address,
        split_blocks: Address,
        topk: i32,
        slots: i32,
        has_dense: i32,
        num_subs: i32,
        sub_tiles: i32,
        max_blocks: i32,
        window_blocks: i32,
        unit_entries: i32,
        spare_units: i32,
        full_units: i32,
        ordered: i32,
        packs_sums: i32,
        max_split_blocks: i32,
    }

    /// Parameters of the kernels of `index`.
    struct IndexParams {
        layout: Layout,
        index: Index,
        first_kv_head: i32,
        staged: i32,
    }

    /// Parameters of `attend`.
    struct AttendParams {
        layout: Layout,
        index: Index,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        partial: Address,
        partial_lse: Address,
        scale_log2: f32,
        group_size: i32,
        chunk: i32,
        first_head: i32,
    }

    /// Parameters of `reduce`.
    struct ReduceParams {
        layout: Layout,
        index: Index,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        partial: Address,
        partial_lse: Address,
        lse: Address,
        scale_log2: f32,
        group_size: i32,
        chunk: i32,
        first_head: i32,
        branch: Branch,
        key_map: TensorMap,
        value_map: TensorMap,
    }

    /// What bounds an attention's part of scaled sums of gradients of queries.
    struct SumBounds {
        rows: Address,
        keys: Address,
    }

    /// Keys whose bounds are raised.
    struct SumKeys {
        key: Tensor,
        value: Tensor,
        cu_keys: Address,
        bounds: Address,
    }

    /// Parameters of the kernels of `backward`.
    struct BackwardParams {
        layout: Layout,
        index: Index,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        grad_out: Tensor,
        lse: Address,
        grad_lse: Address,
        row_stats: Address,
        grad_query: Address,
        partial: Address,
        grad_query_out: Tensor,
        grad_key_out: Tensor,
        grad_value_out: Tensor,
        grad_key: Address,
        grad_value: Address,
        row_bounds: Address,
        key_bounds: Address,
        block_bounds: Address,
        sums: [SumBounds; 3],
        sum_rows: i64,
        query_row_bytes: i64,
        query_head_bytes: i64,
        scale_log2: f32,
        scale: f32,
        group_size: i32,
        chunk: i32,
        first_head: i32,
        stats_row: i32,
        stats_head: i32,
        rows: i32,
        first_sums: i32,
        finish_sums: i32,
        first_key: i32,
        end_key: i32,
        given_stats: i32,
        accumulate: i32,
        accumulate_keys: i32,
        in_place: i32,
    }

    /// A `[tokens, heads, head_dim]` tensor as the bulk copy engine sees it; see `TensorMap` in `driver`.
    struct TensorMap {
        words: MapWords,
    }

    /// Which blocks of keys the rows list, and the steps of keys of every tile of rows. Written by `block_mask`, or by those who choose.
    struct BlockMask {
        rows: Address,
        steps: Address,
        step_counts: Address,
        nonfinite: Address,
        words: i32,
        max_steps: i32,
        num_tiles: i32,
        value_groups: i32,
    }

    /// Which keys a row sees in the stages window, compressed and dense, and where rows and keys lie.
    struct Band {
        cu_seqlens_q: Address,
        cu_seqlens_kv: Address,
        cu_keys: Address,
        tile_base: Address,
        key_tile_base: Address,
        batch: i32,
        total_q: i32,
        total_keys: i32,
        kernel_size: i32,
        kernel_stride: i32,
        window: i32,
        group_size: i32,
        tile_heads: i32,
        tile_tokens: i32,
        head_tiles: i32,
        split: i32,
        mask: BlockMask,
    }

    /// Parameters of `block_mask`.
    struct BlockMaskParams {
        band: Band,
        value: Tensor,
        topk_indices: Address,
        topk: i32,
        step_keys: i32,
        window: i32,
    }

    /// What a CTA of `prepare` fills.
    struct BatchTables {
        cu_seqlens_q: Address,
        cu_seqlens_kv: Address,
        cu_compressed: Address,
        tile_base: Address,
        key_tile_base: Address,
        cleared: [Address; 6],
        batch: i32,
        kernel_size: i32,
        kernel_stride: i32,
        tile_tokens: i32,
        tile_keys: i32,
        compressed: i32,
    }

    /// Lists of rows that list all blocks that they see; by default none are wanted.
    struct BlockLists {
        cu_seqlens_q: Address,
        cu_seqlens_kv: Address,
        topk_indices: Address,
        batch: i32,
        total_q: i32,
        num_kv_heads: i32,
        topk: i32,
        block_size: i32,
        first_cta: i32,
    }

    /// Parameters of `prepare`.
    struct PrepareParams {
        tables: [BatchTables; 2],
        lists: BlockLists,
    }

    /// Parameters of `band`.
    struct BandParams {
        band: Band,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Address,
        branch: Branch,
        scale_log2: f32,
        num_tiles: i32,
        num_kv_heads: i32,
        query_map: TensorMap,
        key_map: TensorMap,
        value_map: TensorMap,
    }

    /// Scores of blocks that compressed attention leaves, and what is chosen by them; by default nothing.
    struct BlockChoice {
        scores: Address,
        topk_indices: Address,
        max_steps: i32,
        topk: i32,
        init_blocks: i32,
        local_blocks: i32,
        window: i32,
        mask: BlockMask,
        value: Tensor,
    }

    /// Parameters of `band` where it goes from a window on to the keys before it, and to compressed keys.
    struct BandBothParams {
        attention: BandParams,
        compressed: BandParams,
        out: Tensor,
        lse: Address,
        branch: Branch,
    }

    /// Parameters of `band_pair`.
    struct BandPairParams {
        attention: BandParams,
        out: Tensor,
        lse: Address,
        branch: Branch,
        compressed: Tensor,
        window: i32,
    }

    /// Parameters of `band` where it chooses blocks.
    struct BandSelectParams {
        attention: BandParams,
        choice: BlockChoice,
        out_map: TensorMap,
        sum_map: TensorMap,
    }

    /// Parameters of the kernels of `band_backward`.
    struct BandBackwardParams {
        band: Band,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        grad_out: Tensor,
        lse: Address,
        grad_lse: Address,
        row_stats: Address,
        row_bounds: Address,
        key_bounds: Address,
        sums: [SumBounds; 3],
        other: SumKeys,
        clearing: Address,
        window_stats: Address,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        partial_keys: Address,
        scale_log2: f32,
        scale: f32,
        num_kv_heads: i32,
        num_tiles: i32,
        num_key_tiles: i32,
        splits: i32,
        resident: i32,
        accumulate: i32,
        accumulate_keys: i32,
        window_size: i32,
        query_map: TensorMap,
        grad_out_map: TensorMap,
        key_map: TensorMap,
        value_map: TensorMap,
        sums_map: TensorMap,
    }

    /// Parameters of `select`.
    struct SelectParams {
        band: Band,
        query: Tensor,
        key: Tensor,
        lse: Address,
        topk_indices: Address,
        scale_log2: f32,
        topk: i32,
        init_blocks: i32,
        local_blocks: i32,
        scored_heads: i32,
        num_tiles: i32,
        num_kv_heads: i32,
        segment_steps: i32,
        direct: i32,
        query_map: TensorMap,
        key_map: TensorMap,
    }

    /// An input of `compress`, forward.
    struct CompressParams {
        cu_seqlens_kv: Address,
        cu_compressed: Address,
        input: Tensor,
        out: Tensor,
        weight: Address,
        position: Address,
        partial: Address,
        batch: i32,
        total_compressed: i32,
        num_kv_heads: i32,
        kernel_size: i32,
        kernel_stride: i32,
        pieces: i32,
    }

    /// Parameters of `compress_sum`.
    struct CompressSumParams {
        inputs: [CompressParams; 2],
    }

    /// Parameters of the backward kernels of `compress`.
    struct CompressBackwardParams {
        forward: CompressParams,
        grad_out: Tensor,
        grad_input: Tensor,
        grad_weight: Address,
        grad_position: Address,
        partial: Address,
        pieces: i32,
        accumulate: i32,
    }

    /// Parameters of `rope`.
    struct RopeParams {
        input: Tensor,
        out: Tensor,
        frequencies: Address,
        cu_rows: Address,
        cu_seqlens_kv: Address,
        positions: Address,
        batch: i32,
        rows: i32,
        heads: i32,
        head_dim: i32,
        multiplier: i32,
        inverse: i32,
        row_threads: i32,
    }

    /// Parameters of `combine`.
    struct CombineParams {
        branches: [Tensor; 3],
        out: Tensor,
        gates: Gates,
        rows: i32,
        heads: i32,
    }

    /// Parameters of `combine_backward`.
    struct CombineBackwardParams {
        forward: CombineParams,
        grad_out: Tensor,
        grad_branches: [Tensor; 3],
        grad_gates: Address,
    }

    /// What comes besides statistics of rows before attentions that add to one gradient of queries in memory; by default nothing.
    struct SumsOpening {
        grad_query: Tensor,
        keys: [SumKeys; 2],
        mask: BlockMask,
        topk_indices: Address,
        cu_seqlens_q: Address,
        batch: i32,
        num_kv_heads: i32,
        topk: i32,
        block_size: i32,
        total_q: i32,
        ctas: i32,
        row_cta: i32,
    }

    /// Parameters of `combine_statistics`.
    struct CombineStatisticsParams {
        forward: CombineParams,
        grad_out: Tensor,
        lse: [Address; 3],
        row_stats: [Address; 3],
        row_bounds: [Address; 3],
        grad_gates: Address,
        opening: SumsOpening,
    }
}

/// Size of a [`Unit`] and of a [`Tile`].
pub(crate) const RECORD_BYTES: usize = size_of::<Unit>();

#[cfg(test)]
mod tests;
