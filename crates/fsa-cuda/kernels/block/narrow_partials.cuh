// Partials of 12 bits an element, three quarters of the memory of the storage type: the elements of a row that one thread has share an
// exponent e and are multiples of 2^e / 1023.5. The error is below 2^-11 of the largest of them, where rounding to bf16 may cost 2^-9.
//
// A row is three vectors of 16 bytes a thread, thread t's j-th at 64 j + 16 t; eight elements are three words, lowest bits
// first, each element with 2048 added. Beside the rows lies a table: per slot the log2-sum-exp and the exponents, a byte a thread.
// Rows with NaN or infinity, or close to overflow, are rare: the highest byte is 255, the lowest the exponent of the whole row, elements are multiples
// of 2^e / 511.75, and 0, 1 and 4095 mean NaN and the infinities.
#pragma once
#include "block/rows.cuh"

#ifndef FSA_PARTIAL_BITS
#define FSA_PARTIAL_BITS 16
#endif
constexpr bool NARROW_PARTIALS = FSA_PARTIAL_BITS == 12 && HEAD_DIM == 128;      // whole vectors a thread, and registers
constexpr int PARTIAL_ROW_BYTES = NARROW_PARTIALS ? HEAD_DIM * 3 / 2 : ROW_BYTES;
constexpr int NARROW_VALUES = HEAD_DIM / 4;                 // of a row, one thread's
constexpr int NARROW_WORDS = NARROW_VALUES * 3 / 8;
constexpr u32 SPECIAL = 255, MIN_EXPONENT = 10, MAX_EXPONENT = 240;     // biased; so that factors and sums of 64 are finite
constexpr u32 CODE_NAN = 0, CODE_NEGATIVE = 1, CODE_POSITIVE = 4095;
constexpr f32 UNITS = 1023.5f;

struct __align__(8) NarrowSlot {
    f32 lse;
    u32 exponents;
};
// The table of a launch lies behind its rows.
FSA_DEVICE NarrowSlot* narrow_slots(const void* partial, i64 rows) { return (NarrowSlot*)((char*)partial + rows * PARTIAL_ROW_BYTES); }

// Element n of the thread's row, in fragment order.
template <bool HIGH>
FSA_DEVICE f32& narrow_value(Piece (&acc)[PIECES], int n) {
    constexpr int VALUES = PIECE_COLUMNS / 4;
    return acc[n / VALUES][n % VALUES / 2 * 4 + (HIGH ? 2 : 0) + n % 2];
}

FSA_DEVICE u32 exponent_of(f32 x) { return __float_as_uint(x) >> 23; }              // of x >= 0
FSA_DEVICE f32 power(u32 exponent) { return __uint_as_float(exponent << 23); }      // 1 .. 254

// Whether a thread of the row has no exponent: a byte is 255.
FSA_DEVICE bool is_special(u32 exponents) { return ((exponents & 0x7f7f7f7fu) + 0x01010101u) & exponents & 0x80808080u; }

// Eight integers below 4096, plus `bias`, to three words. The bias has zeros in its low 12 bits; shifted, it is subtracted from the sums.
FSA_DEVICE void pack_eight(u32* words, const u32 (&b)[8], u32 bias) {
    words[0] = b[0] + (b[1] << 12) + (b[2] << 24) - (bias + (bias << 12) + (bias << 24));
    words[1] = (b[2] >> 8) + (b[3] << 4) + (b[4] << 16) + (b[5] << 28) - ((bias >> 8) + (bias << 4) + (bias << 16) + (bias << 28));
    words[2] = (b[5] >> 4) + (b[6] << 8) + (b[7] << 20) - ((bias >> 4) + (bias << 8) + (bias << 20));
}
// Element n of eight in bits 11 .. 22, where a float has the first bits of its mantissa; other bits are undefined.
FSA_DEVICE u32 extract(const u32 (&words)[NARROW_WORDS], int n) {
    const u32 a = words[n / 8 * 3], b = words[n / 8 * 3 + 1], c = words[n / 8 * 3 + 2];
    switch (n % 8) {
        case 0: return a << 11;
        case 1: return a >> 1;
        case 2: return __funnelshift_r(a, b, 13);
        case 3: return b << 7;
        case 4: return b >> 5;
        case 5: return __funnelshift_r(b, c, 17);
        case 6: return c << 3;
        default: return c >> 9;
    }
}

// Rewrites the words of a row with NaN or infinity and returns its exponents; other quads keep theirs.
template <bool HIGH>
FSA_DEVICE u32 narrow_special(u32 (&words)[NARROW_WORDS], Piece (&acc)[PIECES], f32 scale, u32 exponents) {
    f32 top = 0.0f;
    FSA_UNROLL for (int n = 0; n < NARROW_VALUES; ++n) {
        const f32 x = fabsf(narrow_value<HIGH>(acc, n) * scale);
        if (exponent_of(x) != SPECIAL) top = fmaxf(top, x);
    }
    const u32 exponent = max_i(exponent_of(quad_max(top)), MIN_EXPONENT);
    if (!is_special(exponents)) return exponents;
    const f32 unit = exponent < 128 ? power(254 - exponent) : power(254 - exponent + 64) * 0x1p-64f;
    FSA_UNROLL for (int n = 0; n < NARROW_VALUES; n += 8) {
        u32 b[8];
        FSA_UNROLL for (int i = 0; i < 8; ++i) {
            const f32 x = narrow_value<HIGH>(acc, n + i) * scale;
            const u32 code = x == x ? (x > 0.0f ? CODE_POSITIVE : CODE_NEGATIVE) : CODE_NAN;
            b[i] = exponent_of(fabsf(x)) == SPECIAL ? code : __float_as_uint(x * unit * (UNITS / 2) + (12582912.0f + 2048.0f)) & 0xfffu;
        }
        pack_eight(words + n / 8 * 3, b, 0);
    }
    return SPECIAL << 24 | exponent;
}

// The thread's row times `scale` as words; returns the exponents. All lanes of the quad take part.
template <bool HIGH>
FSA_DEVICE u32 narrow_row(u32 (&words)[NARROW_WORDS], Piece (&acc)[PIECES], f32 scale) {
    f32 top = 0.0f;
    FSA_UNROLL for (int n = 0; n < NARROW_VALUES; ++n) top = fmaxf(top, fabsf(narrow_value<HIGH>(acc, n)));
    u32 exponent = max_i(exponent_of(top * scale), MIN_EXPONENT), all = 0;
    const f32 factor = power(254 - exponent) * UNITS * scale;
    FSA_UNROLL for (int n = 0; n < NARROW_VALUES; n += 8) {
        // Added to 1.5 x 2^23, a float is an integer in the low bits.
        u32 b[8];
        FSA_UNROLL for (int i = 0; i < 8; ++i) {
            b[i] = __float_as_uint(fmaf(narrow_value<HIGH>(acc, n + i), factor, 12582912.0f + 2048.0f));
            all |= b[i];
        }
        pack_eight(words + n / 8 * 3, b, 0x4b400000u);
    }
    // Only NaN, which the maximum skipped, and infinity have this bit.
    if (exponent > MAX_EXPONENT || (all & 0x20000000u)) exponent = SPECIAL;
    u32 exponents = exponent << 8 * (threadIdx.x & 3);
    exponents |= __shfl_xor_sync(0xffffffffu, exponents, 1);
    exponents |= __shfl_xor_sync(0xffffffffu, exponents, 2);
    return __any_sync(0xffffffffu, is_special(exponents)) ? narrow_special<HIGH>(words, acc, scale, exponents) : exponents;
}

// Stores the thread's part of a row times `scale`, and one lane what belongs to it.
template <bool HIGH>
FSA_DEVICE void store_narrow(char* rows, NarrowSlot* table, u32 slot, bool keep, Piece (&acc)[PIECES], f32 scale, f32 lse) {
    u32 words[NARROW_WORDS];
    const u32 exponents = narrow_row<HIGH>(words, acc, scale);
    if (!keep) return;
    char* row = rows + (i64)slot * PARTIAL_ROW_BYTES + (threadIdx.x & 3) * 16;
    FSA_UNROLL for (int i = 0; i < NARROW_WORDS; i += 4) store_global(row + i * 16, Vec4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    if ((threadIdx.x & 3) == 0) store_global8(table + slot, __float_as_uint(lse), exponents);
}
FSA_DEVICE void load_narrow(u32 (&words)[NARROW_WORDS], const char* row, bool present) {
    FSA_UNROLL for (int i = 0; i < NARROW_WORDS; i += 4) {
        Vec4 v = {0, 0, 0, 0};
        if (present) v = load_global_once(row + i * 16 + (threadIdx.x & 3) * 16);
        words[i] = v.x; words[i + 1] = v.y; words[i + 2] = v.z; words[i + 3] = v.w;
    }
}

// Adds a weighted row. What it adds too much, the same to all elements, is subtracted from `excess`.
template <bool HIGH>
FSA_DEVICE void add_narrow(Piece (&acc)[PIECES], f32& excess, const u32 (&words)[NARROW_WORDS], f32 weight, u32 exponents) {
    if (exponents >> 24 != SPECIAL) {
        // 1 + element / 4096 is a float that is made by one shift and one logical operation.
        const f32 factor = weight * power(exponents >> 8 * (threadIdx.x & 3) & 255) * (4096.0f / UNITS);
        excess -= 1.5f * factor;
        FSA_UNROLL for (int n = 0; n < NARROW_VALUES; ++n) {
            f32& x = narrow_value<HIGH>(acc, n);
            x = fmaf(factor, __uint_as_float((extract(words, n) & 0x7ff800u) | 0x3f800000u), x);
        }
    } else {
        const f32 factor = weight * power(exponents & 255) * (2.0f / UNITS);
        FSA_UNROLL for (int n = 0; n < NARROW_VALUES; ++n) {
            const u32 code = extract(words, n) >> 11 & 0xfffu;
            const f32 infinite = code == CODE_NAN ? __int_as_float(0x7fffffff) : code == CODE_NEGATIVE ? neg_inf() : -neg_inf();
            f32& x = narrow_value<HIGH>(acc, n);
            x = fmaf(factor, code == CODE_NAN || code == CODE_NEGATIVE || code == CODE_POSITIVE ? infinite : (f32)((int)code - 2048), x);
        }
    }
}
