// WHAT   Second half of selected attention: for a tile of 64 query rows of one head, the dense blocks (sink, local, and the
//        rare block for which a row had no slot left) by online softmax, then the gathered partials merged by their
//        log2-sum-exp; writes out and the natural-log lse. A row without a key gets 0 and -inf.
// GRID   (tiles of the chunk, query heads of the launch).
// ROLES  One warpgroup. The accumulators of the dense part are in the layout of the partials, which stream through registers.
// SMEM   query tile, key tile, value tile of at most 64 keys; log2-sum-exps of the tile's partials [64, slots], which become weights, with factors if they are packed.
// SYNC   The copy engine brings keys and values, each to an mbarrier: the next keys load under softmax and second product, the next
//        values under the next first product. A barrier after each product, before its tile is written again; the merge needs none.
#include "block/branch_rows.cuh"
#include "block/partial_rows.cuh"
#include "block/sequence.cuh"
#include "block/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/thread.cuh"
#include "ptx/wgmma.cuh"
#include "tile/tile_boxes.cuh"

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

// What all dense steps share. Sums and scores leave few registers: the tile and what its rows list are in shared memory.
struct DenseContext {
    const Tile& tile;
    const u32 (&infos)[TILE_ROWS];      // RowInfo of the tile's rows
    u32 query_tile, key_tile, value_tile;
    u32 barriers;                       // of keys, of values
    u32 parity;                         // of both, at the next step
    int kv_head;

    // Row of the tile; the thread's other row is 8 more.
    static FSA_DEVICE int row_low() {
        const int thread = thread_number();
        return thread / 32 * 16 + (thread & 31) / 4;
    }
    FSA_DEVICE RowInfo info_low() const { return {infos[row_low()]}; }
    FSA_DEVICE RowInfo info_high() const { return {infos[row_low() + 8]}; }
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
FSA_DEVICE void dense_blocks(TileState& state, const ReduceParams& p, DenseContext& c, const i32* ids, int steps, F listed) {
    // What lies behind the sequence comes along: no row sees it, and values are cleaned.
    auto load_keys = [&](int n) {
        if (n >= steps || threadIdx.x != 0) return;
        barrier_expect(c.barriers, KeyTile::BYTES);
        load_tile<STEP_KEYS>(c.key_tile, &p.key_map, c.barriers, c.kv_head, c.tile.kv_row + step_key(ids, n));
    };
    auto load_values = [&](int n) {
        if (n >= steps || threadIdx.x != 0) return;
        barrier_expect(c.barriers + 8, KeyTile::BYTES);
        load_tile<STEP_KEYS>(c.value_tile, &p.value_map, c.barriers + 8, c.kv_head, c.tile.kv_row + step_key(ids, n));
    };
    load_keys(0);
    load_values(0);
    copy_wait<0>();     // the queries
    fence_async_proxy();
    __syncthreads();
    FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
        const int key = step_key(ids, n), limit = c.tile.position + c.row_low() - key;
        const int limit_low = listed(n / KEY_STEPS, c.info_low()) ? limit : -1;
        const int limit_high = listed(n / KEY_STEPS, c.info_high()) ? limit + 8 : -1;
        barrier_wait(c.barriers, c.parity);
        f32 s[STEP_KEYS / 2];
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<STEP_KEYS>::shared_shared<0, 0>(s, over_columns<TILE_ROWS>(c.query_tile, k), over_columns<STEP_KEYS>(c.key_tile, k), k != 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(s);
        __syncthreads();
        load_keys(n + 1);
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
        barrier_wait(c.barriers + 8, c.parity);
        const bool dirty = clean_rows<STEP_KEYS>(c.value_tile);
        if (dirty) fence_async_proxy();
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
        load_values(n + 1);
        c.parity ^= 1;
    }
}

// Steps of a list of ascending blocks: whole blocks, and of the last one what the tile's last row can see.
FSA_DEVICE int count_steps(const i32* ids, int count, int last_position) {
    if (count == 0) return 0;
    return (count - 1) * KEY_STEPS + min_i(KEY_STEPS, (last_position - ids[count - 1] * BLOCK_SIZE) / STEP_KEYS + 1);
}

// What the powers of two of a row are relative to.
FSA_DEVICE f32 reference(const RowState& state) { return state.max == neg_inf() ? 0.0f : state.max; }

// Turns a row's log2-sum-exps into weights, in place, and adds them to its state; returns the factor for what was summed before. The weights of packed
// partials take in their factors; `far` is set if one is not plain.
FSA_DEVICE f32 merge_weights(RowState& state, f32* lse, int count, bool& far) {
    const int t = threadIdx.x & 3;
    const f32 before = state.max;
    FSA_NO_UNROLL for (int slot = t; slot < count; slot += 4) state.max = fmaxf(state.max, lse[slot * PARTIAL_NUMBERS]);
    state.max = quad_max(state.max);
    const f32 zero = reference(state), carry = exp2_fast(before - zero);
    state.sum *= carry;
    FSA_NO_UNROLL for (int slot = t; slot < count; slot += 4) {
        f32& weight = lse[slot * PARTIAL_NUMBERS];
        weight = exp2_fast(weight - zero);
        state.sum += weight;
        if (PACKS_PARTIALS) {
            const f32 factor = lse[slot * PARTIAL_NUMBERS + 1];
            weight *= fabsf(factor);
            far |= is_far(factor);
        }
    }
    return carry;
}

// Slots whose partials are in flight at a time: as many as there are registers for.
constexpr int SLOTS_AHEAD = HEAD_DIM > 128 ? 1 : PACKS_PARTIALS ? 3 : 2;

// Adds all partials of the thread's two rows; a warp runs as long as its longest row.
FSA_DEVICE void merge_partials(Piece (&out)[PIECES], const char* low, const char* high, int count_low, int count_high, const f32* weights_low,
                               const f32* weights_high) {
    const int count = __reduce_max_sync(0xffffffffu, max_i(count_low, count_high));
    low += (threadIdx.x & 3) * 16;
    high += (threadIdx.x & 3) * 16;
    FSA_NO_UNROLL for (int slot = 0; slot < count; slot += SLOTS_AHEAD) {
        keep(low);
        keep(high);
        PartialRow v[2 * SLOTS_AHEAD];
        FSA_UNROLL for (int a = 0; a < SLOTS_AHEAD; ++a) {
            load_partial(v[2 * a], low + a * PARTIAL_BYTES, slot + a < count_low);
            load_partial(v[2 * a + 1], high + a * PARTIAL_BYTES, slot + a < count_high);
        }
        low += SLOTS_AHEAD * PARTIAL_BYTES;
        high += SLOTS_AHEAD * PARTIAL_BYTES;
        FSA_UNROLL for (int a = 0; a < SLOTS_AHEAD; ++a) {
            merge_partial<false>(out, v[2 * a], slot + a < count_low ? weights_low[(slot + a) * PARTIAL_NUMBERS] : 0.0f);
            merge_partial<true>(out, v[2 * a + 1], slot + a < count_high ? weights_high[(slot + a) * PARTIAL_NUMBERS] : 0.0f);
        }
    }
}

// The same where a row of the warp has a packed partial that is not plain. Rare.
FSA_DEVICE void merge_far_partials(Piece (&out)[PIECES], const char* low, const char* high, int count_low, int count_high, const f32* weights_low,
                                   const f32* weights_high) {
    const int count = max_i(count_low, count_high), offset = (threadIdx.x & 3) * 16;
    const auto weight_of = [](const f32* numbers) { return is_far(numbers[PARTIAL_NUMBERS - 1]) ? numbers[0] : numbers[0] * 0x1p-126f; };
    FSA_NO_UNROLL for (int slot = 0; slot < count; ++slot) {
        PartialRow v;
        if (slot < count_low) {
            load_partial(v, low + slot * PARTIAL_BYTES + offset, true);
            merge_far<false>(out, v, weight_of(weights_low + slot * PARTIAL_NUMBERS));
        }
        if (slot < count_high) {
            load_partial(v, high + slot * PARTIAL_BYTES + offset, true);
            merge_far<true>(out, v, weight_of(weights_high + slot * PARTIAL_NUMBERS));
        }
    }
}

// Adds the partials of the tile's rows, which start at row `chunk_row` of the buffer. `lse` has room for [64, slots] log-sum-exps, and factors.
FSA_DEVICE void merge(TileState& state, const ReduceParams& p, const DenseContext& c, f32* lse, i64 chunk_row) {
    const int slots = p.index.slots, low = c.row_low(), high = low + 8;
    const int count_low = c.info_low().partials(), count_high = c.info_high().partials();
    f32 *lse_low = lse + low * slots * PARTIAL_NUMBERS, *lse_high = lse + high * slots * PARTIAL_NUMBERS;
    // A quad copies the log2-sum-exps of its own rows.
    auto copy_lse = [&](f32* to, int row, int count) {
        const i64 first = (chunk_row + row) * slots;
        FSA_NO_UNROLL for (int slot = threadIdx.x & 3; slot < count; slot += 4) {
            const u32 at = shared_address(to + slot * PARTIAL_NUMBERS);
            const f32* from = p.partial_lse + (first + slot) * PARTIAL_NUMBERS;
            if (PACKS_PARTIALS) copy_async8(at, from); else copy_async4(at, from);
        }
    };
    copy_lse(lse_low, low, count_low);
    copy_lse(lse_high, high, count_high);
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    bool far = false;
    const f32 carry_low = merge_weights(state.low, lse_low, count_low, far), carry_high = merge_weights(state.high, lse_high, count_high, far);
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) scale_piece(state.out[piece], carry_low, carry_high);
    __syncwarp();
    const char* partials_low = (const char*)p.partial + (chunk_row + low) * slots * PARTIAL_BYTES;
    const char* partials_high = partials_low + 8 * slots * PARTIAL_BYTES;
    if (PACKS_PARTIALS && __any_sync(0xffffffffu, far))
        merge_far_partials(state.out, partials_low, partials_high, count_low, count_high, lse_low, lse_high);
    else
        merge_partials(state.out, partials_low, partials_high, count_low, count_high, lse_low, lse_high);
}

// Rows whose id found no slot: their blocks one at a time, lowest first. Rare.
FSA_DEVICE void spilled_blocks(TileState& state, const ReduceParams& p, DenseContext& c, i32* ids, i32* next) {
    const int last_position = c.tile.position + c.tile.rows - 1;
    int done = -1;
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) *next = 0x7fffffff;
        __syncthreads();
        if (c.info_low().spilled() > done) atomicMin(next, c.info_low().spilled());
        if (c.info_high().spilled() > done) atomicMin(next, c.info_high().spilled());
        __syncthreads();
        done = *next;
        if (done == 0x7fffffff) return;
        if (threadIdx.x == 0) ids[0] = done;
        __syncthreads();
        dense_blocks(state, p, c, ids, count_steps(ids, 1, last_position), [&](int, RowInfo info) { return info.spilled() == done; });
    }
}

// Writes the thread's rows and their natural-log lse.
FSA_DEVICE void store_rows(const TileState& state, const ReduceParams& p, const Tile& tile) {
    const int head = p.first_head + blockIdx.y, low = DenseContext::row_low();
    auto finish = [&](int row, const RowState& sums) -> BranchRow {
        const f32 sum = quad_sum(sums.sum);
        if (row >= tile.rows) return no_row();
        const i64 token = tile.token + row;
        if (p.lse != nullptr && (threadIdx.x & 3) == 0) p.lse[(i64)head * p.layout.total_q + token] = (reference(sums) + log2_fast(sum)) * LN_2;
        return branch_row(p.out, p.branch, token, head, sum);
    };
    store_branch(p.branch, finish(low, state.low), finish(low + 8, state.high), state.out);
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, REDUCE_CTAS) reduce(const __grid_constant__ ReduceParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ i32 dense_ids[MAX_DENSE + 1], dense_bits[MAX_DENSE];
    __shared__ i32 next_spilled;
    __shared__ u32 warp_info[4], infos[TILE_ROWS];
    __shared__ u64 barriers[2];
    __shared__ Tile tile;
    let_next_start();
    const Index& index = p.index;
    const int tile_number = p.chunk * p.layout.chunk_tiles + blockIdx.x;
    const Tile own = tile_number < p.layout.max_tiles ? p.layout.tiles[tile_number] : Tile{};
    if (own.rows == 0) {
        wait_for_previous();
        return;
    }
    const int head = p.first_head + blockIdx.y, thread = threadIdx.x;
    const u32 query_tile = shared_address(shared), key_tile = query_tile + QueryTile::BYTES;
    DenseContext c = {tile, infos, query_tile, key_tile, key_tile + KeyTile::BYTES, shared_address(barriers), 0, head / p.group_size};

    copy_rows<TILE_ROWS>(c.query_tile, p.query, head, own.token, own.rows);
    copy_commit();
    const u32 info = thread < own.rows ? index.row_info[(i64)c.kv_head * p.layout.total_q + own.token + thread] : 0;
    if (thread < TILE_ROWS) infos[thread] = info;
    const u32 any = __reduce_or_sync(0xffffffffu, info);
    if (thread % 32 == 0) warp_info[thread / 32] = any;
    if (thread == 0) {
        tile = own;
        barrier_init(c.barriers, 1);
        barrier_init(c.barriers + 8, 1);
        barriers_ready();
    }
    __syncthreads();
    const u32 all = warp_info[0] | warp_info[1];        // two warps have the rows
    if (thread < MAX_DENSE && (all >> thread & 1)) {
        const int slot = __popc(all & ((1u << thread) - 1));
        dense_ids[slot] = thread == 0 ? 0 : dense_rule(own, 1).first_local + thread - 1;
        dense_bits[slot] = thread;
    }
    __syncthreads();

    TileState state;
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
        FSA_UNROLL for (int i = 0; i < PIECE_COLUMNS / 2; ++i) state.out[piece][i] = 0.0f;
    state.low = state.high = {neg_inf(), 0.0f};
    const int steps = count_steps(dense_ids, __popc(all & 0x7f), own.position + own.rows - 1);
    dense_blocks(state, p, c, dense_ids, steps, [&](int n, RowInfo info) { return info.lists_dense(dense_bits[n]); });
    if (all >> RowInfo::SPILLED_SHIFT != 0) spilled_blocks(state, p, c, dense_ids, &next_spilled);
    wait_for_previous();
    const i64 chunk_row = (i64)blockIdx.y * p.layout.chunk_tiles * TILE_ROWS + tile.token - p.layout.chunk_token[p.chunk];
    merge(state, p, c, (f32*)(shared + QueryTile::BYTES + 2 * KeyTile::BYTES), chunk_row);
    store_rows(state, p, tile);
}
