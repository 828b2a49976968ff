// Scores of blocks on their way from the warps that attend to those that choose, or to their own choice: sums of groups of keys relative to the row's maximum at their step, in memory
// that stays in L2 for the most part, and the log-sum-exps that turn them into probabilities. Two slots of a tile's rows each, or one. A row's 32 sums of a step are
// eight pieces of four groups, eight apart: piece 4 c + t has the groups 8 j + 2 t + c, so that a quad stores whole sectors.
#pragma once
#include "block/group_scores.cuh"
#include "block/softmax.cuh"

constexpr int SLOTS = HAS_CHOOSERS ? 2 : 1;

// A tile whose scores are in a slot.
struct ChosenTile {
    i32 position, tokens, steps;    // of the first token; tokens that exist; steps whose scores there are
    i32 token, kv_head;
};

struct ScoreSlots {
    Ring<SLOTS> ring;           // readers are the warps that choose, writers those that attend; of no use where these are the same
    f32* references;            // [SLOTS, CTA_ROWS] in shared memory: log2-sum-exps, infinity of a row that does not vote
    ChosenTile* tiles;          // [SLOTS] in shared memory
    f32* scores;                // [SLOTS] of this cta
    i32 max_steps;

    FSA_DEVICE f32* sums(u32 n) const { return scores + (i64)Ring<SLOTS>::place(n) * CTA_ROWS * (GROUPS + 1) * max_steps; }
    FSA_DEVICE f32* maxima(u32 n) const { return sums(n) + CTA_ROWS * GROUPS * max_steps; }
    FSA_DEVICE ChosenTile& tile_of(u32 n) const { return tiles[Ring<SLOTS>::place(n)]; }
    FSA_DEVICE f32* references_of(u32 n) const { return references + Ring<SLOTS>::place(n) * CTA_ROWS; }
};

// Maximum of a row's scores of a step; HIGH: the thread's second row.
template <bool HIGH>
FSA_DEVICE f32 top_of(const Scores& s) {
    f32 top = neg_inf();
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) top = fmaxf(top, s[4 * i + (HIGH ? 2 : 0) + e]);
    return quad_max(top);
}
// Takes it into the state; the factor for what was summed before.
FSA_DEVICE f32 raise(RowState& state, f32 top, f32 scale_log2) {
    const f32 before = state.max;
    state.max = fmaxf(before, top == neg_inf() ? top : top * scale_log2);    // scale 0 times -inf would be NaN
    return exp2_fast(before - (state.max == neg_inf() ? 0.0f : state.max));
}
// Scores to probabilities, and their sums over groups, in which the first three keys of a group count `inner` times.
template <bool HIGH>
FSA_DEVICE void exponentials(Scores& s, GroupSums& sums, RowState& state, f32 scale_log2, f32 factor, f32 inner) {
    constexpr int E = HIGH ? 2 : 0;
    const f32 reference = state.max == neg_inf() ? 0.0f : state.max;
    f32 sum = 0.0f;
    FSA_UNROLL for (int j = 0; j < OCTETS; ++j)
        FSA_UNROLL for (int c = 0; c < 2; ++c) {
            f32 key[4];
            FSA_UNROLL for (int e = 0; e < 4; ++e) {
                f32& x = s[4 * (e * OCTETS + j) + E + c];
                key[e] = x = exp2_fast(fmaf(x, scale_log2, -reference));
            }
            const f32 first = key[0] + key[1] + key[2];
            sums[2 * j + c] = fmaf(inner, first, key[3]);
            sum += first + key[3];
        }
    state.sum = state.sum * factor + sum;
}

// What a thread leaves of its rows `row` and `row` + 8.
struct ScoreWriter {
    f32 *sums, *maxima;         // of the first row, from the next step on
    i32 max_steps;
    f32 carry_low, carry_high;  // last key of the step before, where it counts in the first group of the next

    FSA_DEVICE void open(const ScoreSlots& slots, u32 n, int row) {
        max_steps = slots.max_steps;
        sums = slots.sums(n) + row * GROUPS * max_steps + 4 * (threadIdx.x & 3);
        maxima = slots.maxima(n) + row * max_steps;
        carry_low = carry_high = 0.0f;
    }
    // Makes the scores of the next step probabilities, as softmax_step does, and leaves their sums; `overlap`: a key reaches into the next group. What is done for one
    // row runs under the latencies of the other.
    FSA_DEVICE void leave(Scores& s, RowState& low, RowState& high, f32 scale_log2, bool overlap, f32& low_factor, f32& high_factor) {
        GroupSums low_sums, high_sums;
        const f32 low_top = top_of<false>(s), high_top = top_of<true>(s), inner = overlap ? 2.0f : 1.0f;
        low_factor = raise(low, low_top, scale_log2);
        high_factor = raise(high, high_top, scale_log2);
        exponentials<false>(s, low_sums, low, scale_log2, low_factor, inner);
        exponentials<true>(s, high_sums, high, scale_log2, high_factor, inner);
        carry_low *= low_factor;
        carry_high *= high_factor;
        add_overlap<false>(low_sums, s, carry_low, inner - 1.0f);       // without a branch, among the exponentials
        add_overlap<true>(high_sums, s, carry_high, inner - 1.0f);
        store(sums, low_sums);
        store(sums + 8 * GROUPS * max_steps, high_sums);
        if ((threadIdx.x & 3) == 0) {
            maxima[0] = low.max;
            maxima[8 * max_steps] = high.max;
        }
        sums += GROUPS;
        ++maxima;
    }

  private:
    static FSA_DEVICE void store(f32* target, const GroupSums& v) {
        static_assert(OCTETS == 4, "pieces of four groups");
        FSA_UNROLL for (int c = 0; c < 2; ++c) store_global(target + 16 * c, as_words(v[c], v[2 + c], v[4 + c], v[6 + c]));
    }
};
