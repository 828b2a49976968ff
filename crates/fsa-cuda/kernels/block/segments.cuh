// Candidates from long segments of a token's scores in shared memory: a warp takes those of four tokens, eight lanes each. The first segment's bound is a score
// that enough of the two best of each lane reach, so that few of its blocks become candidates. What a block costs is a load and a comparison.
#pragma once
#include "block/candidates.cuh"

constexpr int SEGMENT_LANES = 8, SEGMENT_TOKENS = 32 / SEGMENT_LANES;
constexpr int SEGMENT_CHUNKS = 16, MAX_SEGMENT = SEGMENT_CHUNKS * 32;   // blocks of a segment: a lane has four of each 32, 64 in all
constexpr int SEGMENT_PAD = 8;                                          // words between tokens' scores: they lie in different banks

// What eight lanes know of their token's segment.
struct TokenSegment {
    const f32* scores;  // 16-byte aligned
    int begin;          // its first block
    int first, end;     // blocks that compete; none where it has no work
};

// The lane's blocks of a segment as bits: bit 4 c + v of the two words is block 32 c + 4 lane + v. Those before `block`.
struct LaneBlocks {
    u32 word[2];

    FSA_DEVICE static LaneBlocks before(int block, int lane) {
        const int behind = block - 4 * lane, count = behind <= 0 ? 0 : (behind >> 5) * 4 + min_i(behind & 31, 4);
        return {count >= 32 ? ~0u : (1u << count) - 1, count >= 64 ? ~0u : count <= 32 ? 0 : (1u << (count - 32)) - 1};
    }
};

// The lane's scores of half a segment: loads that are under way together; those behind the segment's chunks are others twice.
struct LaneScores {
    static constexpr int CHUNKS = SEGMENT_CHUNKS / 2;
    Vec4 of[CHUNKS];

    FSA_DEVICE LaneScores(const f32* scores, int half, int chunks, int lane) {
        FSA_UNROLL for (int i = 0; i < CHUNKS; ++i) of[i] = *(const Vec4*)(scores + 32 * min_i(half * CHUNKS + i, chunks - 1) + 4 * lane);
    }
    // Score v of chunk i; not negative, so that it orders as an integer.
    FSA_DEVICE i32 bits(int i, int v) const { return (i32)(v == 0 ? of[i].x : v == 1 ? of[i].y : v == 2 ? of[i].z : of[i].w); }
};

// A score that at least `places` of the present blocks reach, or -1: of the two best of each lane.
FSA_DEVICE f32 find_bound(const f32* scores, int places, const u32 (&present)[2], int chunks, int lane) {
    constexpr i32 ABSENT = (i32)0xbf800000;     // -1
    i32 best[2] = {ABSENT, ABSENT};
    FSA_NO_UNROLL for (int half = 0; half * LaneScores::CHUNKS < chunks; ++half) {
        const LaneScores s(scores, half, chunks, lane);
        const u32 bits = half == 0 ? present[0] : present[1];
        FSA_UNROLL for (int i = 0; i < LaneScores::CHUNKS; ++i)
            FSA_UNROLL for (int v = 0; v < 4; ++v) {
                const i32 score = bits >> (4 * i + v) & 1 ? s.bits(i, v) : ABSENT;
                best[1] = max_i(best[1], min_i(best[0], score));
                best[0] = max_i(best[0], score);
            }
    }
    order_lanes<SEGMENT_LANES>(best, lane);
    const i32 found = key_at<SEGMENT_LANES>(best, places - 1);
    return __int_as_float(places > 2 * SEGMENT_LANES ? ABSENT : found);
}

// Adds the segments of four tokens, `chunks` of 32 blocks, to their candidates; all lanes take part.
FSA_DEVICE void offer_segments(Candidates& c, const TokenSegment& t, int chunks) {
    const int lane = lane_number() & (SEGMENT_LANES - 1), places = c.places;
    const bool takes = places > 0 && t.first < t.end;
    const LaneBlocks low = LaneBlocks::before(t.first - t.begin, lane), high = LaneBlocks::before(t.end - t.begin, lane);
    const u32 present[2] = {takes ? high.word[0] & ~low.word[0] : 0, takes ? high.word[1] & ~low.word[1] : 0};
    Tally tally = {c.count, c.bound, c.worst};
    u32 passing[2] = {0, 0};
    const bool opens = takes && tally.bound < 0.0f;
    if (__any_sync(ALL_LANES, opens)) {
        const f32 found = find_bound(t.scores, places, present, chunks, lane);
        if (opens) tally.bound = found;
    }
    FSA_NO_UNROLL for (int half = 0; half * LaneScores::CHUNKS < chunks; ++half) {
        const LaneScores s(t.scores, half, chunks, lane);
        u32 bits = 0;
        FSA_UNROLL for (int i = 0; i < LaneScores::CHUNKS; ++i)
            FSA_UNROLL for (int v = 0; v < 4; ++v)
                if (!(__int_as_float(s.bits(i, v)) < tally.bound)) bits |= 1u << (4 * i + v);
        if (half == 0) passing[0] = bits & present[0];
        else passing[1] = bits & present[1];
    }
    while (__any_sync(ALL_LANES, passing[0] | passing[1])) {
        const bool second = passing[0] == 0;
        const u32 word = second ? passing[1] : passing[0], lowest = word & (0u - word);
        if (second) passing[1] ^= lowest;
        else passing[0] ^= lowest;
        const int bit = (second ? 32 : 0) + __popc(lowest - 1), at = word != 0 ? 32 * (bit >> 2) + 4 * lane + (bit & 3) : 0, block = t.begin + at;
        const f32 score = t.scores[at];
        append_lanes<SEGMENT_LANES>(c, tally, score, block, word != 0, takes);
    }
    __syncwarp();
    if (lane == 0 && takes) {
        c.count = tally.count;
        c.bound = tally.bound;
        c.worst = tally.worst;
    }
    __syncwarp();
}
