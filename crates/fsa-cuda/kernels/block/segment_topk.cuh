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
    int places, held;   // for the best, in the list already
};

struct Candidates {
    u64* keys;          // the token's [CANDIDATES]
    int places;
    int count;

    FSA_DEVICE static int lane() { return threadIdx.x & (LIST_LANES - 1); }

    // Puts the best `places` first, in order; the others are gone.
    FSA_DEVICE void sort() {
        const int most = __reduce_max_sync(0xffffffffu, count);
        if (most <= 24) sort_some<3>(most);
        else sort_some<4>(most);
    }
    // Rank of the worst that has a place, if all have.
    FSA_DEVICE u32 worst_rank() const { return (u32)(keys[places - 1] >> 32); }

  private:
    template <int OWN>
    FSA_DEVICE void sort_some(int most) {
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
        _Pragma("unroll 4") for (int other = 0; other < most; other += 2) {
            const Vec4 v = *(const Vec4*)(keys + other);
            const u64 a = (u64)v.y << 32 | v.x, b = (u64)v.w << 32 | v.z;
            FSA_UNROLL for (int k = 0; k < OWN; ++k) place[k] += (a < own[k]) + (b < own[k]);
        }
        __syncwarp();
        FSA_UNROLL for (int k = 0; k < OWN; ++k)
            if (lane() + LIST_LANES * k < count && place[k] < places) keys[place[k]] = own[k];
        count = min_i(count, places);
        __syncwarp();
    }
};

// The lane's blocks of a segment as bits: bit 4 c + v of the two words is block 32 c + 4 lane + v. Those before `block`.
struct LaneBlocks {
    u32 word[2];

    FSA_DEVICE static LaneBlocks before(int block) {
        const int behind = block - 4 * Candidates::lane(), count = behind <= 0 ? 0 : (behind >> 5) * 4 + min_i(behind & 31, 4);
        return {count >= 32 ? ~0u : (1u << count) - 1, count >= 64 ? ~0u : count <= 32 ? 0 : (1u << (count - 32)) - 1};
    }
};

// Adds the segments of four tokens to their lists, which then hold the best `places` blocks in order. `chunks` of 32 blocks; all lanes take part.
FSA_DEVICE void offer_segments(u64* list, u64* scratch, const TokenSegment& t, int chunks) {
    const int lane = Candidates::lane();
    const LaneBlocks low = LaneBlocks::before(t.first - t.begin), high = LaneBlocks::before(t.end - t.begin);
    const u32 present[2] = {t.places > 0 ? high.word[0] & ~low.word[0] : 0, t.places > 0 ? high.word[1] & ~low.word[1] : 0};
    Candidates c = {scratch, t.places, 0};
    // Segments come in the order of their blocks: of equals the one that is in the list stays.
    u32 bound = TopBlocks::WORST_RANK;
    if (t.held > 0 && t.held == t.places) bound = (u32)(list[t.places - 1] >> 32) - 1;
    if (__any_sync(0xffffffffu, t.held == 0 && t.places > 0)) {
        // At least `places` blocks are not worse than that one of the two best of each lane.
        u32 best = ABSENT_RANK, second = ABSENT_RANK;
        FSA_UNROLL for (int half = 0; half < 2; ++half)
            FSA_UNROLL for (int i = 0; i < SEGMENT_CHUNKS / 2; ++i) {
                if (half * SEGMENT_CHUNKS / 2 + i >= chunks) break;
                const Vec4 v = *(const Vec4*)(t.ranks + 32 * (half * SEGMENT_CHUNKS / 2 + i) + 4 * lane);
                const u32 ranks[4] = {v.x, v.y, v.z, v.w};
                FSA_UNROLL for (int e = 0; e < 4; ++e) {
                    const u32 rank = present[half] >> (4 * i + e) & 1 ? ranks[e] : ABSENT_RANK;
                    const u32 worse = rank > best ? rank : best;
                    best = rank < best ? rank : best;
                    second = worse < second ? worse : second;
                }
            }
        c.keys[2 * lane] = block_key(best, 2 * lane);
        c.keys[2 * lane + 1] = block_key(second, 2 * lane + 1);
        c.count = 2 * LIST_LANES;
        c.sort();
        if (t.held == 0 && t.places > 0 && t.places <= 2 * LIST_LANES) bound = min_u(bound, c.worst_rank());
        __syncwarp();
    }
    u32 passing[2] = {0, 0};
    FSA_UNROLL for (int half = 0; half < 2; ++half) {
        FSA_UNROLL for (int i = 0; i < SEGMENT_CHUNKS / 2; ++i) {
            if (half * SEGMENT_CHUNKS / 2 + i >= chunks) break;
            const Vec4 v = *(const Vec4*)(t.ranks + 32 * (half * SEGMENT_CHUNKS / 2 + i) + 4 * lane);
            passing[half] |= (v.x <= bound ? 1u << (4 * i) : 0) | (v.y <= bound ? 2u << (4 * i) : 0) | (v.z <= bound ? 4u << (4 * i) : 0) | (v.w <= bound ? 8u << (4 * i) : 0);
        }
        passing[half] &= present[half];
    }
    if (!__any_sync(0xffffffffu, passing[0] | passing[1])) return;
    c.count = t.held;
    for (int i = lane; i < t.held; i += LIST_LANES) c.keys[i] = list[i];
    do {
        const int half = passing[0] == 0;
        const u32 word = half ? passing[1] : passing[0], lowest = word & (0u - word);
        if (half) passing[1] ^= lowest;
        else passing[0] ^= lowest;
        const int bit = 32 * half + __popc(lowest - 1), block = 32 * (bit >> 2) + 4 * lane + (bit & 3);
        const u32 rank = word != 0 ? t.ranks[block] : ABSENT_RANK;
        const u32 votes = __ballot_sync(0xffffffffu, rank <= bound) >> (threadIdx.x & 24) & 255;
        if (rank <= bound) c.keys[c.count + __popc(votes & ((1u << lane) - 1))] = block_key(rank, t.begin + block);
        c.count += __popc(votes);
        if (__any_sync(0xffffffffu, c.count > CANDIDATES - LIST_LANES)) {
            c.sort();
            if (t.places > 0 && c.count == t.places) bound = c.worst_rank();
        }
    } while (__any_sync(0xffffffffu, passing[0] | passing[1]));
    c.sort();
    for (int i = lane; i < c.count; i += LIST_LANES) list[i] = c.keys[i];
}

// Writes the rows of four tokens: the first blocks, the best ones ascending, the last ones, then -1. `held` of the best are in the list; those behind are
// `unmet` and the next ones.
FSA_DEVICE void list_tokens(i32* row, const u64* list, const RowBlocks& blocks, int topk, int held, int unmet, bool present) {
    const int lane = Candidates::lane(), places = blocks.lists_all() || !present ? 0 : blocks.places, most = __reduce_max_sync(0xffffffffu, min_i(held, places));
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
