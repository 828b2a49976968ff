// From a tile or block number to its sequence.
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"

// Largest i in [0, batch) with base[i] <= value < base[i + 1]; empty sequences are never returned.
FSA_DEVICE int find_sequence(const i32* base, int batch, int value) {
    int low = 0, high = batch - 1;
    while (low < high) {
        const int mid = (low + high) >> 1;
        if (base[mid + 1] > value) high = mid; else low = mid + 1;
    }
    return low;
}

FSA_DEVICE Tile find_tile(const Layout& layout, int tile) {
    const int s = find_sequence(layout.tile_base, layout.batch, tile);
    const int q_begin = layout.cu_seqlens_q[s], q_end = layout.cu_seqlens_q[s + 1];
    const int kv_begin = layout.cu_seqlens_kv[s], kv_end = layout.cu_seqlens_kv[s + 1];
    const int row = (tile - layout.tile_base[s]) * TILE_ROWS;
    Tile t;
    t.token = q_begin + row;
    t.rows = min_i(TILE_ROWS, q_end - t.token);
    t.kv_len = kv_end - kv_begin;
    t.position = row + t.kv_len - (q_end - q_begin);
    t.block_base = layout.block_base[s];
    t.kv_row = kv_begin;
    t.reserved[0] = t.reserved[1] = 0;
    return t;
}

// The rule that index and reduce share: which of a row's blocks are done densely, tile by tile, and which are gathered.
// Dense are the first block and every block from the one before the tile's first own block on: the sink and
// the local blocks that nearly every row lists. All others lie wholly in the past of every row of the tile, so the
// gathering kernel needs no mask.
struct DenseRule {
    int first_local;    // first local block of the tile
    bool enabled;
};
FSA_DEVICE DenseRule dense_rule(const Tile& t, int has_dense) { return {max_i(1, t.position / BLOCK_SIZE - 1), has_dense != 0}; }

// What the merging kernels need to know of a row, packed by the index: bits 0..6 the listed dense blocks (bit 0: block 0, bit i:
// first_local + i - 1), bits 7..13 the number of partials, bits 14.. one more than the id of a block that found no slot.
// 64 rows touch at most 64 / 16 + 2 local blocks, a row has at most 64 slots, and ids end at 2^18 - 2.
struct RowInfo {
    u32 word;
    FSA_DEVICE bool lists_dense(int bit) const { return word >> bit & 1; }
    FSA_DEVICE u32 dense() const { return word & 0x7f; }
    FSA_DEVICE int partials() const { return word >> 7 & 0x7f; }
    FSA_DEVICE int spilled() const { return (int)(word >> SPILLED_SHIFT) - 1; }
    static constexpr int PARTIALS_SHIFT = 7, SPILLED_SHIFT = 14;
};
FSA_DEVICE u32 dense_bit(const DenseRule& rule, int id) { return 1u << (id == 0 ? 0 : id - rule.first_local + 1); }

// Unit `number` of a (kv head, chunk) list, those that exist first: the full ones, then the remainders; null beyond them.
FSA_DEVICE const Unit* find_unit(const Index& index, i64 list, int number) {
    const int full = index.unit_counts[2 * list], rest = index.unit_counts[2 * list + 1];
    const Unit* units = index.units + list * (index.full_units + index.max_blocks);
    return number < full ? units + number : number - full < rest ? units + index.full_units + (number - full) : nullptr;
}
