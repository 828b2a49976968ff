// The best blocks of a warp's 16 rows, where a token has one head and a row few steps: all rows at once, two lanes each, by the sums that the warp
// left (block/score_slots.cuh). A lane has every second piece of its row's steps in registers. The best of 32 sets of a row's blocks give a bound
// that enough blocks reach; those that do are listed, their scores are ordered, and then the ids of the best. What two lanes order for a row costs
// a fraction of what eight do. Longer rows, and those of which too many blocks reach the bound or equal ones compete for the last place, are left
// to block/row_choice.cuh, four at a time.
#pragma once
#include "block/row_choice.cuh"

constexpr int PAIR = 2, STEP_PIECES = 4, PIECE = 8;     // lanes of a row; pieces of its step, a quad's lane each; blocks of a piece
constexpr int FEW_STEPS = 4, LANE_PIECES = FEW_STEPS * STEP_PIECES / PAIR;
constexpr int KEYS = LIST / PAIR;                       // of a lane that are ordered with those of the other
constexpr int LANE_LIST = 18;                           // blocks that a lane can list

// Lists of scores and blocks; a piece may be written behind the last place. Small enough for L1 to keep 60 KB, where row_choice.cuh finds scores of
// candidates again: with 64 KB of lists rows of 64K tokens take 4 % longer.
struct __align__(16) PairMemory {
    i32 scores[LANE_LIST + PIECE][32];
    u8 blocks[LANE_LIST + PIECE][32];
};
static_assert(sizeof(RowCandidates) <= sizeof(PairMemory), "they share it");
static_assert(FEW_STEPS * GROUPS <= 256, "blocks are bytes");

struct PairChooser {
    const BlockChoice& choice;
    const f32 *sums, *maxima, *references;  // as of RowChooser
    PairMemory& m;
    int position, first, rows, steps;       // as of RowChooser; first row of the warp
    int lane;

    // A lane's row and what competes there. Blocks are counted from the first that does.
    struct Row {
        RowBlocks blocks;
        bool takes;             // it exists, and blocks compete for its places
        i32 row;                // in the tile; the last that exists where there is none
        i32 pieces;             // of both lanes, of steps with blocks that compete
        f32 reference;

        FSA_DEVICE int count() const { return blocks.end_scored - blocks.first_scored; }
    };
    // What the two lanes of a row list.
    struct Listed {
        i32 own, all;
        bool fits;
    };

    FSA_DEVICE int parity() const { return lane & 1; }
    FSA_DEVICE int begin() const { return choice.init_blocks / GROUPS; }
    FSA_DEVICE Row find_row() const {
        const int row = first + lane / PAIR;
        Row r;
        r.row = min_i(row, rows - 1);
        r.blocks = row_blocks(position + row, choice.topk, choice.init_blocks, choice.local_blocks);
        r.takes = row < rows && !r.blocks.lists_all() && r.blocks.places > 0;
        r.pieces = r.takes ? (ceil_div(r.blocks.end_scored, GROUPS) - begin()) * STEP_PIECES : 0;
        r.reference = references[r.row];
        return r;
    }

    // The lane's i-th piece: its number in the row.
    FSA_DEVICE int piece_of(int i) const { return begin() * STEP_PIECES + PAIR * i + parity(); }
    // The first block of a piece, groups 8 j + 2 t + c of its step; how much further block e is, that of word e % 4 of half e / 4.
    FSA_DEVICE static int first_block(const Row& r, int piece) {
        return piece / STEP_PIECES * GROUPS + piece % STEP_PIECES * 2 - r.blocks.first_scored;
    }
    FSA_DEVICE static constexpr int distance(int e) { return e % 4 * 8 + e / 4; }

    // Scores of the lane's pieces of the first `most` of a row; blocks that nobody sees score 0.
    FSA_DEVICE void load(f32 (&x)[LANE_PIECES][PIECE], const Row& r, int most) const {
        f32 top[LANE_PIECES];
        FSA_UNROLL for (int i = 0; i < LANE_PIECES; ++i) {
            top[i] = 0.0f;
            FSA_UNROLL for (int e = 0; e < PIECE; ++e) x[i][e] = 0.0f;      // or else registers would be theirs from the start of the kernel on
            if (PAIR * i < unknown(most)) {
                const int step = r.row * choice.max_steps + piece_of(i) / STEP_PIECES;
                const f32* from = sums + step * GROUPS + piece_of(i) % STEP_PIECES * 4;
                FSA_UNROLL for (int half = 0; half < 2; ++half) {
                    const Vec4 v = load_global_written(from + 16 * half);
                    x[i][4 * half] = __uint_as_float(v.x);     x[i][4 * half + 1] = __uint_as_float(v.y);
                    x[i][4 * half + 2] = __uint_as_float(v.z); x[i][4 * half + 3] = __uint_as_float(v.w);
                }
                top[i] = *(const volatile f32*)(maxima + step);
            }
        }
        FSA_UNROLL for (int i = 0; i < LANE_PIECES; ++i)
            if (PAIR * i < unknown(most)) {
                const f32 factor = exp2_fast(top[i] - r.reference);
                const bool seen = piece_of(i) / STEP_PIECES < steps;
                FSA_UNROLL for (int e = 0; e < PIECE; ++e) x[i][e] = seen ? x[i][e] * factor : 0.0f;
            }
    }
    // A score that enough of the row's blocks reach.
    FSA_DEVICE i32 bound_of(const f32 (&x)[LANE_PIECES][PIECE], const Row& r, int most) const {
        i32 keys[KEYS];
        FSA_UNROLL for (int i = 0; i < KEYS; ++i) keys[i] = ABSENT;
        FSA_UNROLL for (int i = 0; i < LANE_PIECES; ++i)
            if (PAIR * i < unknown(most)) {
                const int block = unknown(first_block(r, piece_of(i)));
                FSA_UNROLL for (int e = 0; e < PIECE; ++e) {
                    i32& key = keys[(PIECE * i + e) % KEYS];
                    key = max_i(key, (u32)(block + distance(e)) < (u32)r.count() ? __float_as_int(x[i][e]) : ABSENT);
                }
            }
        order_lanes<PAIR>(keys, lane);
        const i32 known = max_i(0, key_at<PAIR>(keys, max_i(r.blocks.places - 1, 0)));
        return r.takes ? known : 0x7fffffff;
    }
    // Lists a block of `count` that reaches the bound.
    FSA_DEVICE static void append(u32& score_place, u32& block_place, i32 score, i32 bound, int block, int count) {
        asm volatile("{ .reg .pred p, q; setp.lt.u32 p, %4, %5; setp.ge.s32 q, %2, %3; and.pred p, p, q;"
                     " @p st.shared.u32 [%0], %2; @p st.shared.u8 [%1], %4; @p add.u32 %0, %0, %6; @p add.u32 %1, %1, %7; }"
                     : "+r"(score_place), "+r"(block_place)
                     : "r"(score), "r"(bound), "r"(block), "r"(count), "n"(sizeof(m.scores[0])), "n"(sizeof(m.blocks[0]))
                     : "memory");
    }
    // Lists the blocks that reach a bound.
    FSA_DEVICE Listed list(const Row& r, int most) const {
        f32 x[LANE_PIECES][PIECE];
        load(x, r, most);
        const i32 bound = bound_of(x, r, most);
        const u32 begin = shared_address(&m.scores[0][lane]);
        u32 place = begin, block_place = shared_address(&m.blocks[0][lane]);
        FSA_UNROLL for (int i = 0; i < LANE_PIECES; ++i)
            if (PAIR * i < unknown(most)) {
                const int block = unknown(first_block(r, piece_of(i)));
                FSA_UNROLL for (int e = 0; e < PIECE; ++e) append(place, block_place, __float_as_int(x[i][e]), bound, block + distance(e), r.count());
                place = min(place, shared_address(&m.scores[LANE_LIST][lane]));
                block_place = min(block_place, shared_address(&m.blocks[LANE_LIST][lane]));
            }
        const int own = (place - begin) / sizeof(m.scores[0]), other = __shfl_xor_sync(ALL_LANES, own, 1);
        const bool fits = max_i(own, other) < LANE_LIST && own + other <= LIST;
        __syncwarp();
        return {fits ? own : 0, fits ? own + other : 0, fits};
    }
    // Writes the row, whose best blocks are listed; false where equal ones compete for the last place, or the row does not vote.
    FSA_DEVICE bool write(const Row& r, const Listed& l, i32* target) const {
        const int places = r.takes ? r.blocks.places : 0, even = parity() == 0 ? l.own : l.all - l.own;
        i32 scores[KEYS], sorted[KEYS];
        u32 ids[KEYS];          // complements, which fall
        FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
            const int n = PAIR * i + parity(), at = min_i(n, max_i(l.all - 1, 0));
            const int place = at < even ? at : at - even, other = (lane & ~1) | (at >= even);
            scores[i] = sorted[i] = n < l.all ? m.scores[place][other] : ABSENT;
            ids[i] = ~(u32)m.blocks[place][other];
        }
        order_lanes<PAIR>(sorted, lane);
        const i32 worst = max_i(0, key_at<PAIR>(sorted, max_i(places - 1, 0)));
        int stay = 0;
        FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
            stay += scores[i] >= worst;
            if (scores[i] < worst) ids[i] = 0;
        }
        stay += __shfl_xor_sync(ALL_LANES, stay, 1);
        order_lanes<PAIR>(ids, lane);
        if (first + lane / PAIR >= rows) return true;
        const RowBlocks& blocks = r.blocks;
        FSA_UNROLL for (int i = 0; i < KEYS; ++i)
            if (KEYS * parity() + i < places) target[blocks.first_scored + KEYS * parity() + i] = blocks.first_scored + (i32)~ids[i];
        const int first_local = blocks.first_scored + places, skipped = blocks.lists_all() ? blocks.first_scored : blocks.end_scored;
        const int end = first_local + blocks.candidates - skipped;
        for (int slot = parity(); slot < choice.topk; slot += PAIR)
            if (slot < blocks.first_scored) target[slot] = slot;
            else if (slot >= first_local) target[slot] = slot < end ? skipped + slot - first_local : -1;
        return !r.takes || (stay == places && r.reference < -neg_inf());
    }
    // Writes the lists of the warp's rows; `targets` are those of the tile.
    FSA_DEVICE void choose(i32* targets) const {
        const Row r = find_row();
        const int most = __reduce_max_sync(ALL_LANES, r.pieces);
        u32 left = ALL_LANES;   // two bits a row
        if (most <= FEW_STEPS * STEP_PIECES) {
            Listed l = {0, 0, true};
            if (most > 0) l = list(r, most);
            const bool right = write(r, l, targets + (first + lane / PAIR) * choice.topk);
            left = __ballot_sync(ALL_LANES, !(right && l.fits));
            __syncwarp();
        }
        FSA_NO_UNROLL for (int from = first; left != 0 && from < rows;) {   // all that are left at once, or four at a time
            const int end = left == ALL_LANES ? rows : min_i(rows, from + WARP_ROWS);
            if (left & 0xff) {
                RowChooser c = {choice, sums, maxima, references, *(RowCandidates*)&m, position, end, steps, lane};
                c.choose(from, targets);
            }
            left >>= PAIR * WARP_ROWS;
            from = end;
        }
    }
};
