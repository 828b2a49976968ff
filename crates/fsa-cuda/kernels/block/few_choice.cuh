// The best blocks of tokens that have few, chosen by a warp, LANES lanes a token: the sums of a token's heads are added up in registers and stay there, as
// integers, which order as scores do. The best of 32 sets of a token's blocks give a bound that enough blocks reach; blocks are dropped from below until no more
// reach it than there are places. Exact: among equal scores the lower ids stay.
#pragma once
#include "block/candidates.cuh"
#include "block/chosen_mask.cuh"
#include "block/score_slots.cuh"

constexpr int FEW_STEPS = PART_STEPS;               // that lanes have registers for
constexpr i32 ABSENT = (i32)0xbf800000;             // -1: scores are not negative
constexpr int COPY_BYTES = 16384;                   // of a warp, for sums on their way

template <int LANES>
struct FewChooser {
    static constexpr int TOKENS = 32 / LANES, PIECES = 8 / LANES, KEYS = 4 * PIECES;    // of a warp; of a lane and step; its blocks of a step
    static constexpr int HEAD_BYTES = FEW_STEPS * PIECES * 512, HEADS = COPY_BYTES / HEAD_BYTES;    // of a head's sums; heads on their way
    typedef i32 Scores[FEW_STEPS][KEYS];

    const BlockChoice& choice;
    const ScoreSlots& slots;
    u32 copies;                 // shared memory of the lane
    u32 slot;
    int heads;                  // of a token
    int position, tokens;       // of the tile
    int attended;               // steps whose sums there are

    FSA_DEVICE static int place() { return lane_number() & (LANES - 1); }
    // Block of word j of the lane's piece p of a step, less its 8 j + p: piece 4 c + t has the groups 8 j + 2 t + c.
    FSA_DEVICE static int first_block() { return 2 * (place() & 3) + place() / 4; }
    FSA_DEVICE static constexpr int distance(int key) { return key % 4 * 8 + key / 4; }
    template <typename T, typename F>
    FSA_DEVICE static T over_lanes(T x, F f) {
        FSA_UNROLL for (int mask = 1; mask < LANES; mask *= 2) x = f(x, __shfl_xor_sync(ALL_LANES, x, mask));
        return x;
    }

    FSA_DEVICE void copy(const f32* sums, int head, int steps) const {
        const f32* from = sums + head * FEW_STEPS * GROUPS;
        FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
            if (i < steps)
                FSA_UNROLL for (int p = 0; p < PIECES; ++p)
                    copy_async(copies + head % HEADS * HEAD_BYTES + (PIECES * i + p) * 512, from + i * GROUPS + p * LANES * 4);
    }
    // Adds up the heads of the lane's token: of `steps` steps, which may not be all that blocks compete of.
    FSA_DEVICE void gather(f32 (&sum)[FEW_STEPS][KEYS], int token, int steps) const {
        const int row = token * heads;
        const f32 *sums = slots.sums(slot) + row * FEW_STEPS * GROUPS + 4 * place(), *maxima = slots.maxima(slot) + row * FEW_STEPS;
        const f32 *references = slots.references_of(slot) + row, *row_factors = slots.factors_of(slot) + row;
        FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
            FSA_UNROLL for (int k = 0; k < KEYS; ++k) sum[i][k] = 0.0f;
        if (steps <= 0) return;
        FSA_UNROLL for (int h = 0; h < HEADS; ++h) {
            if (h < heads) copy(sums, h, steps);
            copy_commit();
        }
        FSA_NO_UNROLL for (int from = 0; from < heads; from += LANES) {     // a lane has the factors of one of these
            const bool exists = from + place() < heads;
            const Vec4 tops = exists ? load_global_written(maxima + (from + place()) * FEW_STEPS) : Vec4{0, 0, 0, 0};
            const f32 reference = exists ? references[from + place()] : 0.0f, by = exists ? row_factors[from + place()] : 0.0f;
            const f32 factors[FEW_STEPS] = {by * exp2_small(__uint_as_float(tops.x) - reference), by * exp2_small(__uint_as_float(tops.y) - reference),
                                            by * exp2_small(__uint_as_float(tops.z) - reference), by * exp2_small(__uint_as_float(tops.w) - reference)};
            const u32 voting = __ballot_sync(ALL_LANES, by > 0.0f) >> (lane_number() & ~(LANES - 1));
            FSA_NO_UNROLL for (int n = 0; n < LANES && from + n < heads; ++n) {
                const u32 sums_at = copies + (from + n) % HEADS * HEAD_BYTES;
                f32 factor[FEW_STEPS];
                FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i) factor[i] = __shfl_sync(ALL_LANES, factors[i], n, LANES);
                copy_wait<HEADS - 1>();
                FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
                    if (i < steps)
                        FSA_UNROLL for (int p = 0; p < PIECES; ++p) {
                            const Vec4 x = load_shared(sums_at + (PIECES * i + p) * 512);
                            if (voting >> n & 1) {
                                sum[i][4 * p] = fmaf(__uint_as_float(x.x), factor[i], sum[i][4 * p]);
                                sum[i][4 * p + 1] = fmaf(__uint_as_float(x.y), factor[i], sum[i][4 * p + 1]);
                                sum[i][4 * p + 2] = fmaf(__uint_as_float(x.z), factor[i], sum[i][4 * p + 2]);
                                sum[i][4 * p + 3] = fmaf(__uint_as_float(x.w), factor[i], sum[i][4 * p + 3]);
                            }
                        }
                if (from + n + HEADS < heads) copy(sums, from + n + HEADS, steps);
                copy_commit();
            }
        }
    }
    // A score that at least `places` of the token's blocks reach.
    FSA_DEVICE static i32 bound_of(const Scores& score, int steps, int places) {
        i32 best[KEYS];
        FSA_UNROLL for (int k = 0; k < KEYS; ++k) best[k] = score[0][k];
        FSA_UNROLL for (int i = 1; i < FEW_STEPS; ++i)
            if (i < steps)
                FSA_UNROLL for (int k = 0; k < KEYS; ++k) best[k] = max_i(best[k], score[i][k]);
        order_lanes<LANES>(best, place());
        return key_at<LANES>(best, max_i(places - 1, 0));
    }
    // Raises the bound while enough blocks exceed it.
    FSA_DEVICE static void raise(const Scores& score, int steps, int places, i32& bound) {
        bool again = true;
        FSA_NO_UNROLL while (again) {
            int above[2] = {0, 0};
            i32 least[2] = {0x7fffffff, 0x7fffffff};
            FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
                if (i < steps)
                    FSA_UNROLL for (int k = 0; k < KEYS; ++k)
                        if (score[i][k] > bound) {
                            ++above[k & 1];
                            least[k & 1] = min_i(least[k & 1], score[i][k]);
                        }
            const int count = over_lanes(above[0] + above[1], [](int a, int b) { return a + b; });
            const i32 next = over_lanes(min_i(least[0], least[1]), [](i32 a, i32 b) { return min_i(a, b); });
            if (count >= places) bound = next;
            again = __any_sync(ALL_LANES, count >= places);
        }
    }
    // The blocks with `takes(score)` in the order of ids, a bit each: a lane has LANES-ths of the steps' words.
    template <typename F>
    FSA_DEVICE static u32 word_of(const Scores& score, int steps, F takes) {
        u32 words[FEW_STEPS];
        FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i) {
            words[i] = 0;
            if (i < steps)
                FSA_UNROLL for (int k = 0; k < KEYS; ++k)
                    if (takes(score[i][k])) words[i] |= 1u << distance(k);
            words[i] <<= first_block();
        }
        const bool second = place() & LANES / 2, odd = place() & LANES / 4;
        const u32 even_word = (second ? words[2] : words[0]) | __shfl_xor_sync(ALL_LANES, second ? words[0] : words[2], LANES / 2);
        const u32 odd_word = (second ? words[3] : words[1]) | __shfl_xor_sync(ALL_LANES, second ? words[1] : words[3], LANES / 2);
        u32 word = (odd ? odd_word : even_word) | __shfl_xor_sync(ALL_LANES, odd ? even_word : odd_word, LANES / 4);
        if (LANES == 8) word = (word | __shfl_xor_sync(ALL_LANES, word, 1)) & (place() & 1 ? 0xffff0000u : 0xffffu);
        return word;
    }
    // Sum over the lanes of the token up to this one.
    FSA_DEVICE static int up_to(int x) {
        FSA_UNROLL for (int distance = 1; distance < LANES; distance *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, x, distance, LANES);
            if (place() >= distance) x += other;
        }
        return x;
    }
    FSA_DEVICE RowBlocks blocks_of(int token) const { return row_blocks(position + token, choice.topk, choice.init_blocks, choice.local_blocks); }
    // Of the lane's `word` of listed blocks those that equal the bound go, the last first, until the token lists no more than `places`.
    FSA_DEVICE static u32 drop(u32 word, u32 equal, int places) {
        const int surplus = __shfl_sync(ALL_LANES, up_to(__popc(word)), LANES - 1, LANES) - places, count = __popc(equal), before = up_to(count);
        const int behind = __shfl_sync(ALL_LANES, before, LANES - 1, LANES) - before;
        FSA_NO_UNROLL for (int drops = min_i(surplus - behind, count); __any_sync(ALL_LANES, drops > 0); --drops)
            if (drops > 0) {
                const u32 highest = 0x80000000u >> __clz(equal);
                equal ^= highest;
                word ^= highest;
            }
        return word;
    }
    // The lane's word of the token's best blocks: of those that compete as many as there are places.
    FSA_DEVICE u32 best_of(Scores& score, int first, int steps, int& places) const {
        const int token = first + lane_number() / LANES;
        const RowBlocks blocks = blocks_of(token);
        const int least = blocks_of(first).end_scored, begin = blocks.first_scored - first_block(), end = blocks.end_scored - first_block();
        const bool takes = token < tokens && !blocks.lists_all() && blocks.places > 0;
        places = takes ? blocks.places : 0;
        FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
            if (i < steps && (GROUPS * i < choice.init_blocks || GROUPS * (i + 1) > least))
                FSA_UNROLL for (int k = 0; k < KEYS; ++k)
                    if (GROUPS * i + distance(k) < begin || GROUPS * i + distance(k) >= end) score[i][k] = ABSENT;
        i32 bound = bound_of(score, steps, places);
        if (!takes) bound = 0x7fffffff;
        raise(score, steps, takes ? places : CANDIDATES * FEW_STEPS, bound);
        u32 word = word_of(score, steps, [&](i32 s) { return s >= bound; });
        if (!takes) word = 0;
        const int listed = over_lanes(__popc(word), [](int a, int b) { return a + b; });
        if (__any_sync(ALL_LANES, listed > places)) word = drop(word, word & word_of(score, steps, [&](i32 s) { return s == bound; }), places);
        return word;
    }
    // Writes the lists of TOKENS tokens from `first` on, and the bits of these. `read` is called once their sums are.
    template <typename F>
    FSA_DEVICE void list(int first, i64 first_row, ChosenBits& bits, F read) const {
        const RowBlocks last = blocks_of(min_i(first + TOKENS, tokens) - 1);
        const int steps = last.lists_all() || last.places == 0 ? 0 : ceil_div(last.end_scored, GROUPS);
        Scores score;
        {
            f32 sum[FEW_STEPS][KEYS];
            gather(sum, first + lane_number() / LANES, min_i(steps, attended));
            FSA_UNROLL for (int i = 0; i < FEW_STEPS; ++i)
                FSA_UNROLL for (int k = 0; k < KEYS; ++k) score[i][k] = __float_as_int(sum[i][k]);
        }
        read();
        u32 word = 0;
        int places = 0;
        if (steps > 0) word = best_of(score, unknown(first), steps, places);
        const int token = unknown(first) + lane_number() / LANES;
        const RowBlocks blocks = blocks_of(token);
        u32 listed = word | forced_bits(blocks, places, choice.topk, step());
        if (LANES == 8) listed |= __shfl_xor_sync(ALL_LANES, listed, 1);
        if (choice.mask.rows != nullptr) {
            if (token < tokens && step() < choice.mask.words) choice.mask.rows[(first_row + token) * choice.mask.words + step()] = listed;
            bits.add<LANES>(slot & 1, step(), listed, token < tokens);
        }
        write(choice.topk_indices + (first_row + token) * choice.topk, blocks, listed, token < tokens, choice.topk, min_i(ceil_div(last.candidates, GROUPS), FEW_STEPS));
    }
    // Writes the token's list: blocks of `words` words of bits, of which the lanes have one each, in the order of ids. A lane has a piece of every word.
    FSA_DEVICE static void write(i32* row, const RowBlocks& blocks, u32 listed, bool exists, int topk, int words) {
        const int own = first_block();
        const char* list = (const char*)row;
        keep(list);
        int count = 0;
        FSA_NO_UNROLL for (int w = 0; w < words; ++w) {
            u32 bits = __shfl_sync(ALL_LANES, listed, w * (LANES / 4), LANES);
            if (!exists) bits = 0;
            FSA_UNROLL for (int k = 0; k < KEYS; ++k) {
                const u32 bit = 1u << own << distance(k);
                store_global_if(bits & bit, (i32*)list + (count + __popc(bits & (bit - 1))), GROUPS * w + distance(k) + own);
            }
            count += __popc(bits);
        }
        if (!exists) return;
        // Behind the words there are last blocks alone.
        const int behind = max_i(blocks.lists_all() ? blocks.first_scored : blocks.end_scored, GROUPS * FEW_STEPS), end = count + blocks.candidates - behind;
        FSA_NO_UNROLL for (int slot = count + place(); slot < topk; slot += LANES) row[slot] = slot < end ? behind + slot - count : -1;
    }
    // The step whose word of a token's bits the lane has.
    FSA_DEVICE static int step() { return LANES == 8 ? place() / 2 : place(); }
};
