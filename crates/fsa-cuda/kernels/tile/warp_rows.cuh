// Copies of rows to swizzled tiles by warps: a warp takes consecutive rows of the tile, as many per instruction as fit in its 32
// lanes. Where a row has 12 or 24 pieces some lanes have nothing to do; in turn every thread stays in one column, so that nothing but one
// address is kept over a loop (pieces dealt out to all lanes took 40 registers more at head_dim 96 and 192, which spilled).
#pragma once
#include "tile/swizzled_tile.cuh"

constexpr int ROWS_PER_COPY = 32 / PIECES_PER_ROW;      // 4, 2, 2, 1, 1

// Calls f(row, address in the tile, column in bytes) for this lane's pieces of ROWS rows from `first_row` on; `row` counts from there. As many of
// the lowest bits of first_row are zero as numbers below ROWS have, or three.
template <int ROWS, typename F>
FSA_DEVICE void for_each_piece(u32 tile, u32 half_bytes, int first_row, F f) {
    const int lane = threadIdx.x & 31, row = lane / PIECES_PER_ROW, piece = lane % PIECES_PER_ROW;
    const u32 at = tile + (piece >> 3) * half_bytes + (first_row + row) * 128 + (((piece ^ (first_row + row)) & 7) << 4);
    const bool active = 32 % PIECES_PER_ROW == 0 || row < ROWS_PER_COPY;
    FSA_UNROLL for (int i = 0; i < ROWS; i += ROWS_PER_COPY) f(row + i, (at ^ ((i & 7) << 4)) + i * 128, piece * 16, active);
}

// Starts the gather of WARP_ROWS rows of a 64-row tile by one warp. Lane i holds the row number, relative to the base, of row
// i % WARP_ROWS, or -1 for a row of zeros. Row strides are below 2^32 bytes.
template <int WARP_ROWS>
FSA_DEVICE void gather_warp_rows(u32 tile, const char* base, u32 row_bytes, int row_of_lane, int first_row) {
    for_each_piece<WARP_ROWS>(tile, SwizzledTile<TILE_ROWS>::HALF_BYTES, first_row, [&](int row, u32 at, int column, bool active) {
        const int source = __shfl_sync(0xffffffffu, row_of_lane, row);
        if (active) copy_async(at, base + (u64)(u32)max_i(source, 0) * row_bytes + column, source < 0 ? 0 : 16);
    });
}

// Starts the copy of consecutive rows to a tile by the four warps of a cta; rows from `valid_rows` (at least 1) on become zero.
template <int ROWS>
FSA_DEVICE void copy_tile(u32 tile, const Tensor& source, int head, i64 source_row, int valid_rows) {
    const int first_row = threadIdx.x / 32 * (ROWS / 4), lane_row = first_row + (threadIdx.x & 31) / PIECES_PER_ROW;
    const char* base = tensor_row(source, source_row, head);
    const u32 row_bytes = (u32)source.row_stride * ELEMENT_BYTES;
    const char* from = base + (u64)row_bytes * lane_row;
    for_each_piece<ROWS / 4>(tile, SwizzledTile<ROWS>::HALF_BYTES, first_row, [&](int row, u32 at, int column, bool active) {
        const bool valid = first_row + row < valid_rows;
        if (active) copy_async(at, (valid ? from : base) + column, valid ? 16 : 0);
        from += (u64)row_bytes * ROWS_PER_COPY;
    });
}

// Clears NaN and infinity in the pieces that this thread copied with copy_tile; true if there were some. The test costs one
// packed fma per word, and the rest runs only if it is needed.
template <int ROWS>
FSA_DEVICE bool clean_tile(u32 tile) {
    const int first_row = threadIdx.x / 32 * (ROWS / 4);
    auto for_each = [&](auto f) {
        for_each_piece<ROWS / 4>(tile, SwizzledTile<ROWS>::HALF_BYTES, first_row, [&](int, u32 at, int, bool active) {
            if (active) f(at, load_shared(at));
        });
    };
    u32 sum[4] = {0, 0, 0, 0};
    for_each([&](u32, Vec4 v) {
        sum[0] = taint(sum[0], v.x); sum[1] = taint(sum[1], v.y); sum[2] = taint(sum[2], v.z); sum[3] = taint(sum[3], v.w);
    });
    if (!(has_nonfinite(sum[0]) | has_nonfinite(sum[1]) | has_nonfinite(sum[2]) | has_nonfinite(sum[3]))) return false;
    for_each([&](u32 at, Vec4 v) { store_shared(at, Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)}); });
    return true;
}
