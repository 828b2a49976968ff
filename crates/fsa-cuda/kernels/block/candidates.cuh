// The best blocks of many tokens while scores pass by, in shared memory: what beats a token's bound joins its candidates; when they are full, the best of
// them are kept and the worst of these is the next bound. Four or eight lanes put the candidates of a token in order, eight or four tokens a warp.
#pragma once
#include "block/topk.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int CANDIDATES = 32, QUAD = 4;                  // of a token; lanes
constexpr int UNIT = 8, MAX_PLACES = CANDIDATES - UNIT;  // of a row's best blocks: there is room for a unit of others besides them

// Score and id as one number, the higher the better: ties go to the lower id. Scores are not negative; NaN is as good as any. 0 is no block.
FSA_DEVICE u64 block_key(f32 score, int block) { return (u64)__float_as_uint(score) << 32 | ~(u32)block; }

struct __align__(16) Candidates {
    u32 worst;          // complement of the id that a block of score `bound` must stay below
    f32 bound;          // blocks that score lower are of no interest
    i32 count;
    i32 places;         // for the best
    u64 keys[CANDIDATES];

    // Those of a row before its first block. A row without work is not interested in any.
    FSA_DEVICE void open(const RowBlocks& row, bool exists) {
        const bool takes = exists && !row.lists_all() && row.places > 0;
        worst = 0;
        bound = takes ? -1.0f : -neg_inf();
        count = 0;
        places = takes ? row.places : 0;
    }
};

// Where `offered`, stores the key of a block that scores higher than the bound, or NaN, and goes on to the next place.
FSA_DEVICE void append_above(u32& place, f32 bound, f32 score, int block, bool offered) {
    asm volatile("{ .reg .pred p, q; setp.ne.s32 q, %4, 0; setp.gtu.f32 p, %1, %2; and.pred p, p, q;"
                 " @p st.shared.u32 [%0], %3; @p st.shared.f32 [%0 + 4], %1; @p add.u32 %0, %0, 8; }"
                 : "+r"(place) : "f"(score), "f"(bound), "r"(~block), "r"((int)offered) : "memory");
}

// Orders two keys, the greater first.
template <typename Key>
FSA_DEVICE void order(Key& a, Key& b) {
    const Key x = a, y = b;
    a = x < y ? y : x;
    b = x < y ? x : y;
}
// Orders the keys of a lane (Batcher's odd-even merge sort).
template <typename Key, int KEYS>
FSA_DEVICE void order_lane(Key (&k)[KEYS]) {
    FSA_UNROLL for (int size = 1; size < KEYS; size *= 2)
        FSA_UNROLL for (int distance = size; distance > 0; distance /= 2)
            FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
                const int from = i - distance % size;   // of runs of `distance` pairs
                if (from >= 0 && from / distance % 2 == 0 && i + distance < KEYS && i / (2 * size) == (i + distance) / (2 * size)) order(k[i], k[i + distance]);
            }
}
// Orders the keys of a lane, which rise and then fall or the other way round.
template <typename Key, int KEYS>
FSA_DEVICE void merge_lane(Key (&k)[KEYS]) {
    FSA_UNROLL for (int distance = KEYS / 2; distance > 0; distance /= 2)
        FSA_UNROLL for (int i = 0; i < KEYS; ++i)
            if ((i & distance) == 0) order(k[i], k[i + distance]);
}
// Compares the keys with those of the lane `mask` away, in the same order or in reverse; the first of the two gets the greater ones.
template <typename Key, int KEYS>
FSA_DEVICE void exchange(Key (&k)[KEYS], int mask, bool reverse, bool first) {
    Key other[KEYS];
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) other[i] = __shfl_xor_sync(ALL_LANES, k[reverse ? KEYS - 1 - i : i], mask);
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) k[i] = (k[i] < other[i]) == first ? other[i] : k[i];
}
// Orders the keys of LANES lanes, the greatest first: those of a lane follow those of the lane before.
template <int LANES, typename Key, int KEYS>
FSA_DEVICE void order_lanes(Key (&k)[KEYS], int lane) {
    order_lane(k);
    FSA_UNROLL for (int width = 2; width <= LANES; width *= 2) {
        exchange(k, width - 1, true, (lane & width / 2) == 0);
        FSA_UNROLL for (int distance = width / 4; distance > 0; distance /= 2) exchange(k, distance, false, (lane & distance) == 0);
        merge_lane(k);
    }
}
// The key at a place of LANES lanes' keys.
template <int LANES, typename Key, int KEYS>
FSA_DEVICE Key key_at(const Key (&k)[KEYS], int place) {
    Key x[KEYS];
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) x[i] = k[i];
    FSA_UNROLL for (int distance = 1; distance < KEYS; distance *= 2)
        FSA_UNROLL for (int i = 0; i < KEYS; i += 2 * distance) x[i] = (place & distance) != 0 ? x[i + distance] : x[i];
    return __shfl_sync(ALL_LANES, x[0], place / KEYS, LANES);
}

// Of a token's full candidates the best stay, each where the number of those before it says.
template <int LANES>
FSA_DEVICE void settle_by_keys(Candidates& c, int lane, int count, int places, bool full) {
    constexpr int KEYS = CANDIDATES / LANES;
    u64 key[KEYS];
    int place[KEYS];
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
        const int at = LANES * i + lane;
        key[i] = at < count ? c.keys[at] : 0;
        place[i] = at < count ? 0 : CANDIDATES;
    }
    FSA_NO_UNROLL for (int other = 0; other < CANDIDATES; ++other) {
        const u64 before = other < count ? c.keys[other] : 0;
        FSA_UNROLL for (int i = 0; i < KEYS; ++i) place[i] += before > key[i];
    }
    __syncwarp();
    if (!full) return;
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
        if (place[i] < places) c.keys[place[i]] = key[i];
        if (place[i] + 1 == places) {
            c.worst = (u32)key[i];
            c.bound = __uint_as_float((u32)(key[i] >> 32));
        }
    }
}

// Where one of the warp's tokens, LANES lanes each, has more candidates than `most`: keeps the best of all of them, as many as there are places, and raises the
// bounds. By the upper bits of the scores, with the place where one lies in the others' stead, unless these do not tell the last that stays from the
// first that goes.
template <int LANES>
FSA_DEVICE void settle(Candidates& c, int most) {
    constexpr int KEYS = CANDIDATES / LANES;
    constexpr u32 PLACE = CANDIDATES - 1;
    const int lane = lane_number() & (LANES - 1), count = c.count, places = c.places;
    if (!__any_sync(ALL_LANES, count > max_i(places, most))) return;
    const bool full = count > places;
    u32 word[KEYS];
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
        const u32 at = LANES * i + lane;
        word[i] = (int)at < count ? ((u32)(c.keys[at] >> 32) & ~PLACE) | at : 0;
    }
    order_lanes<LANES>(word, lane);
    const u32 last = key_at<LANES>(word, places - 1), next = key_at<LANES>(word, places);
    if (__any_sync(ALL_LANES, full && (last ^ next) <= PLACE)) {
        settle_by_keys<LANES>(c, lane, count, places, full);
    } else {
        u64 key[KEYS];
        FSA_UNROLL for (int i = 0; i < KEYS; ++i) key[i] = c.keys[word[i] & PLACE];
        __syncwarp();
        FSA_UNROLL for (int i = 0; i < KEYS; ++i)
            if (full && KEYS * lane + i < places) c.keys[KEYS * lane + i] = key[i];
        if (full && lane == 0 && places > 0) {
            c.worst = 0;
            c.bound = __uint_as_float(last & ~PLACE);
        }
    }
    if (full && lane == 0) c.count = places;
    __syncwarp();
}

// What a token's lanes know of its candidates while they append to them.
struct Tally {
    i32 count;
    f32 bound;
    u32 worst;
};
// Appends the block of every lane that is present and beats the bound of its token, of which `takes` are appended to; LANES lanes a token. The candidates
// of all settle where those of one have no room.
template <int LANES>
FSA_DEVICE void append_lanes(Candidates& c, Tally& t, f32 score, int block, bool present, bool takes) {
    const int lane = lane_number() & (LANES - 1), shift = lane_number() & 31 & ~(LANES - 1);
    const auto votes_for = [&] {    // of the token's lanes, a bit each
        return __ballot_sync(ALL_LANES, present && (!(score <= t.bound) || (score == t.bound && ~(u32)block > t.worst))) >> shift & ((1u << LANES) - 1);
    };
    u32 votes = votes_for();
    if (__any_sync(ALL_LANES, t.count + __popc(votes) > CANDIDATES)) {
        if (lane == 0 && takes) c.count = t.count;
        __syncwarp();
        settle<LANES>(c, 0);
        if (takes && t.count > c.places) t = {c.count, c.bound, c.worst};
        votes = votes_for();
    }
    if (votes >> lane & 1) c.keys[t.count + __popc(votes & ((1u << lane) - 1))] = block_key(score, block);
    t.count += __popc(votes);
}

// Writes what a token's row has besides the best `places` blocks, of which there are none where it lists all: the first blocks, the last ones, then -1.
template <int LANES>
FSA_DEVICE void list_forced(i32* row, const RowBlocks& blocks, int places, int topk) {
    const int first_local = blocks.first_scored + places, skipped = blocks.lists_all() ? blocks.first_scored : blocks.end_scored;
    const int end = first_local + blocks.candidates - skipped;
    for (int slot = lane_number() & (LANES - 1); slot < topk; slot += LANES)
        if (slot < blocks.first_scored || slot >= first_local) row[slot] = slot < blocks.first_scored ? slot : slot < end ? skipped + slot - first_local : -1;
}
// Writes the row of LANES lanes' token: the first blocks, its candidates ascending, the last ones, then -1. Where there are more places than candidates,
// `unmet` and the next blocks follow.
template <int LANES>
FSA_DEVICE void list_blocks(i32* row, const Candidates& c, const RowBlocks& blocks, int topk, int unmet, bool present) {
    constexpr int KEYS = CANDIDATES / LANES;
    const int lane = lane_number() & (LANES - 1), places = blocks.lists_all() || !present ? 0 : blocks.places, held = min_i(c.count, places);
    u32 id[KEYS];       // complements, which fall
    FSA_UNROLL for (int i = 0; i < KEYS; ++i) {
        const int at = lane + LANES * i;
        id[i] = at < held ? (u32)c.keys[at] : at < places ? ~(u32)(unmet + at - held) : 0;
    }
    order_lanes<LANES>(id, lane);
    if (!present) return;
    FSA_UNROLL for (int i = 0; i < KEYS; ++i)
        if (KEYS * lane + i < places) row[blocks.first_scored + KEYS * lane + i] = (i32)~id[i];
    list_forced<LANES>(row, blocks, places, topk);
}
