// The steps of a tile's mask of blocks (struct BlockMask), from the bits of what its rows list.
#pragma once
#include "block/listed_blocks.cuh"

// Rows of a tile and how their keys are walked.
struct MaskedTile {
    i32 position, last_position;    // of the first row and of the last
    i32 end;                        // keys that some row sees
    i32 window;                     // earlier keys that the same kernel attends to, too; -1: it does not
    i32 step_keys;
};

// Lists the steps of which some row lists a block, by a warp, the last first; `any`, `all`: the bits of what some row lists, and every row. Where the rows see a window, too, the
// steps from the window's first key on come behind the others, whoever lists them.
FSA_DEVICE void list_steps(const BlockMask& mask, const MaskedTile& t, i64 list, const u32* any, const u32* all) {
    const int lane = threadIdx.x & 31, blocks_of_step = max_i(1, t.step_keys / BLOCK_SIZE), end = ceil_div(t.end, t.step_keys);
    const int near = t.window < 0 ? end : max_i(0, t.position - t.window) / t.step_keys;
    const u32 whole = (1u << blocks_of_step) - 1;
    int count = 0;
    auto find = [&](int first, int end, bool in_window) {
        FSA_NO_UNROLL for (int last = end - 1; last >= first; last -= 32) {
            const int step = last - lane, key = max_i(step, 0) * t.step_keys, block = key / BLOCK_SIZE;
            const bool listed = step >= first && (in_window || (any[block >> 5] >> (block & 31) & whole) != 0);
            const bool by_all = (all[block >> 5] >> (block & 31) & whole) == whole && !(in_window && key < t.last_position - t.window);
            const u32 votes = __ballot_sync(0xffffffffu, listed);
            if (listed) mask.steps[list * mask.max_steps + count + __popc(votes & ((1u << lane) - 1))] = key | !by_all;
            count += __popc(votes);
        }
    };
    find(0, near, false);
    find(near, end, true);
    if (lane == 0) mask.step_counts[list] = count;
}
