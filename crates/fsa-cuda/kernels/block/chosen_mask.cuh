// The mask of the blocks that tokens choose (struct BlockMask), left by the warps that choose, of tokens with few blocks: who reads it needs no kernel that makes it of lists.
#pragma once
#include "block/mask_steps.cuh"
#include "block/topk.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

constexpr int CHOSEN_WORDS = 4;     // of a token: it has no more than 128 blocks

// In shared memory: what some token lists of each of two tiles, and what every one does.
struct ChosenBits {
    u32 any[2][CHOSEN_WORDS], all[2][CHOSEN_WORDS];
    i32 list[2];        // place of the steps

    FSA_DEVICE void open(int tile, int word) {
        any[tile][word] = 0;
        all[tile][word] = ~0u;
    }
    // Adds a word of the tokens of a warp, of which a lane has one in LANES and its word `word`; those that do not exist list nothing.
    template <int LANES>
    FSA_DEVICE void add(int tile, int word, u32 listed, bool exists) {
        u32 some = exists ? listed : 0, every = exists ? listed : ~0u;
        FSA_UNROLL for (int distance = LANES; distance < 32; distance *= 2) {
            some |= __shfl_xor_sync(0xffffffffu, some, distance);
            every &= __shfl_xor_sync(0xffffffffu, every, distance);
        }
        if (lane_number() >= LANES) return;
        atomicOr(&any[tile][word], some);
        atomicAnd(&all[tile][word], every);
    }
};

// The first n bits of a word; n may be negative or more than there are.
FSA_DEVICE u32 first_bits(int n) { return n <= 0 ? 0 : ~0u >> max_i(0, 32 - n); }
// What a row lists besides the best `places` blocks, as list_forced does, of the blocks of a step, 32 of them.
FSA_DEVICE u32 forced_bits(const RowBlocks& blocks, int places, int topk, int step) {
    const int skipped = blocks.lists_all() ? blocks.first_scored : blocks.end_scored;
    const int end = skipped + min_i(blocks.candidates - skipped, max_i(0, topk - blocks.first_scored - places));
    return first_bits(min_i(blocks.first_scored, topk) - 32 * step) | (first_bits(end - 32 * step) & ~first_bits(skipped - 32 * step));
}

// Of groups of VALUE_ROWS values of a head, whether some are not finite: those of one of a cta's `warps` warps.
FSA_DEVICE void find_nonfinite_values(const BlockMask& mask, const Tensor& value, int rows, int heads, int warp, int warps) {
    constexpr int LOADS = 8, PIECES = VALUE_ROWS * PIECES_PER_ROW;      // under way together; of a group
    static_assert(PIECES % (32 * LOADS) == 0, "all lanes have as many");
    FSA_NO_UNROLL for (int unit = blockIdx.x * warps + warp; unit < mask.value_groups * heads; unit += gridDim.x * warps) {
        const int head = unit % heads, group = unit / heads;
        u32 sum = 0;
        FSA_NO_UNROLL for (int first = lane_number(); first < PIECES; first += 32 * LOADS) {
            Vec4 v[LOADS];
            FSA_UNROLL for (int i = 0; i < LOADS; ++i) {
                const int piece = first + 32 * i, row = group * VALUE_ROWS + piece / PIECES_PER_ROW;
                v[i] = row < rows ? load_global(tensor_row(value, row, head) + piece % PIECES_PER_ROW * 16) : Vec4{0, 0, 0, 0};
            }
            FSA_UNROLL for (int i = 0; i < LOADS; ++i) sum = taint(taint(taint(taint(sum, v[i].x), v[i].y), v[i].z), v[i].w);
        }
        const bool found = __any_sync(0xffffffffu, has_nonfinite(sum));
        if (lane_number() == 0) mask.nonfinite[(i64)head * mask.value_groups + group] = found;
    }
}
