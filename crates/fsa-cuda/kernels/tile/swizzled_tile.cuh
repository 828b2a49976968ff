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
// compile-time constant that stays inside the swizzle atom. Shared addresses end far below the 18 bits of the field, so
// a step of the contraction costs one 32-bit addition; the upper half is a constant.
FSA_DEVICE u64 wgmma_descriptor(u32 tile, u32 offset, u32 leading_bytes, u32 stride_bytes) {
    const u32 low = (tile >> 4) + ((offset >> 4) | (leading_bytes >> 4) << 16), high = (stride_bytes >> 4) | 1u << 30;
    return (u64)high << 32 | low;
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
    FSA_UNROLL for (int i = 0; i < (ROWS * PIECES_PER_ROW + THREADS - 1) / THREADS; ++i) {
        const int n = threadIdx.x + i * THREADS, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
        if (ROWS * PIECES_PER_ROW % THREADS != 0 && row >= ROWS) break;
        const bool valid = row < valid_rows;
        copy_async(tile + SwizzledTile<ROWS>::offset(row, piece), base + (valid ? row : 0) * row_bytes + piece * 16, valid ? 16 : 0);
    }
}

// Starts the gather of WARP_ROWS rows of a 64-row tile by one warp, from one tensor or from two at once (the second tile follows
// the first). Lane i holds the row number, relative to the bases, of row i % WARP_ROWS, or -1 for a row of zeros.
// Row strides are below 2^32 bytes. What does not depend on the data is computed once: 5 instructions per pair of copies
// where the obvious code took 16, and two warps per scheduler do not hide instructions.
// HEADS > 1: row i of the tile is that of head i % HEADS, and HEADS rows side by side have one row number.
template <int WARP_ROWS, bool TWO, int HEADS = 1>
FSA_DEVICE void gather_rows(u32 tile, const char* base, u32 row_bytes, const char* second, u32 second_row_bytes, int row_of_lane, int first_row, u32 head_bytes = 0,
                            u32 second_head_bytes = 0) {
    constexpr int COPIES = WARP_ROWS * PIECES_PER_ROW / 32, BYTES = SwizzledTile<TILE_ROWS>::BYTES;
    constexpr int STEP = 32 / PIECES_PER_ROW;   // rows per warp-wide copy, where lanes divide evenly into rows
    constexpr int SAME = HEADS > STEP ? HEADS / STEP : 1;       // copies of the same row numbers
    static_assert(WARP_ROWS % HEADS == 0, "a warp has all heads of its rows");
    const int lane = threadIdx.x & 31;
    const bool complete = __all_sync(0xffffffffu, row_of_lane >= 0);
    if (32 % PIECES_PER_ROW == 0 && complete) {
        const int row = lane / PIECES_PER_ROW, piece = lane % PIECES_PER_ROW;
        const u32 at = tile + SwizzledTile<TILE_ROWS>::offset(first_row + row, piece);     // first_row is a multiple of 8
        base += piece * 16 + (HEADS > 1 ? (u64)(row % HEADS) * head_bytes : 0);
        second += piece * 16 + (HEADS > 1 ? (u64)(row % HEADS) * second_head_bytes : 0);
        u32 source = 0;
        FSA_UNROLL for (int i = 0; i < COPIES; ++i) {
            if (i % SAME == 0) source = (u32)__shfl_sync(0xffffffffu, row_of_lane, row + i * STEP);
            const u32 target = (at ^ ((i * STEP & 7) << 4)) + i * STEP * 128, head = i * STEP % HEADS;
            copy_async(target, base + (u64)source * row_bytes + (u64)head * head_bytes);
            if (TWO) copy_async(target + BYTES, second + (u64)source * second_row_bytes + (u64)head * second_head_bytes);
        }
    } else {
        FSA_UNROLL for (int i = 0; i < COPIES; ++i) {
            const int n = lane + i * 32, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
            const int source = __shfl_sync(0xffffffffu, row_of_lane, row);
            const int bytes = source < 0 ? 0 : 16;
            const u32 at = tile + SwizzledTile<TILE_ROWS>::offset(first_row + row, piece);
            const u32 head = row % HEADS;
            copy_async(at, base + (u64)(u32)max_i(source, 0) * row_bytes + (u64)head * head_bytes + piece * 16, bytes);
            if (TWO) copy_async(at + BYTES, second + (u64)(u32)max_i(source, 0) * second_row_bytes + (u64)head * second_head_bytes + piece * 16, bytes);
        }
    }
}

// Clears NaN and infinity in the pieces that copy_rows gives to this thread; true if there were some. The test costs one
// packed fma per word, and the rest runs only if it is needed.
template <int ROWS, int THREADS = WARPGROUP>
FSA_DEVICE bool clean_rows(u32 tile) {
    constexpr int COUNT = (ROWS * PIECES_PER_ROW + THREADS - 1) / THREADS;
    auto address = [&](int i) {     // where the threads do not divide evenly, the last ones look at a piece of another thread again
        const int n = min_i(threadIdx.x + i * THREADS, ROWS * PIECES_PER_ROW - 1);
        return tile + SwizzledTile<ROWS>::offset(n / PIECES_PER_ROW, n % PIECES_PER_ROW);
    };
    u32 sum[4] = {0, 0, 0, 0};
    FSA_UNROLL for (int i = 0; i < COUNT; ++i) {
        const Vec4 v = load_shared(address(i));
        sum[0] = taint(sum[0], v.x); sum[1] = taint(sum[1], v.y); sum[2] = taint(sum[2], v.z); sum[3] = taint(sum[3], v.w);
    }
    if (!(has_nonfinite(sum[0]) | has_nonfinite(sum[1]) | has_nonfinite(sum[2]) | has_nonfinite(sum[3]))) return false;
    FSA_NO_UNROLL for (int i = 0; i < COUNT; ++i) {
        const Vec4 v = load_shared(address(i));
        store_shared(address(i), Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)});
    }
    return true;
}
