// Blocks that a whole tile of query rows meets: online softmax over steps of keys, masked by what each row lists and by its position.
// The two products of a step are the caller's `Products`, so that every set of kernels can have its own:
//   STEP_KEYS, scores(s, query_tile, key_tile), add_values(out, probabilities as A fragments, value_tile),
//   and arrived(), which makes copies that have arrived visible to the products.
#pragma once
#include "block/sequence.cuh"
#include "block/softmax.cuh"
#include "ptx/thread.cuh"
#include "tile/warp_rows.cuh"

struct TileState {
    Piece out[PIECES];
    RowState low, high;
};

// What all dense steps share, in shared memory: sums and scores leave no registers for what is used once per step.
struct DenseContext {
    u32 query_tile, key_tile, value_tile;
    Tile tile;
    int head, kv_head;
    u32 infos[TILE_ROWS];   // RowInfo of the tile's rows

    // Row of the tile; the thread's other row is 8 more.
    static FSA_DEVICE int row_low() {
        const int thread = thread_number();
        return thread / 32 * 16 + (thread & 31) / 4;
    }
    FSA_DEVICE RowInfo info_low() const { return {infos[row_low()]}; }
    FSA_DEVICE RowInfo info_high() const { return {infos[row_low() + 8]}; }
    // Last key after `key` that the thread's first row sees.
    FSA_DEVICE int limit(int key) const { return tile.position + row_low() - key; }
};

// Adds the NaN and infinite elements of visible value rows, which clean_tile removed from the tile: there, a probability of zero
// times NaN would be NaN for rows that do not see them.
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

// Softmax of one step's scores for both rows of the thread, and what was summed before scaled to match. Keys beyond a row's
// limit do not count.
template <int N>
FSA_DEVICE void dense_softmax(f32 (&s)[N / 2], TileState& state, f32 scale_log2, int limit_low, int limit_high) {
    f32 carry_low, carry_high;
    if (__all_sync(0xffffffffu, min_i(limit_low, limit_high) >= N - 1)) {     // no row of the warp has a mask
        carry_low = softmax_step<N, false, false>(s, state.low, scale_log2, false, limit_low);
        carry_high = softmax_step<N, true, false>(s, state.high, scale_log2, false, limit_high);
    } else {
        carry_low = softmax_step<N, false, true>(s, state.low, scale_log2, false, limit_low);
        carry_high = softmax_step<N, true, true>(s, state.high, scale_log2, false, limit_high);
    }
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) scale_piece(state.out[piece], carry_low, carry_high);
}

// Online softmax over `steps` steps, whose first keys inside the sequence are listed in shared memory. `listed(step, row info)` says whether
// a row takes part.
template <typename Products, typename F>
FSA_DEVICE void dense_blocks(TileState& state, const ReduceParams& p, const DenseContext& c, const i32* step_keys, int steps, F listed) {
    constexpr int KEYS = Products::STEP_KEYS;
    auto copy_step = [&](u32 tile, const Tensor& source, int n) {
        if (n < steps) {
            const int key = step_keys[n];
            copy_tile<KEYS>(tile, source, c.kv_head, c.tile.kv_row + key, c.tile.kv_len - key);
        }
        copy_commit();
    };
    copy_step(c.key_tile, p.key, 0);
    copy_step(c.value_tile, p.value, 0);
    FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
        const int key = step_keys[n];
        const int limit_low = listed(n, c.info_low()) ? c.limit(key) : -1;
        const int limit_high = listed(n, c.info_high()) ? c.limit(key) + 8 : -1;
        copy_wait<1>();
        Products::arrived();
        __syncthreads();
        f32 s[KEYS / 2];
        Products::scores(s, c.query_tile, c.key_tile);
        __syncthreads();
        copy_step(c.key_tile, p.key, n + 1);
        dense_softmax<KEYS>(s, state, p.scale_log2, limit_low, limit_high);
        u32 a[KEYS / 16][4];
        FSA_UNROLL for (int k = 0; k < KEYS / 16; ++k) to_fragment<KEYS>(a[k], s, k);
        copy_wait<1>();
        const bool dirty = clean_tile<KEYS>(c.value_tile);
        Products::arrived();
        const bool any_dirty = __syncthreads_or(dirty);
        Products::add_values(state.out, a, c.value_tile);
        if (any_dirty) add_nonfinite(state.out, p.value, c.kv_head, c.tile.kv_row + key, min_i(KEYS, c.tile.kv_len - key), limit_low, limit_high);
        __syncthreads();
        copy_step(c.value_tile, p.value, n + 1);
    }
}

// The steps of a tile's dense blocks, in shared memory.
template <int KEYS>
struct DenseSteps {
    static constexpr int KEY_STEPS = BLOCK_SIZE / KEYS, MAX_DENSE = 7;      // bits of RowInfo
    i32 keys[MAX_DENSE * KEY_STEPS], bits[MAX_DENSE * KEY_STEPS];
    u32 warp_info[WARPGROUP / 32];
    i32 next_spilled;

    FSA_DEVICE void add_block(int number, int id, int bit) {
        FSA_UNROLL for (int i = 0; i < KEY_STEPS; ++i) {
            keys[number * KEY_STEPS + i] = id * BLOCK_SIZE + i * KEYS;
            bits[number * KEY_STEPS + i] = bit;
        }
    }
    // Lists the blocks that the tile's rows list, ascending; returns the words of all rows in one. Every thread brings those of its rows.
    FSA_DEVICE u32 fill(const Tile& tile, u32 info) {
        const u32 any = __reduce_or_sync(0xffffffffu, info);
        if ((threadIdx.x & 31) == 0) warp_info[threadIdx.x / 32] = any;
        __syncthreads();
        const u32 all = warp_info[0] | warp_info[1] | warp_info[2] | warp_info[3];
        const int bit = threadIdx.x;
        if (bit < MAX_DENSE && (all >> bit & 1)) add_block(__popc(all & ((1u << bit) - 1)), bit == 0 ? 0 : dense_rule(tile, 1).first_local + bit - 1, bit);
        __syncthreads();
        return all;
    }
    // Steps of the first `blocks` blocks: all of each, and of the last what the tile's last row can see.
    FSA_DEVICE int count(const Tile& tile, int blocks) const {
        if (blocks == 0) return 0;
        const int last_block = (blocks - 1) * KEY_STEPS;
        return last_block + min_i(KEY_STEPS, (tile.position + tile.rows - 1 - keys[last_block]) / KEYS + 1);
    }
};

// Rows whose id found no slot: their blocks one at a time, lowest first. Rare.
template <typename Products>
FSA_DEVICE void spilled_blocks(TileState& state, const ReduceParams& p, const DenseContext& c, DenseSteps<Products::STEP_KEYS>& steps) {
    int done = -1;
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) steps.next_spilled = 0x7fffffff;
        __syncthreads();
        if (c.info_low().spilled() > done) atomicMin(&steps.next_spilled, c.info_low().spilled());
        if (c.info_high().spilled() > done) atomicMin(&steps.next_spilled, c.info_high().spilled());
        __syncthreads();
        done = steps.next_spilled;
        if (done == 0x7fffffff) return;
        if (threadIdx.x == 0) steps.add_block(0, done, 0);
        __syncthreads();
        dense_blocks<Products>(state, p, c, steps.keys, steps.count(c.tile, 1), [&](int, RowInfo info) { return info.spilled() == done; });
    }
}
