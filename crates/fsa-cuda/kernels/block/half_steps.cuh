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
    i32 plain_first, plain_end;     // halves of which every row sees every key, through its window too, but for the last

    FSA_DEVICE static Halves of(const BandWork& w, int window) {
        Halves h;
        const int steps = ceil_div(w.keys.end, STEP_KEYS) - max_i(0, w.tile.position - window) / STEP_KEYS;
        h.before = w.steps - steps;
        h.end = 2 * steps;
        h.top = w.key(h.before) + HALF_KEYS;
        h.first = h.top < w.keys.end ? 0 : 1;
        h.all_see = w.tile.last_position() - window;
        h.plain_first = ceil_div(max_i(0, h.top + HALF_KEYS - w.keys.end_common), HALF_KEYS);
        h.plain_end = h.top < h.all_see ? 0 : min_i(h.end - 1, (h.top - h.all_see) / HALF_KEYS + 1);
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

    // Of probabilities, the sum of those in the window.
    FSA_DEVICE f32 shown_sum(const HalfScores& s) const {
        f32 sum = 0.0f;
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e)
                if (shows(i, e)) sum += s[4 * i + E + e];
        return sum;
    }
    // Clears probabilities of keys before the window.
    FSA_DEVICE void cut(HalfFragments& a) const {
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i) {
            u32 shown;
            asm("shl.b32 %0, %1, %2;" : "=r"(shown) : "r"(~0u), "r"(16 * max_i(0, first - 8 * i)));     // 0 from 32 on
            a[i / 2][2 * (i & 1) + HIGH] &= shown;
        }
    }

    // From scores, those of no row -inf: the maxima of both branches; the larger for both, if neither sum becomes too small by that. The factors are for what was summed
    // before.
    FSA_DEVICE void raise(const HalfScores& s, f32 scale_log2, f32* maxima, f32* sums, f32& listed_carry, f32& near_carry) const {
        RowState listed = {maxima[0], sums[0]}, near = {quad_sum(sums[1]) == 0.0f ? neg_inf() : maxima[1], sums[1]};     // perhaps only the blocks' so far
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
        maxima[0] = listed.max;
        maxima[1] = near.max;
        sums[0] = listed.sum;
        sums[1] = near.sum;
    }
    // Probabilities of the listed keys, each branch with its own maximum.
    FSA_DEVICE void attend_listed(const HalfScores& s, f32 scale_log2, f32 max, f32& sum, HalfFragments& of_listed) const {
        const f32 reference = max == neg_inf() ? 0.0f : max;
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i) {
            f32 x[2];
            FSA_UNROLL for (int e = 0; e < 2; ++e) {
                x[e] = lists(8 * i) ? exp2_fast(fmaf(s[4 * i + E + e], scale_log2, -reference)) : 0.0f;
                sum += x[e];
            }
            of_listed[i / 2][2 * (i & 1) + HIGH] = pack2(x[0], x[1]);
        }
    }
    // The same of those in the window, in place of the scores.
    FSA_DEVICE void attend_near(HalfScores& s, f32 scale_log2, f32 max, f32& sum) const {
        const f32 reference = max == neg_inf() ? 0.0f : max;
        FSA_UNROLL for (int i = 0; i < HALF_KEYS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e) {
                f32& x = s[4 * i + E + e];
                x = shows(i, e) ? exp2_fast(fmaf(x, scale_log2, -reference)) : 0.0f;
                sum += x;
            }
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

// Sums of a thread's probabilities in a half: of each row the listed ones, and those in the window.
struct HalfSums {
    f32 low_listed, low, high_listed, high;
};
// What a thread's two rows have in registers while a tile goes through its halves.
struct HalfRows {
    ListedBlocks words;             // what they list of the 32 blocks around
    f32 low_max, high_max;          // of the blocks
    HalfSums sums;
    u32 facts;

    static constexpr u32 LOW = 1, HIGH = 2;     // the row exists and sees keys; others may have any scores
    static constexpr u32 SHARES = 4;            // the warp's rows have one reference for both branches
    static constexpr u32 CLEARED = 8;           // some values were not finite
    FSA_DEVICE bool is(u32 fact) const { return facts & fact; }

    // What they list from the block of `key`, the first of a half, on; `known`: the last that was asked for is the half behind it. There are no registers to know small blocks.
    FSA_DEVICE ListedBlocks blocks(const RowLists& lists, int key, bool known) {
        const u32 block = (u32)key / BLOCK_SIZE;
        if (BLOCK_SIZE < HALF_KEYS || !known || (u32)(key + HALF_KEYS) % (32 * BLOCK_SIZE) == 0) words = lists.words(block / 32);
        return {words.low >> block % 32, words.high >> block % 32};
    }
    // Scores to probabilities relative to the maxima; their sums, as if the window showed them all.
    FSA_DEVICE HalfSums exponentiate(HalfScores& s, ListedBlocks blocks, f32 scale_log2) const {
        const f32 low_reference = low_max == neg_inf() ? 0.0f : low_max, high_reference = high_max == neg_inf() ? 0.0f : high_max;
        HalfSums now = {0.0f, 0.0f, 0.0f, 0.0f};
        FSA_UNROLL for (int part = 0; part < HALF_KEYS / PART_KEYS; ++part) {
            f32 low[2] = {0.0f, 0.0f}, high[2] = {0.0f, 0.0f};
            FSA_UNROLL for (int i = part * PART_KEYS / 8; i < (part + 1) * PART_KEYS / 8; ++i)
                FSA_UNROLL for (int e = 0; e < 2; ++e) {
                    f32 &x = s[4 * i + e], &y = s[4 * i + 2 + e];
                    x = exp2_fast(fmaf(x, scale_log2, -low_reference));
                    y = exp2_fast(fmaf(y, scale_log2, -high_reference));
                    low[e] += x;
                    high[e] += y;
                }
            now.low += low[0] + low[1];
            now.high += high[0] + high[1];
            if (blocks.low_lists(part * PART_KEYS)) now.low_listed += low[0] + low[1];
            if (blocks.high_lists(part * PART_KEYS)) now.high_listed += high[0] + high[1];
        }
        return now;
    }
    // Whether what the warp's rows add up to may be relative to the maxima; not if a score is not finite.
    FSA_DEVICE bool fits(const HalfSums& now) const {
        const bool low = now.low_listed + now.low <= LARGE_SUM, high = now.high_listed + now.high <= LARGE_SUM;
        return __all_sync(0xffffffffu, (low | !is(LOW)) & (high | !is(HIGH)));
    }
    FSA_DEVICE void add(const HalfSums& now) {
        sums.low_listed += now.low_listed;
        sums.low += now.low;
        sums.high_listed += now.high_listed;
        sums.high += now.high;
    }
};
// Fragments of the listed probabilities, and of all.
FSA_DEVICE void make_fragments(const HalfScores& s, ListedBlocks blocks, HalfFragments& of_listed, HalfFragments& of_near) {
    FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) {
        const u32 low = blocks.low_lists(16 * k) ? ~0u : 0u, high = blocks.high_lists(16 * k) ? ~0u : 0u;
        to_fragment<HALF_KEYS>(of_near[k], s, k);
        FSA_UNROLL for (int i = 0; i < 4; ++i) of_listed[k][i] = of_near[k][i] & (i & 1 ? high : low);
    }
}
