// The blocks that a row lists: those it always lists, and the best of the others, kept by one warp while the scores pass by.
#pragma once
#include "base/math.cuh"

// Own block of a row and its forced blocks: the first ones and the last ones up to the own. What is between them competes for the other places.
struct RowBlocks {
    i32 candidates;     // blocks [0, candidates)
    i32 first_scored;   // blocks before are listed
    i32 end_scored;     // blocks from here on are listed
    i32 places;         // for the best of [first_scored, end_scored), never more than there are

    FSA_DEVICE bool lists_all() const { return places == end_scored - first_scored; }
};
FSA_DEVICE RowBlocks row_blocks(int position, int topk, int init_blocks, int local_blocks) {
    RowBlocks r;
    r.candidates = position / BLOCK_SIZE + 1;
    r.first_scored = min_i(init_blocks, r.candidates);
    r.end_scored = max_i(r.candidates - local_blocks, r.first_scored);
    r.places = max_i(0, min_i(topk, r.candidates) - r.first_scored - (r.candidates - r.end_scored));
    return r;
}
// A row that lists all of its blocks needs no scores; every lane takes part.
FSA_DEVICE void list_all_blocks(i32* row, const RowBlocks& blocks, int topk) {
    for (int slot = threadIdx.x & 31; slot < topk; slot += 32) row[slot] = slot < blocks.candidates ? slot : -1;
}

// The best blocks so far, in no order, two per lane: 64 at most. Rank orders scores as integers, the lower the better, so that one reduction finds the
// worst: 2^31 - 1 less the bits of a score, which is not negative. NaN ranks as 0, as if its heads had not voted. Among equal ranks the lower id
// is better. Empty places are worse than every block, places beyond `count` better, so that they are never taken.
struct TopBlocks {
    static constexpr u32 LANES = 0xffffffffu;
    static constexpr int WORST_RANK = 0x7fffffff, EMPTY = 0x40000000;   // ids end far below

    i32 rank[2], id[2];
    i32 worst_rank, worst_id;       // the same in all lanes

    FSA_DEVICE static int place(int i) { return (threadIdx.x & 31) + 32 * i; }
    FSA_DEVICE static int rank_of(f32 score) { return score > 0.0f ? WORST_RANK - (int)__float_as_uint(score) : WORST_RANK; }

    FSA_DEVICE void open(int count) {
        FSA_UNROLL for (int i = 0; i < 2; ++i) {
            rank[i] = place(i) < count ? WORST_RANK : -1;
            id[i] = EMPTY + place(i);
        }
        find_worst();
    }
    // State of `count` places in memory, ranks and ids apart.
    FSA_DEVICE void load(const i32* ranks, const i32* ids, int count) {
        FSA_UNROLL for (int i = 0; i < 2; ++i) {
            rank[i] = place(i) < count ? ranks[place(i)] : -1;
            id[i] = place(i) < count ? ids[place(i)] : EMPTY;
        }
        find_worst();
    }
    FSA_DEVICE void store(i32* ranks, i32* ids, int count) const {
        FSA_UNROLL for (int i = 0; i < 2; ++i)
            if (place(i) < count) {
                ranks[place(i)] = rank[i];
                ids[place(i)] = id[i];
            }
    }
    FSA_DEVICE void find_worst() {
        worst_rank = __reduce_max_sync(LANES, max_i(rank[0], rank[1]));
        worst_id = __reduce_max_sync(LANES, max_i(rank[0] == worst_rank ? id[0] : -1, rank[1] == worst_rank ? id[1] : -1));
    }
    FSA_DEVICE bool is_better(int new_rank, int new_id) const { return new_rank < worst_rank || (new_rank == worst_rank && new_id < worst_id); }

    // One block per lane, those with `present`; ids are offered once.
    FSA_DEVICE void offer(f32 score, int block, bool present) {
        const int new_rank = rank_of(score);
        u32 waiting = __ballot_sync(LANES, present && is_better(new_rank, block));
        while (waiting != 0) {
            const int lane = __popc((waiting & (0u - waiting)) - 1);
            waiting &= waiting - 1;
            insert(__shfl_sync(LANES, new_rank, lane), __shfl_sync(LANES, block, lane));
        }
    }
    // Takes the place of the worst, if it is better; the same in all lanes.
    FSA_DEVICE void insert(int new_rank, int new_id) {
        if (!is_better(new_rank, new_id)) return;
        FSA_UNROLL for (int i = 0; i < 2; ++i)
            if (rank[i] == worst_rank && id[i] == worst_id) {
                rank[i] = new_rank;
                id[i] = new_id;
            }
        find_worst();
    }
    // The row's list after all blocks were offered: ascending, then -1.
    FSA_DEVICE void list(i32* row, const RowBlocks& blocks, int topk) const {
        int before[2] = {0, 0};     // chosen ids below this lane's
        for (int i = 0; i < blocks.places; ++i) {
            const int other = __shfl_sync(LANES, i < 32 ? id[0] : id[1], i & 31);
            before[0] += other < id[0];
            before[1] += other < id[1];
        }
        const int first_local = blocks.first_scored + blocks.places, end = first_local + blocks.candidates - blocks.end_scored;
        FSA_UNROLL for (int i = 0; i < 2; ++i) {
            const int slot = place(i);
            if (slot < topk && (slot < blocks.first_scored || slot >= first_local))
                row[slot] = slot < blocks.first_scored ? slot : slot < end ? blocks.end_scored + slot - first_local : -1;
            if (slot < blocks.places) row[blocks.first_scored + before[i]] = id[i];
        }
    }
};
