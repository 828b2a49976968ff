// The best blocks of tokens from many scores at a time. A warp takes segments of four tokens from shared memory, eight lanes each: they find a bound that few
// ranks pass, gather those, and put them in order with the ones before. What a block costs is a load and a comparison; the four share the rest.
#pragma once
#include "block/topk.cuh"
#include "ptx/memory.cuh"

constexpr int LIST_TOKENS = 4, LIST_LANES = 8;
constexpr int MAX_PLACES = 24;                      // of a row's best blocks
constexpr int CANDIDATES = 32, CANDIDATE_WORDS = CANDIDATES + 2;    // of a token; the four lie in different banks
constexpr int SEGMENT_CHUNKS = 16, MAX_SEGMENT = SEGMENT_CHUNKS * 32;   // blocks of a segment: a lane has four of each 32, 64 in all
constexpr u32 ABSENT_RANK = 0xffffffffu;            // worse than every rank

// Rank and id as one number, the lower the better: ties go to the lower id.
FSA_DEVICE u64 block_key(u32 rank, int block) { return (u64)rank << 32 | (u32)block; }

// What eight lanes know of their token; one without work has no places.
struct TokenSegment {
    const u32* ranks;   // of the segment's blocks, 16-byte aligned
    int begin;          // its first block
    int first, end;     // blocks that compete
    int places;         // for the best
    bool opens;         // no block came before
};

// A token's candidates in shared memory: all blocks so far that may be among the best, and few others.
struct Candidates {
    u64* keys;          // [CANDIDATE_WORDS]: keys, the worst that is of interest, their number
    int places;
    int count;
    u64 worst;

    FSA_DEVICE static int lane() { return threadIdx.x & (LIST_LANES - 1); }
    FSA_DEVICE static Candidates none(u64* keys, int places) { return {keys, places, 0, block_key(TopBlocks::WORST_RANK, -1)}; }
    FSA_DEVICE static Candidates load(u64* keys, int places) { return {keys, places, (int)keys[CANDIDATES + 1], keys[CANDIDATES]}; }
    FSA_DEVICE void store() const {
        if (lane() == 0) {
            keys[CANDIDATES] = worst;
            keys[CANDIDATES + 1] = (u64)count;
        }
        __syncwarp();
    }
    FSA_DEVICE u32 bound() const { return (u32)(worst >> 32); }

    // Puts the best `places` first, in order; the others are gone.
    FSA_DEVICE void sort() {
        constexpr int OWN = CANDIDATES / LIST_LANES;
        const int most = __reduce_max_sync(0xffffffffu, count);
        u64 own[OWN];
        int place[OWN];
        __syncwarp();
        FSA_UNROLL for (int k = 0; k < OWN; ++k) {
            const int at = lane() + LIST_LANES * k;
            own[k] = at < count ? keys[at] : ~0ull;
            if (at >= count) keys[at] = ~0ull;
            place[k] = 0;
        }
        __syncwarp();
        _Pragma("unroll 2") for (int other = 0; other < most; other += 2) {
            const Vec4 v = *(const Vec4*)(keys + other);
            const u64 a = (u64)v.y << 32 | v.x, b = (u64)v.w << 32 | v.z;
            FSA_UNROLL for (int k = 0; k < OWN; ++k) place[k] += (a < own[k]) + (b < own[k]);
        }
        __syncwarp();
        FSA_UNROLL for (int k = 0; k < OWN; ++k)
            if (lane() + LIST_LANES * k < count && place[k] < places) keys[place[k]] = own[k];
        count = min_i(count, places);
        __syncwarp();
        if (places > 0 && count == places) worst = keys[places - 1];
        __syncwarp();
    }
    // Takes a key of each lane with `present`.
    FSA_DEVICE void take(u64 key, bool present) {
        u32 votes = votes_for(present && key <= worst);
        if (__any_sync(0xffffffffu, count + __popc(votes) > CANDIDATES)) {
            sort();
            votes = votes_for(present && key <= worst);
        }
        if (votes >> lane() & 1) keys[count + __popc(votes & ((1u << lane()) - 1))] = key;
        count += __popc(votes);
    }

  private:
    // Lanes of the token, a bit each.
    FSA_DEVICE static u32 votes_for(bool takes) { return __ballot_sync(0xffffffffu, takes) >> (threadIdx.x & 24) & 255; }
};

// The lane's blocks of a segment as bits: bit 4 c + v of the two words is block 32 c + 4 lane + v. Those before `block`.
struct LaneBlocks {
    u32 word[2];

    FSA_DEVICE static LaneBlocks before(int block) {
        const int behind = block - 4 * Candidates::lane(), count = behind <= 0 ? 0 : (behind >> 5) * 4 + min_i(behind & 31, 4);
        return {count >= 32 ? ~0u : (1u << count) - 1, count >= 64 ? ~0u : count <= 32 ? 0 : (1u << (count - 32)) - 1};
    }
};

// The lane's ranks of half a segment: loads that are under way together; those behind the segment's chunks are others twice.
struct LaneRanks {
    static constexpr int CHUNKS = SEGMENT_CHUNKS / 2;
    Vec4 of[CHUNKS];

    FSA_DEVICE LaneRanks(const u32* ranks, int half, int chunks) {
        FSA_UNROLL for (int i = 0; i < CHUNKS; ++i) of[i] = *(const Vec4*)(ranks + 32 * min_i(half * CHUNKS + i, chunks - 1) + 4 * Candidates::lane());
    }
};

// A rank that at least `places` of the present blocks do not pass, if places are at most two per lane: of the two best of each lane.
FSA_DEVICE u32 find_bound(Candidates c, const TokenSegment& t, const u32 (&present)[2], int chunks) {
    u32 best = ABSENT_RANK, second = ABSENT_RANK;
    FSA_NO_UNROLL for (int half = 0; half * LaneRanks::CHUNKS < chunks; ++half) {
        const LaneRanks r(t.ranks, half, chunks);
        const u32 bits = half == 0 ? present[0] : present[1];
        FSA_UNROLL for (int i = 0; i < LaneRanks::CHUNKS; ++i) {
            const u32 ranks[4] = {r.of[i].x, r.of[i].y, r.of[i].z, r.of[i].w};
            FSA_UNROLL for (int e = 0; e < 4; ++e) {
                const u32 rank = bits >> (4 * i + e) & 1 ? ranks[e] : ABSENT_RANK, worse = rank > best ? rank : best;
                best = min_u(rank, best);
                second = min_u(worse, second);
            }
        }
    }
    const int lane = Candidates::lane();
    c.keys[2 * lane] = block_key(best, 2 * lane);
    c.keys[2 * lane + 1] = block_key(second, 2 * lane + 1);
    c.count = 2 * LIST_LANES;
    c.sort();
    return c.places > 0 && c.places <= 2 * LIST_LANES ? min_u(c.bound(), TopBlocks::WORST_RANK) : TopBlocks::WORST_RANK;
}

// Adds the segments of four tokens, `chunks` of 32 blocks, to their candidates; all lanes take part. What lanes without work write goes to `idle`.
FSA_DEVICE void offer_segments(u64* keys, u64* idle, const TokenSegment& t, int chunks) {
    const LaneBlocks low = LaneBlocks::before(t.first - t.begin), high = LaneBlocks::before(t.end - t.begin);
    const u32 present[2] = {t.places > 0 ? high.word[0] & ~low.word[0] : 0, t.places > 0 ? high.word[1] & ~low.word[1] : 0};
    Candidates c = t.opens ? Candidates::none(keys, t.places) : Candidates::load(keys, t.places);
    if (t.places == 0) c = Candidates::none(idle, 0);
    if (__any_sync(0xffffffffu, t.opens && t.places > 0)) {
        const u32 bound = find_bound(Candidates::none(t.opens ? c.keys : idle, t.places), t, present, chunks);
        if (t.opens) c.worst = block_key(bound, -1);
    }
    u32 passing[2] = {0, 0};
    FSA_NO_UNROLL for (int half = 0; half * LaneRanks::CHUNKS < chunks; ++half) {
        const LaneRanks r(t.ranks, half, chunks);
        const u32 bound = c.bound();
        u32 bits = 0;
        FSA_UNROLL for (int i = 0; i < LaneRanks::CHUNKS; ++i)
            bits |= (r.of[i].x <= bound ? 1u << (4 * i) : 0) | (r.of[i].y <= bound ? 2u << (4 * i) : 0) | (r.of[i].z <= bound ? 4u << (4 * i) : 0) |
                    (r.of[i].w <= bound ? 8u << (4 * i) : 0);
        if (half == 0) passing[0] = bits & present[0];
        else passing[1] = bits & present[1];
    }
    while (__any_sync(0xffffffffu, passing[0] | passing[1])) {
        const bool second = passing[0] == 0;
        const u32 word = second ? passing[1] : passing[0], lowest = word & (0u - word);
        if (second) passing[1] ^= lowest;
        else passing[0] ^= lowest;
        const int bit = (second ? 32 : 0) + __popc(lowest - 1), block = 32 * (bit >> 2) + 4 * Candidates::lane() + (bit & 3);
        c.take(block_key(word != 0 ? t.ranks[block] : ABSENT_RANK, t.begin + block), word != 0);
    }
    c.store();
}

// Writes the rows of four tokens: the first blocks, the best ones ascending, the last ones, then -1. `held` of the best are candidates; those behind are
// `unmet` and the next ones.
FSA_DEVICE void list_tokens(i32* row, u64* keys, u64* idle, const RowBlocks& blocks, int topk, int held, int unmet, bool present) {
    const int lane = Candidates::lane(), places = blocks.lists_all() || !present ? 0 : blocks.places, most = __reduce_max_sync(0xffffffffu, min_i(held, places));
    Candidates c = places > 0 && held > 0 ? Candidates::load(keys, places) : Candidates::none(idle, 0);
    c.sort();
    const u64* list = c.keys;
    i32 id[MAX_PLACES / LIST_LANES], before[MAX_PLACES / LIST_LANES];
    FSA_UNROLL for (int k = 0; k < MAX_PLACES / LIST_LANES; ++k) {
        const int at = lane + LIST_LANES * k;
        id[k] = at < places && at < held ? (i32)(u32)list[at] : 0;
        before[k] = at < held ? 0 : at;
        if (at >= held) id[k] = unmet + at - held;
    }
    _Pragma("unroll 4") for (int i = 0; i < most; ++i) {
        const i32 other = i < held && i < places ? (i32)(u32)list[i] : 0x7fffffff;
        FSA_UNROLL for (int k = 0; k < MAX_PLACES / LIST_LANES; ++k) before[k] += lane + LIST_LANES * k < held && other < id[k];
    }
    if (!present) return;
    FSA_UNROLL for (int k = 0; k < MAX_PLACES / LIST_LANES; ++k)
        if (lane + LIST_LANES * k < places) row[blocks.first_scored + before[k]] = id[k];
    const int first_local = blocks.first_scored + places, skipped = blocks.lists_all() ? blocks.first_scored : blocks.end_scored;
    const int end = blocks.lists_all() ? blocks.candidates : first_local + blocks.candidates - blocks.end_scored;
    for (int slot = lane; slot < topk; slot += LIST_LANES)
        if (slot < blocks.first_scored || slot >= first_local) row[slot] = slot < blocks.first_scored ? slot : slot < end ? skipped + slot - first_local : -1;
}
