// The best blocks of tokens by the sums that their heads left (block/score_slots.cuh), chosen by warps, four tokens at a time, eight lanes each: a lane has one
// piece of every step. Sums come to shared memory ahead of their use. The heads are added up; the scores that they make of a few steps stay there. The two best
// of every lane so far give a bound that enough blocks reach; the few that do become candidates (block/candidates.cuh), and the next steps follow.
#pragma once
#include "block/few_choice.cuh"

constexpr int CHOOSERS = 4;                                         // warps
constexpr int TOKEN_LANES = 8, WARP_TOKENS = 32 / TOKEN_LANES;
constexpr int PART_HEADS = 2;                                       // of a part, which is copied together
constexpr int PARTS = 2, PART_BYTES = PART_HEADS * PART_STEPS * 512;    // one in use, one on its way
static_assert(PART_HEADS * PART_STEPS == TOKEN_LANES, "a lane has one maximum of a part");
constexpr int CHUNK_STEPS = 12;                                     // whose scores are kept at a time

union __align__(16) ChoiceMemory {     // of a warp
    struct {
        Vec4 sums[PARTS][PART_HEADS][PART_STEPS][32];               // by lanes
        f32 maxima[PARTS][32];                                      // by lanes, of parts that need them
        Vec4 scores[CHUNK_STEPS][32];                               // by lanes
        Candidates candidates[WARP_TOKENS];
    };
    Vec4 few[COPY_BYTES / 512][32];                                 // by lanes: sums of tokens with few blocks
};

struct Chooser {
    const BlockChoice& choice;
    const ScoreSlots& slots;
    ChoiceMemory& m;
    ChosenBits& bits;
    int heads;                  // a power of two, 2 or more

    u32 slot;                   // number of the tile
    int position, tokens, steps;
    int group, step, end_step, head;    // that is copied next: two heads of four tokens from `group` on
    int differing;                      // steps of that group before it have other maxima than later ones
    u32 lane_sums, place;               // shared memory for the lane's sums; offset of the part in use, or used last
    const f32* next_sums;

    FSA_DEVICE static int warp() { return thread_number() / 32 % CHOOSERS; }
    FSA_DEVICE static int piece() { return lane_number() & (TOKEN_LANES - 1); }
    FSA_DEVICE static int lane_token() { return lane_number() / TOKEN_LANES; }
    // Block v of the lane's piece of a step.
    FSA_DEVICE static int block_of(int step, int v) { return step * GROUPS + 8 * v + 2 * (piece() & 3) + piece() / 4; }
    FSA_DEVICE RowBlocks blocks_of(int token) const { return row_blocks(position + token, choice.topk, choice.init_blocks, choice.local_blocks); }
    FSA_DEVICE int first_step() const { return choice.init_blocks / (GROUPS * PART_STEPS) * PART_STEPS; }
    // The steps with blocks that compete for a place end with those of the last of four tokens.
    FSA_DEVICE int end_of(int first) const {
        const RowBlocks last = blocks_of(min_i(first + WARP_TOKENS, tokens) - 1);
        return last.lists_all() || last.places == 0 ? 0 : ceil_div(last.end_scored, GROUPS);
    }

    // From which step on all rows of the lanes' tokens vote by sums relative to the same maxima.
    FSA_DEVICE int differing_of(int token) const { return __reduce_max_sync(ALL_LANES, slots.differing_of(slot)[token * heads / WARP_TILE_ROWS]); }

    // From `first` on, the next tokens of the warp whose blocks compete.
    FSA_DEVICE void seek(int first) {
        head = 0;
        step = first_step();
        for (group = first; group < tokens; group += CHOOSERS * WARP_TOKENS) {
            end_step = end_of(group);
            if (end_step <= step) continue;
            next_sums = slots.sums(slot) + slots.number((group + lane_token()) * heads, step) * GROUPS + 4 * piece();
            differing = differing_of(group + lane_token());
            return;
        }
    }
    // Starts the copy of the next part, if there is one, to the place that was used last.
    FSA_DEVICE void copy() {
        if (group < tokens) {
            FSA_UNROLL for (int i = 0; i < PART_HEADS * PART_STEPS; ++i) copy_async(lane_sums + place + i * 512, next_sums + i * GROUPS);
            if (step < differing) {
                const int row = (group + lane_token()) * heads + head + piece() / PART_STEPS;
                copy_async4(shared_address(&m.maxima[place / PART_BYTES][lane_number()]), slots.maxima(slot) + slots.number(row, step) + piece() % PART_STEPS);
            }
            head += PART_HEADS;
            if (head < heads) {
                next_sums += PART_HEADS * PART_STEPS * GROUPS;
            } else {
                head = 0;
                step += PART_STEPS;
                next_sums += (CTA_ROWS + PART_HEADS - heads) * PART_STEPS * GROUPS;
                if (step >= end_step) seek(group + CHOOSERS * WARP_TOKENS);
            }
        }
        copy_commit();
    }
    // Leaves the scores of a part's steps at `target`: those that nobody sees are 0, those that do not compete absent.
    FSA_DEVICE void finish(f32 (&sum)[PART_STEPS][4], i32 (&best)[2], const RowBlocks& blocks, u32 target, int first) const {
        const int begin = blocks.first_scored - first * GROUPS, end = blocks.end_scored - first * GROUPS, seen = min_i(blocks.end_scored, steps * GROUPS) - first * GROUPS;
        if (__any_sync(ALL_LANES, begin > 0 || seen < PART_STEPS * GROUPS)) {
            if (__any_sync(ALL_LANES, seen < end))
                FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i)
                    if (first + i >= steps) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
            const u32 own = block_of(0, 0) - begin;
            FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i)
                FSA_UNROLL for (int v = 0; v < 4; ++v)
                    if (own + i * GROUPS + 8 * v >= (u32)(end - begin)) sum[i][v] = __int_as_float(ABSENT);
        }
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) {
            store_shared(target + i * 512, as_words(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
            const i32 top = max_i(max_i(__float_as_int(sum[i][0]), __float_as_int(sum[i][1])), max_i(__float_as_int(sum[i][2]), __float_as_int(sum[i][3])));
            best[1] = max_i(best[1], min_i(best[0], top));
            best[0] = max_i(best[0], top);
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        }
    }
    // Of a part whose steps have other maxima than later ones a lane makes one of its token's factors. What a head left that does not vote may be NaN.
    FSA_DEVICE f32 factor_of(int token, int head) const {
        const int row = token * heads + head + piece() / PART_STEPS;
        const f32 factor = slots.factors_of(slot)[row];
        const u32 silent = __ballot_sync(ALL_LANES, factor == 0.0f) >> (lane_number() & ~(TOKEN_LANES - 1));
        if (silent != 0)
            FSA_NO_UNROLL for (int i = 0; i < PART_HEADS * PART_STEPS; ++i)
                if (silent >> i & 1) store_shared(lane_sums + place + i * 512, Vec4{0, 0, 0, 0});
        return factor == 0.0f ? 0.0f : factor * exp2_small(m.maxima[place / PART_BYTES][lane_number()] - slots.references_of(slot)[row]);
    }
    // Adds the part in use; `factor(n)` is that of step n % PART_STEPS of its head n / PART_STEPS.
    template <typename F>
    FSA_DEVICE void add_part(f32 (&sum)[PART_STEPS][4], F factor) const {
        FSA_UNROLL for (int n = 0; n < PART_HEADS * PART_STEPS; ++n) {
            f32 (&to)[4] = sum[n % PART_STEPS];
            const Vec4 x = load_shared(lane_sums + place + n * 512);
            const f32 by = factor(n);
            to[0] = fmaf(__uint_as_float(x.x), by, to[0]);
            to[1] = fmaf(__uint_as_float(x.y), by, to[1]);
            to[2] = fmaf(__uint_as_float(x.z), by, to[2]);
            to[3] = fmaf(__uint_as_float(x.w), by, to[3]);
        }
    }
    // Adds up the heads of the lane's token for the steps from `first` to `end`. The lane's two best so far.
    FSA_DEVICE void gather(int token, const RowBlocks& blocks, int first, int end, i32 (&best)[2]) {
        const int changed = differing_of(token);
        const f32* factors = slots.factors_of(slot) + token * heads;
        u32 target = shared_address(&m.scores[0][lane_number()]);
        f32 sum[PART_STEPS][4];
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        FSA_NO_UNROLL do {
            int h = 0;
            FSA_NO_UNROLL do {
                copy();
                copy_wait<PARTS - 1>();     // a lane reads what it has copied
                place ^= PART_BYTES;
                if (first < changed) {
                    const f32 own = factor_of(token, h);
                    add_part(sum, [&](int n) { return __shfl_sync(ALL_LANES, own, n, TOKEN_LANES); });
                } else {
                    const float2 both = *(const float2*)(factors + h);
                    add_part(sum, [&](int n) { return n < PART_STEPS ? both.x : both.y; });
                }
                h += PART_HEADS;
            } while (h < heads);
            finish(sum, best, blocks, target, first);
            target += PART_STEPS * 512;
            first += PART_STEPS;
        } while (first < end);
        __syncwarp();
    }
    // Which of the lane's blocks of the four steps from `scores` on are below the bound: their bits, the first the lowest, before those of `later`.
    FSA_DEVICE static u32 below(u32 scores, i32 bound, u32 later) {
        Vec4 v[PART_STEPS];
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) v[i] = load_shared(scores + i * 512);
        FSA_UNROLL for (int i = PART_STEPS - 1; i >= 0; --i) {
            later = __funnelshift_l(v[i].w - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].z - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].y - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].x - (u32)bound, later, 1);
        }
        return later;
    }
    // Where the score of bit 4 i + v is among the lane's; that of i = v = 0 is first. Their blocks are eight apart.
    FSA_DEVICE static int score_place(int bit) { return 32 * bit - 31 * (bit & 3); }
    // Makes those of the kept scores, from step `begin` on, that reach the bound candidates. `so_far`: the best of the lane.
    FSA_DEVICE void offer(Candidates& c, int begin, int end, const i32 (&so_far)[2]) const {
        const int lane = piece(), places = c.places;
        i32 best[2] = {so_far[0], so_far[1]};
        order_lanes<TOKEN_LANES>(best, lane);
        const i32 known = key_at<TOKEN_LANES>(best, places - 1);
        const f32 bound = places == 0 ? -neg_inf() : places > 2 * TOKEN_LANES || known < 0 ? 0.0f : __int_as_float(known);
        Tally tally = {c.count, fmaxf(bound, c.bound), bound > c.bound ? 0 : c.worst};
        FSA_NO_UNROLL for (int first = 0; begin + first < end; first += 2 * PART_STEPS) {
            const u32 scores = shared_address(&m.scores[first][lane_number()]);
            const f32* lane_scores = (const f32*)&m.scores[first][lane_number()];
            const int lane_block = block_of(begin + first, 0);
            const i32 least = __float_as_int(tally.bound);
            u32 passing = ~0u;
            if (begin + first + PART_STEPS < end) passing = below(scores + PART_STEPS * 512, least, passing);
            passing = ~below(scores, least, passing);
            // Each lane's behind those of the lanes before it, if there is room for all.
            const int mine = __popc(passing);
            int end_place = mine;
            FSA_UNROLL for (int d = 1; d < TOKEN_LANES; d *= 2) {
                const int before = __shfl_up_sync(ALL_LANES, end_place, d, TOKEN_LANES);
                if (lane >= d) end_place += before;
            }
            const int all = __shfl_sync(ALL_LANES, end_place, TOKEN_LANES - 1, TOKEN_LANES);
            if (!__any_sync(ALL_LANES, tally.count + all > CANDIDATES)) {
                u64* key = c.keys + tally.count + end_place - mine;
                FSA_NO_UNROLL while (passing != 0) {
                    const u32 lowest = passing & (0u - passing);
                    const int bit = 31 - __clz(lowest);
                    passing ^= lowest;
                    *key++ = block_key(lane_scores[score_place(bit)], lane_block + 8 * bit);
                }
                tally.count += all;
                __syncwarp();
            }
            while (__any_sync(ALL_LANES, passing != 0)) {
                const bool present = passing != 0;
                const u32 lowest = passing & (0u - passing);
                const int bit = present ? 31 - __clz(lowest) : 0;
                passing ^= lowest;
                append_lanes<TOKEN_LANES>(c, tally, lane_scores[score_place(bit)], lane_block + 8 * bit, present, true);
            }
        }
        if (lane == 0) {
            c.count = tally.count;
            c.bound = tally.bound;
            c.worst = tally.worst;
        }
        __syncwarp();
    }
    // The tile's first row among those of all kv heads.
    FSA_DEVICE i64 row_of(int total_q) const {
        const volatile ChosenTile& tile = slots.tile_of(slot);
        return (i64)tile.kv_head * total_q + tile.token;
    }
    // Place of the tile's steps.
    FSA_DEVICE int list_of(int num_kv_heads) const {
        const volatile ChosenTile& tile = slots.tile_of(slot);
        return tile.kv_head * choice.mask.num_tiles + tile.number / num_kv_heads;
    }
    // Writes a token's row. All is found again, so that less is kept in registers until then.
    FSA_DEVICE void list(int total_q, const Candidates& c, int token) const {
        const RowBlocks blocks = blocks_of(token);
        list_blocks<TOKEN_LANES>(choice.topk_indices + (row_of(total_q) + token) * choice.topk, c, blocks, choice.topk, blocks.first_scored, token < tokens);
    }
    // The rows of the warp's tokens, which have few blocks, and the tile's mask.
    template <int LANES>
    FSA_DEVICE void choose_of_few(const BandParams& p) const {
        typedef FewChooser<LANES> Few;
        constexpr int STRIDE = CHOOSERS * Few::TOKENS;
        const Few few = {choice, slots, shared_address(&m.few[0][lane_number()]), slot, heads, position, tokens, steps};
        const i64 first_row = row_of(p.band.total_q);
        if (warp() == 0) bits.list[slot & 1] = list_of(p.num_kv_heads);    // before the slot is released
        int first = Few::TOKENS * warp();
        if (first >= tokens) slots.ring.release(slot);
        FSA_NO_UNROLL for (; first < tokens; first += STRIDE)
            few.list(first, first_row, bits, [&] { if (first + STRIDE >= tokens) slots.ring.release(slot); });
        if (choice.mask.rows == nullptr) return;
        named_sync(CHOSEN, CHOOSERS * 32);
        if (warp() > 0) return;
        const int tile = slot & 1, last = position + tokens - 1;
        list_steps(choice.mask, {position, last, last + 1, choice.window, STEP_KEYS}, bits.list[tile], bits.any[tile], bits.all[tile]);
        __syncwarp();       // who goes on to the tile after the next meets this warp before
        if (lane_number() < CHOSEN_WORDS) bits.open(tile, lane_number());
    }
    // Writes the rows of the warp's tokens of a slot's tile, every CHOOSERS-th few of them, and releases the slot.
    FSA_DEVICE void choose(const BandParams& p) {
        const int total_q = p.band.total_q;
        const ChosenTile tile = slots.tile_of(slot);
        position = tile.position;
        tokens = tile.tokens;
        steps = tile.steps;
        if (end_of(max_i(tokens - WARP_TOKENS, 0)) <= FEW_STEPS) {
            if (heads <= 4) choose_of_few<4>(p);
            else choose_of_few<8>(p);
            return;
        }
        lane_sums = unknown(shared_address(&m.sums[0][0][0][lane_number()]));
        place = 0;
        seek(WARP_TOKENS * warp());
        copy();
        place = PART_BYTES;
        Candidates& c = m.candidates[lane_token()];
        FSA_NO_UNROLL for (int first = WARP_TOKENS * warp(); first < tokens; first += CHOOSERS * WARP_TOKENS) {
            const int token = first + lane_token(), end = end_of(first);
            const RowBlocks blocks = blocks_of(token);
            __syncwarp();
            if (piece() == 0) c.open(blocks, token < tokens);
            __syncwarp();
            i32 best[2] = {ABSENT, ABSENT};
            FSA_NO_UNROLL for (int begin = first_step(); begin < end; begin += CHUNK_STEPS) {
                const int until = min_i(end, begin + CHUNK_STEPS);
                gather(token, blocks, begin, until, best);
                offer(c, begin, until, best);
            }
            settle<TOKEN_LANES>(c, 0);
            list(total_q, c, first + lane_token());
        }
        copy_wait<0>();
        slots.ring.release(slot);
    }
};
