// f32 sums in memory that many ctas add to, one float per lane and instruction: what devices without vector additions have.
//
// The rows are private to the stage, so each group of 16 columns is stored in the order in which accumulators meet it: place
// 8 e + 4 h + t holds column 8 h + 2 t + e. Two quads exchange halves of their rows first, so that 8 lanes add to 32 neighbouring bytes,
// one whole sector of L2, twice per group; without that, every sector would be touched twice as often.
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"
#include "ptx/memory.cuh"

// Where the sums of one of a thread's rows and of the row of the neighbouring quad (lane ^ 4) lie, with the lane's place.
struct SumRows {
    f32 *even, *odd;        // row of the quad with an even number, and of the next one
    bool keep_even, keep_odd;
};
constexpr u32 NO_ROW = 0xffffffffu;
FSA_DEVICE SumRows sum_rows(f32* base, u32 row) {
    const bool odd = threadIdx.x & 4;
    const u32 other = __shfl_xor_sync(0xffffffffu, row, 4), even_row = odd ? other : row, odd_row = odd ? row : other;
    base += threadIdx.x & 7;
    return {base + (i64)even_row * HEAD_DIM, base + (i64)odd_row * HEAD_DIM, even_row != NO_ROW, odd_row != NO_ROW};
}

// Adds a thread's four values of a group of 16 columns: of pairs h = 0 and h = 1. All lanes of both quads take part.
FSA_DEVICE void add_group(const SumRows& rows, int column, f32 a0, f32 a1, f32 b0, f32 b1) {
    const bool odd = threadIdx.x & 4;
    const f32 received0 = __shfl_xor_sync(0xffffffffu, odd ? a0 : b0, 4), received1 = __shfl_xor_sync(0xffffffffu, odd ? a1 : b1, 4);
    if (rows.keep_even) {
        atomicAdd(rows.even + column, odd ? received0 : a0);
        atomicAdd(rows.even + column + 8, odd ? received1 : a1);
    }
    if (rows.keep_odd) {
        atomicAdd(rows.odd + column, odd ? b0 : received0);
        atomicAdd(rows.odd + column + 8, odd ? b1 : received1);
    }
}
// Adds 16 columns of both rows of a thread: eight accumulators from `first` on.
template <int COUNT>
FSA_DEVICE void add_unit(const SumRows& low, const SumRows& high, int column, const f32 (&acc)[COUNT], int first) {
    add_group(low, column, acc[first], acc[first + 1], acc[first + 4], acc[first + 5]);
    add_group(high, column, acc[first + 2], acc[first + 3], acc[first + 6], acc[first + 7]);
}

// The two pairs of columns 8 h + 4 e .. + 3 of a group, h = q & 1 and e = q >> 1, as a thread has them after it loaded places 4 q .. 4 q + 3 and
// exchanged half with lane ^ 2.
FSA_DEVICE Vec4 natural_pairs(Vec4 v) {
    const bool upper = threadIdx.x & 2;
    const u32 a = __shfl_xor_sync(0xffffffffu, upper ? v.x : v.z, 2), b = __shfl_xor_sync(0xffffffffu, upper ? v.y : v.w, 2);
    return upper ? Vec4{a, v.z, b, v.w} : Vec4{v.x, a, v.y, b};
}
