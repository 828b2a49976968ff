// What a row of a band adds to the online softmax: masks with two ends, and values that are NaN or infinite. Accumulator layout of block/rows.cuh.
#pragma once
#include "block/listed_blocks.cuh"
#include "block/softmax.cuh"

// Columns [begin, end) of a tile of scores count for a row.
struct SeenColumns { i32 begin, end; };

// Makes the scores of a row that do not count -inf; HIGH picks the thread's second row.
template <int N, bool HIGH>
FSA_DEVICE void mask_scores(f32 (&s)[N / 2], SeenColumns seen) {
    const int column = 2 * (threadIdx.x & 3), count = max_i(0, seen.end - seen.begin);
    FSA_UNROLL for (int i = 0; i < N / 8; ++i)
        FSA_UNROLL for (int e = 0; e < 2; ++e)
            if ((u32)(8 * i + column + e - seen.begin) >= (u32)count) s[4 * i + (HIGH ? 2 : 0) + e] = neg_inf();
}

// Whether one of a thread's two rows has a sum that is NaN or infinite. It has one if any of the values that it was multiplied with is, seen or
// not: zero times NaN or infinity is NaN, and both stay. So finite sums prove that no value had to be taken out.
FSA_DEVICE bool has_nonfinite_sums(const Piece (&out)[PIECES], bool low, bool high) {
    f32 sum_low = 0.0f, sum_high = 0.0f;
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
        FSA_UNROLL for (int i = 0; i < PIECE_COLUMNS / 8; ++i)
            FSA_UNROLL for (int e = 0; e < 2; ++e) {
                sum_low = fmaf(out[piece][4 * i + e], 0.0f, sum_low);
                sum_high = fmaf(out[piece][4 * i + 2 + e], 0.0f, sum_high);
            }
    return (low && sum_low != 0.0f) || (high && sum_high != 0.0f);
}

// Adds the NaN and infinite elements of the value rows that a row sees, which clean_tile took out of the tile: there, a probability of zero times
// NaN would be NaN for rows that do not see them. `value_row(column)` is the first byte of the row of a column of the scores.
template <typename F>
FSA_DEVICE void add_seen_nonfinite(Piece (&out)[PIECES], int columns, SeenColumns low, SeenColumns high, ListedBlocks blocks, F value_row) {
    FSA_NO_UNROLL for (int column = 0; column < columns; ++column) {
        const char* row = value_row(column);
        const bool seen_low = column >= low.begin && column < low.end && blocks.low_lists(column);
        const bool seen_high = column >= high.begin && column < high.end && blocks.high_lists(column);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            const u32 word = *(const u32*)(row + (8 * i + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            const f32 lo = unpack_lo(bad), hi = unpack_hi(bad);
            Piece& acc = out[8 * i / PIECE_COLUMNS];
            const int e = i % (PIECE_COLUMNS / 8) * 4;
            if (seen_low) { acc[e] += lo; acc[e + 1] += hi; }
            if (seen_high) { acc[e + 2] += lo; acc[e + 3] += hi; }
        }
    }
}
