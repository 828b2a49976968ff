// Partials in 12 bits an element, for bf16: the same 8 bits of precision in three quarters of the bytes, which is what attend and reduce wait for.
//
// A row is multiplied by a power of two that brings it below 2^-113 and rounded to bf16: numbers of a sign, 4 bits of exponent and 7 of mantissa. The
// power follows from a bound of its elements, the largest value of the block times the sum of the row's weights. What is above 2^-13 of the bound has all 8
// bits, the rest one less per factor of two, as any float below its normal range: what that adds is below 2^-19 of the block's largest value. The
// exponent 15 is left for infinity and NaN. The bits of two elements in a word leave two gaps of 4 bits, which the fourth word of a group fills.
//
// In fragment order (block/rows.cuh) a thread of a quad has 12 words, three of every 32 columns; piece j of thread t is at 64 j + 16 t. Beside its
// log2-sum-exp a row has a factor, which makes its elements those of the normalised partial. A negative one stands for -2^FAR times itself, of rows near the
// end of f32 or with elements that are not finite.
#pragma once
#include "block/rows.cuh"

constexpr bool PACKS_PARTIALS = IS_BF16 && HEAD_DIM == 128 && BLOCK_SIZE <= 64;
constexpr int PARTIAL_BYTES = PACKS_PARTIALS ? HEAD_DIM * 12 / 8 : ROW_BYTES;
constexpr int PARTIAL_PIECES = PARTIAL_BYTES / 64;          // of 16 bytes, of a thread
// What is kept of a row besides: its log2-sum-exp and, if packed, the factor.
constexpr int PARTIAL_NUMBERS = PACKS_PARTIALS ? 2 : 1;
constexpr int LARGEST_EXPONENT = 13;                        // of a packed row, as f32 have it: biased
constexpr int FAR = 126;
constexpr f32 MOST_PLAIN_VALUE = 0x1p10f;                   // of a block whose rows have factors within f32
constexpr f32 ROUNDED_UP = 1.01f;                           // weights are rounded to bf16 for their product with values, not for their sum
constexpr u32 SIGNS = 0x80008000u, GAPS = 0x78007800u, SPECIAL = 0x07800000u;

// 2^exponent, also below the normal range.
FSA_DEVICE f32 power_of_two(int exponent) { return __uint_as_float(exponent >= -126 ? (u32)(exponent + 127) << 23 : 1u << max_i(exponent + 149, 0)); }
FSA_DEVICE int exponent_of(f32 x) { return (int)(__float_as_uint(x) >> 23 & 0xffu); }

// The larger sizes of two pairs, with any signs; NaN if one is NaN.
FSA_DEVICE u32 larger_sizes(u32 a, u32 b) {
    u32 c;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Largest size in a tile of a block's values, for all threads; infinity or NaN if there are such values. `warps` is a word of shared memory per warp.
FSA_DEVICE f32 largest_value(u32 tile, u32* warps) {
    u32 sizes = 0;
    FSA_UNROLL for (int i = 0; i < BLOCK_SIZE * ROW_BYTES / (16 * WARPGROUP); ++i) {
        const Vec4 v = load_shared(tile + (i * WARPGROUP + threadIdx.x) * 16);
        sizes = larger_sizes(larger_sizes(larger_sizes(larger_sizes(sizes, v.x), v.y), v.z), v.w);
    }
    const u32 most = __reduce_max_sync(0xffffffffu, max_u(sizes & 0x7fffu, sizes >> 16 & 0x7fffu));
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32] = most;
    __syncthreads();
    return __uint_as_float(max_u(max_u(warps[0], warps[1]), max_u(warps[2], warps[3])) << 16);
}

// The words of a group: the last fills the gaps of the others.
FSA_DEVICE void fill_gaps(u32* to, Vec4 w) {
    to[0] = w.x | (w.w << 11 & GAPS);
    to[1] = w.y | (w.w << 7 & GAPS);
    to[2] = w.z | (w.w << 3 & 0x38003800u) | (w.w >> 1 & 0x40004000u);
}
FSA_DEVICE u32 word_of_gaps(const u32* w) { return (w[0] >> 11 & 0x000f000fu) | (w[1] >> 7 & 0x00f000f0u) | (w[2] >> 3 & 0x07000700u) | (w[2] << 1 & SIGNS); }
FSA_DEVICE f32 packed_lo(u32 word) { return __uint_as_float(word << 16 & 0x87ff0000u); }
FSA_DEVICE f32 packed_hi(u32 word) { return __uint_as_float(word & 0x87ff0000u); }

// One of the thread's rows on its way to memory.
template <bool HIGH>
struct PackedRow {
    char* row;              // with the thread's offset
    bool keep;
    f32 power;
    u32 words[4 * PARTIAL_PIECES];

    // Begins a row whose elements are not larger than `bound`; returns its factor.
    FSA_DEVICE f32 begin(char* at, bool kept, f32 bound, f32 reciprocal) {
        const int exponent = exponent_of(bound);
        row = at;
        keep = kept;
        power = power_of_two(LARGEST_EXPONENT - exponent);
        // The power may be beyond f32 where the product is not: sums of weights are up to 64.
        return reciprocal * power_of_two(exponent - LARGEST_EXPONENT - 32) * 0x1p32f;
    }
    // Stores what is complete with a piece. In a branch of its own: within one block of instructions ptxas moves the wait for the next piece up before it.
    template <typename Pack>
    FSA_DEVICE void add(int piece, const Piece& acc, Pack pack) {
        if (!keep) return;
        FSA_UNROLL for (int group = 0; group < PIECE_GROUPS; ++group)
            fill_gaps(words + 3 * (piece * PIECE_GROUPS + group), pack_group<HIGH>(acc, group, power, pack));
        const int first = 3 * piece * PIECE_GROUPS / 4, end = 3 * (piece + 1) * PIECE_GROUPS / 4;
        FSA_UNROLL for (int j = 0; j < PARTIAL_PIECES; ++j)
            if (j >= first && j < end) store_global(row + 64 * j, Vec4{words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]});
    }
    FSA_DEVICE void add(int piece, const Piece& acc) {
        add(piece, acc, [](f32 lo, f32 hi) { return pack2(lo, hi); });
    }

    // Stores all of a row of a block with values that are large or not finite; returns its factor.
    FSA_DEVICE f32 store_far(char* at, bool kept, const Piece (&out)[PIECES], f32 reciprocal) {
        f32 size = 0.0f;        // of what is finite
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 2; ++i) {
            const f32 x = fabsf(out[i / (PIECE_COLUMNS / 2)][i % (PIECE_COLUMNS / 2)]);
            if ((i % 4 >= 2) == HIGH && x < -neg_inf()) size = fmaxf(size, x);
        }
        // Below 2^-97 nothing is left beside what is not finite: the factor has to be a normal number.
        const int exponent = max_i(exponent_of(quad_max(size)), 30);
        const f32 rest = power_of_two(LARGEST_EXPONENT + 100 - exponent);
        const auto scaled = [&](f32 x) {
            if (fabsf(x) < -neg_inf()) return x * rest;
            return __uint_as_float((__float_as_uint(x) & 0x80000000u) | SPECIAL | (x == x ? 0u : 0x00400000u));
        };
        row = at;
        keep = kept;
        power = 0x1p-100f;
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) add(piece, out[piece], [&](f32 lo, f32 hi) { return pack2(scaled(lo), scaled(hi)); });
        return -reciprocal * power_of_two(exponent - LARGEST_EXPONENT - FAR);
    }
};

// The thread's part of a partial that is read once; zeros where it is not present. `first` is with the thread's offset.
typedef Vec4 PartialRow[PARTIAL_PIECES];
FSA_DEVICE void load_partial(PartialRow& v, const char* first, bool present) {
    FSA_UNROLL for (int j = 0; j < PARTIAL_PIECES; ++j) v[j] = present ? load_global_once(first + 64 * j) : Vec4{0, 0, 0, 0};
}
// Word n of it.
FSA_DEVICE u32 word_of(const PartialRow& v, int n) {
    const Vec4& piece = v[n / 4];
    return n % 4 == 0 ? piece.x : n % 4 == 1 ? piece.y : n % 4 == 2 ? piece.z : piece.w;
}

// acc += weight * row; `widen` finishes an element. Of packed rows the factor is in the weight.
template <bool HIGH, typename Widen>
FSA_DEVICE void merge_partial(Piece (&out)[PIECES], const PartialRow& v, f32 weight, Widen widen) {
    constexpr int WORDS = PACKS_PARTIALS ? 3 : 4;       // of a group
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        u32 word[4];
        FSA_UNROLL for (int j = 0; j < WORDS; ++j) word[j] = word_of(v, WORDS * group + j);
        if (PACKS_PARTIALS) word[3] = word_of_gaps(word);
        Piece& acc = out[group / PIECE_GROUPS];
        const int first = group % PIECE_GROUPS * 16 + (HIGH ? 2 : 0);
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            acc[first + 4 * j] = fmaf(weight, widen(PACKS_PARTIALS ? packed_lo(word[j]) : unpack_lo(word[j])), acc[first + 4 * j]);
            acc[first + 4 * j + 1] = fmaf(weight, widen(PACKS_PARTIALS ? packed_hi(word[j]) : unpack_hi(word[j])), acc[first + 4 * j + 1]);
        }
    }
}
template <bool HIGH>
FSA_DEVICE void merge_partial(Piece (&out)[PIECES], const PartialRow& v, f32 weight) {
    merge_partial<HIGH>(out, v, weight, [](f32 x) { return x; });
}

// Whether a factor stands for a larger one.
FSA_DEVICE bool is_far(f32 factor) { return __float_as_uint(factor) >> 31; }
// merge_partial of a packed row with such a factor, or of a plain one with its weight times 2^-FAR.
template <bool HIGH>
FSA_DEVICE void merge_far(Piece (&out)[PIECES], const PartialRow& v, f32 weight) {
    merge_partial<HIGH>(out, v, weight, [](f32 x) {
        const u32 bits = __float_as_uint(x);
        return (bits & SPECIAL) == SPECIAL ? __uint_as_float(bits | 0x7f800000u) : x * 0x1p126f;
    });
}
