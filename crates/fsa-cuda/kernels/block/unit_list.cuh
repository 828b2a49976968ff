// The units that a cta of a KV-major kernel works through: every gridDim.x-th one of a (kv head, chunk), so that a grid of any size does all
// of them. In shared memory, because accumulators leave no registers for what is used once per tile; one thread goes on to the next
// unit, between barriers.
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"

struct CtaUnits {
    Unit unit;              // the current one
    const u32* entries;     // its entries
    int kv_head, chunk_token;
    const Unit *full_units, *remainders;
    int full, total;        // full units come first, then remainders
    int number;             // of the current one

    // Before the first unit.
    FSA_DEVICE void open(const Layout& layout, const Index& index, int head, int group_size, int chunk) {
        kv_head = head / group_size;
        chunk_token = layout.chunk_token[chunk];
        const i64 list = (i64)kv_head * layout.num_chunks + chunk;
        const i32* counts = index.unit_counts + 2 * list;
        full = counts[0];
        total = full + counts[1];
        full_units = index.units + list * (index.full_units + index.max_blocks);
        remainders = full_units + index.full_units;
        number = (int)blockIdx.x - (int)gridDim.x;
    }
    // Goes to the next unit; false if there is none.
    FSA_DEVICE bool advance(const Layout& layout, const Index& index) {
        number += gridDim.x;
        if (number >= total) return false;
        unit = number < full ? full_units[number] : remainders[number - full];
        entries = index.entries + ((i64)kv_head * layout.total_q + chunk_token) * index.slots + unit.entry_begin;
        return true;
    }
    FSA_DEVICE bool exists() const { return number < total; }
};
