// A tile of rows in shared memory: ROWS x HEAD_DIM in halves of 64 columns, each row of a half 128 bytes, 128-byte
// swizzle: what wgmma reads as A or B with rows as M or N (K-major), or as B with rows as K (N contiguous).
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"
#include "ptx/memory.cuh"

template <int ROWS>
struct SwizzledTile {
    static constexpr int HALVES = (HEAD_DIM + 63) / 64;
    static constexpr int HALF_BYTES = ROWS * 128;
    static constexpr int BYTES = HALVES * HALF_BYTES;

    // Byte offset of 16-byte piece `piece` (0 .. HEAD_DIM / 8) of `row`.
    static FSA_DEVICE u32 offset(int row, int piece) {
        return (u32)((piece >> 3) * HALF_BYTES + row * 128 + (((piece & 7) ^ (row & 7)) << 4));
    }
};
constexpr int PIECES_PER_ROW = HEAD_DIM / 8;    // 16-byte pieces

// wgmma matrix descriptor of a 128-byte-swizzled tile at `tile` + `offset`; the tile is 1024-byte aligned and `offset` a
// compile-time constant that stays inside the swizzle atom. Written as a sum, so that a step of the contraction costs
// one addition: shared addresses end far below the 18 bits of the field.
FSA_DEVICE u64 wgmma_descriptor(u32 tile, u32 offset, u32 leading_bytes, u32 stride_bytes) {
    return (u64)(tile >> 4) + ((u64)(offset >> 4) | (u64)(leading_bytes >> 4) << 16 | (u64)(stride_bytes >> 4) << 32 | 1ull << 62);
}
// Contraction over columns: step `k` of 16 columns, rows from `row` on (a multiple of 8) as M or N.
template <int ROWS>
FSA_DEVICE u64 over_columns(u32 tile, int k, int row = 0) {
    return wgmma_descriptor(tile, (k >> 2) * SwizzledTile<ROWS>::HALF_BYTES + (k & 3) * 32 + row * 128, 16, 1024);
}
// Contraction over rows: step `k` of 16 rows; N runs over columns from `column` on, a multiple of 32. Needs TRANSPOSE_B.
template <int ROWS>
FSA_DEVICE u64 over_rows(u32 tile, int k, int column) {
    return wgmma_descriptor(tile, (column >> 6) * SwizzledTile<ROWS>::HALF_BYTES + (column & 63) * 2 + k * 2048, SwizzledTile<ROWS>::HALF_BYTES, 1024);
}

// First byte of a row of one head.
FSA_DEVICE const char* tensor_row(const Tensor& t, i64 row, int head) {
    return (const char*)t.data + (row * t.row_stride + (i64)head * t.head_stride) * ELEMENT_BYTES;
}

// Starts the copy of consecutive rows into a tile, by THREADS threads; rows from `valid_rows` on become zero.
template <int ROWS, int THREADS = WARPGROUP>
FSA_DEVICE void copy_rows(u32 tile, const Tensor& source, int head, i64 first_row, int valid_rows) {
    const char* base = tensor_row(source, first_row, head);
    const i64 row_bytes = source.row_stride * ELEMENT_BYTES;
    FSA_UNROLL for (int i = 0; i < ROWS * PIECES_PER_ROW / THREADS; ++i) {
        const int n = threadIdx.x + i * THREADS, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
        const bool valid = row < valid_rows;
        copy_async(tile + SwizzledTile<ROWS>::offset(row, piece), base + (valid ? row : 0) * row_bytes + piece * 16, valid ? 16 : 0);
    }
}

// Starts the gather of WARP_ROWS rows of a 64-row tile by one warp, from one tensor or from two at once (the second tile follows
// the first). Lane i holds the row number, relative to the bases, of row i % WARP_ROWS, or -1 for a row of zeros.
template <int WARP_ROWS, bool TWO>
FSA_DEVICE void gather_rows(u32 tile, const char* base, i64 row_bytes, const char* second, i64 second_row_bytes, int row_of_lane, int first_row) {
    const int lane = threadIdx.x & 31;
    FSA_UNROLL for (int i = 0; i < WARP_ROWS * PIECES_PER_ROW / 32; ++i) {
        const int n = lane + i * 32, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
        const int source = __shfl_sync(0xffffffffu, row_of_lane, row);
        const int bytes = source < 0 ? 0 : 16;
        const u32 at = tile + SwizzledTile<TILE_ROWS>::offset(first_row + row, piece);
        copy_async(at, base + (i64)max_i(source, 0) * row_bytes + piece * 16, bytes);
        if (TWO) copy_async(at + SwizzledTile<TILE_ROWS>::BYTES, second + (i64)max_i(source, 0) * second_row_bytes + piece * 16, bytes);
    }
}

// Clears NaN and infinity in the pieces that this thread copied with copy_rows; true if there were some.
template <int ROWS, int THREADS = WARPGROUP>
FSA_DEVICE bool clean_rows(u32 tile) {
    bool dirty = false;
    FSA_UNROLL for (int i = 0; i < ROWS * PIECES_PER_ROW / THREADS; ++i) {
        const int n = threadIdx.x + i * THREADS;
        const u32 address = tile + SwizzledTile<ROWS>::offset(n / PIECES_PER_ROW, n % PIECES_PER_ROW);
        const Vec4 v = load_shared(address);
        if (has_nonfinite(v.x) | has_nonfinite(v.y) | has_nonfinite(v.z) | has_nonfinite(v.w)) {
            store_shared(address, Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)});
            dirty = true;
        }
    }
    return dirty;
}
