// A matrix product of STRIP_ROWS rows and HEAD_DIM columns by mma.sync or (FSA_WGMMA) wgmma, over a contraction in steps of 64 whose operands
// stream through a ring of stages in shared memory. Who calls it says how a step is copied: rows of the operands may lie anywhere.
//
// The left operand of a step is a tile of rows of 128 bytes, either rows of the result by elements of the contraction, or (LEFT_TRANSPOSED), for
// every 64 rows of the result, elements of the contraction by rows of the result. The right one is either 64 elements of the contraction by
// columns of the result, a tile of whole rows, or (RIGHT_BY_COLUMN) HEAD_DIM columns of the result by elements of the contraction.
// All tiles have the swizzle of tile/swizzled_tile.cuh.
#pragma once
#include "ptx/wgmma.cuh"
#include "tile/fragments.cuh"
#include "tile/pieces.cuh"

constexpr int STEP = 64;                                            // of the contraction
#ifndef FSA_WGMMA
#define FSA_WGMMA 0                                                 // 1: a warpgroup has 64 rows and all columns
#endif
constexpr int STRIP_ROWS = FSA_WGMMA ? 128 : 64;                    // of the result
constexpr int COLUMN_WARPS = FSA_WGMMA ? 1 : HEAD_DIM <= 128 ? 2 : 4;
constexpr int WARP_UNITS = HEAD_DIM / COLUMN_WARPS / 16;            // 16 columns each
constexpr int WARP_TILES = FSA_WGMMA ? 1 : 2;                       // 16 rows each
constexpr int LINEAR_THREADS = STRIP_ROWS / (16 * WARP_TILES) * COLUMN_WARPS * 32;
constexpr int LEFT_BYTES = STRIP_ROWS * 128, STAGE_BYTES = LEFT_BYTES + SwizzledTile<STEP>::BYTES;
constexpr int MAX_STAGES = (FSA_WGMMA ? 96 : 95) * 1024 / STAGE_BYTES;      // by mma.sync, a cta fits devices of 100 KB
constexpr int STAGES = MAX_STAGES < 4 ? MAX_STAGES : 4;
constexpr int LINEAR_SMEM = STAGES * STAGE_BYTES;
constexpr int LINEAR_CTAS = !FSA_WGMMA && HEAD_DIM <= 128 ? 3 : 2;   // resident on an SM of 228 KB
static_assert(WARP_UNITS * COLUMN_WARPS * 16 == HEAD_DIM, "warps share the columns evenly");
static_assert(HEAD_DIM * 128 <= SwizzledTile<STEP>::BYTES, "a right operand by column is not larger");

// Sums of a warp: WARP_TILES x 16 rows, WARP_UNITS x 16 columns.
typedef f32 StripSums[WARP_TILES][WARP_UNITS * 8];

FSA_DEVICE int strip_row() { return threadIdx.x / 32 / COLUMN_WARPS * (WARP_TILES * 16); }
FSA_DEVICE int strip_column() { return threadIdx.x / 32 % COLUMN_WARPS * (WARP_UNITS * 16); }

// `copy(step, left, right)` starts the copies of a step into two tiles.
template <bool LEFT_TRANSPOSED, bool RIGHT_BY_COLUMN, typename Copy>
FSA_DEVICE void multiply_strip(StripSums& sums, u32 shared, int steps, const Copy& copy) {
#if !FSA_WGMMA
    u32 left[WARP_TILES], right[WARP_UNITS];        // this lane's addresses in stage 0
    FSA_UNROLL for (int i = 0; i < WARP_TILES; ++i)
        left[i] = LEFT_TRANSPOSED ? unit_address<STEP>(wide_address(shared, 0), strip_row() / 16 + i) : tall_address(shared, strip_row() + 16 * i);
    FSA_UNROLL for (int u = 0; u < WARP_UNITS; ++u)
        right[u] = RIGHT_BY_COLUMN ? wide_address(shared + LEFT_BYTES, strip_column() + 16 * u)
                                   : unit_address<STEP>(tall_address(shared + LEFT_BYTES, 0), strip_column() / 16 + u);
#endif
    FSA_UNROLL for (int i = 0; i < WARP_TILES; ++i) clear(sums[i]);
    auto start = [&](int step, int stage) {
        if (step < steps) copy(step, shared + stage * STAGE_BYTES, shared + stage * STAGE_BYTES + LEFT_BYTES);
        copy_commit();
    };
    FSA_UNROLL for (int stage = 0; stage < STAGES - 1; ++stage) start(stage, stage);
    int stage = 0;
    FSA_NO_UNROLL for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        if (FSA_WGMMA) fence_async_proxy();
        __syncthreads();        // the step is there, and all are past the one before, whose stage is filled again
        start(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        const u32 base = stage * STAGE_BYTES;
#if FSA_WGMMA
        const u32 left = shared + base + threadIdx.x / WARPGROUP * (64 * 128), right = shared + base + LEFT_BYTES;
        wgmma_pin(sums[0]);
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < STEP / 16; ++k) {
            const u64 a = LEFT_TRANSPOSED ? over_rows<STEP>(left, k, 0) : over_columns<STRIP_ROWS>(left, k);
            const u64 b = RIGHT_BY_COLUMN ? over_columns<HEAD_DIM>(right, k) : over_rows<STEP>(right, k, 0);
            Wgmma<HEAD_DIM>::shared_shared<LEFT_TRANSPOSED, !RIGHT_BY_COLUMN>(sums[0], a, b, 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(sums[0]);
#else
        FSA_UNROLL for (int k = 0; k < STEP / 16; ++k) {
            u32 a[WARP_TILES][4];
            FSA_UNROLL for (int i = 0; i < WARP_TILES; ++i)
                if (LEFT_TRANSPOSED) load_transposed(a[i], left[i] + base + k * 16 * 128); else load_matrices(a[i], (left[i] ^ k << 5) + base);
            FSA_UNROLL for (int u = 0; u < WARP_UNITS; ++u) {
                u32 b[4];
                if (RIGHT_BY_COLUMN) load_matrices(b, (right[u] ^ k << 5) + base); else load_transposed(b, right[u] + base + k * 16 * 128);
                FSA_UNROLL for (int i = 0; i < WARP_TILES; ++i) {
                    multiply_add(sums[i], 8 * u, a[i], b[0], b[1]);
                    multiply_add(sums[i], 8 * u + 4, a[i], b[2], b[3]);
                }
            }
        }
#endif
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}

// Sums to natural order through shared memory, where the stages were: calls store(row, piece, eight sums) for every 16-byte piece of the
// result. Rows are eight floats longer than they need to be, so that neither side has a bank conflict.
constexpr int SUM_PITCH = HEAD_DIM + 8;
static_assert(STRIP_ROWS * SUM_PITCH * 4 <= LINEAR_SMEM, "the sums fit");
template <typename Store>
FSA_DEVICE void store_strip(const StripSums& sums, char* shared, const Store& store) {
    f32* tile = (f32*)shared;
    const int lane = threadIdx.x & 31;
    __syncthreads();            // all are past the last step
    FSA_UNROLL for (int i = 0; i < WARP_TILES; ++i) {
        FSA_UNROLL for (int n = 0; n < WARP_UNITS * 2; ++n) {
            f32* at = tile + (strip_row() + 16 * i + lane / 4) * SUM_PITCH + strip_column() + 8 * n + (lane & 3) * 2;
            at[0] = sums[i][4 * n];
            at[1] = sums[i][4 * n + 1];
            at[8 * SUM_PITCH] = sums[i][4 * n + 2];
            at[8 * SUM_PITCH + 1] = sums[i][4 * n + 3];
        }
    }
    __syncthreads();
    for (int n = threadIdx.x; n < STRIP_ROWS * PIECES_PER_ROW; n += LINEAR_THREADS) {
        const int row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
        Eight x;
        FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] = tile[row * SUM_PITCH + piece * 8 + e];
        store(row, piece, x);
    }
}
