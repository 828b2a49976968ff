// Partials of a tile's rows, weighted by their log2-sum-exps and added to what the dense blocks gave, and the rows written out.
#pragma once
#include "block/branch_rows.cuh"
#include "block/dense_blocks.cuh"

// Slots whose partials are under way at once: 16 loads per thread, and fewer where the sums take most registers.
constexpr int MERGE_SLOTS = HEAD_DIM <= 128 ? 2 : 1;

// Turns a row's log2-sum-exps into weights, in place and not normalised.
struct MergeRow {
    f32 dense_weight, sum, reference;
};
FSA_DEVICE MergeRow merge_weights(const RowState& state, f32* lse, int count) {
    const int t = threadIdx.x & 3;
    f32 max = state.max;
    FSA_NO_UNROLL for (int slot = t; slot < count; slot += 4) max = fmaxf(max, lse[slot]);
    max = quad_max(max);
    MergeRow row;
    row.reference = max == neg_inf() ? 0.0f : max;
    row.dense_weight = exp2_fast(state.max - row.reference);
    f32 sum = state.sum * row.dense_weight;
    FSA_NO_UNROLL for (int slot = t; slot < count; slot += 4) {
        lse[slot] = exp2_fast(lse[slot] - row.reference);
        sum += lse[slot];
    }
    row.sum = quad_sum(sum);
    return row;
}

template <bool HIGH>
FSA_DEVICE void merge_partial(Piece (&out)[PIECES], const Vec4 (&v)[HEAD_DIM / 32], f32 weight) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        Piece& acc = out[group / PIECE_GROUPS];
        const int first = group % PIECE_GROUPS * 16 + (HIGH ? 2 : 0);
        const u32 word[4] = {v[group].x, v[group].y, v[group].z, v[group].w};
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            acc[first + 4 * j] = fmaf(weight, unpack_lo(word[j]), acc[first + 4 * j]);
            acc[first + 4 * j + 1] = fmaf(weight, unpack_hi(word[j]), acc[first + 4 * j + 1]);
        }
    }
}

// One of the thread's two rows: its partials and their weights.
struct PartialRow {
    const char* partials;
    const f32* weights;
    int count;
};

// Adds all partials of the thread's two rows, MERGE_SLOTS slots at a time; a warp runs as long as its longest row.
FSA_DEVICE void merge_partials(Piece (&out)[PIECES], const PartialRow& low, const PartialRow& high) {
    const int count = __reduce_max_sync(0xffffffffu, max_i(low.count, high.count));
    FSA_NO_UNROLL for (int first = 0; first < count; first += MERGE_SLOTS) {
        Vec4 v[MERGE_SLOTS][2][HEAD_DIM / 32];
        FSA_UNROLL for (int i = 0; i < MERGE_SLOTS; ++i) {
            load_row(v[i][0], low.partials + (first + i) * ROW_BYTES, first + i < low.count);
            load_row(v[i][1], high.partials + (first + i) * ROW_BYTES, first + i < high.count);
        }
        FSA_UNROLL for (int i = 0; i < MERGE_SLOTS; ++i) {
            merge_partial<false>(out, v[i][0], first + i < low.count ? low.weights[first + i] : 0.0f);
            merge_partial<true>(out, v[i][1], first + i < high.count ? high.weights[first + i] : 0.0f);
        }
    }
}

// The tile's first row in the partials.
FSA_DEVICE i64 first_partial_row(const ReduceParams& p, const DenseContext& c) {
    return (i64)blockIdx.y * p.layout.chunk_tiles * TILE_ROWS + c.tile.token - p.layout.chunk_token[p.chunk];
}
// Starts the copies of the log2-sum-exps of a row's partials, by the quad that uses them.
FSA_DEVICE void copy_lse(f32* lse, const ReduceParams& p, const DenseContext& c, int row, int count) {
    const i64 first = first_partial_row(p, c) * p.index.slots;
    for (int slot = row * p.index.slots + (threadIdx.x & 3), end = row * p.index.slots + count; slot < end; slot += 4)
        copy_async4(shared_address(lse + slot), p.partial_lse + first + slot);
}

// Adds the partials of the tile's rows and writes out and the natural-log lse. `lse` are the tile's log2-sum-exps [64, slots]
// in shared memory.
FSA_DEVICE void merge_tile(TileState& state, const ReduceParams& p, const DenseContext& c, f32* lse) {
    const int slots = p.index.slots, low = c.row_low(), high = low + 8, rows = c.tile.rows;
    const char* partials = (const char*)p.partial + first_partial_row(p, c) * slots * ROW_BYTES;
    const PartialRow partials_low = {partials + low * slots * ROW_BYTES, lse + low * slots, c.info_low().partials()};
    const PartialRow partials_high = {partials + high * slots * ROW_BYTES, lse + high * slots, c.info_high().partials()};
    const MergeRow row_low = merge_weights(state.low, lse + low * slots, partials_low.count);
    const MergeRow row_high = merge_weights(state.high, lse + high * slots, partials_high.count);
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) scale_piece(state.out[piece], row_low.dense_weight, row_high.dense_weight);
    __syncwarp();
    merge_partials(state.out, partials_low, partials_high);

    auto finish = [&](int row, f32 sum) { return row < rows ? branch_row(p.out, p.branch, c.tile.token + row, c.head, sum) : no_row(); };
    store_branch(p.branch, finish(low, row_low.sum), finish(high, row_high.sum), state.out);
    if (p.lse != nullptr && (threadIdx.x & 3) == 0) {
        f32* out_lse = p.lse + (i64)c.head * p.layout.total_q + c.tile.token;
        if (low < rows) out_lse[low] = (row_low.reference + log2_fast(row_low.sum)) * LN_2;
        if (high < rows) out_lse[high] = (row_high.reference + log2_fast(row_high.sum)) * LN_2;
    }
}
