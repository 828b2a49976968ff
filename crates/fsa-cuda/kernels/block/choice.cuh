// The best blocks of tokens by the sums that their heads left (block/score_slots.cuh), chosen by warps, four tokens at a time, eight lanes each: a lane has one
// piece of every step. Sums come to shared memory ahead of their use. The heads are added up; what they make goes back to the first head's place, and the two
// best of every lane give a bound that enough blocks reach. The few that do become candidates (block/candidates.cuh).
#pragma once
#include "block/candidates.cuh"
#include "block/score_slots.cuh"

constexpr int CHOOSERS = 4;                                         // warps
constexpr int TOKEN_LANES = 8, WARP_TOKENS = 32 / TOKEN_LANES;
constexpr int PART_STEPS = 4, PARTS = 6;                            // of a part, which is copied together; that are on their way or in use
constexpr i32 ABSENT = (i32)0xbf800000;                             // -1: scores are not negative, and order as integers

struct __align__(16) ChoiceMemory {     // of a warp
    Vec4 sums[PARTS][PART_STEPS][32];                               // by lanes
    f32 maxima[PARTS][WARP_TOKENS * PART_STEPS];
    Candidates candidates[WARP_TOKENS];
};

struct Chooser {
    const BlockChoice& choice;
    const ScoreSlots& slots;
    ChoiceMemory& m;
    int heads;                  // a power of two, 2 or more

    u32 slot;
    int position, tokens, steps;
    int group, step, end_step, head;    // that is copied next: a head of four tokens from `group` on
    int filled, taken;                  // places of parts
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
    FSA_DEVICE f32* sums_of(int token) const { return slots.sums(slot) + token * heads * slots.max_steps * GROUPS + 4 * piece(); }
    FSA_DEVICE static int next_place(int place) { return place + 1 == PARTS ? 0 : place + 1; }

    // From `first` on, the next tokens of the warp whose blocks compete.
    FSA_DEVICE void seek(int first) {
        head = 0;
        step = first_step();
        for (group = first; group < tokens; group += CHOOSERS * WARP_TOKENS) {
            end_step = end_of(group);
            if (end_step <= step) continue;
            next_sums = sums_of(group + lane_token()) + step * GROUPS;
            next_maximum = slots.maxima(slot) + (group + lane_token()) * heads * slots.max_steps + step + piece();
            return;
        }
    }
    // Starts the copy of the next part, if there is one.
    FSA_DEVICE void copy() {
        if (group < tokens) {
            const u32 to = shared_address(&m.sums[filled][0][lane_number()]);
            FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) copy_async(to + i * 512, next_sums + i * GROUPS);
            if (piece() < PART_STEPS) copy_async4(shared_address(&m.maxima[filled][lane_token() * PART_STEPS + piece()]), next_maximum);
            filled = next_place(filled);
            if (++head < heads) {
                next_sums += slots.max_steps * GROUPS;
                next_maximum += slots.max_steps;
            } else {
                const int back = (heads - 1) * slots.max_steps - PART_STEPS;
                head = 0;
                step += PART_STEPS;
                next_sums -= back * GROUPS;
                next_maximum -= back;
                if (step >= end_step) seek(group + CHOOSERS * WARP_TOKENS);
            }
        }
        copy_commit();
    }
    // Puts the scores of a token's part into their place: those that nobody sees are 0, those that do not compete absent.
    FSA_DEVICE void finish(f32 (&sum)[PART_STEPS][4], i32 (&best)[2], const RowBlocks& blocks, f32* target, int first, bool exists) const {
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
            if (exists) store_global(target + i * GROUPS, as_words(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
            const i32 top = max_i(max_i(__float_as_int(sum[i][0]), __float_as_int(sum[i][1])), max_i(__float_as_int(sum[i][2]), __float_as_int(sum[i][3])));
            best[1] = max_i(best[1], min_i(best[0], top));
            best[0] = max_i(best[0], top);
            sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        }
    }
    // Adds up the heads of the lane's token for the steps before `end`. The lane's two best.
    FSA_DEVICE void gather(int token, const RowBlocks& blocks, int end, i32 (&best)[2]) {
        const f32* references = slots.references_of(slot) + token * heads;
        f32* target = sums_of(token) + first_step() * GROUPS;
        f32 sum[PART_STEPS][4];
        best[0] = best[1] = ABSENT;
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
        FSA_NO_UNROLL for (int first = first_step(); first < end; first += PART_STEPS, target += PART_STEPS * GROUPS) {
            FSA_NO_UNROLL for (int h = 0; h < heads; h += 2) {     // two heads run side by side
                copy();
                copy();
                copy_wait<PARTS - 2>();
                __syncwarp();
                f32 factor[2][PART_STEPS];
                Vec4 x[2][PART_STEPS];
                FSA_UNROLL for (int k = 0; k < 2; ++k) {
                    const f32 reference = references[h + k];
                    const Vec4 maxima = load_shared(shared_address(&m.maxima[taken][lane_token() * PART_STEPS]));
                    const u32 maximum[PART_STEPS] = {maxima.x, maxima.y, maxima.z, maxima.w};
                    FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) {
                        x[k][i] = load_shared(shared_address(&m.sums[taken][i][lane_number()]));
                        if (!(reference < -neg_inf())) x[k][i] = Vec4{0, 0, 0, 0};      // does not vote
                        factor[k][i] = exp2_fast(__uint_as_float(maximum[i]) - reference);
                    }
                    taken = next_place(taken);
                }
                FSA_UNROLL for (int k = 0; k < 2; ++k)
                    FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) {
                        sum[i][0] = fmaf(__uint_as_float(x[k][i].x), factor[k][i], sum[i][0]);
                        sum[i][1] = fmaf(__uint_as_float(x[k][i].y), factor[k][i], sum[i][1]);
                        sum[i][2] = fmaf(__uint_as_float(x[k][i].z), factor[k][i], sum[i][2]);
                        sum[i][3] = fmaf(__uint_as_float(x[k][i].w), factor[k][i], sum[i][3]);
                    }
                __syncwarp();
            }
            finish(sum, best, blocks, target, first, token < tokens);
        }
    }
    // Which of the lane's blocks of the four steps from `scores` on are below the bound: their bits, the first the lowest, before those of `later`.
    FSA_DEVICE static u32 below(const f32* scores, i32 bound, u32 later) {
        Vec4 v[PART_STEPS];
        FSA_UNROLL for (int i = 0; i < PART_STEPS; ++i) v[i] = load_global_written(scores + i * GROUPS);
        FSA_UNROLL for (int i = PART_STEPS - 1; i >= 0; --i) {
            later = __funnelshift_l(v[i].w - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].z - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].y - (u32)bound, later, 1);
            later = __funnelshift_l(v[i].x - (u32)bound, later, 1);
        }
        return later;
    }
    // Makes what reaches the bound candidates, and keeps the best.
    FSA_DEVICE void offer(Candidates& c, const f32* scores, int end, i32 (&best)[2]) const {
        const int lane = piece(), places = c.places;
        order_lanes<TOKEN_LANES>(best, lane);
        const i32 known = key_at<TOKEN_LANES>(best, places - 1);
        const f32 bound = places == 0 ? -neg_inf() : places > 2 * TOKEN_LANES || known < 0 ? 0.0f : __int_as_float(known);
        Tally tally = {0, bound, 0};
        FSA_NO_UNROLL for (int first = first_step(); first < end; first += 2 * PART_STEPS) {
            const f32* from = scores + first * GROUPS;
            const i32 least = __float_as_int(tally.bound);
            u32 passing = ~0u;
            if (first + PART_STEPS < end) passing = below(from + PART_STEPS * GROUPS, least, passing);
            passing = ~below(from, least, passing);
            while (__any_sync(ALL_LANES, passing != 0)) {
                const bool present = passing != 0;
                const int bit = present ? __popc((passing & (0u - passing)) - 1) : 0, block = block_of(first + bit / 4, bit & 3);
                const f32 score = from[bit / 4 * GROUPS + (bit & 3)];
                passing &= passing - 1;
                append_lanes<TOKEN_LANES>(c, tally, score, block, present, true);
            }
        }
        if (lane == 0) c.count = tally.count;
        __syncwarp();
        settle<TOKEN_LANES>(c, 0);
    }
    // Writes the rows of the warp's tokens of a tile, every CHOOSERS-th four of them.
    FSA_DEVICE void choose(u32 number, const BandTile& t, int tile_steps, i32* rows) {
        slot = number;
        position = t.position;
        tokens = t.tokens;
        steps = tile_steps;
        filled = taken = 0;
        seek(WARP_TOKENS * warp());
        FSA_UNROLL for (int i = 0; i < PARTS - 2; ++i) copy();
        Candidates& c = m.candidates[lane_token()];
        FSA_NO_UNROLL for (int first = WARP_TOKENS * warp(); first < tokens; first += CHOOSERS * WARP_TOKENS) {
            const int token = first + lane_token(), end = end_of(first);
            const RowBlocks blocks = blocks_of(token);
            __syncwarp();
            if (piece() == 0) c.open(blocks, token < tokens);
            __syncwarp();
            if (end > first_step()) {
                i32 best[2];
                gather(token, blocks, end, best);
                offer(c, sums_of(token), end, best);
            }
            list_blocks<TOKEN_LANES>(rows + token * choice.topk, c, blocks, choice.topk, blocks.first_scored, token < tokens);
        }
        copy_wait<0>();
    }
};
