// What the Hopper kernels share that walk the rows of a tile of 128 keys for grad_key and grad_value: which rows a cta meets and in which order, the ring of
// tiles of rows with what is known of every row, and how the sums leave. Two warpgroups consume, 64 keys each; a third brings the rows.
#pragma once
#include "block/band_gradients.cuh"
#include "block/band_pipeline.cuh"

constexpr int CTA_KEYS = 128;
static_assert(STEP_KEYS == CTA_KEYS, "the box of keys is that of the pass of queries");
constexpr int PIECE_KEYS = 64;                  // keys, or rows, of one score tile
constexpr int PIECE_BYTES = PIECE_KEYS * 128;   // from one piece to the next inside a half of a tile
typedef f32 PieceScores[PIECE_KEYS / 2];
typedef u32 PieceFragments[PIECE_KEYS / 16][4];

// Scores of 64 rows of a tile of 128 and 2 COUNT rows of one of ROWS.
template <int ROWS, int COUNT>
FSA_DEVICE void start_piece(f32 (&s)[COUNT], u32 a, u32 b) {
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
        Wgmma<2 * COUNT>::template shared_shared<0, 0>(s, over_columns<CTA_KEYS>(a, k), over_columns<ROWS>(b, k), k != 0);
}
// Adds scores times 16 STEPS rows of a tile of ROWS.
template <int ROWS, int STEPS>
FSA_DEVICE void start_piece_sum(Columns& acc, const u32 (&a)[STEPS][4], u32 rows) {
    FSA_UNROLL for (int k = 0; k < STEPS; ++k) Wgmma<HEAD_DIM>::template registers_shared<1>(acc, a[k], over_rows<ROWS>(rows, k, 0), 1);
}

// A tile of keys and the tiles of rows that meet it: tokens from the first that sees a key on, as many at a time as fit. Of gridDim.z splits each takes
// every gridDim.z-th.
struct KeyWork {
    KeyTileRows rows;
    BandSequence tokens;            // those that see a key of the tile, as a sequence of their own
    i32 kv_head, split;
    i32 first, steps;               // the split's tiles: number of the one that is walked first, and how many
    i32 stride;                     // from one to the next; below zero the last comes first
    u32 reciprocal;                 // 2^16 / band.tile_heads, rounded up
    bool has_nonfinite_values;      // of the tile of keys, as far as anybody has looked

    FSA_DEVICE static KeyWork find(const Band& band, int num_kv_heads, int resident) {
        KeyWork w;
        // Splits and heads side by side, so that the longest walks start first.
        const int launched = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, splits = gridDim.z, number = launched / splits;
        w.split = launched - number * splits;
        w.kv_head = number % num_kv_heads;
        w.rows = find_key_tile(band, number / num_kv_heads, w.kv_head, CTA_KEYS);
        w.tokens = w.rows.sequence;
        w.tokens.token += w.rows.first_token;
        w.tokens.position += w.rows.first_token;
        w.tokens.tokens = (i32)(w.rows.rows / (u32)band.group_size);
        const int tiles = ceil_div(w.tokens.tokens, band.tile_tokens) * band.head_tiles;     // of tokens times of heads
        w.steps = ceil_div(max_i(tiles - w.split, 0), splits);
        // Ctas of one time meet the same rows, so that all but one find them in L2. Those of the first wave start together, and share the last rows.
        // Those of the next start one by one as the shortest walks end, each as much later as its first row is further on: forwards they go side by
        // side, and end together for the wave after them.
        const bool backwards = launched / resident % 2 == 0;
        w.first = backwards ? w.split + (w.steps - 1) * splits : w.split;
        w.stride = backwards ? -splits : splits;
        w.reciprocal = 65535u / (u32)band.tile_heads + 1;
        w.has_nonfinite_values = false;
        return w;
    }
};

// Where a tile of rows begins, in the tokens of a KeyWork and the heads of a group.
struct RowPlace {
    i32 token, head;

    // Of the n-th tile of a walk.
    FSA_DEVICE static RowPlace find(const Band& band, const KeyWork& w, int n) {
        const int number = w.first + n * w.stride, token_tile = number / band.head_tiles;
        return {token_tile * band.tile_tokens, (number - token_tile * band.head_tiles) * band.tile_heads};
    }
};

// A row of a tile, as the thread sees it that brings it.
struct RowOfTile {
    i32 row;                        // of the tile
    bool exists;
    i32 token, head, position;      // row and head of query
    i32 tile_position;              // of the tile's first row

    FSA_DEVICE RowStats stats(const RowStats* of_all, const Band& band) const { return exists ? of_all[(i64)head * band.total_q + token] : no_row_stats(); }
    // Its blocks from the first of a tile of keys on.
    FSA_DEVICE u32 blocks(const Band& band, const KeyWork& w) const { return exists ? blocks_of_row(band, w.kv_head, token, w.rows.first_key) : 0; }
};

// A ring of tiles of rows of query and of grad_out, with what is known of the rows: `put` of the records takes a row, and returns what consumers have to
// mind of its warp's rows, their `special`.
template <typename Records, int STAGES>
struct RowRing {
    static constexpr int ROWS = Records::ROWS, WARPS = (ROWS + 31) / 32;    // that bring them
    typedef SwizzledTile<ROWS> Tile;
    static constexpr int BYTES = STAGES * 2 * Tile::BYTES, BARRIERS = 4 * STAGES;
    u32 tiles;
    Records* records;      // [STAGES]
    Ring<STAGES> loaded, checked;   // of `checked` only `full` is used

    FSA_DEVICE static RowRing at(u32 tiles, Records* records, u32 barriers) {
        return {tiles, records, Ring<STAGES>::at(barriers), Ring<STAGES>::at(barriers + Ring<STAGES>::BYTES)};
    }
    FSA_DEVICE void open() const {
        loaded.open();
        checked.open(0, WARPS);
    }
    // All threads of the cta, before the first load. Rows that no box covers stay zero for ever.
    FSA_DEVICE void clear_uncovered(const Band& band) const {
        if (band.tile_tokens * band.tile_heads == ROWS) return;
        FSA_NO_UNROLL for (int at = threadIdx.x * 16; at < BYTES; at += THREADS * 16) store_shared(tiles + at, Vec4{0, 0, 0, 0});
        fence_async_proxy();
    }
    FSA_DEVICE u32 query(u32 n) const { return tiles + Ring<STAGES>::place(n) * 2 * Tile::BYTES; }
    FSA_DEVICE u32 grad(u32 n) const { return query(n) + Tile::BYTES; }
    FSA_DEVICE Records& record(u32 n) const { return records[Ring<STAGES>::place(n)]; }

    // The first WARPS warps of the producing warpgroup: the first thread loads the tiles, and each brings the records of one row, of which those from ROWS on
    // do not exist.
    FSA_DEVICE void bring(const BandBackwardParams& p, const KeyWork& w) const {
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n) {
            // Exact, see BandTile. Not kept in registers from one tile to the next.
            const int row = thread_number() - CONSUMER_THREADS, token_of_tile = (int)((u32)row * w.reciprocal >> 16), head_of_tile = row - token_of_tile * p.band.tile_heads;
            const RowPlace place = RowPlace::find(p.band, w, n);
            loaded.wait_free(n);
            if (row == 0) {
                const u32 barrier = loaded.expect(n, 2 * Tile::HALVES * 128 * p.band.tile_tokens * p.band.tile_heads);
                load_tile<ROWS>(query(n), &p.query_map, barrier, w.rows.first_head + place.head, w.tokens.token + place.token);
                load_tile<ROWS>(grad(n), &p.grad_out_map, barrier, w.rows.first_head + place.head, w.tokens.token + place.token);
            }
            const int token = place.token + token_of_tile, head = place.head + head_of_tile;
            const bool exists = token_of_tile < p.band.tile_tokens && token < w.tokens.tokens && head < p.band.group_size;
            const RowOfTile of_tile = {row, exists, w.tokens.token + token, w.rows.first_head + head, w.tokens.position + token, w.tokens.position + place.token};
            Records& to = record(n);
            const i32 special = to.put(p, w, of_tile);
            if (__any_sync(0xffffffffu, !exists && token_of_tile < p.band.tile_tokens)) {
                loaded.wait(n);
                if (!exists && row < ROWS) { clear_row(query(n), row); clear_row(grad(n), row); }
                fence_async_proxy();
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                to.special[row / 32] = special;
                barrier_arrive(checked.full + 8 * Ring<STAGES>::place(n));
            }
        }
    }

  private:
    // What boxes brought of a row that does not exist belongs to somebody else, and may not be finite.
    static FSA_DEVICE void clear_row(u32 tile, int row) {
        FSA_UNROLL for (int half = 0; half < Tile::HALVES; ++half)
            FSA_UNROLL for (int piece = 0; piece < 8; ++piece) store_shared(tile + half * Tile::HALF_BYTES + row * 128 + piece * 16, Vec4{0, 0, 0, 0});
    }
};

// One thread: the keys, or values, of the tile.
FSA_DEVICE void load_keys(const TensorMap& map, u32 tile, u32 barrier, const KeyWork& w) {
    barrier_expect(barrier, KeyTile::BYTES);
    load_tile<CTA_KEYS>(tile, &map, barrier, w.kv_head, w.tokens.key_row + w.rows.first_key);
}

// One of the thread's two rows of sums of a split (HIGH: the second), which has that number. Two quads write whole lines, as in block/rows.cuh.
template <bool HIGH>
FSA_DEVICE void store_half_split(const HalfSplits& splits, const Columns& acc, u32 number, bool present) {
    f32 most = 0.0f;
    FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const f32 x = acc[4 * i + e + (HIGH ? 2 : 0)];
            most = fmaxf(most, fabsf(fmaf(x, 0.0f, x)));        // NaN of what is not finite, which does not count
        }
    const u32 exponent = HalfSplits::exponent(quad_max(most));
    const f32 scale = HalfSplits::scale(exponent);
    const bool odd = threadIdx.x & 4;
    const FragmentRows rows = fragment_rows(splits.rows, number, present);
    FSA_UNROLL for (int piece = 0; piece < HEAD_DIM / 64; ++piece) {
        Vec4 groups[2];
        FSA_UNROLL for (int group = 0; group < 2; ++group) {
            u32 w[4];
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                const int e = ((2 * piece + group) * 4 + j) * 4 + (HIGH ? 2 : 0);
                w[j] = pack_sums(acc[e] * scale, acc[e + 1] * scale);
            }
            groups[group] = Vec4{w[0], w[1], w[2], w[3]};
        }
        const Vec4 received = swap_with_neighbour(odd ? groups[0] : groups[1]);
        if (rows.keep_even) store_global(rows.even + piece * 128, odd ? received : groups[0]);
        if (rows.keep_odd) store_global(rows.odd + piece * 128, odd ? groups[1] : received);
    }
    if (present && (threadIdx.x & 3) == 0) splits.inverses[number] = HalfSplits::inverse(exponent);
}

// Sums of 64 keys, of which the thread has key_low and + 8: to the storage type, or to the split's own.
FSA_DEVICE void store_key_sums(const BandBackwardParams& p, Columns& acc, const Tensor& target, f32 scale, int which, const KeyWork& w, int key_low) {
    const int row = w.tokens.key_row + w.rows.first_key + key_low;
    const bool has_low = key_low < w.rows.keys, has_high = key_low + 8 < w.rows.keys;
    if (p.splits == 1) {
        char *low = (char*)tensor_row(target, row, w.kv_head), *high = (char*)tensor_row(target, row + 8, w.kv_head);
        if (p.accumulate_keys) {
            add_held<false>(acc, low, scale, has_low);
            add_held<true>(acc, high, scale, has_high);
            scale = 1.0f;
        }
        store_row<false>(low, acc, scale, has_low);
        store_row<true>(high, acc, scale, has_high);
        return;
    }
    if constexpr (HALF_SPLITS) {
        const HalfSplits splits = HalfSplits::of(p);
        const u32 number = splits.number(w.split, which, (i64)row * p.num_kv_heads + w.kv_head);
        store_half_split<false>(splits, acc, number, has_low);
        store_half_split<true>(splits, acc, number + 8 * p.num_kv_heads, has_high);
        return;
    }
    f32* sums = p.partial_keys + ((((i64)w.split * 2 + which) * p.band.total_keys + row) * p.num_kv_heads + w.kv_head) * HEAD_DIM + 2 * (threadIdx.x & 3);
    const i64 high = (i64)8 * p.num_kv_heads * HEAD_DIM;
    FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
        if (has_low) store_global8(sums + 8 * i, __float_as_uint(acc[4 * i]), __float_as_uint(acc[4 * i + 1]));
        if (has_high) store_global8(sums + high + 8 * i, __float_as_uint(acc[4 * i + 2]), __float_as_uint(acc[4 * i + 3]));
    }
}
