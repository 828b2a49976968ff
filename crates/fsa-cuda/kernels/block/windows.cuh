// Where windows and tokens of packed sequences meet. Compressed rows are numbered over all sequences; a *cell* is kernel_stride
// consecutive tokens of one sequence, the first at a multiple of kernel_stride, so that window i is the cells i .. i + ratio - 1.
#pragma once
#include "block/sequence.cuh"

// First token of a window, for windows that are asked for in ascending order. All are below cu_compressed[batch].
struct WindowCursor {
    int sequence, first, end, kv_row;   // windows first .. end - 1 are of the sequence; its token 0 is kv_row

    FSA_DEVICE void open(const CompressParams& p, int window) {
        sequence = find_sequence(p.cu_compressed, p.batch, window);
        load(p);
    }
    // The same from the lengths of up to 32 sequences, for who is there before the table is; returns the number of all windows. A warp comes here together.
    FSA_DEVICE int open_by_lengths(const CompressParams& p, int window) {
        constexpr u32 ALL = 0xffffffffu;
        const int lane = threadIdx.x & 31, begin = lane < p.batch ? p.cu_seqlens_kv[lane] : 0, tokens = lane < p.batch ? p.cu_seqlens_kv[lane + 1] - begin : 0;
        const int windows = tokens < p.kernel_size ? 0 : (tokens - p.kernel_size) / p.kernel_stride + 1;
        int sum = windows;      // of the sequences up to this lane's
        FSA_UNROLL for (int delta = 1; delta < 32; delta *= 2) {
            const int other = __shfl_up_sync(ALL, sum, delta);
            if (lane >= delta) sum += other;
        }
        sequence = __popc(__ballot_sync(ALL, sum <= window)) & 31;      // where there is no such window, any
        first = __shfl_sync(ALL, sum - windows, sequence), end = __shfl_sync(ALL, sum, sequence), kv_row = __shfl_sync(ALL, begin, sequence);
        return __shfl_sync(ALL, sum, 31);
    }
    FSA_DEVICE void load(const CompressParams& p) {
        first = p.cu_compressed[sequence];
        end = p.cu_compressed[sequence + 1];
        kv_row = p.cu_seqlens_kv[sequence];
    }
    FSA_DEVICE int token(const CompressParams& p, int window) {
        while (window >= end) {
            ++sequence;
            load(p);
        }
        return kv_row + (window - first) * p.kernel_stride;
    }
};

// A cell, and the windows that it is part of: it is part n of window `window` - n, for n from first_part to last_part.
struct Cell {
    int token;          // its first
    int tokens;         // of it that exist; 0: there is no such cell
    int window;         // number that the window would have that starts here
    int first_part, last_part;
};

// Every sequence has numbers for ratio more cells than windows: enough for all of its tokens, covered by a window or not.
FSA_DEVICE int first_cell(const CompressParams& p, int ratio, int sequence) { return p.cu_compressed[sequence] + sequence * ratio; }
FSA_DEVICE Cell find_cell(const CompressParams& p, int ratio, int cell) {
    if (cell >= first_cell(p, ratio, p.batch)) return {0, 0, 0, 0, -1};
    int low = 0, high = p.batch - 1;
    while (low < high) {
        const int mid = (low + high) >> 1;
        if (first_cell(p, ratio, mid + 1) > cell) high = mid; else low = mid + 1;
    }
    const int local = cell - first_cell(p, ratio, low), kv_begin = p.cu_seqlens_kv[low], kv_len = p.cu_seqlens_kv[low + 1] - kv_begin;
    const int first_window = p.cu_compressed[low], windows = p.cu_compressed[low + 1] - first_window;
    Cell c;
    c.token = kv_begin + local * p.kernel_stride;
    c.tokens = max_i(min_i(p.kernel_stride, kv_len - local * p.kernel_stride), 0);
    c.window = first_window + local;
    c.first_part = max_i(local - windows + 1, 0);
    c.last_part = min_i(local, ratio - 1);
    return c;
}
