// Softmax state of a thread's two rows over 64 x N score tiles, in log2 units.
#pragma once
#include "block/rows.cuh"

struct RowState {
    f32 max;    // of the scaled logits seen so far; -inf before the first
    f32 sum;    // of 2^(logit - reference), over this thread's columns only
};
constexpr int NO_LIMIT = 1 << 30;
// Where a thread's sum of probabilities relative to an old maximum is too large: f16 ends at 2^16, and their products with values must not overflow.
constexpr f32 LARGE_SUM = 0x1p12f;

// Scores of one tile to probabilities relative to `max` in place, or to zero in groups of eight columns that do not count; their sum over this thread's
// columns, NaN if a score there is not finite.
template <int N, bool HIGH, typename Counts>
FSA_DEVICE f32 kept_step(f32 (&s)[N / 2], f32 max, f32 scale_log2, Counts counts) {
    const f32 reference = max == neg_inf() ? 0.0f : max;
    f32 sum[2] = {0.0f, 0.0f};
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const f32 of_group = counts(8 * i) ? reference : -neg_inf();
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            f32& x = s[4 * i + (HIGH ? 2 : 0) + e];
            x = exp2_fast(fmaf(x, scale_log2, -of_group));
            sum[e] += x;
        }
    }
    return sum[0] + sum[1];
}

// Scores of one tile to probabilities in place; returns the factor for what was summed before. Column c of the tile
// counts iff c <= limit. HIGH picks the thread's second row. `first` says that nothing was summed before.
template <int N, bool HIGH, bool MASKED>
FSA_DEVICE f32 softmax_step(f32 (&s)[N / 2], RowState& state, f32 scale_log2, bool first, int limit) {
    constexpr int E = HIGH ? 2 : 0;
    const int column = 2 * (threadIdx.x & 3);
    f32 top = neg_inf();
    FSA_UNROLL for (int i = 0; i < N / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            if (MASKED && 8 * i + column + e > limit) s[4 * i + E + e] = neg_inf();
            top = fmaxf(top, s[4 * i + E + e]);
        }
    top = quad_max(top);
    f32 max = top == neg_inf() ? top : top * scale_log2;    // scale 0 times -inf would be NaN
    if (!first) max = fmaxf(max, state.max);
    const f32 reference = max == neg_inf() ? 0.0f : max;
    const f32 carry = first ? 0.0f : exp2_fast(state.max - reference);
    f32 sum = 0.0f;
    FSA_UNROLL for (int i = 0; i < N / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            f32& x = s[4 * i + E + e];
            x = exp2_fast(fmaf(x, scale_log2, -reference));
            sum += x;
        }
    state.sum = first ? sum : state.sum * carry + sum;
    state.max = max;
    return carry;
}
