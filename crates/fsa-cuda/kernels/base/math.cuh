// Scalar functions, and packing of two 16-bit floats.
#pragma once
#include "base/types.cuh"

FSA_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
FSA_DEVICE int min_i(int a, int b) { return a < b ? a : b; }
FSA_DEVICE int max_i(int a, int b) { return a > b ? a : b; }
FSA_DEVICE u32 max_u(u32 a, u32 b) { return a > b ? a : b; }
// 0 from 32 on, and of negative counts.
FSA_DEVICE u32 shift_left(u32 word, int count) {
    u32 out;
    asm("shl.b32 %0, %1, %2;" : "=r"(out) : "r"(word), "r"(count));
    return out;
}
// The lowest bits: all from 32 on, none below 1.
FSA_DEVICE u32 low_bits(int count) {
    u32 above;
    asm("shl.b32 %0, 1, %1;" : "=r"(above) : "r"(max_i(count, 0)));     // 0 from 32 on
    return above - 1;
}
FSA_DEVICE f32 neg_inf() { return __int_as_float(0xff800000); }

// 2^x and log2 x, one instruction each, about 2 ulp; 2^-inf = 0.
FSA_DEVICE f32 exp2_fast(f32 x) { f32 y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// The same where a result below the normal range is not 0: a factor of sums that are far above 1.
FSA_DEVICE f32 exp2_small(f32 x) { f32 y; asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FSA_DEVICE f32 log2_fast(f32 x) { f32 y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

FSA_DEVICE f32 reciprocal_fast(f32 x) { f32 y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// Two f32 to one word of the storage type; `lo` lands in the low half, the lower address.
FSA_DEVICE u32 pack2(f32 lo, f32 hi) {
    u32 word;
    if constexpr (IS_BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    return word;
}
FSA_DEVICE f32 unpack_lo(u32 word) {
    if constexpr (IS_BF16) {
        return __uint_as_float(word << 16);
    } else {
        f32 x;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(word));
        return x;
    }
}
FSA_DEVICE f32 unpack_hi(u32 word) {
    if constexpr (IS_BF16) {
        return __uint_as_float(word & 0xffff0000u);
    } else {
        f32 x;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(word));
        return x;
    }
}

// sum + word * 0 in the storage type: turns a half into NaN for ever once a NaN or infinity was met.
FSA_DEVICE u32 taint(u32 sum, u32 word) {
    u32 out;
    if constexpr (IS_BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(word), "r"(0u), "r"(sum));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(word), "r"(0u), "r"(sum));
    return out;
}
FSA_DEVICE bool has_nonfinite(u32 word) {
    constexpr u32 LOW = IS_BF16 ? 0x7f80u : 0x7c00u, HIGH = LOW << 16;
    return (word & LOW) == LOW || (word & HIGH) == HIGH;
}
// Bit patterns of the halves of a word that are NaN or infinity, cleared. Equal to the word for finite input.
FSA_DEVICE u32 finite_or_zero(u32 word) {
    constexpr u32 EXPONENT = IS_BF16 ? 0x7f80u : 0x7c00u;
    u32 keep = 0xffffffffu;
    if ((word & EXPONENT) == EXPONENT) keep &= 0xffff0000u;
    if (((word >> 16) & EXPONENT) == EXPONENT) keep &= 0x0000ffffu;
    return word & keep;
}
