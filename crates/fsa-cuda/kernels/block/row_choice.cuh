// The best blocks of a warp's own rows, where a token has one head, by the sums that they left (block/score_slots.cuh): four rows at a time, eight lanes each. A lane
// has one piece of every step, in registers while a row has no more steps than these hold. The best of 32 sets of a row's blocks give a bound that enough blocks reach;
// the few that do are listed in the order of their ids, and of these the best stay. Exact: among equal scores the lower id is better.
#pragma once
#include "block/candidates.cuh"
#include "block/score_slots.cuh"

constexpr int ROW_LANES = 8, WARP_ROWS = 32 / ROW_LANES;
constexpr int LIST = 32;                        // candidates of a row
constexpr int SETS = LIST / ROW_LANES;          // sets of blocks of a lane; its candidates
constexpr int HELD_STEPS = 32, WORDS = HELD_STEPS / ROW_LANES;    // steps in registers; words of their blocks, of which a lane has these
constexpr int FIRST_TAKES = 3;                  // blocks of a word that are listed before lanes ask each other whether there are more
constexpr i32 ABSENT = (i32)0xbf800000;         // -1: scores are not negative, and order as integers
typedef i32 RowCandidates[WARP_ROWS][LIST];          // of a warp

// Four rows, and what a lane knows of its own.
struct RowGroup {
    RowBlocks blocks;           // of the lane's row
    bool takes;                 // it exists, and blocks compete for its places
    i32 row;                    // in the tile; the last one that exists where there is none
    i32 end;                    // steps with blocks that compete for a place of one of the rows
    i32 least_end;              // blocks before it, the first ones excepted, compete for those of all of them
};

struct RowChooser {
    const BlockChoice& choice;
    const f32 *sums, *maxima;   // of the tile's rows
    const f32* references;      // of these: log2-sum-exps, infinity of a row that does not vote
    RowCandidates& lists;
    int position, rows, steps;  // of the tile: position of its first row, rows that exist, steps whose sums there are
    int lane;

    f32 v[HELD_STEPS][4], maximum[WORDS];

    FSA_DEVICE int piece() const { return lane & (ROW_LANES - 1); }
    FSA_DEVICE i32* list_of() const { return lists[lane / ROW_LANES]; }
    FSA_DEVICE int begin() const { return choice.init_blocks / GROUPS; }
    // Where a row has the lane's piece, block 8 v + x of a step: group 8 j + 2 t + c is word j of piece 4 c + t.
    FSA_DEVICE static int word_of(int x) { return 16 * (x & 1) + 2 * (x & 6); }

    FSA_DEVICE RowGroup group_of(int first) const {
        const int row = first + lane / ROW_LANES;
        RowGroup g;
        g.blocks = row_blocks(position + row, choice.topk, choice.init_blocks, choice.local_blocks);
        g.takes = row < rows && !g.blocks.lists_all() && g.blocks.places > 0;
        g.row = min_i(row, rows - 1);
        g.end = __reduce_max_sync(ALL_LANES, g.takes ? ceil_div(g.blocks.end_scored, GROUPS) : 0);
        g.least_end = __reduce_min_sync(ALL_LANES, g.blocks.end_scored);
        return g;
    }

    // Starts to load the sums of a row from step `first` on.
    FSA_DEVICE void fetch(const RowGroup& g, int first) {
        const f32 *from = sums + (g.row * choice.max_steps + first) * GROUPS + word_of(piece()), *tops = maxima + g.row * choice.max_steps + first + piece();
        const int count = g.end - first;
        FSA_UNROLL for (int k = 0; k < WORDS; ++k) maximum[k] = piece() + ROW_LANES * k < count ? *(const volatile f32*)(tops + ROW_LANES * k) : neg_inf();
        FSA_UNROLL for (int i = 0; i < HELD_STEPS; ++i) {
            if (i % PART_STEPS == 0 && i >= count) break;
            const Vec4 x = load_global_written(from + i * GROUPS);
            v[i][0] = __uint_as_float(x.x); v[i][1] = __uint_as_float(x.y); v[i][2] = __uint_as_float(x.z); v[i][3] = __uint_as_float(x.w);
        }
    }
    // Turns sums into scores.
    FSA_DEVICE void weigh(const RowGroup& g, int first) {
        const int count = g.end - first;
        const f32 reference = references[g.row];
        f32 factor[WORDS];
        FSA_UNROLL for (int k = 0; k < WORDS; ++k) factor[k] = exp2_small(maximum[k] - reference);
        FSA_UNROLL for (int i = 0; i < HELD_STEPS; ++i) {
            if (i % PART_STEPS == 0 && i >= count) break;
            const f32 f = __shfl_sync(ALL_LANES, factor[i / ROW_LANES], i % ROW_LANES, ROW_LANES);
            FSA_UNROLL for (int e = 0; e < 4; ++e) v[i][e] *= f;
        }
        const bool votes = reference < -neg_inf();
        if (__any_sync(ALL_LANES, !votes))
            FSA_UNROLL for (int i = 0; i < HELD_STEPS; ++i)
                FSA_UNROLL for (int e = 0; e < 4; ++e) v[i][e] = votes ? v[i][e] : 0.0f;
    }
    // Blocks of the steps from `first` on that do not compete are absent; those that nobody sees score 0.
    FSA_DEVICE void mask(const RowGroup& g, int first) {
        const int count = g.end - first, whole = min_i(g.least_end / GROUPS, steps) - first, seen = steps - first;     // steps
        const int begin = g.blocks.first_scored - first * GROUPS - piece(), span = g.blocks.end_scored - g.blocks.first_scored;
        FSA_UNROLL for (int part = 0; part < HELD_STEPS; part += PART_STEPS) {
            if (part >= count) break;
            if (part > 0 && part + PART_STEPS <= whole) continue;
            FSA_UNROLL for (int i = part; i < part + PART_STEPS; ++i) {
                if (i > 0 && i < whole) continue;
                FSA_UNROLL for (int e = 0; e < 4; ++e) {
                    if (i >= seen) v[i][e] = 0.0f;
                    if ((u32)(i * GROUPS + 8 * e - begin) >= (u32)span) v[i][e] = __int_as_float(ABSENT);
                }
            }
        }
    }
    FSA_DEVICE void raise_tops(i32 (&top)[SETS], int count) const {
        FSA_UNROLL for (int i = 0; i < HELD_STEPS; ++i) {
            if (i % PART_STEPS == 0 && i >= count) break;
            FSA_UNROLL for (int e = 0; e < 4; ++e) top[(i + e) % SETS] = max_i(top[(i + e) % SETS], __float_as_int(v[i][e]));
        }
    }
    // Step of a lane's word k: of few steps one a lane, else consecutive ones, so that words are in the order of ids.
    FSA_DEVICE int step_of(int k, bool few) const { return few ? piece() + ROW_LANES * k : piece() * WORDS + k; }
    // Of the blocks in `left`, a word a step, those that reach the bound.
    FSA_DEVICE void scan(u32 (&left)[WORDS], i32 bound, int count, bool few) const {
        const u32 selector = 0x40 + 0x11 * (lane / ROW_LANES);      // the row's bytes of two words
        FSA_UNROLL for (int part = 0; part < HELD_STEPS; part += PART_STEPS) {
            if (part >= count) break;
            FSA_UNROLL for (int i = part; i < part + PART_STEPS; ++i) {
                u32 m[4];
                FSA_UNROLL for (int e = 0; e < 4; ++e) m[e] = __ballot_sync(ALL_LANES, __float_as_int(v[i][e]) >= bound);
                const u32 word = __byte_perm(__byte_perm(m[0], m[1], selector), __byte_perm(m[2], m[3], selector), 0x5410);
                if (i < ROW_LANES && few && piece() == i) left[0] &= word;
                if (!(i < ROW_LANES && few) && piece() == i / WORDS) left[i % WORDS] &= word;
            }
        }
    }
    // Sum of the lanes of the row before this one; and of all.
    FSA_DEVICE u32 before(u32 own, u32& all) const {
        u32 sum = own;
        FSA_UNROLL for (int distance = 1; distance < ROW_LANES; distance *= 2) {
            const u32 other = __shfl_up_sync(ALL_LANES, sum, distance, ROW_LANES);
            if (piece() >= distance) sum += other;
        }
        all = __shfl_sync(ALL_LANES, sum, ROW_LANES - 1, ROW_LANES);
        return sum - own;
    }
    // Lists blocks of `left` in the order of their ids from `place` on while there is room: the first of every word without a vote on whether any is left.
    FSA_DEVICE void append(u32 (&left)[WORDS], int place, int first, bool few) const {
        i32* list = list_of();
        int places[WORDS];
        FSA_UNROLL for (int k = 0; k < WORDS; ++k) {
            places[k] = place;
            place += __popc(left[k]);
        }
        const auto take = [&](int k) {
            const u32 word = left[k], lowest = word & (0u - word);
            if (word != 0 && places[k] < LIST) {
                list[places[k]++] = (first + step_of(k, few)) * GROUPS + 31 - __clz(lowest);
                left[k] = word ^ lowest;
            }
        };
        FSA_UNROLL for (int n = 0; n < FIRST_TAKES; ++n)
            FSA_UNROLL for (int k = 0; k < WORDS; ++k) take(k);
        FSA_UNROLL for (int k = 0; k < WORDS; ++k)
            while (__any_sync(ALL_LANES, left[k] != 0 && places[k] < LIST)) take(k);
    }
    // Scores of the lane's candidates of `count`, as integers, while the sums of `next` come, if `fetches`.
    FSA_DEVICE void score(i32 (&scores)[SETS], i32 (&ids)[SETS], const RowGroup& g, int count, const RowGroup& next, bool fetches) {
        const Vec4 listed = load_shared(shared_address(list_of() + SETS * piece()));
        const u32 words[SETS] = {listed.x, listed.y, listed.z, listed.w};
        f32 sum[SETS], top[SETS];
        FSA_UNROLL for (int k = 0; k < SETS; ++k) {
            ids[k] = SETS * piece() + k < count ? (i32)words[k] : 0;
            const int at = g.row * choice.max_steps + ids[k] / GROUPS;
            sum[k] = *(const volatile f32*)(sums + at * GROUPS + word_of(ids[k] & 7) + (ids[k] >> 3 & 3));
            top[k] = *(const volatile f32*)(maxima + at);
        }
        if (fetches) fetch(next, begin());
        const f32 reference = references[g.row];
        FSA_UNROLL for (int k = 0; k < SETS; ++k) {
            const bool seen = reference < -neg_inf() && ids[k] / GROUPS < steps;
            scores[k] = SETS * piece() + k >= count ? ABSENT : seen ? __float_as_int(sum[k] * exp2_small(top[k] - reference)) : 0;
        }
    }
    // Of a row's candidates the best stay, in their order; what comes later must be better than the worst of them.
    FSA_DEVICE void settle(const RowGroup& g, int& count, i32& bound, const RowGroup& next, bool fetches) {
        const int places = g.takes ? g.blocks.places : 0;
        i32 scores[SETS], ids[SETS], sorted[SETS];
        __syncwarp();
        score(scores, ids, g, count, next, fetches);
        FSA_UNROLL for (int k = 0; k < SETS; ++k) sorted[k] = scores[k];
        order_lanes<ROW_LANES>(sorted, lane);
        const i32 last = key_at<ROW_LANES>(sorted, max_i(places - 1, 0));
        u32 own = 0, all;       // those above the last one, and those like it, 16 bits each
        FSA_UNROLL for (int k = 0; k < SETS; ++k) own += scores[k] > last ? 1 : scores[k] == last ? 1 << 16 : 0;
        const u32 ahead = before(own, all);
        const int ties = places - (int)(all & 0xffff);
        int place = ahead & 0xffff, equal = ahead >> 16;
        __syncwarp();
        FSA_UNROLL for (int k = 0; k < SETS; ++k) {
            if (last >= 0 && (scores[k] > last || (scores[k] == last && equal < ties))) list_of()[place + min_i(equal, ties)] = ids[k];
            place += scores[k] > last;
            equal += scores[k] == last;
        }
        if (places > 0 && count >= places) {
            count = places;
            bound = last + 1;
        }
        __syncwarp();
    }
    // Lists the best blocks of the rows in order. Their first sums are on their way; then those of `next` are.
    FSA_DEVICE void list(const RowGroup& g, const RowGroup& next) {
        const bool many = g.end - begin() > HELD_STEPS;     // read twice
        i32 top[SETS], bound = 0x7fffffff;
        u32 left[WORDS];
        int listed = 0, first = begin();
        bool fresh = true, opens = true;
        FSA_UNROLL for (int k = 0; k < SETS; ++k) top[k] = ABSENT;
        FSA_NO_UNROLL while (true) {
            const int count = g.end - first;
            const bool few = count <= ROW_LANES;
            if (fresh) {
                weigh(g, first);
                mask(g, first);
                FSA_UNROLL for (int k = 0; k < WORDS; ++k) left[k] = step_of(k, few) < count ? ~0u : 0;
                fresh = false;
            }
            if (opens) {
                raise_tops(top, count);
                first += HELD_STEPS;
                if (first >= g.end) {
                    order_lanes<ROW_LANES>(top, lane);
                    const i32 known = key_at<ROW_LANES>(top, max_i(g.blocks.places - 1, 0));
                    if (g.takes) bound = max_i(known, 0);
                    opens = false;
                    first = begin();
                }
                if (!many) continue;
                fetch(g, first);
                fresh = true;
                continue;
            }
            scan(left, bound, count, few);
            u32 own = 0, all;
            FSA_UNROLL for (int k = 0; k < WORDS; ++k) own += __popc(left[k]);
            append(left, listed + before(own, all), first, few);
            const bool again = __any_sync(ALL_LANES, listed + (int)all > LIST), last = first + HELD_STEPS >= g.end;
            listed = min_i(listed + all, LIST);
            if (again || last) settle(g, listed, bound, next, !again);
            if (again) continue;
            if (last) return;
            first += HELD_STEPS;
            fetch(g, first);
            fresh = true;
        }
    }
    // Writes the lists of the rows from `first` on; `targets` are those of the tile.
    FSA_DEVICE void choose(int first, i32* targets) {
        RowGroup g = group_of(first);
        fetch(g, begin());
        FSA_NO_UNROLL for (; first < rows; first += WARP_ROWS) {
            const RowGroup next = group_of(first + WARP_ROWS);
            if (g.end > begin()) list(g, next);
            else fetch(next, begin());
            const int row = first + lane / ROW_LANES, places = g.takes ? g.blocks.places : 0, skipped = g.blocks.lists_all() ? g.blocks.first_scored : g.blocks.end_scored;
            const int first_local = g.blocks.first_scored + places, listed = min_i(choice.topk, first_local + g.blocks.candidates - skipped);
            i32* target = targets + row * choice.topk;
            for (int slot = row < rows ? piece() : choice.topk; slot < choice.topk; slot += ROW_LANES)
                target[slot] = slot < g.blocks.first_scored ? slot : slot < first_local ? list_of()[slot - g.blocks.first_scored] : slot < listed ? skipped + slot - first_local : -1;
            __syncwarp();
            g = next;
        }
    }
};
