// Values that are NaN or infinity, of which the steps of band_sm90.cuh are cleared in shared memory: which heads have some, and the rows that see them.
#pragma once
#include "block/band_pipeline.cuh"

// Sets the bits of the kv heads, modulo 32, that have values which are not finite; by `threads` threads, of which this is number `thread`.
FSA_DEVICE void find_nonfinite_heads(const BandParams& p, u32* bits, int thread = threadIdx.x, int threads = THREADS) {
    const int groups = p.band.mask.value_groups;
    u32 found = 0;
    FSA_NO_UNROLL for (int i = thread; i < groups * p.num_kv_heads; i += threads)
        if (p.band.mask.nonfinite[i] != 0) found |= 1u << (i / groups & 31);
    if (found != 0) atomicOr(bits, found);
}

// Adds the NaN and infinite elements of the values that a row sees, which clean_step removed from the tile.
FSA_DEVICE void add_nonfinite(Columns& out, const Tensor& value, const BandWork& w, int first, const RowLimits& limits, ListedBlocks blocks, int count = STEP_KEYS) {
    FSA_NO_UNROLL for (int key = first; key < min_i(first + count, w.tile.keys); ++key) {
        const char* row = tensor_row(value, w.tile.key_row + key, w.kv_head);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            const u32 word = *(const u32*)(row + (8 * i + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            if (limits.sees_low(key) && blocks.low_lists(key - first)) { out[4 * i] += unpack_lo(bad); out[4 * i + 1] += unpack_hi(bad); }
            if (limits.sees_high(key) && blocks.high_lists(key - first)) { out[4 * i + 2] += unpack_lo(bad); out[4 * i + 3] += unpack_hi(bad); }
        }
    }
}
