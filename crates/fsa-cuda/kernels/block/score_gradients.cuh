// Probabilities and score gradients of transposed score tiles: rows of the accumulator are keys, columns are query rows, whose
// statistics lie in shared memory.
#pragma once
#include "block/row_stats.cuh"

// Probabilities from scores, in place: column c of the tile is row c of `stats`; keys above its limit do not count. MASKED also gives them the
// signs of the rows' gates.
template <int N, bool MASKED, typename Limit>
FSA_DEVICE void probabilities(f32 (&s)[N / 2], const RowStats* stats, const Limit* limits, int key_low, f32 scale_log2) {
    const int t = threadIdx.x & 3;
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * i + 2 * t);
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const f32 lse = e == 0 ? pair.first.lse : pair.second.lse;
            s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], scale_log2, -lse));
            s[4 * i + 2 + e] = exp2_fast(fmaf(s[4 * i + 2 + e], scale_log2, -lse));
            if (MASKED) {
                const int limit = limits[8 * i + 2 * t + e];
                const f32 sign = is_negative(e == 0 ? pair.first : pair.second) ? -1.0f : 1.0f;
                s[4 * i + e] = key_low > limit ? 0.0f : s[4 * i + e] * sign;
                s[4 * i + 2 + e] = key_low + 8 > limit ? 0.0f : s[4 * i + 2 + e] * sign;
            }
        }
    }
}
// dS = P (dP - delta), zero where P was masked even if dP is not finite.
template <int N, bool MASKED, typename Limit>
FSA_DEVICE void score_gradients(f32 (&dp)[N / 2], const f32 (&probability)[N / 2], const RowStats* stats, const Limit* limits, int key_low) {
    const int t = threadIdx.x & 3;
    FSA_UNROLL for (int i = 0; i < N / 8; ++i) {
        const StatsPair pair = *(const StatsPair*)(stats + 8 * i + 2 * t);
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            const f32 delta = e == 0 ? pair.first.delta : pair.second.delta;
            dp[4 * i + e] = probability[4 * i + e] * (dp[4 * i + e] - delta);
            dp[4 * i + 2 + e] = probability[4 * i + 2 + e] * (dp[4 * i + 2 + e] - delta);
            if (MASKED) {
                const int limit = limits[8 * i + 2 * t + e];
                if (key_low > limit) dp[4 * i + e] = 0.0f;
                if (key_low + 8 > limit) dp[4 * i + 2 + e] = 0.0f;
            }
        }
    }
}
