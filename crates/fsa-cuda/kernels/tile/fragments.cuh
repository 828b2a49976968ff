// Operands of mma.sync from swizzled tiles, and the two kinds of product that attention has: over the columns of two tiles
// (scores) and over the rows of one (sums of values).
//
// One ldmatrix reads 16 rows x 16 columns as four matrices, in one of two orders of the lanes. Tall: the second matrix lies
// below the first; plain this is an A operand with rows as M, transposed a B operand with rows as the contraction. Wide: the second
// lies beside the first; plain this is a pair of B operands with rows as N, transposed an A operand with columns as M.
// The eight rows of a matrix are in eight different pieces of 16 bytes (swizzle), so no read has a bank conflict.
#pragma once
#include "ptx/mma.cuh"
#include "ptx/thread.cuh"
#include "tile/swizzled_tile.cuh"

// Address of this lane's row and piece of the first 16 columns, from `row` (a multiple of 8) on.
FSA_DEVICE u32 tall_address(u32 tile, int row) {
    const int lane = lane_number();
    return tile + (u32)(row + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
}
FSA_DEVICE u32 wide_address(u32 tile, int row) {
    const int lane = lane_number();
    return tile + (u32)(row + (lane & 7) + (lane >> 4) * 8) * 128 + (((lane >> 3 & 1) ^ (lane & 7)) << 4);
}
// The same rows, 16 `unit` columns further: pieces are swizzled by exclusive or, so that a step is one instruction.
template <int ROWS>
FSA_DEVICE u32 unit_address(u32 address, int unit) { return (address ^ (unit & 3) << 5) + (unit >> 2) * SwizzledTile<ROWS>::HALF_BYTES; }

template <int COUNT>
FSA_DEVICE void clear(f32 (&acc)[COUNT]) {
    FSA_UNROLL for (int i = 0; i < COUNT; ++i) acc[i] = 0.0f;
}

// acc [16, N] += A [16, 16] x B^T, B being 16 columns of N rows; `b` is a wide address.
template <int N>
FSA_DEVICE void multiply_rows(f32 (&acc)[N / 2], const u32 (&a)[4], u32 b) {
    FSA_UNROLL for (int n = 0; n < N / 16; ++n) {
        u32 m[4];
        load_matrices(m, b + n * 16 * 128);
        multiply_add(acc, 8 * n, a, m[0], m[1]);
        multiply_add(acc, 8 * n + 4, a, m[2], m[3]);
    }
}
// acc [16, N] = A [16, HEAD_DIM] x B^T: scores of 16 rows against N rows. `a` is a tall, `b` a wide address.
template <int N, int A_ROWS, int B_ROWS>
FSA_DEVICE void multiply_tiles(f32 (&acc)[N / 2], u32 a, u32 b) {
    clear(acc);
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) {
        u32 m[4];
        load_matrices(m, unit_address<A_ROWS>(a, k));
        multiply_rows<N>(acc, m, unit_address<B_ROWS>(b, k));
    }
}
// acc [16, 16] (its elements from `first` on) += A [16, 16] x B, B being 16 rows; `b` is a tall address of its 16 columns.
template <int COUNT>
FSA_DEVICE void multiply_unit(f32 (&acc)[COUNT], int first, const u32 (&a)[4], u32 b) {
    u32 m[4];
    load_transposed(m, b);
    multiply_add(acc, first, a, m[0], m[1]);
    multiply_add(acc, first + 4, a, m[2], m[3]);
}
