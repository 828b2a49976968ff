// Scores of blocks on their way from the warps that attend to those that choose, or to their own choice: sums of groups of keys relative to the row's maximum at their step, in memory
// that stays in L2 for the most part, and what turns them into probabilities. Two slots of a tile's rows each, or one. A row's 32 sums of a step are
// eight pieces of four groups, eight apart: piece 4 c + t has the groups 8 j + 2 t + c, so that a quad stores whole sectors.
// A maximum is raised only where scores exceed it by much, so nearly all sums of a row are relative to one, and one factor makes scores of them.
#pragma once
#include "block/group_scores.cuh"
#include "block/softmax.cuh"

constexpr int SLOTS = HAS_CHOOSERS ? 2 : 1;
constexpr int PART_STEPS = 4;                                               // that are read together
constexpr int WARP_TILE_ROWS = 16, ROW_WARPS = CTA_ROWS / WARP_TILE_ROWS;   // rows of a warp that attends; such warps

// A tile whose scores are in a slot.
struct ChosenTile {
    i32 position, tokens, steps;    // of the first token; tokens that exist; steps whose scores there are
    i32 token, kv_head;
    i32 number;                     // in the order of launch
};

struct ScoreSlots {
    Ring<SLOTS> ring;           // readers are the warps that choose, writers those that attend; of no use where these are the same
    f32* references;            // [SLOTS, CTA_ROWS] in shared memory: log2-sum-exps, infinity of a row that does not vote; for warps that choose, maxima of the last step
    f32* factors;               // [SLOTS, CTA_ROWS] in shared memory, for warps that choose: of sums relative to these maxima, 0 of a row that does not vote
    i32* differing;             // [SLOTS, ROW_WARPS] in shared memory, for warps that choose: the step from which on a warp's rows all vote with these factors
    ChosenTile* tiles;          // [SLOTS] in shared memory
    f32* scores;                // [SLOTS] of this cta
    i32 max_steps;

    FSA_DEVICE f32* sums(u32 n) const { return scores + (i64)Ring<SLOTS>::place(n) * CTA_ROWS * (GROUPS + 1) * max_steps; }
    FSA_DEVICE f32* maxima(u32 n) const { return sums(n) + CTA_ROWS * GROUPS * max_steps; }
    FSA_DEVICE ChosenTile& tile_of(u32 n) const { return tiles[Ring<SLOTS>::place(n)]; }
    FSA_DEVICE f32* references_of(u32 n) const { return references + Ring<SLOTS>::place(n) * CTA_ROWS; }
    FSA_DEVICE f32* factors_of(u32 n) const { return factors + Ring<SLOTS>::place(n) * CTA_ROWS; }
    FSA_DEVICE i32* differing_of(u32 n) const { return differing + Ring<SLOTS>::place(n) * ROW_WARPS; }
    // Steps of a row that lie together, before those of the next row. Warps that choose copy a part of many rows at a time.
    FSA_DEVICE int row_steps() const { return HAS_CHOOSERS ? PART_STEPS : max_steps; }
    // Where a row's maximum of a step is, and the GROUPS sums.
    FSA_DEVICE int number(int row, int step) const { return (step / row_steps() * CTA_ROWS + row) * row_steps() + step % row_steps(); }
};

// Maximum of a row's scores of a step; HIGH: the thread's second row.
template <bool HIGH>
FSA_DEVICE f32 top_of(const Scores& s) {
    f32 top = neg_inf();
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) top = fmaxf(top, s[4 * i + (HIGH ? 2 : 0) + e]);
    return quad_max(top);
}
FSA_DEVICE f32 reference_of(const RowState& state) { return state.max == neg_inf() ? 0.0f : state.max; }
// By how much, in log2 units, scores may exceed their row's maximum before it is raised: f16 ends at 2^16.
constexpr f32 RAISE = 12.0f;
// Makes scores log2 of probabilities relative to the row's maximum so far. The largest of the thread's: as an integer, which orders numbers above 0 as they are.
template <bool HIGH>
FSA_DEVICE i32 relate(Scores& s, const RowState& state, f32 scale_log2) {
    const f32 reference = reference_of(state);
    i32 top[2] = {(i32)0x80000000, (i32)0x80000000};
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i) {
        f32* x = &s[4 * i + (HIGH ? 2 : 0)];
        FSA_UNROLL for (int e = 0; e < 2; ++e) x[e] = fmaf(x[e], scale_log2, -reference);
        top[i & 1] = max_i(max_i(top[i & 1], __float_as_int(x[0])), __float_as_int(x[1]));
    }
    return max_i(top[0], top[1]);
}
FSA_DEVICE bool exceeds(const RowState& state, i32 top) { return state.max == neg_inf() || top > __float_as_int(RAISE); }
// Raises the maximum to the largest of these numbers, if that is much or there was none; the factor for what was summed before.
template <bool HIGH>
FSA_DEVICE f32 raise(Scores& s, RowState& state, i32 known) {
    known = max_i(known, __shfl_xor_sync(0xffffffffu, known, 1));
    f32 top = __int_as_float(max_i(known, __shfl_xor_sync(0xffffffffu, known, 2)));
    const bool none = state.max == neg_inf();
    if (__any_sync(0xffffffffu, none)) {        // numbers below 0 count, too
        const f32 exact = top_of<HIGH>(s);
        if (none) top = exact;
    }
    if (!(top > (none ? neg_inf() : RAISE))) return 1.0f;
    const f32 before = reference_of(state);
    state.max = before + top;
    const f32 by = state.max - before;          // of the rounded maximum, which later steps take
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e) s[4 * i + (HIGH ? 2 : 0) + e] -= by;
    return none ? 0.0f : exp2_fast(-by);
}
// Probabilities, and their sums over groups, in which the first three keys of a group count `inner` times.
template <bool HIGH>
FSA_DEVICE void exponentials(Scores& s, GroupSums& sums, f32 inner) {
    constexpr int E = HIGH ? 2 : 0;
    FSA_UNROLL for (int j = 0; j < OCTETS; ++j)
        FSA_UNROLL for (int c = 0; c < 2; ++c) {
            f32 key[4];
            FSA_UNROLL for (int e = 0; e < 4; ++e) {
                f32& x = s[4 * (e * OCTETS + j) + E + c];
                key[e] = x = exp2_fast(x);
            }
            sums[2 * j + c] = fmaf(inner, key[0] + key[1] + key[2], key[3]);
        }
}

// What a thread leaves of its rows `row` and `row` + 8.
struct ScoreWriter {
    f32 *sums, *maxima;         // of the first row, from the next step on
    i32 row_steps;
    f32 carry_low, carry_high;  // last key of the step before, where it counts in the first group of the next

    FSA_DEVICE void open(const ScoreSlots& slots, u32 n, int row) {
        row_steps = slots.row_steps();
        sums = slots.sums(n) + slots.number(row, 0) * GROUPS + 4 * (threadIdx.x & 3);
        maxima = slots.maxima(n) + slots.number(row, 0);
        carry_low = carry_high = 0.0f;
    }
    // Makes the scores of step n, the next, probabilities, and leaves their sums; `overlap`: a key reaches into the next group. The factors for what was summed before, and
    // whether one of the warp's is not 1. What is done for one row runs under the latencies of the other.
    FSA_DEVICE bool leave(Scores& s, int n, RowState& low, RowState& high, f32 scale_log2, bool overlap, f32& low_factor, f32& high_factor) {
        GroupSums low_sums, high_sums;
        const f32 inner = overlap ? 2.0f : 1.0f;
        if (n == 0) {       // as of later steps, so that equal scores stay equal
            const f32 low_top = top_of<false>(s), high_top = top_of<true>(s);
            low.max = low_top == neg_inf() ? low_top : low_top * scale_log2;        // scale 0 times -inf would be NaN
            high.max = high_top == neg_inf() ? high_top : high_top * scale_log2;
        }
        const i32 low_top = relate<false>(s, low, scale_log2), high_top = relate<true>(s, high, scale_log2);
        bool raised = false;
        low_factor = high_factor = 1.0f;
        if (n > 0 && __any_sync(0xffffffffu, exceeds(low, low_top) || exceeds(high, high_top))) {
            low_factor = raise<false>(s, low, low_top);
            high_factor = raise<true>(s, high, high_top);
            carry_low *= low_factor;
            carry_high *= high_factor;
            low.sum *= low_factor;
            high.sum *= high_factor;
            raised = __any_sync(0xffffffffu, low_factor != 1.0f || high_factor != 1.0f);
        }
        exponentials<false>(s, low_sums, inner);
        exponentials<true>(s, high_sums, inner);
        low.sum += add_overlap<false>(low_sums, s, carry_low, inner - 1.0f);        // without a branch, among the exponentials
        high.sum += add_overlap<true>(high_sums, s, carry_high, inner - 1.0f);
        store(sums, low_sums);
        store(sums + 8 * row_steps * GROUPS, high_sums);
        if ((threadIdx.x & 3) == 0) {
            maxima[0] = low.max;
            maxima[8 * row_steps] = high.max;
        }
        const int next = HAS_CHOOSERS && n % PART_STEPS == PART_STEPS - 1 ? (CTA_ROWS - 1) * PART_STEPS + 1 : 1;
        sums += next * GROUPS;
        maxima += next;
        return raised;
    }
    // Makes of the sums of all groups those of all keys: where keys reach into the next group, each counts twice but the last, which counts once.
    FSA_DEVICE void close(RowState& low, RowState& high, bool overlap) const {
        const f32 last = (threadIdx.x & 3) == 0 ? 0.5f : 0.0f;
        if (overlap) {
            low.sum = 0.5f * low.sum + last * carry_low;
            high.sum = 0.5f * high.sum + last * carry_high;
        }
    }

  private:
    static FSA_DEVICE void store(f32* target, const GroupSums& v) {
        static_assert(OCTETS == 4, "pieces of four groups");
        FSA_UNROLL for (int c = 0; c < 2; ++c) store_global(target + 16 * c, as_words(v[c], v[2 + c], v[4 + c], v[6 + c]));
    }
};
