// What comes before and behind sums of gradients of queries that stand in grad_query itself (band_sums_sm90.cuh).
#pragma once
#include "block/band_gradients.cuh"
#include "block/query_sums.cuh"

constexpr int SMALL_THREADS = MERGE_THREADS, TARGET_COPIES = 4, TARGET_BYTES = SMALL_THREADS * TARGET_COPIES * 16, OPEN_KEYS = 64;

// Calls f with the address and number of every piece of grad_query that is this thread's.
template <typename F>
FSA_DEVICE void for_each_target(const BandBackwardParams& p, int cta, F f) {
    const u32 heads = (u32)(p.num_kv_heads * p.band.group_size);
    FSA_UNROLL for (int i = 0; i < TARGET_COPIES; ++i) {
        const i64 n = ((i64)cta * TARGET_COPIES + i) * SMALL_THREADS + threadIdx.x;
        const u32 row = (u32)(n / PIECES_PER_ROW), token = row / heads;     // 2^32 rows fit nowhere
        if (token < (u32)p.band.total_q) f((char*)tensor_row(p.grad_query, token, (int)(row % heads)) + n % PIECES_PER_ROW * 16, i);
    }
}

// Zeros in grad_query; the first ctas take the bounds of some keys of a head each, and of the other keys, of which there are no more.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS) band_sums_open(const __grid_constant__ BandBackwardParams p) {
    for_each_target(p, blockIdx.x, [](char* at, int) { store_global(at, Vec4{0, 0, 0, 0}); });
    const int head = blockIdx.x % p.num_kv_heads, first = blockIdx.x / p.num_kv_heads * OPEN_KEYS;
    const auto raise = [&](const SumKeys& of) {
        const int keys = min_i(of.cu_keys[p.band.batch] - first, OPEN_KEYS);        // total_keys may be a bound
        if (keys > 0) raise_key_bounds<SMALL_THREADS>(of.bounds, of.key, of.value, head, first, keys);
    };
    raise({p.key, p.value, p.band.cu_keys, p.key_bounds});
    if (p.other.bounds == nullptr) return;
    __syncthreads();
    raise(p.other);
}

// bf16 of the sums, in their place; ctas behind those that this takes add up splits. Last rows and last keys first: those that L2 still has. It may
// be there before the kernels ahead have ended.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS, 5) band_sums_finish(const __grid_constant__ BandBackwardParams p) {
    wait_for_previous();
    const i64 bytes = (i64)p.band.total_q * (p.num_kv_heads * p.band.group_size) * ROW_BYTES;
    const int splits = (int)(gridDim.x - (bytes + TARGET_BYTES - 1) / TARGET_BYTES), number = (int)(gridDim.x - 1 - blockIdx.x), cta = number - splits;
    if (cta < 0) return merge_splits(p, number);
    Vec4 v[TARGET_COPIES];
    for_each_target(p, cta, [&](char* at, int i) { v[i] = load_global_once(at); });
    const f32 scale = p.scale * sum_scale(p.sums).inverse;
    const auto finish = [&](u32 word) {
        f32 low, high;
        unpack_sums(word, low, high);
        return pack2(low * scale, high * scale);
    };
    for_each_target(p, cta, [&](char* at, int i) { store_global(at, Vec4{finish(v[i].x), finish(v[i].y), finish(v[i].z), finish(v[i].w)}); });
}
