// WHAT   Second half of selected attention: for a tile of 64 query rows of one head, the dense blocks (sink, local, and the
//        rare block for which a row had no slot left) by online softmax, then the gathered partials merged by their
//        log2-sum-exp; writes out and the natural-log lse. A row without a key gets 0 and -inf.
// GRID   (tiles of the chunk, query heads of the launch).
// ROLES  One warpgroup. The accumulators of the dense part are in the layout of the partials, which stream through registers.
// SMEM   query tile, key tile, value tile of at most 64 keys; log2-sum-exps of the tile's partials [64, slots], which become weights.
// SYNC   cp.async groups alternate keys, values: the next keys load under softmax and second product, the next
//        values under the next first product. Barriers around each product; the merge needs none.
#include "block/sequence.cuh"
#include "block/softmax.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzled_tile.cuh"

constexpr int STEP_KEYS = BLOCK_SIZE < 64 ? BLOCK_SIZE : 64;
constexpr int KEY_STEPS = BLOCK_SIZE / STEP_KEYS;
constexpr int MAX_DENSE = 7;        // bits of RowInfo
constexpr int REDUCE_CTAS = HEAD_DIM <= 128 ? 3 : 2;
typedef SwizzledTile<TILE_ROWS> QueryTile;
typedef SwizzledTile<STEP_KEYS> KeyTile;

struct TileState {
    Piece out[PIECES];
    RowState low, high;
};

// What all dense steps share.
struct DenseContext {
    u32 query_tile, key_tile, value_tile;
    Tile tile;
    int kv_head;
    int row_low;            // of the tile; the other row is row_low + 8
    RowInfo info_low, info_high;
};

// Adds the NaN and infinite elements of visible value rows, which clean_rows removed from the tile.
FSA_DEVICE void add_nonfinite(Piece (&out)[PIECES], const Tensor& value, int kv_head, i64 first_row, int keys, int limit_low, int limit_high) {
    FSA_NO_UNROLL for (int key = 0; key < keys; ++key) {
        const char* row = tensor_row(value, first_row + key, kv_head);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            const u32 word = *(const u32*)(row + (8 * i + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            const f32 lo = unpack_lo(bad), hi = unpack_hi(bad);
            Piece& acc = out[8 * i / PIECE_COLUMNS];
            const int e = i % (PIECE_COLUMNS / 8) * 4;
            if (key <= limit_low) { acc[e] += lo; acc[e + 1] += hi; }
            if (key <= limit_high) { acc[e + 2] += lo; acc[e + 3] += hi; }
        }
    }
}

// Step `n` of a list of dense blocks: its first key inside the sequence.
FSA_DEVICE int step_key(const i32* ids, int n) { return ids[n / KEY_STEPS] * BLOCK_SIZE + n % KEY_STEPS * STEP_KEYS; }

// Online softmax over `steps` steps of the listed blocks. `listed(block number in the list, row info)` says whether a row takes part.
template <typename F>
FSA_DEVICE void dense_blocks(TileState& state, const ReduceParams& p, const DenseContext& c, const i32* ids, int steps, F listed) {
    auto copy_step = [&](u32 tile, const Tensor& source, int n) {
        if (n < steps) {
            const int key = step_key(ids, n);
            copy_rows<STEP_KEYS>(tile, source, c.kv_head, c.tile.kv_row + key, c.tile.kv_len - key);
        }
        copy_commit();
    };
    copy_step(c.key_tile, p.key, 0);
    copy_step(c.value_tile, p.value, 0);
    FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
        const int key = step_key(ids, n);
        const int limit_low = listed(n / KEY_STEPS, c.info_low) ? c.tile.position + c.row_low - key : -1;
        const int limit_high = listed(n / KEY_STEPS, c.info_high) ? c.tile.position + c.row_low + 8 - key : -1;
        copy_wait<1>();
        fence_async_proxy();
        __syncthreads();
        f32 s[STEP_KEYS / 2];
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<STEP_KEYS>::shared_shared<0, 0>(s, over_columns<TILE_ROWS>(c.query_tile, k), over_columns<STEP_KEYS>(c.key_tile, k), k != 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(s);
        __syncthreads();
        copy_step(c.key_tile, p.key, n + 1);
        f32 carry_low, carry_high;
        if (__all_sync(0xffffffffu, min_i(limit_low, limit_high) >= STEP_KEYS - 1)) {     // no row of the warp has a mask
            carry_low = softmax_step<STEP_KEYS, false, false>(s, state.low, p.scale_log2, false, limit_low);
            carry_high = softmax_step<STEP_KEYS, true, false>(s, state.high, p.scale_log2, false, limit_high);
        } else {
            carry_low = softmax_step<STEP_KEYS, false, true>(s, state.low, p.scale_log2, false, limit_low);
            carry_high = softmax_step<STEP_KEYS, true, true>(s, state.high, p.scale_log2, false, limit_high);
        }
        u32 a[STEP_KEYS / 16][4];
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
        copy_wait<1>();
        const bool dirty = clean_rows<STEP_KEYS>(c.value_tile);
        fence_async_proxy();
        const bool any_dirty = __syncthreads_or(dirty);
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
            scale_piece(state.out[piece], carry_low, carry_high);
            wgmma_pin(state.out[piece]);
            wgmma_fence();
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k)
                Wgmma<PIECE_COLUMNS>::registers_shared<1>(state.out[piece], a[k], over_rows<STEP_KEYS>(c.value_tile, k, piece * PIECE_COLUMNS), 1);
            wgmma_commit();
        }
        wgmma_wait<0>();
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) wgmma_pin(state.out[piece]);
        if (any_dirty) add_nonfinite(state.out, p.value, c.kv_head, c.tile.kv_row + key, min_i(STEP_KEYS, c.tile.kv_len - key), limit_low, limit_high);
        __syncthreads();
        copy_step(c.value_tile, p.value, n + 1);
    }
}

// Steps of a list of ascending blocks: whole blocks, and of the last one what the tile's last row can see.
FSA_DEVICE int count_steps(const i32* ids, int count, int last_position) {
    if (count == 0) return 0;
    return (count - 1) * KEY_STEPS + min_i(KEY_STEPS, (last_position - ids[count - 1] * BLOCK_SIZE) / STEP_KEYS + 1);
}

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
FSA_DEVICE void load_partial(Vec4 (&v)[HEAD_DIM / 32], const char* row, bool present) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        v[group] = Vec4{0, 0, 0, 0};
        if (present) v[group] = load_global_once(row + group * 64 + (threadIdx.x & 3) * 16);
    }
}

// Slots whose partials are in flight at a time: as many as there are registers for.
constexpr int SLOTS_AHEAD = HEAD_DIM <= 128 ? 2 : 1;

// Adds all partials of the thread's two rows; a warp runs as long as its longest row.
FSA_DEVICE void merge_partials(Piece (&out)[PIECES], const char* low, const char* high, int count_low, int count_high, const f32* weights_low,
                               const f32* weights_high) {
    const int count = __reduce_max_sync(0xffffffffu, max_i(count_low, count_high));
    FSA_NO_UNROLL for (int slot = 0; slot < count; slot += SLOTS_AHEAD) {
        Vec4 v[2 * SLOTS_AHEAD][HEAD_DIM / 32];
        FSA_UNROLL for (int a = 0; a < SLOTS_AHEAD; ++a) {
            load_partial(v[2 * a], low + (slot + a) * ROW_BYTES, slot + a < count_low);
            load_partial(v[2 * a + 1], high + (slot + a) * ROW_BYTES, slot + a < count_high);
        }
        FSA_UNROLL for (int a = 0; a < SLOTS_AHEAD; ++a) {
            merge_partial<false>(out, v[2 * a], slot + a < count_low ? weights_low[slot + a] : 0.0f);
            merge_partial<true>(out, v[2 * a + 1], slot + a < count_high ? weights_high[slot + a] : 0.0f);
        }
    }
}

// Rows whose id found no slot: their blocks one at a time, lowest first. Rare.
FSA_DEVICE void spilled_blocks(TileState& state, const ReduceParams& p, const DenseContext& c, i32* ids, i32* next) {
    const int last_position = c.tile.position + c.tile.rows - 1;
    int done = -1;
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) *next = 0x7fffffff;
        __syncthreads();
        if (c.info_low.spilled() > done) atomicMin(next, c.info_low.spilled());
        if (c.info_high.spilled() > done) atomicMin(next, c.info_high.spilled());
        __syncthreads();
        done = *next;
        if (done == 0x7fffffff) return;
        if (threadIdx.x == 0) ids[0] = done;
        __syncthreads();
        dense_blocks(state, p, c, ids, count_steps(ids, 1, last_position), [&](int, RowInfo info) { return info.spilled() == done; });
    }
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, REDUCE_CTAS) reduce(const __grid_constant__ ReduceParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ i32 dense_ids[MAX_DENSE + 1], dense_bits[MAX_DENSE];
    __shared__ i32 next_spilled;
    __shared__ u32 warp_info[4];
    let_next_start();
    const Index& index = p.index;
    const int tile_number = p.chunk * p.layout.chunk_tiles + blockIdx.x;
    DenseContext c;
    c.tile.rows = 0;
    if (tile_number < p.layout.max_tiles) c.tile = p.layout.tiles[tile_number];
    if (c.tile.rows == 0) {
        wait_for_previous();
        return;
    }
    const int head = p.first_head + blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    c.kv_head = head / p.group_size;
    c.row_low = warp * 16 + lane / 4;
    const int low = c.row_low, high = low + 8;
    c.query_tile = shared_address(shared);
    c.key_tile = c.query_tile + QueryTile::BYTES;
    c.value_tile = c.key_tile + KeyTile::BYTES;
    f32* lse = (f32*)(shared + QueryTile::BYTES + 2 * KeyTile::BYTES);
    const i64 chunk_row = (i64)blockIdx.y * p.layout.chunk_tiles * TILE_ROWS + c.tile.token - p.layout.chunk_token[p.chunk];

    copy_rows<TILE_ROWS>(c.query_tile, p.query, head, c.tile.token, c.tile.rows);
    const u32* row_info = index.row_info + (i64)c.kv_head * p.layout.total_q + c.tile.token;
    c.info_low.word = low < c.tile.rows ? row_info[low] : 0;
    c.info_high.word = high < c.tile.rows ? row_info[high] : 0;
    const u32 any = __reduce_or_sync(0xffffffffu, c.info_low.word | c.info_high.word);
    if (lane == 0) warp_info[warp] = any;
    __syncthreads();
    const u32 all = warp_info[0] | warp_info[1] | warp_info[2] | warp_info[3];
    const DenseRule rule = dense_rule(c.tile, 1);
    if (threadIdx.x < MAX_DENSE && (all >> threadIdx.x & 1)) {
        const int slot = __popc(all & ((1u << threadIdx.x) - 1));
        dense_ids[slot] = threadIdx.x == 0 ? 0 : rule.first_local + threadIdx.x - 1;
        dense_bits[slot] = threadIdx.x;
    }
    __syncthreads();

    TileState state;
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
        FSA_UNROLL for (int i = 0; i < PIECE_COLUMNS / 2; ++i) state.out[piece][i] = 0.0f;
    state.low = state.high = {neg_inf(), 0.0f};
    const int steps = count_steps(dense_ids, __popc(all & 0x7f), c.tile.position + c.tile.rows - 1);
    dense_blocks(state, p, c, dense_ids, steps, [&](int n, RowInfo info) { return info.lists_dense(dense_bits[n]); });
    if (all >> RowInfo::SPILLED_SHIFT != 0) spilled_blocks(state, p, c, dense_ids, &next_spilled);
    const int partials_low = c.info_low.partials(), partials_high = c.info_high.partials();
    wait_for_previous();
    // A quad copies the log2-sum-exps of its own rows.
    auto copy_lse = [&](int row, int count) {
        for (int slot = lane & 3; slot < count; slot += 4)
            copy_async4(shared_address(lse + row * index.slots + slot), p.partial_lse + (chunk_row + row) * index.slots + slot);
    };
    copy_lse(low, partials_low);
    copy_lse(high, partials_high);
    copy_commit();
    copy_wait<0>();
    __syncwarp();

    const MergeRow row_low = merge_weights(state.low, lse + low * index.slots, partials_low);
    const MergeRow row_high = merge_weights(state.high, lse + high * index.slots, partials_high);
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) scale_piece(state.out[piece], row_low.dense_weight, row_high.dense_weight);
    __syncwarp();
    const char* partials = (const char*)p.partial + chunk_row * index.slots * ROW_BYTES;
    merge_partials(state.out, partials + low * index.slots * ROW_BYTES, partials + high * index.slots * ROW_BYTES, partials_low, partials_high,
                   lse + low * index.slots, lse + high * index.slots);

    char* out = (char*)tensor_row(p.out, c.tile.token, head);
    const i64 out_row_bytes = p.out.row_stride * ELEMENT_BYTES;
    const f32 scale_low = row_low.sum == 0.0f ? 0.0f : reciprocal_fast(row_low.sum), scale_high = row_high.sum == 0.0f ? 0.0f : reciprocal_fast(row_high.sum);
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
        store_natural<false>(out + low * out_row_bytes, piece, state.out[piece], scale_low, low < c.tile.rows);
        store_natural<true>(out + high * out_row_bytes, piece, state.out[piece], scale_high, high < c.tile.rows);
    }
    if ((lane & 3) == 0) {
        f32* out_lse = p.lse + (i64)head * p.layout.total_q + c.tile.token;
        if (low < c.tile.rows) out_lse[low] = (row_low.reference + log2_fast(row_low.sum)) * LN_2;
        if (high < c.tile.rows) out_lse[high] = (row_high.reference + log2_fast(row_high.sum)) * LN_2;
    }
}
