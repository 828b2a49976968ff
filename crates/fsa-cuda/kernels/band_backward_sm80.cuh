// WHAT   Backward of window, compressed and dense attention, for every device from sm_80 on, in two passes that compute the scores again, so
//        that every sum has one owner and no atomics are needed. band_backward_queries: grad_query of 64 rows over the keys that they see,
//        three products. band_backward_keys: grad_key and grad_value of a tile of keys over all rows of the group that see it, four products.
//        Gradients may be added to. With FSA_BLOCK_MASK rows see the blocks that they list. Before them band_delta where the caller has no
//        statistics, and after them band_backward_merge where splits > 1 (block/band_gradients.cuh).
// GRID   queries: (num_tiles * head_tiles, num_kv_heads), the tiles with the most keys first. keys: (num_key_tiles, num_kv_heads, splits):
//        split z takes every splits-th tile of rows and writes f32 sums, unscaled; a single split writes the gradients.
// ROLES  Four warps. queries: 16 rows each. keys: 16 keys each, scores with keys as rows, so that P^T and dS^T are operands as they lie in
//        registers. Where the sums of 64 keys do not fit (head_dim 192, 256) a cta has 32 keys, and two warps share 16 of them: half of the
//        rows for scores, which they exchange through shared memory, half of the columns for sums.
// SMEM   queries: query and grad_out tile, two key tiles (one from head_dim 192 on), a value tile. keys: key and value tile, two query tiles
//        (or one), a grad_out tile, and where warps share keys P^T and dS^T. At most 80 KB: two ctas on devices of 164 KB.
// SYNC   All copies of a step are awaited at its first barrier, past which the tile of the step before is free: the next one starts there and
//        has the whole step to load. The tile without a second buffer starts past its last product and loads under the rest of the step.
//        Steps in which some row does not see some key ("masked") have two barriers more, around the search for NaN and infinity.
#include "block/band_gradients.cuh"
#include "block/piece_products.cuh"
#include "tile/warp_rows.cuh"

constexpr int MAX_SMEM_BYTES = 80 * 1024;
constexpr int BUFFERS = HEAD_DIM <= 128 ? 2 : 1;        // of the tile that is read first and last: keys, queries

// ---- grad_query ----

constexpr int STEP_KEYS = HEAD_DIM <= 128 ? 64 : HEAD_DIM <= 192 ? 32 : 16;
typedef SwizzledTile<TILE_ROWS> QueryTile;
typedef SwizzledTile<STEP_KEYS> StepTile;
constexpr int QUERIES_CTAS = HEAD_DIM <= 64 ? 3 : 2;       // per SM
typedef f32 StepScores[STEP_KEYS / 2];
constexpr int QUERIES_SMEM_BYTES = 2 * QueryTile::BYTES + (BUFFERS + 1) * StepTile::BYTES;
static_assert(QUERIES_SMEM_BYTES <= MAX_SMEM_BYTES, "query, grad_out, key and value tiles fit in shared memory");

// One of the thread's two rows.
struct QueryRow {
    RowStats stats;
    i32 first, end;     // keys that it sees

    FSA_DEVICE KeySpan span(int key, int keys, u32 blocks) const {
        const int from = min_i(max_i(first - key, 0), keys);
        return make_span(from, max_i(min_i(end - key, keys) - from, 0), blocks);
    }
};
FSA_DEVICE QueryRow query_row(const BandBackwardParams& p, const BandTile& tile, int row) {
    QueryRow r = {no_row_stats(), 0, 0};
    if (!tile.exists(row)) return r;
    r.stats = p.row_stats[tile.plane_index(row, p.band.total_q)];
    r.first = first_key(p.band, tile.position_of(row));
    r.end = end_key(p.band, tile.position_of(row), tile.keys);
    return r;
}

// Adds what clean_tile removed from the keys of a step. A key with NaN or infinity has a probability of NaN or of exactly 0 (a logit of
// -inf), so that the product is NaN in any row that sees it.
FSA_DEVICE void add_nonfinite_keys(Piece (&out)[PIECES], const Tensor& key, int kv_head, i64 first_row, int keys, KeySpan low, KeySpan high) {
    FSA_NO_UNROLL for (int k = 0; k < keys; ++k) {
        const char* row = tensor_row(key, first_row + k, kv_head);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            const u32 word = *(const u32*)(row + (8 * i + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            const f32 lo = unpack_lo(bad) - unpack_lo(bad), hi = unpack_hi(bad) - unpack_hi(bad);
            Piece& acc = out[8 * i / PIECE_COLUMNS];
            const int e = i % (PIECE_COLUMNS / 8) * 4;
            if (low.sees(k)) { acc[e] += lo; acc[e + 1] += hi; }
            if (high.sees(k)) { acc[e + 2] += lo; acc[e + 3] += hi; }
        }
    }
}

// dS of the warp's rows and the keys of a step.
template <bool MASKED>
FSA_DEVICE void step_gradients(StepScores& s, StepScores& dp, u32 queries, u32 grads, u32 keys, u32 values, const QueryRow& low, const QueryRow& high,
                               KeySpan span_low, KeySpan span_high, f32 scale_log2) {
    multiply_tiles<STEP_KEYS, TILE_ROWS, STEP_KEYS>(s, queries, keys);
    row_probabilities<STEP_KEYS, false, MASKED>(s, low.stats, span_low, scale_log2);
    row_probabilities<STEP_KEYS, true, MASKED>(s, high.stats, span_high, scale_log2);
    multiply_tiles<STEP_KEYS, TILE_ROWS, STEP_KEYS>(dp, grads, values);
    row_gradients<STEP_KEYS, false, MASKED>(dp, s, low.stats, span_low);
    row_gradients<STEP_KEYS, true, MASKED>(dp, s, high.stats, span_high);
}

// One of the thread's two rows, with the sign of its gate.
template <bool HIGH>
FSA_DEVICE void store_query_row(const BandBackwardParams& p, const BandTile& tile, int number, const QueryRow& row, Piece (&out)[PIECES]) {
    char* target = (char*)tile.row_of(p.grad_query, number);
    const bool exists = tile.exists(number);
    f32 scale = is_negative(row.stats) ? -p.scale : p.scale;
    if (p.accumulate) {
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
            add_held<HIGH>(out[piece], target + piece * PIECE_COLUMNS * ELEMENT_BYTES, scale, exists);
        scale = 1.0f;
    }
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) store_natural<HIGH>(target, piece, out[piece], scale, exists);
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, QUERIES_CTAS) band_backward_queries(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ BandTile tile;
    if (threadIdx.x == 0) tile = find_band_tile(p.band, blockIdx.x, blockIdx.y);
    __syncthreads();
    if (tile.tokens == 0) return;
    const u32 query_tile = shared_address(shared), grad_tile = query_tile + QueryTile::BYTES;
    const u32 value_tile = grad_tile + QueryTile::BYTES, key_tiles = value_tile + StepTile::BYTES;
    const BandInterval interval = band_interval(p.band, tile);
    const int steps = interval.end > interval.first ? ceil_div(interval.end - interval.first, STEP_KEYS) : 0;
    const int row_low = threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;
    Piece out[PIECES];
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) clear(out[piece]);
    auto key_of = [&](int step) { return interval.first + step * STEP_KEYS; };
    auto key_tile = [&](int step) { return key_tiles + step % BUFFERS * StepTile::BYTES; };
    auto copy_step = [&](u32 target, const Tensor& source, int step) {     // keys that no row sees become zeros
        if (step < steps) copy_tile<STEP_KEYS>(target, source, blockIdx.y, tile.key_row + key_of(step), interval.end - key_of(step));
        copy_commit();
    };
    if (steps > 0) {
        copy_band_rows<TILE_ROWS>(query_tile, p.query, tile);
        copy_band_rows<TILE_ROWS>(grad_tile, p.grad_out, tile);
    }
    copy_step(key_tile(0), p.key, 0);
    copy_step(value_tile, p.value, 0);
    const QueryRow low = query_row(p, tile, row_low), high = query_row(p, tile, row_low + 8);
    const RowLists lists = RowLists::of(p.band, tile, blockIdx.y, row_low);
    FSA_NO_UNROLL for (int step = 0; step < steps; ++step) {
        const int key = key_of(step);
        const bool masked = BLOCK_MASK || interval.needs_mask(key, STEP_KEYS);
        copy_wait<0>();
        __syncthreads();                                        // keys and values are there, all are past the other key tile
        if (BUFFERS == 2) copy_step(key_tile(step + 1), p.key, step + 1);
        const u32 queries = tall_address(query_tile, threadIdx.x / 32 * 16), keys = wide_address(key_tile(step), 0);
        const u32 grads = queries + QueryTile::BYTES, values = wide_address(value_tile, 0);
        const ListedBlocks blocks = lists.from(key);
        const KeySpan span_low = low.span(key, STEP_KEYS, blocks.low), span_high = high.span(key, STEP_KEYS, blocks.high);
        StepScores s, dp;
        if (masked) step_gradients<true>(s, dp, queries, grads, keys, values, low, high, span_low, span_high, p.scale_log2);
        else step_gradients<false>(s, dp, queries, grads, keys, values, low, high, span_low, span_high, p.scale_log2);
        u32 a[STEP_KEYS / 16][4];
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], dp, k);
        __syncthreads();                                        // all are past the values, and past the scores
        copy_step(value_tile, p.value, step + 1);
        bool dirty = false;
        if (masked) dirty = __syncthreads_or(clean_tile<STEP_KEYS>(key_tile(step)));    // a dS of zero times NaN would be NaN
        const u32 sums = tall_address(key_tile(step), 0);
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) multiply_piece<STEP_KEYS>(out[piece], a[k], sums + k * 16 * 128, piece);
        if (dirty) add_nonfinite_keys(out, p.key, blockIdx.y, tile.key_row + key, min_i(STEP_KEYS, interval.end - key), span_low, span_high);
        if (BUFFERS == 1) {
            __syncthreads();                                    // all are past the keys
            copy_step(key_tile(0), p.key, step + 1);
        }
    }
    copy_wait<0>();
    store_query_row<false>(p, tile, row_low, low, out);
    store_query_row<true>(p, tile, row_low + 8, high, out);
}

// ---- grad_key, grad_value ----

constexpr int CTA_KEYS = HEAD_DIM <= 128 ? 64 : 32;
constexpr int SPLIT = 64 / CTA_KEYS;                        // warps that share 16 keys
constexpr int STEP_ROWS = HEAD_DIM <= 192 ? 64 : 32;
constexpr int SCORE_ROWS = STEP_ROWS / SPLIT;               // rows of which a warp computes scores
constexpr int SUM_COLUMNS = HEAD_DIM / SPLIT;               // columns of which it holds the sums of its keys
constexpr int WARP_ROWS = STEP_ROWS / 4;                    // rows that it gathers
typedef SwizzledTile<CTA_KEYS> KeyTile;
typedef SwizzledTile<STEP_ROWS> RowTile;
typedef f32 ScoreTile[SCORE_ROWS / 2];
typedef f32 KeySums[SUM_COLUMNS / 2];
constexpr int SCORE_BYTES = SPLIT == 1 ? 0 : CTA_KEYS * 128;
constexpr int KEYS_SMEM_BYTES = 2 * KeyTile::BYTES + (BUFFERS + 1) * RowTile::BYTES + 2 * SCORE_BYTES;
static_assert(KEYS_SMEM_BYTES <= MAX_SMEM_BYTES, "key, value, query and grad_out tiles fit in shared memory");
static_assert(SPLIT == 1 || HEAD_DIM % 64 == 0, "the halves of the columns are halves of every 64");

// What the cta knows of its keys, and of the rows of the current step. Sums and scores leave no registers for what is used once per step.
struct KeyContext {
    __align__(16) RowStats stats[STEP_ROWS];
    __align__(8) KeySpan spans[STEP_ROWS];
    KeyTileRows tile;

    // Number of row lane % WARP_ROWS of those that the warp gathers for a step.
    static FSA_DEVICE u32 row_of_lane(u32 first_row) {
        const int thread = thread_number();
        return first_row + thread / 32 * WARP_ROWS + thread % WARP_ROWS;
    }
    FSA_DEVICE void gather(u32 target, const Tensor& source, u32 first_row) const {
        const u32 number = row_of_lane(first_row);
        const u64 address = number < tile.rows ? (u64)tile.row_of(source, number) : 0;
        for_each_piece<WARP_ROWS>(target, RowTile::HALF_BYTES, threadIdx.x / 32 * WARP_ROWS, [&](int row, u32 at, int column, bool active) {
            const u64 from = (u64)__shfl_sync(0xffffffffu, (u32)(address >> 32), row) << 32 | __shfl_sync(0xffffffffu, (u32)address, row);
            if (active) copy_async(at, from != 0 ? (const char*)from + column : (const char*)source.data, from != 0 ? 16 : 0);
        });
    }
    // Starts the copies of a step's grad_out and statistics; true if the thread's row needs a mask or has a gate below zero.
    FSA_DEVICE bool start_grads(const BandBackwardParams& p, u32 target, u32 first_row) {
        gather(target, p.grad_out, first_row);
        const u32 number = row_of_lane(first_row);
        const int row = threadIdx.x / 32 * WARP_ROWS + (threadIdx.x & 31);
        bool masked = false, negative = false;
        if ((threadIdx.x & 31) < WARP_ROWS) {
            KeySpan span = make_span(0, 0, 0);      // its zeros times a key or value that is not finite would be NaN
            if (number < tile.rows) {
                const RowStats* source = p.row_stats + tile.plane_index(number, p.band.total_q);
                copy_async8(shared_address(&stats[row]), source);
                negative = is_negative(*source);
                const u32 blocks = blocks_of_row(p.band, blockIdx.y, tile.sequence.token + tile.token_of(number), tile.first_key);
                span = key_span(p.band, tile.position_of(number), tile.first_key, tile.keys, tile.sequence.keys, blocks);
            } else {
                stats[row] = no_row_stats();
            }
            spans[row] = span;
            masked = !span.sees_all<CTA_KEYS>(tile.keys);
        }
        return masked || negative;
    }
};
static_assert(sizeof(KeyContext) <= 1024, "static shared memory of two ctas, beside their tiles");

// Which keys, rows and columns the warp has.
struct WarpPlace {
    int key;            // first of its 16 keys
    int half;           // which half of rows of scores and columns of sums, where two warps share keys
    FSA_DEVICE int key_low() const { return key + lane_number() / 4; }
};
FSA_DEVICE WarpPlace warp_place() {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    return {warp % (CTA_KEYS / 16) * 16, SPLIT == 1 ? 0 : warp / (CTA_KEYS / 16)};
}

// Addresses in shared memory.
struct Tiles {
    u32 key, value, grad, queries, probability, gradient;
    FSA_DEVICE u32 query(int step) const { return queries + step % BUFFERS * RowTile::BYTES; }
};
FSA_DEVICE Tiles tiles_at(u32 shared) {
    const u32 grad = shared + 2 * KeyTile::BYTES, queries = grad + RowTile::BYTES, scores = queries + BUFFERS * RowTile::BYTES;
    return {shared, shared + KeyTile::BYTES, grad, queries, scores, scores + SCORE_BYTES};
}

// P^T and dS^T of the warp's keys and rows, without the signs of the rows' gates.
template <bool MASKED>
FSA_DEVICE void key_scores(ScoreTile& s, ScoreTile& dp, const Tiles& tiles, u32 query_tile, const KeyContext& c, const WarpPlace& w, f32 scale_log2) {
    const int row = w.half * SCORE_ROWS;
    multiply_tiles<SCORE_ROWS, CTA_KEYS, STEP_ROWS>(s, tall_address(tiles.key, w.key), wide_address(query_tile, row));
    key_probabilities<SCORE_ROWS, MASKED>(s, c.stats + row, c.spans + row, w.key_low(), scale_log2);
    multiply_tiles<SCORE_ROWS, CTA_KEYS, STEP_ROWS>(dp, tall_address(tiles.value, w.key), wide_address(tiles.grad, row));
    key_gradients<SCORE_ROWS, MASKED>(dp, s, c.stats + row, c.spans + row, w.key_low());
}
// The signs of the gates of sixteen rows, the columns of fragments: where the scores are gone, and registers are free.
FSA_DEVICE void sign_fragments(u32 (&probability)[4], u32 (&gradient)[4], const RowStats* stats) {
    FSA_UNROLL for (int half = 0; half < 2; ++half) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * half + 2 * (threadIdx.x & 3));
        const u32 signs = (u32)is_negative(pair.first) << 15 | (u32)is_negative(pair.second) << 31;
        FSA_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
            probability[i] ^= signs;
            gradient[i] ^= signs;
        }
    }
}
// Scores to the storage type in shared memory, for the warp with the other half of the rows: key i is row i of a tile with 128-byte swizzle.
FSA_DEVICE void store_scores(u32 tile, const ScoreTile& s, const WarpPlace& w) {
    const int key = w.key_low();
    FSA_UNROLL for (int i = 0; i < SCORE_ROWS / 8; ++i) {
        const u32 at = tile + key * 128 + (((w.half * (SCORE_ROWS / 8) + i) ^ (key & 7)) << 4) + (threadIdx.x & 3) * 4;
        store_shared(at, pack2(s[4 * i], s[4 * i + 1]));
        store_shared(at + 8 * 128, pack2(s[4 * i + 2], s[4 * i + 3]));
    }
}

// 16 columns of the warp's part of a row: with two warps per row, each has 32 of every 64, from column `first_column` on.
FSA_DEVICE constexpr int sum_unit(int unit) { return SPLIT == 1 ? unit : unit / 2 * 4 + unit % 2; }
FSA_DEVICE int first_column(const WarpPlace& w) { return w.half * 32; }

// sums += scores [keys, rows] x rows of a tile; the scores are operands in registers, or come from both warps through shared memory.
FSA_DEVICE void add_rows(KeySums& sums, const u32 (&operands)[SCORE_ROWS / 16][4], u32 scores, u32 tile, const WarpPlace& w) {
    const u32 a = tall_address(scores, w.key), b = tall_address(tile, 0) ^ (first_column(w) * ELEMENT_BYTES);
    FSA_UNROLL for (int k = 0; k < STEP_ROWS / 16; ++k) {
        u32 m[4];
        if (SPLIT == 1) FSA_UNROLL for (int i = 0; i < 4; ++i) m[i] = operands[k % (SCORE_ROWS / 16)][i];
        else load_matrices(m, unit_address<CTA_KEYS>(a, k));
        FSA_UNROLL for (int unit = 0; unit < SUM_COLUMNS / 16; ++unit)
            multiply_unit(sums, 8 * unit, m, unit_address<STEP_ROWS>(b, sum_unit(unit)) + k * 16 * 128);
    }
}

// Adds the NaN and infinite elements of grad_out, which clean_tile removed from the tile, to grad_value of the keys that their rows see: with the
// sign of the row's gate, and as NaN where that is zero.
FSA_DEVICE void add_nonfinite_grads(KeySums& sums, const Tensor& grad_out, const KeyContext& c, u32 first_row, const WarpPlace& w) {
    FSA_NO_UNROLL for (int r = 0; r < STEP_ROWS && first_row + r < c.tile.rows; ++r) {
        const char* row = c.tile.row_of(grad_out, first_row + r) + (first_column(w) + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES;
        const bool low = c.spans[r].sees(w.key_low()), high = c.spans[r].sees(w.key_low() + 8);
        const f32 gate = c.stats[r].lse == no_row_stats().lse ? 0.0f : is_negative(c.stats[r]) ? -1.0f : 1.0f;
        FSA_UNROLL for (int i = 0; i < SUM_COLUMNS / 8; ++i) {
            const u32 word = *(const u32*)(row + (sum_unit(i / 2) * 16 + i % 2 * 8) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            const f32 x = unpack_lo(bad) * gate, y = unpack_hi(bad) * gate;
            if (low) { sums[4 * i] += x; sums[4 * i + 1] += y; }
            if (high) { sums[4 * i + 2] += x; sums[4 * i + 3] += y; }
        }
    }
}

// The thread's two keys to the storage type, or to f32 partial sums [.., num_kv_heads, HEAD_DIM] of this split.
FSA_DEVICE void store_sums(const BandBackwardParams& p, const Tensor& target, int which, const KeySums& sums, const KeyContext& c, const WarpPlace& w,
                           f32 scale) {
    FSA_UNROLL for (int high = 0; high < 2; ++high) {
        const int key = w.key_low() + 8 * high, e = 2 * high;
        const i64 row = c.tile.sequence.key_row + c.tile.first_key + key;
        const bool present = key < c.tile.keys;
        if (p.splits == 1) {
            char* out = (char*)tensor_row(target, row, blockIdx.y) + first_column(w) * ELEMENT_BYTES + (threadIdx.x & 3) * 16;
            FSA_UNROLL for (int group = 0; group < SUM_COLUMNS / 32; ++group) {
                char* to = out + sum_unit(2 * group) * 16 * ELEMENT_BYTES;
                const Vec4 held = transpose_quad(present && p.accumulate_keys ? load_global_once(to) : Vec4{0, 0, 0, 0});
                auto word = [&](int j, u32 old) {
                    const f32 *pair = sums + 16 * group + 4 * j + e;
                    return pack2(fmaf(pair[0], scale, unpack_lo(old)), fmaf(pair[1], scale, unpack_hi(old)));
                };
                const Vec4 v = transpose_quad(Vec4{word(0, held.x), word(1, held.y), word(2, held.z), word(3, held.w)});
                if (present) store_global(to, v);
            }
        } else {
            const i64 plane = (i64)(2 * blockIdx.z + which) * p.band.total_keys;
            f32* out = p.partial_keys + ((plane + row) * p.num_kv_heads + blockIdx.y) * HEAD_DIM + first_column(w) + 2 * (threadIdx.x & 3);
            FSA_UNROLL for (int i = 0; i < SUM_COLUMNS / 8; ++i) {
                const u32 first = __float_as_uint(sums[4 * i + e]), second = __float_as_uint(sums[4 * i + e + 1]);
                if (present) store_global8(out + sum_unit(i / 2) * 16 + i % 2 * 8, first, second);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, 2) band_backward_keys(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ KeyContext c;
    if (threadIdx.x == 0) c.tile = find_key_tile(p.band, blockIdx.x, blockIdx.y, CTA_KEYS);
    __syncthreads();
    if (c.tile.keys == 0) return;
    const Tiles tiles = tiles_at(shared_address(shared));
    const WarpPlace w = warp_place();
    KeySums grad_key, grad_value;
    clear(grad_key);
    clear(grad_value);
    auto first_row = [&](int step) { return (u32)(step * p.splits + blockIdx.z) * STEP_ROWS; };
    bool masked = false;
    if (first_row(0) < c.tile.rows) {
        const i64 key_row = c.tile.sequence.key_row + c.tile.first_key;
        copy_tile<CTA_KEYS>(tiles.key, p.key, blockIdx.y, key_row, c.tile.keys);
        copy_tile<CTA_KEYS>(tiles.value, p.value, blockIdx.y, key_row, c.tile.keys);
        c.gather(tiles.queries, p.query, first_row(0));
        masked = c.start_grads(p, tiles.grad, first_row(0));
        copy_commit();
    }
    FSA_NO_UNROLL for (int step = 0; first_row(step) < c.tile.rows; ++step) {
        const bool more = first_row(step + 1) < c.tile.rows;
        copy_wait<0>();
        const bool any_masked = __syncthreads_or(masked);       // rows and keys are there, all are past the other query tile
        if (BUFFERS == 2 && more) c.gather(tiles.query(step + 1), p.query, first_row(step + 1));
        ScoreTile s, dp;
        if (any_masked) key_scores<true>(s, dp, tiles, tiles.query(step), c, w, p.scale_log2);
        else key_scores<false>(s, dp, tiles, tiles.query(step), c, w, p.scale_log2);
        u32 probability[SCORE_ROWS / 16][4], gradient[SCORE_ROWS / 16][4];
        if (SPLIT == 1) {
            FSA_UNROLL for (int k = 0; k < SCORE_ROWS / 16; ++k) {
                to_fragment<SCORE_ROWS>(probability[k], s, k);
                to_fragment<SCORE_ROWS>(gradient[k], dp, k);
                if (any_masked) sign_fragments(probability[k], gradient[k], c.stats + 16 * k);
            }
        } else {
            if (any_masked) {
                apply_signs<SCORE_ROWS>(s, c.stats + w.half * SCORE_ROWS);
                apply_signs<SCORE_ROWS>(dp, c.stats + w.half * SCORE_ROWS);
            }
            store_scores(tiles.probability, s, w);
            store_scores(tiles.gradient, dp, w);
        }
        if (SPLIT > 1 || any_masked) __syncthreads();           // all scores are written, all are past the rows as they were
        bool dirty = false;
        if (any_masked) {   // a probability of zero times NaN would be NaN. NaN in a query reaches the keys that it sees through its dS.
            dirty = clean_tile<STEP_ROWS>(tiles.grad);
            clean_tile<STEP_ROWS>(tiles.query(step));
            dirty = __syncthreads_or(dirty);
        }
        add_rows(grad_value, probability, tiles.probability, tiles.grad, w);
        if (dirty) add_nonfinite_grads(grad_value, p.grad_out, c, first_row(step), w);
        __syncthreads();                                        // all are past grad_out and what is known of its rows
        if (more) masked = c.start_grads(p, tiles.grad, first_row(step + 1));
        add_rows(grad_key, gradient, tiles.gradient, tiles.query(step), w);
        if (BUFFERS == 1 && more) {
            __syncthreads();                                    // all are past the queries
            c.gather(tiles.queries, p.query, first_row(step + 1));
        }
        copy_commit();
    }
    store_sums(p, p.grad_key, 0, grad_key, c, w, p.scale);
    store_sums(p, p.grad_value, 1, grad_value, c, w, 1.0f);
}
