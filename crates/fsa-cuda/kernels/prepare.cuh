// WHAT   Prefix sums over the sequences of a batch, for the stages whose rows and keys are cut into tiles: compressed keys, tiles of rows,
//        tiles of keys. Lengths stay on the device, so that no call waits for them. Clears what the stages behind it raise: a memset of a few
//        bytes takes as long as a kernel, and they follow one another. Where rows list all blocks that they see, writes these lists, which need nothing but lengths.
// GRID   A cta for each set of tables, any batch; behind them ctas for 1024 ids of a kv head, whose lists are those of all.
// ROLES  1024 sequences a step: scans of warps, then of their totals by the first warp. Of lists a thread per place of a token.
// SMEM   totals of 32 warps.
// SYNC   three barriers a step.
#include "base/math.cuh"
#include "base/params.cuh"
#include "block/sequence.cuh"
#include "ptx/memory.cuh"

constexpr int PREPARE_THREADS = 1024, PREPARE_WARPS = PREPARE_THREADS / 32;
constexpr u32 ALL_LANES = 0xffffffffu;

FSA_DEVICE int sum_of_lanes_before(int value) {     // and this one
    const int lane = threadIdx.x & 31;
    FSA_UNROLL for (int delta = 1; delta < 32; delta *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, value, delta);
        if (lane >= delta) value += other;
    }
    return value;
}

// sums[s] = count(0) + .. + count(s - 1) for all s in [0, batch].
template <typename F>
FSA_DEVICE void prefix_sums(i32* sums, int batch, i32* totals, F count) {
    if (sums == nullptr) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int before = 0;     // of the steps before this one
    for (int first = 0; first < batch; first += PREPARE_THREADS) {
        const int s = first + threadIdx.x, sum = sum_of_lanes_before(s < batch ? count(s) : 0);
        if (lane == 31) totals[warp] = sum;
        __syncthreads();
        if (warp == 0) totals[lane] = sum_of_lanes_before(totals[lane]);
        __syncthreads();
        if (s < batch) sums[s + 1] = before + (warp == 0 ? 0 : totals[warp - 1]) + sum;
        before += totals[PREPARE_WARPS - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[0] = 0;
}

// All blocks that a row sees, ascending, then -1.
FSA_DEVICE void list_blocks(const BlockLists& p) {
    const int place = (blockIdx.x - p.first_cta) * PREPARE_THREADS + threadIdx.x, token = place / p.topk, slot = place % p.topk;
    if (token >= p.total_q) return;
    const int s = find_sequence(p.cu_seqlens_q, p.batch, token);
    const int position = token - p.cu_seqlens_q[s + 1] + p.cu_seqlens_kv[s + 1] - p.cu_seqlens_kv[s];
    const i32 id = slot <= position / p.block_size ? slot : -1;
    FSA_NO_UNROLL for (int head = 0; head < p.num_kv_heads; ++head) p.topk_indices[(i64)head * p.total_q * p.topk + place] = id;
}

extern "C" __global__ void __launch_bounds__(PREPARE_THREADS) prepare(const __grid_constant__ PrepareParams all) {
    let_next_start();
    if (all.lists.topk_indices != nullptr && blockIdx.x >= all.lists.first_cta) return list_blocks(all.lists);
    const BatchTables& p = all.tables[blockIdx.x];
    __shared__ i32 totals[PREPARE_WARPS];
    constexpr int CLEARED = sizeof(p.cleared) / sizeof(p.cleared[0]);
    if (threadIdx.x < CLEARED && p.cleared[threadIdx.x] != nullptr) p.cleared[threadIdx.x][0] = p.cleared[threadIdx.x][1] = 0;
    auto kv_len = [&](int s) { return p.cu_seqlens_kv[s + 1] - p.cu_seqlens_kv[s]; };
    auto compressed = [&](int s) { return kv_len(s) < p.kernel_size ? 0 : (kv_len(s) - p.kernel_size) / p.kernel_stride + 1; };
    prefix_sums(p.cu_compressed, p.batch, totals, compressed);
    prefix_sums(p.tile_base, p.batch, totals, [&](int s) { return ceil_div(p.cu_seqlens_q[s + 1] - p.cu_seqlens_q[s], p.tile_tokens); });
    prefix_sums(p.key_tile_base, p.batch, totals, [&](int s) { return ceil_div(p.compressed ? compressed(s) : kv_len(s), p.tile_keys); });
}
