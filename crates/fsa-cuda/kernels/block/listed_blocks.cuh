// Attention to an interval of keys with a mask of blocks (struct BlockMask): of the keys before it a row sees those of the blocks that it lists. A word holds
// the bits of all blocks of a step, because both start at multiples of their sizes, which are powers of two.
#pragma once
#include "block/band_rows.cuh"

#ifndef FSA_BLOCK_MASK
#define FSA_BLOCK_MASK 0
#endif
constexpr bool BLOCK_MASK = FSA_BLOCK_MASK;

// Whether some of `rows` rows of value from `row` on, or of their neighbours, is not finite.
FSA_DEVICE bool has_nonfinite_values(const Band& band, int kv_head, int row, int rows) {
    u32 any = 0;
    for (int group = row / VALUE_ROWS; group * VALUE_ROWS < row + rows; ++group) any |= band.mask.nonfinite[(i64)kv_head * band.mask.value_groups + group];
    return any != 0;
}

// Place of a tile's steps, `number` counting the tiles of a kv head in the order of launch.
FSA_DEVICE i64 listed_steps(const Band& band, int number, int kv_head) { return (i64)kv_head * band.mask.num_tiles + number / band.head_tiles; }

// What two rows list of the blocks of a step, its first in bit 0.
struct ListedBlocks {
    u32 low, high;

    FSA_DEVICE bool low_lists(int column) const { return !BLOCK_MASK || low >> column / BLOCK_SIZE & 1; }
    FSA_DEVICE bool high_lists(int column) const { return !BLOCK_MASK || high >> column / BLOCK_SIZE & 1; }
};

// What a thread's two rows list; without a mask nobody asks.
struct RowLists {
    const u32 *low, *high;

    // Of rows `row` and `row` + 8 of a tile; those that do not exist list what the first does.
    FSA_DEVICE static RowLists of(const Band& band, const BandTile& t, int kv_head, int row) {
        if constexpr (!BLOCK_MASK) return {};
        const u32* first = band.mask.rows + ((i64)kv_head * band.total_q + t.token) * band.mask.words;
        return {first + (t.exists(row) ? t.token_of(row) : 0) * band.mask.words, first + (t.exists(row + 8) ? t.token_of(row + 8) : 0) * band.mask.words};
    }
    FSA_DEVICE ListedBlocks from(int key) const {
        if constexpr (!BLOCK_MASK) return {};
        const int block = key / BLOCK_SIZE;
        return {__ldg(low + (block >> 5)) >> (block & 31), __ldg(high + (block >> 5)) >> (block & 31)};
    }
    // Of 32 blocks.
    FSA_DEVICE ListedBlocks words(int number) const {
        if constexpr (!BLOCK_MASK) return {};
        return {__ldg(low + number), __ldg(high + number)};
    }
};

// What one row of query lists of the blocks from that of `key` on.
FSA_DEVICE u32 blocks_of_row(const Band& band, int kv_head, i64 row, int key) {
    if constexpr (!BLOCK_MASK) return 0;
    const int block = key / BLOCK_SIZE;
    return band.mask.rows[((i64)kv_head * band.total_q + row) * band.mask.words + (block >> 5)] >> (block & 31);
}

// Value `mask` for the scores of the blocks of a step that a row does not list. Accumulator layout of block/rows.cuh.
template <int COUNT>
FSA_DEVICE void mask_blocks(f32 (&s)[COUNT], ListedBlocks blocks, f32 mask) {
    FSA_UNROLL for (int i = 0; i < COUNT / 4; ++i) {
        const bool low = blocks.low_lists(8 * i), high = blocks.high_lists(8 * i);
        FSA_UNROLL for (int e = 0; e < 2; ++e) {
            if (!low) s[4 * i + e] = mask;
            if (!high) s[4 * i + 2 + e] = mask;
        }
    }
}
