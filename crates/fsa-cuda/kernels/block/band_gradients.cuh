// What the backward of the stages window, compressed and dense does on every architecture: statistics of rows before the passes, the sum of
// the splits after them, and between them probabilities and score gradients of tiles whose rows see an interval of keys.
#pragma once
#include "block/band_rows.cuh"
#include "block/listed_blocks.cuh"
#include "block/query_sums.cuh"
#include "block/rows.cuh"
#include "block/score_gradients.cuh"

// Statistics of rows, where the caller has none, and their bounds, where those are wanted. A warp has one token and reads the rows of some neighbouring
// heads, which lie side by side in memory; the statistics leave by head.
constexpr int DELTA_TOKENS = 8, DELTA_HEADS = 8;
extern "C" __global__ void __launch_bounds__(DELTA_TOKENS * 32) band_delta(const __grid_constant__ BandBackwardParams p) {
    constexpr int LANES = PIECES_PER_ROW <= 8 ? 8 : PIECES_PER_ROW <= 16 ? 16 : 32, ROWS = 32 / LANES, COPIES = DELTA_HEADS / ROWS;
    __shared__ f32 sums[2][DELTA_HEADS][DELTA_TOKENS];      // of grad_out times out, of the sizes of grad_out
    const int heads = p.num_kv_heads * p.band.group_size, parts = ceil_div(heads, DELTA_HEADS);
    const int first_head = blockIdx.x % parts * DELTA_HEADS, first_token = blockIdx.x / parts * DELTA_TOKENS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, piece = lane % LANES;
    Vec4 out[COPIES], grad[COPIES];
    FSA_UNROLL for (int i = 0; i < COPIES; ++i) {           // all under way at once
        const int token = first_token + warp, head = first_head + i * ROWS + lane / LANES;
        const bool present = token < p.band.total_q && head < heads && piece < PIECES_PER_ROW;
        out[i] = present ? load_global_once(tensor_row(p.out, token, head) + piece * 16) : Vec4{0, 0, 0, 0};
        grad[i] = present ? load_global_once(tensor_row(p.grad_out, token, head) + piece * 16) : Vec4{0, 0, 0, 0};
    }
    FSA_UNROLL for (int i = 0; i < COPIES; ++i) {
        const u32 a[4] = {out[i].x, out[i].y, out[i].z, out[i].w}, b[4] = {grad[i].x, grad[i].y, grad[i].z, grad[i].w};
        f32 product = 0.0f, size = p.row_bounds != nullptr ? sum_sizes(grad[i]) : 0.0f;
        FSA_UNROLL for (int j = 0; j < 4; ++j) product += unpack_lo(a[j]) * unpack_lo(b[j]) + unpack_hi(a[j]) * unpack_hi(b[j]);
        FSA_UNROLL for (int delta = LANES / 2; delta > 0; delta /= 2) {
            product += __shfl_xor_sync(0xffffffffu, product, delta);
            if (p.row_bounds != nullptr) size += __shfl_xor_sync(0xffffffffu, size, delta);
        }
        if (piece == 0) {
            sums[0][i * ROWS + lane / LANES][warp] = product;
            sums[1][i * ROWS + lane / LANES][warp] = size;
        }
    }
    __syncthreads();
    if (threadIdx.x >= DELTA_TOKENS * DELTA_HEADS) return;
    const int row = threadIdx.x / DELTA_TOKENS, column = threadIdx.x % DELTA_TOKENS, head = first_head + row, token = first_token + column;
    const bool present = head < heads && token < p.band.total_q;
    const i64 at = (i64)head * p.band.total_q + token;
    const f32 lse = present ? p.lse[at] : neg_inf(), delta = sums[0][row][column] - (present && p.grad_lse != nullptr ? p.grad_lse[at] : 0.0f);
    if (present) p.row_stats[at] = make_row_stats(lse, delta);
    if (p.row_bounds == nullptr) return;
    const bool sees = lse != neg_inf();
    raise_bound(&p.row_bounds->grad, sees ? bound_bits(sums[1][row][column]) : 0);
    raise_bound(&p.row_bounds->delta, sees ? bound_bits(delta) : 0);
}

#ifndef FSA_HALF_SPLITS     // 1: splits leave f16
#define FSA_HALF_SPLITS 0
#endif
constexpr bool HALF_SPLITS = FSA_HALF_SPLITS;
constexpr int MERGE_THREADS = 256, MERGE_COLUMNS = 4;        // of both gradients, for a thread

// What a split leaves of a row of grad_key or of grad_value in f16: half the bytes of f32, which are most of what stands behind the passes of short calls.
// In fragment order, multiplied by a power of two such that the row's largest finite element is between 2^14 and 2^15, so that rounding is an eighth of that
// to bf16. Behind all rows lies what takes the factors back.
struct HalfSplits {
    char* rows;
    f32* inverses;
    i64 split_rows;     // of a split and one of both gradients

    FSA_DEVICE static HalfSplits of(const BandBackwardParams& p) {
        const i64 rows = (i64)p.band.total_keys * p.num_kv_heads;
        return {(char*)p.partial_keys, (f32*)((char*)p.partial_keys + 2 * p.splits * rows * HEAD_DIM * 2), rows};
    }
    // Number of a row of the first or second gradient: those of more than 2^32 fit nowhere.
    FSA_DEVICE u32 number(int split, int which, i64 row) const { return (u32)((2 * split + which) * split_rows + row); }
    FSA_DEVICE static f32 scale(u32 exponent) { return __uint_as_float((268 - exponent) << 23); }
    FSA_DEVICE static f32 inverse(u32 exponent) { return __uint_as_float((exponent - 14) << 23); }
    // Of a row's largest element, as floats have it; both factors are normal.
    FSA_DEVICE static u32 exponent(f32 most) { return max_u(__float_as_uint(most) >> 23, 15); }
};

// Sums of keys: the splits in order, to the storage type. A thread has a piece of 16 bytes of one of both gradients, so that it needs few registers.
FSA_DEVICE void merge_half_splits(const BandBackwardParams& p, int cta) {
    constexpr int AHEAD = 4, PIECES = MERGE_THREADS / 2;        // splits whose loads are under way together; of a cta and a gradient
    const int which = threadIdx.x / PIECES, piece = threadIdx.x % PIECES_PER_ROW;
    const i64 row = ((i64)cta * PIECES + threadIdx.x % PIECES) / PIECES_PER_ROW;
    const HalfSplits splits = HalfSplits::of(p);
    const u32 key = (u32)row / (u32)p.num_kv_heads, head = (u32)row % (u32)p.num_kv_heads;
    // total_keys may be a bound: nothing was summed for such rows. All threads come to the end, whose quads exchange words.
    const bool exists = row < splits.split_rows && key < (u32)p.band.cu_keys[p.band.batch];
    char* const target = (char*)tensor_row(which == 0 ? p.grad_key : p.grad_value, key, head) + piece * 16;
    const Vec4 natural = p.accumulate_keys && exists ? load_global_once(target) : Vec4{0, 0, 0, 0};
    f32 sum[8] = {};
    FSA_NO_UNROLL for (int first = 0; first < p.splits; first += AHEAD) {
        Vec4 v[AHEAD];
        f32 inverse[AHEAD];
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) {
            const u32 number = splits.number(first + i, which, row);
            const bool present = exists && first + i < p.splits;
            v[i] = present ? load_global_once(splits.rows + (i64)number * (HEAD_DIM * 2) + piece * 16) : Vec4{0, 0, 0, 0};
            inverse[i] = present ? splits.inverses[number] : 0.0f;
        }
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) {
            const u32 word[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                f32 low, high;
                unpack_sums(word[j], low, high);
                sum[2 * j] = fmaf(low, inverse[i], sum[2 * j]);
                sum[2 * j + 1] = fmaf(high, inverse[i], sum[2 * j + 1]);
            }
        }
    }
    const f32 scale = which == 0 ? p.scale : 1.0f;
    const Vec4 held = transpose_quad(natural);
    const auto pair = [&](int j, u32 word) { return pack2(fmaf(sum[2 * j], scale, unpack_lo(word)), fmaf(sum[2 * j + 1], scale, unpack_hi(word))); };
    const Vec4 all = transpose_quad(Vec4{pair(0, held.x), pair(1, held.y), pair(2, held.z), pair(3, held.w)});
    if (exists) store_global(target, all);
}

// The same of f32 in natural order: a thread has four columns of both gradients.
FSA_DEVICE void merge_splits(const BandBackwardParams& p, int cta) {
    if constexpr (HALF_SPLITS) return merge_half_splits(p, cta);
    constexpr int AHEAD = 4;        // splits whose loads are under way together
    const i64 n = (i64)cta * MERGE_THREADS + threadIdx.x, row = n / (HEAD_DIM / MERGE_COLUMNS), rows = (i64)p.band.total_keys * p.num_kv_heads;
    const int column = (int)(n % (HEAD_DIM / MERGE_COLUMNS)) * MERGE_COLUMNS;
    if (row >= rows) return;
    const u32 key = (u32)row / (u32)p.num_kv_heads, head = (u32)row % (u32)p.num_kv_heads;     // the partials of 2^32 rows fit nowhere
    if (key >= (u32)p.band.cu_keys[p.band.batch]) return;       // total_keys may be a bound: nothing was summed for such rows
    u32 *target[2], held[2][2];
    f32 sum[2][4] = {};
    FSA_UNROLL for (int which = 0; which < 2; ++which) {
        target[which] = (u32*)((char*)tensor_row(which == 0 ? p.grad_key : p.grad_value, key, head) + column * ELEMENT_BYTES);
        FSA_UNROLL for (int word = 0; word < 2; ++word) held[which][word] = p.accumulate_keys ? target[which][word] : 0;
    }
    FSA_NO_UNROLL for (int first = 0; first < p.splits; first += AHEAD) {
        Vec4 v[AHEAD][2];
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i)
            FSA_UNROLL for (int which = 0; which < 2; ++which)
                if (first + i < p.splits) v[i][which] = load_global_once(p.partial_keys + ((2 * (first + i) + which) * rows + row) * HEAD_DIM + column);
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i)
            FSA_UNROLL for (int which = 0; which < 2; ++which) {
                if (first + i >= p.splits) continue;
                const u32 word[4] = {v[i][which].x, v[i][which].y, v[i][which].z, v[i][which].w};
                FSA_UNROLL for (int e = 0; e < 4; ++e) sum[which][e] += __uint_as_float(word[e]);
            }
    }
    FSA_UNROLL for (int which = 0; which < 2; ++which) {
        const f32 scale = which == 0 ? p.scale : 1.0f;
        const auto pair = [&](int word) {
            return pack2(fmaf(sum[which][2 * word], scale, unpack_lo(held[which][word])), fmaf(sum[which][2 * word + 1], scale, unpack_hi(held[which][word])));
        };
        store_global8(target[which], pair(0), pair(1));
    }
}
extern "C" __global__ void __launch_bounds__(MERGE_THREADS) band_backward_merge(const __grid_constant__ BandBackwardParams p) { merge_splits(p, blockIdx.x); }

// acc = acc * scale + what memory holds of one of the thread's two rows (HIGH: the second), 2 N columns from `row` on. The whole quad takes part.
template <bool HIGH, int N>
FSA_DEVICE void add_held(f32 (&acc)[N], const char* row, f32 scale, bool present) {
    FSA_UNROLL for (int group = 0; group < N / 16; ++group) {
        const Vec4 held = transpose_quad(present ? load_global_once(row + group * 64 + (threadIdx.x & 3) * 16) : Vec4{0, 0, 0, 0});
        const u32 w[4] = {held.x, held.y, held.z, held.w};
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
            acc[e] = fmaf(acc[e], scale, unpack_lo(w[j]));
            acc[e + 1] = fmaf(acc[e + 1], scale, unpack_hi(w[j]));
        }
    }
}

// Keys of a tile that a row sees: `count` of them from `first` on, with a mask those of its blocks.
struct __align__(4) KeySpan {
#if FSA_BLOCK_MASK
    u8 first, count;
    u16 blocks;     // bit 0: the block of the tile's first key
#else
    u16 first, count;
#endif
    FSA_DEVICE bool sees(int key) const { return sees(key, 0); }
    // The same of two parts of a key, of which the first alone says in which block it lies.
    FSA_DEVICE bool sees(int key, int more) const {
        const bool inside = (u32)(key + more - first) < count;
#if FSA_BLOCK_MASK
        return inside && blocks >> key / BLOCK_SIZE & 1;
#endif
        return inside;
    }
    // Whether the row sees all `keys` keys of a tile of TILE.
    template <int TILE>
    FSA_DEVICE bool sees_all(int keys) const {
#if FSA_BLOCK_MASK
        constexpr u32 ALL = (1u << (TILE < BLOCK_SIZE ? 1 : TILE / BLOCK_SIZE)) - 1;
        if ((blocks & ALL) != ALL) return false;
#endif
        return count == keys;
    }
};
// `blocks` as RowLists has them.
FSA_DEVICE KeySpan make_span(int first, int count, u32 blocks) {
#if FSA_BLOCK_MASK
    return {(u8)first, (u8)count, (u16)blocks};
#else
    return {(u16)first, (u16)count};
#endif
}
struct __align__(8) SpanPair {      // of two neighbouring rows
    KeySpan first, second;
};
// Of a row at `position`, in a tile of `keys` keys from `key` on; `sequence_keys` are all.
FSA_DEVICE KeySpan key_span(const Band& band, int position, int key, int keys, int sequence_keys, u32 blocks) {
    const int first = max_i(first_key(band, position) - key, 0), end = min_i(end_key(band, position, sequence_keys) - key, keys);
    return make_span(min_i(first, keys), max_i(end - first, 0), blocks);
}

// Rows as rows of the accumulators: one of the thread's two rows (HIGH: row + 8) of N keys. Probabilities from scores, in place. All without the sign
// of the row's gate, which its sums get at the end.
template <int N, bool HIGH, bool MASKED>
FSA_DEVICE void row_probabilities(f32 (&s)[N / 2], const RowStats& row, KeySpan span, f32 scale_log2) {
    FSA_UNROLL for (int i = 0; i < N / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            f32& x = s[4 * i + e + (HIGH ? 2 : 0)];
            x = exp2_fast(fmaf(x, scale_log2, -row.lse));
            if (MASKED && !span.sees(8 * i, 2 * (threadIdx.x & 3) + e)) x = 0.0f;
        }
}
// dS = P (dP - delta), in place of dP; zero where the row does not see the key even if dP is not finite.
template <int N, bool HIGH, bool MASKED>
FSA_DEVICE void row_gradients(f32 (&dp)[N / 2], const f32 (&probability)[N / 2], const RowStats& row, KeySpan span) {
    FSA_UNROLL for (int i = 0; i < N / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            f32& x = dp[4 * i + e + (HIGH ? 2 : 0)];
            x = probability[4 * i + e + (HIGH ? 2 : 0)] * (x - row.delta);
            if (MASKED && !span.sees(8 * i, 2 * (threadIdx.x & 3) + e)) x = 0.0f;
        }
}

// Keys as rows of the accumulators, N rows as columns, whose statistics and spans lie in shared memory; the thread has keys `key_low` and + 8.
template <int N, bool MASKED>
FSA_DEVICE void key_probabilities(f32 (&s)[N / 2], const RowStats* stats, const KeySpan* spans, int key_low, f32 scale_log2) {
    const int t = threadIdx.x & 3;
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * i + 2 * t);
        const SpanPair span = MASKED ? *(const SpanPair*)(spans + 8 * i + 2 * t) : SpanPair{};
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const f32 lse = e == 0 ? pair.first.lse : pair.second.lse;
            const KeySpan seen = e == 0 ? span.first : span.second;
            s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], scale_log2, -lse));
            s[4 * i + 2 + e] = exp2_fast(fmaf(s[4 * i + 2 + e], scale_log2, -lse));
            if (MASKED && !seen.sees(key_low)) s[4 * i + e] = 0.0f;
            if (MASKED && !seen.sees(key_low + 8)) s[4 * i + 2 + e] = 0.0f;
        }
    }
}
template <int N, bool MASKED>
FSA_DEVICE void key_gradients(f32 (&dp)[N / 2], const f32 (&probability)[N / 2], const RowStats* stats, const KeySpan* spans, int key_low) {
    const int t = threadIdx.x & 3;
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * i + 2 * t);
        const SpanPair span = MASKED ? *(const SpanPair*)(spans + 8 * i + 2 * t) : SpanPair{};
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const f32 delta = e == 0 ? pair.first.delta : pair.second.delta;
            const KeySpan seen = e == 0 ? span.first : span.second;
            dp[4 * i + e] = probability[4 * i + e] * (dp[4 * i + e] - delta);
            dp[4 * i + 2 + e] = probability[4 * i + 2 + e] * (dp[4 * i + 2 + e] - delta);
            if (MASKED && !seen.sees(key_low)) dp[4 * i + e] = 0.0f;
            if (MASKED && !seen.sees(key_low + 8)) dp[4 * i + 2 + e] = 0.0f;
        }
    }
}

// The rows that see one of the keys of a tile, numbered token by token and inside a token head by head, whatever tiles the other kernels make
// of them: no tile but the last has rows that do not exist. 32 bits are enough for the number: a row takes 128 bytes or more.
struct KeyTileRows {
    BandSequence sequence;
    i32 first_key, keys;        // of the tile
    i32 first_token;            // of the sequence's rows, the first that sees a key of the tile
    u32 rows;                   // tokens that do, times the heads of the group
    u32 group_size;
    i32 first_head;             // query head

    FSA_DEVICE i32 token_of(u32 row) const { return first_token + (i32)(row / group_size); }
    FSA_DEVICE i32 head_of(u32 row) const { return first_head + (i32)(row % group_size); }
    FSA_DEVICE int position_of(u32 row) const { return sequence.position + token_of(row); }
    // First byte of a row that exists, and its place in [num_q_heads, total_q].
    FSA_DEVICE const char* row_of(const Tensor& t, u32 row) const { return tensor_row(t, sequence.token + token_of(row), head_of(row)); }
    FSA_DEVICE i64 plane_index(u32 row, int total_q) const { return (i64)head_of(row) * total_q + sequence.token + token_of(row); }
};
// Tile `number` of `tile_keys` keys of a kv head; without keys where there is none.
FSA_DEVICE KeyTileRows find_key_tile(const Band& band, int number, int kv_head, int tile_keys) {
    KeyTileRows t = {};
    const int s = find_sequence(band.key_tile_base, band.batch, number);
    t.sequence = band_sequence(band, s);    // beside the question whether there is such a tile: loads wait for each other otherwise
    t.first_key = (number - band.key_tile_base[s]) * tile_keys;
    t.keys = number < band.key_tile_base[band.batch] ? min_i(tile_keys, t.sequence.keys - t.first_key) : 0;
    t.first_token = max_i(first_position(band, t.first_key) - t.sequence.position, 0);
    const int end_token = min_i(end_position(band, t.first_key + t.keys - 1) - t.sequence.position, t.sequence.tokens);
    t.group_size = band.group_size;
    t.rows = t.keys > 0 ? (u32)max_i(end_token - t.first_token, 0) * t.group_size : 0;
    t.first_head = kv_head * band.group_size;
    return t;
}
