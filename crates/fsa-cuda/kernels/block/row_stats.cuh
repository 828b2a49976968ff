// What the backward of an attention knows of a query row: P' = 2^(scale_log2 * score - lse) is its probability times its gate, and
// dS = P' (dP - delta), so that the gradient of the row's output is read as it came, without the gate. A gate below zero makes P' negative: the
// lowest bit of the mantissa of delta says so, which is far below the error of delta itself. Steps with such a row take the way of masked steps.
#pragma once
#include "base/math.cuh"

struct __align__(8) RowStats {
    f32 lse, delta;     // log2 of the sum over |gate|; sum of grad_out * out minus grad_lse, with the sign of the gate
};
// Statistics of the two neighbouring rows that a thread meets in columns 8 i + 2 t and + 1 of a tile: one 16-byte load.
struct __align__(16) StatsPair {
    RowStats first, second;
};

FSA_DEVICE bool is_negative(const RowStats& stats) { return __float_as_uint(stats.delta) & 1; }
// Delta with the sign of a gate. An infinite delta of a negative gate becomes NaN.
FSA_DEVICE f32 with_sign(f32 delta, bool negative) { return __uint_as_float((__float_as_uint(delta) & ~1u) | negative); }

// Of a row that sees no key or does not exist: every probability is 2^-inf = 0.
FSA_DEVICE RowStats no_row_stats() { return {__int_as_float(0x7f800000), 0.0f}; }
// Of a row with the natural log-sum-exp `lse`.
FSA_DEVICE RowStats make_row_stats(f32 lse, f32 delta) { return lse == neg_inf() ? no_row_stats() : RowStats{lse * LOG2_E, with_sign(delta, false)}; }
// The same of a row with a gate: zero makes every probability zero.
FSA_DEVICE RowStats gated_row_stats(f32 lse, f32 delta, f32 gate) {
    return lse == neg_inf() ? no_row_stats() : RowStats{fmaf(lse, LOG2_E, -log2_fast(fabsf(gate))), with_sign(delta, gate < 0.0f)};
}

// A probability with the sign of the row's gate.
FSA_DEVICE f32 with_sign_of(f32 probability, f32 delta) { return __uint_as_float(__float_as_uint(probability) ^ __float_as_uint(delta) << 31); }
// The same of probabilities, or score gradients, with rows as columns of the accumulator.
template <int N>
FSA_DEVICE void apply_signs(f32 (&s)[N / 2], const RowStats* stats) {
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * i + 2 * (threadIdx.x & 3));
        FSA_UNROLL for (int e = 0; e < 4; ++e) {
            s[4 * i + e] = with_sign_of(s[4 * i + e], e & 1 ? pair.second.delta : pair.first.delta);
        }
    }
}
