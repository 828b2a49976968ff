// What comes besides statistics of rows before attentions that add to one grad_query in memory (struct SumsOpening): bounds of keys, where values are not
// finite, and lists of blocks as bits. Ctas of their own in the launch of the statistics, which memory bounds, too.
#pragma once
#include "block/query_sums.cuh"
#include "block/sequence.cuh"

// The lists of VALUE_ROWS tokens from `first` on as bits: a lane has a list, and a warp a word of 32 of them.
template <int THREADS>
FSA_DEVICE void open_lists(const SumsOpening& o, int head, int first) {
    constexpr int GROUPS = VALUE_ROWS / 32;
    FSA_NO_UNROLL for (int task = threadIdx.x / 32; task < GROUPS * o.mask.words; task += THREADS / 32) {
        const int word = task / GROUPS, token = first + task % GROUPS * 32 + (threadIdx.x & 31);
        if (token >= o.total_q) continue;
        const i64 row = (i64)head * o.total_q + token;
        const i32* ids = o.topk_indices + row * o.topk;
        const int s = find_sequence(o.cu_seqlens_q, o.batch, token), blocks = ceil_div(o.keys[0].cu_keys[s + 1] - o.keys[0].cu_keys[s], o.block_size);
        u32 bits = 0;
        _Pragma("unroll 16") for (int place = 0; place < o.topk; ++place) {
            const int id = ids[place];      // any: the sequence has less blocks than its lists have bits
            if (id >> 5 == word && id < blocks) bits |= 1u << (id & 31);
        }
        o.mask.rows[row * o.mask.words + word] = bits;
    }
}

// VALUE_ROWS tokens of a kv head, and as many compressed keys. The bounds are cleared by the kernel before.
template <int THREADS>
FSA_DEVICE void open_keys(const SumsOpening& o, int cta) {
    const int head = cta % o.num_kv_heads, group = cta / o.num_kv_heads, first = group * VALUE_ROWS;
    const auto rows = [&](const SumKeys& of) { return max_i(min_i(of.cu_keys[o.batch] - first, VALUE_ROWS), 0); };     // there may be fewer than planned for
    const auto find = [&](const SumKeys& of) { return thread_largest<THREADS>(of.key, of.value, head, first, rows(of)); };
    const LargestElements tokens = find(o.keys[0]);
    const bool nonfinite = __syncthreads_or(has_nonfinite(tokens.value.tainted));
    if (o.mask.rows != nullptr && threadIdx.x == 0 && group < o.mask.value_groups) o.mask.nonfinite[(i64)head * o.mask.value_groups + group] = nonfinite;
    if (o.mask.rows != nullptr) open_lists<THREADS>(o, head, first);
    wait_for_previous();
    let_next_start();
    raise_bounds<THREADS>(&o.keys[0].bounds->key, tokens.key.bits(), tokens.value.bits());
    if (rows(o.keys[1]) == 0) return;
    const LargestElements compressed = find(o.keys[1]);
    __syncthreads();
    raise_bounds<THREADS>(&o.keys[1].bounds->key, compressed.key.bits(), compressed.value.bits());
}
