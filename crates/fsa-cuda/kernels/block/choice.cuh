// The best blocks of tokens by the sums that their heads left (block/score_slots.cuh), chosen by warps, four tokens at a time, eight lanes each: a lane has one
// piece of every step. Sums come to shared memory ahead of their use. The heads are added up; the scores that they make of a few steps stay there. The two best
// of every lane so far give a bound that enough blocks reach; the few that do become candidates (block/candidates.cuh), and the next steps follow.
#pragma once
#include "block/few_choice.cuh"

constexpr int CHOOSERS = 4;                                         // warps
constexpr int TOKEN_LANES = 8, WARP_TOKENS = 32 / TOKEN_LANES;
constexpr int PART_STEPS = 4, PART_HEADS = 2;                       // of a part, which is copied together
constexpr int PARTS = 2;                                            // one in use, one on its way
static_assert(PART_HEADS * PART_STEPS == TOKEN_LANES, "a lane has one maximum of a part");
constexpr int CHUNK_STEPS = 12;                                     // whose scores are kept at a time

union __align__(16) ChoiceMemory {     // of a warp
    struct {
        Vec4 sums[PARTS][PART_HEADS][PART_STEPS][32];               // by lanes
        f32 factors[PARTS][WARP_TOKENS][PART_HEADS * PART_STEPS];   // maxima first
        Vec4 scores[CHUNK_STEPS][32];                               // by lanes
        Candidates candidates[WARP_TOKENS];
    };
    Vec4 few[COPY_BYTES / 512][32];                                 // by lanes: sums of tokens with few blocks
};

struct Chooser {
    const BlockChoice& choice;
    const ScoreSlots& slots;
    ChoiceMemory& m;
    int heads;                  // a power of two, 2 or more

    u32 slot;                   // number of the tile
    int position, tokens, steps;
    int group, step, end_step, head;    // that is copied next: two heads of four tokens from `group` on
    int place;                          // of the part in use, or used last
    const f32 *next_sums, *next_maximum;

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

    // From `first` on, the next tokens of the warp whose blocks compete.
    FSA_DEVICE void seek(int first) {
        head = 0;
        step = first_step();
        for (group = first; group < tokens; group += CHOOSERS * WARP_TOKENS) {
            end_step = end_of(group);
            if (end_step <= step) continue;
            const int row = (group + lane_token()) * heads;
            next_sums = slots.sums(slot) + (row * slots.max_steps + step) * GROUPS + 4 * piece();
            next_maximum = slots.maxima(slot) + (row + piece() / PART_STEPS) * slots.max_steps + step + piece() % PART_STEPS;
            return;
        }
    }
    // Starts the copy of the next part, if there is one, to the place that was used last.
    FSA_DEVICE void copy() {
        if (group < tokens) {
            const int row = slots.max_steps * GROUPS;
            const u32 sums = shared_address(&m.sums[place][0][0][lane_number()]);
            FSA_UNROLL for (int k = 0; k < PART_HEADS; ++k)
                FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) copy_async(sums + (k * PART_STEPS + i) * 512, next_sums + k * row + i * GROUPS);
            copy_async4(shared_address(&m.factors[place][lane_token()][piece()]), next_maximum);
            head += PART_HEADS;
            if (head < heads) {
                next_sums += PART_HEADS * row;
                next_maximum += PART_HEADS * slots.max_steps;
            } else {
                const int back = (heads - PART_HEADS) * slots.max_steps - PART_STEPS;
                head = 0;
                step += PART_STEPS;
                next_sums -= back * GROUPS;
                next_maximum -= back;
                if (step >= end_step) seek(group + CHOOSERS * WARP_TOKENS);
            }
        }
        copy_commit();
    }
    // Leaves the scores of a part's steps at `target`: those that nobody sees are 0, those that do not compete absent.
    FSA_DEVICE void finish(f32 (&sum)[PART_STEPS][4], i32 (&best)[2], const RowBlocks& blocks, u32 target, int first) const {
        const int seen = min_i(blocks.end_scored, steps * GROUPS);
        if (__any_sync(ALL_LANES, first * GROUPS < blocks.first_scored || (first + PART_STEPS) * GROUPS > seen)) {
            FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i)
                FSA_UNROLL for (int v = 0; v < 4; ++v) {
                    const int block = block_of(first + i, v);
                    if (block >= seen) sum[i][v] = 0.0f;
                    if (block < blocks.first_scored || block >= blocks.end_scored) sum[i][v] = __int_as_float(ABSENT);
                }
        }
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) {
            store_shared(target + i * 512, as_words(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
            const i32 top = max_i(max_i(__float_as_int(sum[i][0]), __float_as_int(sum[i][1])), max_i(__float_as_int(sum[i][2]), __float_as_int(sum[i][3])));
            best[1] = max_i(best[1], min_i(best[0], top));
            best[0] = max_i(best[0], top);
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        }
    }
    // Adds up the heads of the lane's token for the steps from `first` to `end`. The lane's two best so far.
    FSA_DEVICE void gather(int token, const RowBlocks& blocks, int first, int end, i32 (&best)[2]) {
        const f32* references = slots.references_of(slot) + token * heads + piece() / PART_STEPS;
        u32 target = shared_address(&m.scores[0][lane_number()]);
        f32 sum[PART_STEPS][4];
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        FSA_NO_UNROLL for (; first < end; first += PART_STEPS, target += PART_STEPS * 512) {
            FSA_NO_UNROLL for (int h = 0; h < heads; h += PART_HEADS) {
                copy();
                copy_wait<PARTS - 1>();
                place ^= 1;
                __syncwarp();
                // A lane makes one of its token's factors. What a head left that does not vote may be NaN.
                f32& factor = m.factors[place][lane_token()][piece()];
                const f32 reference = references[h];
                const bool votes = reference < -neg_inf();
                factor = votes ? exp2_fast(factor - reference) : 0.0f;
                const u32 silent = __ballot_sync(ALL_LANES, !votes) >> (lane_number() & ~(TOKEN_LANES - 1));
                __syncwarp();
                FSA_UNROLL for (int k = 0; k < PART_HEADS; ++k) {
                    Vec4 x[PART_STEPS];
                    FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) x[i] = load_shared(shared_address(&m.sums[place][k][i][lane_number()]));
                    const Vec4 factors = load_shared(shared_address(&m.factors[place][lane_token()][k * PART_STEPS]));
                    const u32 by[PART_STEPS] = {factors.x, factors.y, factors.z, factors.w};
                    if (silent >> PART_STEPS * k & 1)
                        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) x[i] = Vec4{0, 0, 0, 0};
                    FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) {
                        sum[i][0] = fmaf(__uint_as_float(x[i].x), __uint_as_float(by[i]), sum[i][0]);
                        sum[i][1] = fmaf(__uint_as_float(x[i].y), __uint_as_float(by[i]), sum[i][1]);
                        sum[i][2] = fmaf(__uint_as_float(x[i].z), __uint_as_float(by[i]), sum[i][2]);
                        sum[i][3] = fmaf(__uint_as_float(x[i].w), __uint_as_float(by[i]), sum[i][3]);
                    }
                }
                __syncwarp();
            }
            finish(sum, best, blocks, target, first);
        }
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
                FSA_NO_UNROLL for (; passing != 0; passing &= passing - 1) {
                    const int bit = __popc((passing & (0u - passing)) - 1);
                    *key++ = block_key(((const f32*)&m.scores[first + bit / 4][lane_number()])[bit & 3], block_of(begin + first + bit / 4, bit & 3));
                }
                tally.count += all;
                __syncwarp();
            }
            while (__any_sync(ALL_LANES, passing != 0)) {
                const bool present = passing != 0;
                const int bit = present ? __popc((passing & (0u - passing)) - 1) : 0, block = block_of(begin + first + bit / 4, bit & 3);
                const f32 score = ((const f32*)&m.scores[first + bit / 4][lane_number()])[bit & 3];
                passing &= passing - 1;
                append_lanes<TOKEN_LANES>(c, tally, score, block, present, true);
            }
        }
        if (lane == 0) {
            c.count = tally.count;
            c.bound = tally.bound;
            c.worst = tally.worst;
        }
        __syncwarp();
    }
    // Writes a token's row. `token` is found again, so that less is kept in registers until then.
    FSA_DEVICE void list(i32* rows, const Candidates& c, int token) const {
        const RowBlocks blocks = blocks_of(token);
        list_blocks<TOKEN_LANES>(rows + token * choice.topk, c, blocks, choice.topk, blocks.first_scored, token < tokens);
    }
    // The rows of the warp's tokens, which have few blocks.
    template <int LANES>
    FSA_DEVICE void choose_of_few(i32* rows) const {
        typedef FewChooser<LANES> Few;
        constexpr int STRIDE = CHOOSERS * Few::TOKENS;
        const Few few = {choice, slots, shared_address(&m.few[0][lane_number()]), slot, heads, position, tokens, steps};
        int first = Few::TOKENS * warp();
        if (first >= tokens) slots.ring.release(slot);
        FSA_NO_UNROLL for (; first < tokens; first += STRIDE)
            few.list(first, rows, [&] { if (first + STRIDE >= tokens) slots.ring.release(slot); });
    }
    // Writes the rows of the warp's tokens of a slot's tile, every CHOOSERS-th few of them, and releases the slot.
    FSA_DEVICE void choose(int total_q) {
        const ChosenTile tile = slots.tile_of(slot);
        i32* rows = choice.topk_indices + ((i64)tile.kv_head * total_q + tile.token) * choice.topk;
        position = tile.position;
        tokens = tile.tokens;
        steps = tile.steps;
        if (end_of(max_i(tokens - WARP_TOKENS, 0)) <= FEW_STEPS) {
            if (heads <= 4) choose_of_few<4>(rows);
            else choose_of_few<8>(rows);
            return;
        }
        place = 0;
        seek(WARP_TOKENS * warp());
        copy();
        place = 1;
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
            list(rows, c, first + lane_token());
        }
        copy_wait<0>();
        slots.ring.release(slot);
    }
};
