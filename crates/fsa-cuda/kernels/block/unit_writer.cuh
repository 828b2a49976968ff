// Sums over blocks by a whole cta, and the lists of units that follow from them.
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"
#include "block/sequence.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;

constexpr int REST_CLASSES = 4;     // of remainders of blocks (write_lists)
constexpr int MOST_SUMS = 3 + REST_CLASSES;
// One for all scans of a kernel, which follow one another.
FSA_DEVICE int (&warp_sums())[MOST_SUMS][32] {
    __shared__ int sums[MOST_SUMS][32];
    return sums;
}

// Exclusive sums of COUNT values over the cta; `total` gets the sums over all threads.
template <int COUNT>
FSA_DEVICE void cta_scan(int (&value)[COUNT], int (&total)[COUNT]) {
    static_assert(COUNT <= MOST_SUMS, "sums of warps have a place");
    int(&warp_sum)[MOST_SUMS][32] = warp_sums();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    auto sum_lanes = [&](int x) {
        FSA_UNROLL for (int delta = 1; delta < 32; delta *= 2) {
            const int y = __shfl_up_sync(ALL_LANES, x, delta);
            if (lane >= delta) x += y;
        }
        return x;
    };
    int inclusive[COUNT];
    FSA_UNROLL for (int k = 0; k < COUNT; ++k) {
        inclusive[k] = sum_lanes(value[k]);
        if (lane == 31) warp_sum[k][warp] = inclusive[k];
    }
    __syncthreads();
    for (int k = warp; k < COUNT; k += warps) warp_sum[k][lane] = sum_lanes(lane < warps ? warp_sum[k][lane] : 0);
    __syncthreads();
    FSA_UNROLL for (int k = 0; k < COUNT; ++k) {
        const int before = warp == 0 ? 0 : warp_sum[k][warp - 1];
        value[k] = before + inclusive[k] - value[k];
        total[k] = warp_sum[k][31];
    }
    __syncthreads();
}

// Exclusive sums of the blocks' counts, by a cta: count(block, note), then use(block, sum, note). Returns the sum of all.
template <typename F, typename G>
FSA_DEVICE int scan_blocks(int blocks, F count, G use) {
    constexpr int EACH = 2;     // consecutive blocks of a thread
    int carry = 0;
    for (int base = 0; base < blocks; base += EACH * blockDim.x) {
        const int first = base + EACH * threadIdx.x;
        int counts[EACH] = {}, notes[EACH], sum[1] = {0}, total[1];
        FSA_UNROLL for (int i = 0; i < EACH; ++i) {
            if (first + i < blocks) counts[i] = count(first + i, notes[i]);
            sum[0] += counts[i];
        }
        cta_scan(sum, total);
        int next = carry + sum[0];
        FSA_UNROLL for (int i = 0; i < EACH; ++i) {
            if (first + i < blocks) use(first + i, next, notes[i]);
            next += counts[i];
        }
        carry += total[0];
    }
    __syncthreads();
    return carry;
}

// Writes the units of one block: the full ones at `full`, the remainder at `rest`. `split` counts the blocks before that have several. Returns the row of its sums.
FSA_DEVICE i32 write_units(const IndexParams& p, Unit* units, int unit_entries, int block, int begin, int count, int full, int rest, int split) {
    const Layout& layout = p.layout;
    const int s = find_sequence(layout.block_base, layout.batch, block);
    const int q_begin = layout.cu_seqlens_q[s], q_len = layout.cu_seqlens_q[s + 1] - q_begin;
    const int kv_begin = layout.cu_seqlens_kv[s], kv_len = layout.cu_seqlens_kv[s + 1] - kv_begin;
    const int key = (block - layout.block_base[s]) * BLOCK_SIZE;
    Unit unit;
    unit.kv_row = kv_begin + key;
    unit.valid_keys = min_i(BLOCK_SIZE, kv_len - key);
    unit.first_token = key - (kv_len - q_len) + q_begin;
    unit.block = block;
    unit.split = count > unit_entries;
    unit.sums_row = p.index.packs_sums ? split * BLOCK_SIZE : unit.kv_row;
    for (; count >= unit_entries; count -= unit_entries, begin += unit_entries) {
        unit.entry_begin = begin;
        unit.entry_count = unit_entries;
        units[full++] = unit;
    }
    if (count > 0) {
        unit.entry_begin = begin;
        unit.entry_count = count;
        units[p.index.full_units + rest] = unit;
    }
    return unit.sums_row;
}

// Entries of a full unit: as few of these as leave no more units than a launch has ctas for, which the last always does. Given the units
// beyond the first of all blocks, by each.
constexpr int UNIT_SIZES = 4, MOST_UNIT_GROWTH = 2;
FSA_DEVICE int unit_size(const Index& index, int number) {
    const int quarters = number == UNIT_SIZES - 1 ? 4 * MOST_UNIT_GROWTH : 4 + number;
    return index.unit_entries * quarters / 4;
}
FSA_DEVICE int fitting_unit_size(const Index& index, const int (&beyond)[UNIT_SIZES - 1]) {
    int number = 0;
    while (number < UNIT_SIZES - 1 && beyond[number] > index.spare_units) ++number;
    return unit_size(index, number);
}

// Writes the units of a chunk by a whole cta, a thread a block at a time, and what the backward asks besides. `count_block` says how many entries a block
// has (none beyond the last); `open_block(block, start)` gets where they start.
template <typename F, typename G>
FSA_DEVICE void write_lists(const IndexParams& p, int chunk, int kv_head, F count_block, G open_block) {
    const Index& index = p.index;
    const int threads = blockDim.x;
    Unit* units = index.units + ((i64)kv_head * p.layout.num_chunks + chunk) * (index.full_units + index.max_blocks);
    i32* split_blocks = index.split_blocks + (i64)kv_head * index.max_split_blocks;
    int unit_entries = index.unit_entries, count = 0;
    if (index.spare_units < index.full_units) {
        int beyond[UNIT_SIZES - 1] = {}, total[UNIT_SIZES - 1];
        for (int base = 0; base < index.max_blocks; base += threads) {
            count = count_block(base + threadIdx.x);
            FSA_UNROLL for (int i = 0; i < UNIT_SIZES - 1; ++i) beyond[i] += max_i(count - 1, 0) / unit_size(index, i);
        }
        cta_scan(beyond, total);
        unit_entries = fitting_unit_size(index, total);
    }
    const bool counted = index.max_blocks <= threads;
    if (counted && index.spare_units >= index.full_units) count = count_block(threadIdx.x);
    // Remainders of a backward of one chunk by their size, the longest first and those of a class in order: the later a block the fewer rows see it, but what is
    // left of a late block that all rows list can be long, and what starts last all wait for. Others have one class: rows in order of blocks are more often in L2.
    __shared__ int members[REST_CLASSES];
    const bool sorts = index.block_sums != nullptr;
    const f32 per_entry = sorts ? (f32)REST_CLASSES / unit_entries : 0.0f;
    auto rest_class = [&](int rest) { return REST_CLASSES - 1 - min_i((int)(rest * per_entry), REST_CLASSES - 1); };
    if (threadIdx.x < REST_CLASSES) members[threadIdx.x] = 0;
    __syncthreads();
    FSA_NO_UNROLL for (int base = 0; sorts && base < index.max_blocks; base += threads) {
        const int rest = (counted ? count : count_block(base + threadIdx.x)) % unit_entries;
        if (rest > 0) atomicAdd(&members[rest_class(rest)], 1);
    }
    __syncthreads();
    int carry[3 + REST_CLASSES] = {};   // entries, full units, blocks of several units, then the next place of each class
    FSA_UNROLL for (int i = 1; i < REST_CLASSES; ++i) carry[3 + i] = carry[2 + i] + members[i - 1];
    FSA_NO_UNROLL for (int base = 0; base < index.max_blocks; base += threads) {
        const int block = base + threadIdx.x;
        const bool exists = block < index.max_blocks;
        if (!counted) count = count_block(block);
        const bool splits = count > unit_entries;
        const int left = count % unit_entries, kind = left > 0 ? rest_class(left) : -1;
        int sum[3 + REST_CLASSES] = {count, count / unit_entries, splits}, total[3 + REST_CLASSES], rest = 0;
        FSA_UNROLL for (int i = 0; i < REST_CLASSES; ++i) sum[3 + i] = kind == i;
        cta_scan(sum, total);
        FSA_UNROLL for (int i = 0; i < REST_CLASSES; ++i) if (kind == i) rest = carry[3 + i] + sum[3 + i];
        const int start = carry[0] + sum[0];
        i32 sums = LISTED_BY_NONE;
        if (count > 0) {
            const i32 row = write_units(p, units, unit_entries, block, start, count, carry[1] + sum[1], rest, carry[2] + sum[2]);
            sums = splits ? row : LISTED_BY_ONE_UNIT;
            if (splits && index.packs_sums) split_blocks[carry[2] + sum[2]] = block;
        }
        if (index.block_sums && exists) index.block_sums[(i64)kv_head * index.max_blocks + block] = sums;
        open_block(block, start);
        FSA_UNROLL for (int k = 0; k < 3 + REST_CLASSES; ++k) carry[k] += total[k];
    }
    if (index.packs_sums) for (int i = carry[2] + threadIdx.x; i < index.max_split_blocks; i += threads) split_blocks[i] = -1;
    if (threadIdx.x == 0) {
        i32* counts = index.unit_counts + ((i64)kv_head * p.layout.num_chunks + chunk) * 2;
        counts[0] = carry[1];
        counts[1] = carry[2 + REST_CLASSES];    // behind the last class
    }
}
