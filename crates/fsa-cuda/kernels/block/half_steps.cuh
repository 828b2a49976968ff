// Halves of the steps of a window for two attentions at once, to the blocks that a row lists and to its window: which there are, their products, and what a row makes of
// its scores. Accumulator layout of block/rows.cuh.
#pragma once
#include "block/band_pipeline.cuh"
#include "block/softmax.cuh"

constexpr int HALF_KEYS = STEP_KEYS / 2, HALF_BYTES = HALF_KEYS * 128;
constexpr int PART_KEYS = BLOCK_SIZE < HALF_KEYS ? BLOCK_SIZE : HALF_KEYS;     // of a half, which a row lists or not
typedef f32 HalfScores[HALF_KEYS / 2];
typedef u32 HalfFragments[HALF_KEYS / 16][4];

// A branch whose sum of probabilities is at least this, relative to some reference, may have it: f16 has fewer bits below 2^-14.
constexpr f32 SMALL_SUM = IS_BF16 ? 0x1p-32f : 0x1p-4f;

// Steps of the window, in halves: the last keys first. Half j of a tile is one of step j / 2, the upper first.
struct Halves {
    i32 first, end;         // halves; a tile whose last upper half has no key begins with the lower one
    i32 before;             // steps that come before
    i32 top;                // first key of half 0
    i32 all_see;            // first key that the last row's window shows: from it on all do

    FSA_DEVICE static Halves of(const BandWork& w, int window) {
        Halves h;
        const int steps = ceil_div(w.keys.end, STEP_KEYS) - max_i(0, w.tile.position - window) / STEP_KEYS;
        h.before = w.steps - steps;
        h.end = 2 * steps;
        h.top = w.key(h.before) + HALF_KEYS;
        h.first = h.top < w.keys.end ? 0 : 1;
        h.all_see = w.tile.last_position() - window;
        return h;
    }
    FSA_DEVICE static bool is_upper(int j) { return (j & 1) == 0; }
    FSA_DEVICE int step(int j) const { return before + (j >> 1); }
    FSA_DEVICE int key(int j) const { return top - j * HALF_KEYS; }
    // Where it lies in a tile of keys or values.
    FSA_DEVICE static u32 place(u32 tile, int j) { return tile + (is_upper(j) ? HALF_BYTES : 0); }
};

FSA_DEVICE void start_half_scores(HalfScores& s, u32 rows, u32 keys) {
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
        Wgmma<HALF_KEYS>::shared_shared<0, 0>(s, over_columns<CTA_ROWS>(rows, k), over_columns<STEP_KEYS>(keys, k), k != 0);
}
FSA_DEVICE void start_half_sum(Columns& acc, const HalfFragments& a, u32 values) {
    FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) Wgmma<HEAD_DIM>::template registers_shared<1>(acc, a[k], over_rows<STEP_KEYS>(values, k, 0), 1);
}

// One of a thread's two rows (HIGH: the second) in a half.
template <bool HIGH>
struct HalfRow {
    static constexpr int E = HIGH ? 2 : 0;
    u32 blocks;         // what it lists, the first block of the half in bit 0
    i32 first, end;     // columns that its window shows, less the thread's first: [first, end); both branches see none behind them

    FSA_DEVICE bool lists(int column) const { return blocks >> column / BLOCK_SIZE & 1; }
    FSA_DEVICE bool shows(int i, int e) const { return 8 * i + e >= first; }
    FSA_DEVICE void hide(HalfScores& s) const {
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e)
                if (8 * i + e >= end) s[4 * i + E + e] = neg_inf();
    }

    // Scores to probabilities relative to `max`; adds up those that either branch sees. `cuts`: windows of some rows begin in this half.
    FSA_DEVICE void exponentiate(HalfScores& s, f32 max, f32 scale_log2, bool cuts, f32& listed, f32& near) const {
        const f32 reference = max == neg_inf() ? 0.0f : max;
        listed = near = 0.0f;
        FSA_UNROLL for (int part = 0; part < HALF_KEYS / PART_KEYS; ++part) {
            f32 sum[2] = {0.0f, 0.0f};
            FSA_UNROLL for (int i = part * PART_KEYS / 8; i < (part + 1) * PART_KEYS / 8; ++i)
                FSA_UNROLL for (int e = 0; e < 2; ++e) {
                    f32& x = s[4 * i + E + e];
                    x = exp2_fast(fmaf(x, scale_log2, -reference));
                    sum[e] += x;
                }
            const f32 both = sum[0] + sum[1];
            near += both;
            if (lists(part * PART_KEYS)) listed += both;
        }
        if (!cuts) return;
        near = 0.0f;
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e)
                if (shows(i, e)) near += s[4 * i + E + e];
    }
    // Clears probabilities of keys before the window.
    FSA_DEVICE void cut(HalfScores& s) const {
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e)
                if (!shows(i, e)) s[4 * i + E + e] = 0.0f;
    }
    FSA_DEVICE void drop_unlisted(HalfFragments& a) const {
        FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) {
            if (lists(16 * k)) continue;
            a[k][HIGH] = 0;
            a[k][2 + HIGH] = 0;
        }
    }

    // From scores, those of no row -inf: the maxima of both branches, then probabilities with a reference for each: the larger maximum for both, if neither sum becomes
    // too small by that. The factors are for what was summed before.
    FSA_DEVICE void restart(const HalfScores& s, f32 scale_log2, f32* maxima, f32* sums, HalfFragments& of_listed, HalfFragments& of_near, f32& listed_carry, f32& near_carry) const {
        RowState listed = {maxima[0], sums[0]}, near = {maxima[1], sums[1]};
        f32 listed_top = neg_inf(), near_top = neg_inf();
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e) {
                const f32 x = s[4 * i + E + e];
                if (lists(8 * i)) listed_top = fmaxf(listed_top, x);
                if (shows(i, e)) near_top = fmaxf(near_top, x);
            }
        const f32 listed_max = raised(listed, listed_top, scale_log2), near_max = raised(near, near_top, scale_log2);
        const f32 common = fmaxf(listed_max, near_max);
        const bool share = is_large(listed, listed_top, scale_log2, common) & is_large(near, near_top, scale_log2, common);
        listed_carry = carry_to(listed, share ? common : listed_max);
        near_carry = carry_to(near, share ? common : near_max);
        const f32 listed_reference = listed.max == neg_inf() ? 0.0f : listed.max, near_reference = near.max == neg_inf() ? 0.0f : near.max;
        FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k)
            FSA_UNROLL for (int part = 0; part < 2; ++part) {
                f32 x[2], y[2];
                FSA_UNROLL for (int e = 0; e < 2; ++e) {
                    const int i = 2 * k + part;
                    const f32 score = s[4 * i + E + e];
                    x[e] = lists(16 * k) ? exp2_fast(fmaf(score, scale_log2, -listed_reference)) : 0.0f;
                    y[e] = shows(i, e) ? exp2_fast(fmaf(score, scale_log2, -near_reference)) : 0.0f;
                    listed.sum += x[e];
                    near.sum += y[e];
                }
                of_listed[k][2 * part + HIGH] = pack2(x[0], x[1]);
                of_near[k][2 * part + HIGH] = pack2(y[0], y[1]);
            }
        maxima[0] = listed.max;
        maxima[1] = near.max;
        sums[0] = listed.sum;
        sums[1] = near.sum;
    }

  private:
    // All lanes of a quad get the same.
    FSA_DEVICE static f32 raised(const RowState& state, f32& top, f32 scale_log2) {
        top = quad_max(top);
        return fmaxf(state.max, top == neg_inf() ? top : top * scale_log2);
    }
    // Whether the sum, relative to `reference`, will do; false for what is not finite.
    FSA_DEVICE static bool is_large(const RowState& state, f32 top, f32 scale_log2, f32 reference) {
        const f32 before = quad_sum(state.sum) * exp2_fast(state.max - reference), now = exp2_fast(fmaf(top, scale_log2, -reference));
        return before + now >= SMALL_SUM && before + now < -neg_inf();
    }
    FSA_DEVICE static f32 carry_to(RowState& state, f32 max) {
        const f32 carry = exp2_fast(state.max - (max == neg_inf() ? 0.0f : max));
        state.sum *= carry;
        state.max = max;
        return carry;
    }
};
