// WHAT   Attention of rows to an interval of keys (window, compressed, dense) on Hopper: online softmax over steps of keys, out and the natural-log
//        lse. A row without a key gets 0 and -inf. With FSA_BLOCK_MASK to those keys of blocks that the row lists; steps that no row of a tile lists are
//        left out.
// GRID   As many ctas as there are multiprocessors, at most one per tile; each takes every gridDim.x-th tile of all heads, those with the most keys first.
// ROLES  Two warpgroups of 64 rows consume, a thread of a third produces, its other warps check values. A consumer computes the next scores beside the
//        current values' product, and the two consumers take turns to start products, so that the softmax of one runs under the products of the other.
// SMEM   Query tile of 128 rows, two stages of keys and of values (128 rows each; 64 above head_dim 128). Boxes land swizzled as wgmma reads them.
// SYNC   An mbarrier pair per stage and for the queries, another barrier per stage for values that were checked; named barriers for the turns.
#include "block/band_pipeline.cuh"
#include "block/branch_rows.cuh"
#include "block/softmax.cuh"

constexpr int STAGES = 2;
constexpr int SMEM_BYTES = RowTile::BYTES + 2 * STAGES * KeyTile::BYTES;

struct BandMemory {
    u32 query, keys, values;    // tiles
    Ring<1> query_ring;
    Ring<STAGES> key_ring, value_ring;
    Checked<STAGES> checked;

    FSA_DEVICE u32 key(u32 n) const { return keys + Ring<STAGES>::place(n) * KeyTile::BYTES; }
    FSA_DEVICE u32 value(u32 n) const { return values + Ring<STAGES>::place(n) * KeyTile::BYTES; }
};

FSA_DEVICE void produce(const BandParams& p, const BandMemory& m, int total) {
    u32 step = 0, tile = 0;
    prefetch_map(&p.query_map);
    prefetch_map(&p.key_map);
    prefetch_map(&p.value_map);
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const BandWork w = BandWork::find(p.band, number, p.num_kv_heads);
        if (w.steps == 0) continue;
        load_tile<CTA_ROWS>(m.query, &p.query_map, m.query_ring.start(tile++, row_tile_bytes(p.band)), w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
            const int row = w.tile.key_row + w.key(n);
            load_tile<STEP_KEYS>(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, row);
            load_tile<STEP_KEYS>(m.value(step), &p.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
        }
    }
}

// Adds the NaN and infinite elements of the values that a row sees, which clean_step removed from the tile.
FSA_DEVICE void add_nonfinite(Columns& out, const BandParams& p, const BandWork& w, int first, const RowLimits& limits, ListedBlocks blocks) {
    FSA_NO_UNROLL for (int key = first; key < min_i(first + STEP_KEYS, w.tile.keys); ++key) {
        const char* row = tensor_row(p.value, w.tile.key_row + key, w.kv_head);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            const u32 word = *(const u32*)(row + (8 * i + 2 * (threadIdx.x & 3)) * ELEMENT_BYTES), bad = word ^ finite_or_zero(word);
            if (limits.sees_low(key) && blocks.low_lists(key - first)) { out[4 * i] += unpack_lo(bad); out[4 * i + 1] += unpack_hi(bad); }
            if (limits.sees_high(key) && blocks.high_lists(key - first)) { out[4 * i + 2] += unpack_lo(bad); out[4 * i + 3] += unpack_hi(bad); }
        }
    }
}

FSA_DEVICE void scale_rows(Columns& out, f32 low, f32 high) {
    FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
        out[4 * i] *= low;      out[4 * i + 1] *= low;
        out[4 * i + 2] *= high; out[4 * i + 3] *= high;
    }
}

struct Consumer {
    const BandParams& p;
    const BandMemory& m;
    int group;                  // which half of the rows
    u32 step, tile, checks;     // numbers in the rings

    Columns out;
    RowState low, high;

    FSA_DEVICE void take_turn() const { named_sync(TURN + group, CONSUMER_THREADS); }
    FSA_DEVICE void give_turn() const { named_arrive(TURN + (group ^ 1), CONSUMER_THREADS); }

    // Probabilities of a step as fragments; the factors for what was summed before.
    FSA_DEVICE void softmax(Scores& s, const BandWork& w, const RowLimits& limits, ListedBlocks blocks, int n, f32& carry_low, f32& carry_high) {
        if (w.has_end(n)) mask_scores(s, limits.from(w.key(n)), neg_inf());
        if (w.has_gaps(n)) mask_blocks(s, blocks, neg_inf());
        carry_low = softmax_step<STEP_KEYS, false, false>(s, low, p.scale_log2, false, NO_LIMIT);
        carry_high = softmax_step<STEP_KEYS, true, false>(s, high, p.scale_log2, false, NO_LIMIT);
    }
    // Waits for the values of step n; true if NaN or infinity was cleared of them.
    FSA_DEVICE bool wait_for_values(const BandWork& w, int n) {
        m.value_ring.wait(step);
        return w.needs_mask(n) && m.checked.wait(checks++);
    }

    FSA_DEVICE void attend(const BandWork& w, const RowLimits& limits, const RowLists& lists) {
        const u32 query = m.query + group * 64 * 128;
        Scores s;
        Fragments a;
        f32 carry_low, carry_high;
        ListedBlocks blocks = lists.from(w.key(0));
        m.query_ring.wait(tile);
        m.key_ring.wait(step);
        wgmma_fence();
        start_scores(s, query, m.key(step));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(s);
        m.key_ring.release(step);
        softmax(s, w, limits, blocks, 0, carry_low, carry_high);
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
        FSA_NO_UNROLL for (int n = 1; n < w.steps; ++n) {
            blocks = lists.from(w.key(n));
            const bool dirty = wait_for_values(w, n - 1);
            m.key_ring.wait(step + 1);
            take_turn();
            wgmma_fence();
            start_scores(s, query, m.key(step + 1));
            wgmma_commit();
            wgmma_pin(out);
            start_sum(out, a, m.value(step));
            wgmma_commit();
            give_turn();
            wgmma_wait<1>();
            wgmma_pin(s);
            m.key_ring.release(step + 1);
            softmax(s, w, limits, blocks, n, carry_low, carry_high);
            wgmma_wait<0>();
            wgmma_pin(out);
            m.value_ring.release(step);
            if (dirty) add_nonfinite(out, p, w, w.key(n - 1), limits, lists.from(w.key(n - 1)));
            scale_rows(out, carry_low, carry_high);
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
            ++step;
        }
        m.query_ring.release(tile++);
        const bool dirty = wait_for_values(w, w.steps - 1);
        wgmma_pin(out);
        wgmma_fence();
        start_sum(out, a, m.value(step));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(out);
        m.value_ring.release(step++);
        if (dirty) add_nonfinite(out, p, w, w.key(w.steps - 1), limits, lists.from(w.key(w.steps - 1)));
    }

    // Where a row goes; writes its lse.
    FSA_DEVICE BranchRow finish(const BandTile& t, int row, const RowState& state) const {
        const f32 sum = quad_sum(state.sum);
        if (!t.exists(row)) return no_row();
        if (p.lse != nullptr && (threadIdx.x & 3) == 0)
            p.lse[t.plane_index(row, p.band.total_q)] = ((state.max == neg_inf() ? 0.0f : state.max) + log2_fast(sum)) * LN_2;
        return branch_row(p.out, p.branch, t.token + t.token_of(row), t.first_head + t.head_of(row), sum);
    }
    FSA_DEVICE void store(const BandTile& t, int row) const { store_branch(p.branch, finish(t, row, low), finish(t, row + 8, high), out); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band(const __grid_constant__ BandParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 6 * STAGES];
    __shared__ i32 dirty[STAGES];
    BandMemory m;
    m.query = shared_address(shared);
    m.keys = m.query + RowTile::BYTES;
    m.values = m.keys + STAGES * KeyTile::BYTES;
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    m.value_ring = Ring<STAGES>::at(shared_address(barriers + 2 + 2 * STAGES));
    m.checked = {Ring<STAGES>::at(shared_address(barriers + 2 + 4 * STAGES)), dirty};
    if (threadIdx.x == 0) {
        m.query_ring.open();
        m.key_ring.open();
        m.value_ring.open(CHECKED_READERS);
        m.checked.ring.open(0, CHECKERS);
        barriers_ready();
    }
    __syncthreads();
    const int total = p.num_tiles * p.band.head_tiles * p.num_kv_heads;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce(p, m, total);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(p.band, p.num_kv_heads, total, m.value_ring, [&](u32 step) { return m.value(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    Consumer c = {p, m, group, 0, 0, 0};
    if (group == 1) c.give_turn();      // the first goes first
    const int row = first_row_of_thread();
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const BandWork w = BandWork::find(p.band, number, p.num_kv_heads);
        if (w.tile.tokens == 0) continue;
        clear(c.out);
        c.low = c.high = {neg_inf(), 0.0f};
        if (w.steps > 0) c.attend(w, RowLimits::of(p.band, w.tile, row), RowLists::of(p.band, w.tile, w.kv_head, row));
        c.store(w.tile, row);
    }
}
