// Probabilities of a step of keys, pooled to groups of four keys: scores of selection blocks, or of parts of them. The copy engine brings every fourth key at
// a time, so that the keys of a group meet in one thread.
#pragma once
#include "block/band_pipeline.cuh"

constexpr int GROUPS = STEP_KEYS / 4;
// Key 4 q + e of a step is row GROUPS e + q of its tile: column 8 i + 2 t + c of the scores, in lane t of a quad, is key 4 (8 (i % OCTETS) + 2 t + c) + i / OCTETS.
constexpr int OCTETS = GROUPS / 8;
typedef f32 GroupSums[2 * OCTETS];              // of a row: groups 8 j + 2 t, 8 j + 2 t + 1
FSA_DEVICE int key_of_column(int i, int c) { return 4 * (8 * (i % OCTETS) + 2 * (threadIdx.x & 3) + c) + i / OCTETS; }

// The rows of a step, every fourth one at a time: the boxes of the map skip three rows after each.
FSA_DEVICE void load_groups(u32 tile, const TensorMap* map, u32 barrier, int head, int row) {
    FSA_UNROLL for (int e = 0; e < 4; ++e)
        FSA_UNROLL for (int half = 0; half < KeyTile::HALVES; ++half)
            load_box(tile + half * KeyTile::HALF_BYTES + e * GROUPS * 128, map, barrier, half * 64, head, row + e);
}

// Value `mask` for the scores of keys of a step from `low_end` and `high_end` on, for the thread's first row and its second.
FSA_DEVICE void mask_groups(Scores& s, int low_end, int high_end, f32 mask) {
    FSA_UNROLL for (int i = 0; i < STEP_KEYS / 8; ++i)
        FSA_UNROLL for (int c = 0; c < 2; ++c) {
            const int key = key_of_column(i, c);
            if (key >= low_end) s[4 * i + c] = mask;
            if (key >= high_end) s[4 * i + 2 + c] = mask;
        }
}

// Adds `weight` times what reaches into the groups of a row: the last key of each, and that of the group before, `carry` where it is of the step before. HIGH:
// the thread's second row.
template <bool HIGH>
FSA_DEVICE f32 add_overlap(GroupSums& sums, const Scores& s, f32& carry, f32 weight) {
    f32 sum = 0.0f;
    const int lane = threadIdx.x & 31, left = (lane & ~3) | ((lane + 3) & 3);
    FSA_UNROLL for (int j = 0; j < OCTETS; ++j) {
        const f32* last = &s[4 * (3 * OCTETS + j) + (HIGH ? 2 : 0)];
        const f32 before = __shfl_sync(0xffffffffu, last[1], left);     // lane 0 gets that of the next eight groups
        sums[2 * j + 1] = fmaf(weight, last[0], sums[2 * j + 1]);
        sums[2 * j] = fmaf(weight, (lane & 3) == 0 ? carry : before, sums[2 * j]);
        carry = before;
        sum += sums[2 * j] + sums[2 * j + 1];
    }
    return sum;
}
