// WHAT   Attention of rows to the blocks that they list and to their window, two branches of the whole, in one walk of the keys on Hopper: a key that both may see
//        takes one product with the query and one exponential for both. Adds both branches to the sum at once.
// GRID   As band_sm90.cuh, of whose parts it is made.
// ROLES  As there. A tile first takes the steps before its window, which are of the listed blocks alone, then those of the window, half a step at a time, with
//        accumulators for both branches.
// SMEM   As there. Two tiles, which the thread that loads finds, and what the consumers have no registers for.
// SYNC   As there; a tile comes with its queries.
#define FSA_BLOCK_MASK 1
#define FSA_BAND_PARTS 1
#include "band_sm90.cuh"
#include "block/half_steps.cuh"

static_assert(HEAD_DIM <= 128, "registers are for two accumulators of this size");
constexpr u32 ALL_LANES = 0xffffffffu;

// A tile, in shared memory: consumers have no registers for what is not used all the time, nor time to find it. Without tokens: there are no more.
struct PairTile {
    BandWork work;
    Halves halves;
};
// What a thread's two rows have there, by lanes of a warp.
struct PairRows {
    __align__(16) f32 maxima[32][4];    // and sums of RowState: of the first row in the blocks, in the window, of the second
    __align__(16) f32 sums[32][4];
    __align__(16) RowLimits limits[32];
    __align__(16) RowLists lists[32];
};

// As produce(); a tile comes with its queries, also one whose rows see no key.
FSA_DEVICE void produce_pairs(const BandParams& p, int window, const BandMemory& m, PairTile (&tiles)[2]) {
    u32 step = 0;
    prefetch_map(&p.query_map);
    prefetch_map(&p.key_map);
    prefetch_map(&p.value_map);
    int number = blockIdx.x;
    FSA_NO_UNROLL for (u32 tile = 0;; ++tile, number = next_tile(number)) {
        BandWork w = {};
        if (number < total_tiles(p)) w = BandWork::find(p.band, number, p.num_kv_heads);
        m.query_ring.wait_free(tile);       // so all consumers have left the tile before the last
        tiles[tile & 1].work = w;
        if (w.steps > 0) tiles[tile & 1].halves = Halves::of(w, window);
        const u32 barrier = m.query_ring.expect(tile, w.steps > 0 ? row_tile_bytes(p.band) : 0);
        if (w.tile.tokens == 0) return;
        if (w.steps > 0) load_tile<CTA_ROWS>(m.query, &p.query_map, barrier, w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
            const int row = w.tile.key_row + w.key(n);
            load_step(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, row);
            load_step(m.value(step), &p.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
        }
    }
}

struct PairConsumer : Consumer {
    i32 window;
    PairTile (&tiles)[2];
    PairRows& rows;
    i32 place;                  // of the tile
    Columns near;               // sums of the window, `out` being those of the blocks

    // A row that sees no key has a window somewhere.
    template <bool HIGH>
    FSA_DEVICE HalfRow<HIGH> half_row(ListedBlocks blocks, int key) const {
        const RowLimits& limits = rows.limits[lane_number()];
        const int end = (HIGH ? limits.end_high : limits.end_low) - key - 2 * (int)(threadIdx.x & 3);
        return {HIGH ? blocks.high : blocks.low, end - 1 - window, end};
    }
    FSA_DEVICE const BandWork& work() const { return tiles[place].work; }
    FSA_DEVICE const Halves& halves() const { return tiles[place].halves; }
    FSA_DEVICE f32 (&maxima() const)[4] { return rows.maxima[lane_number()]; }
    FSA_DEVICE f32 (&sums() const)[4] { return rows.sums[lane_number()]; }

    // Those of the blocks before the window, and none of the window.
    FSA_DEVICE void open_states() const {
        f32 (&max)[4] = maxima(), (&sum)[4] = sums();
        max[0] = low.max; max[1] = neg_inf(); max[2] = high.max; max[3] = neg_inf();
        sum[0] = low.sum; sum[1] = 0.0f; sum[2] = high.sum; sum[3] = 0.0f;
    }

    // Probabilities relative to the reference of the halves before, if both branches have one, the same, which will do (Consumer::softmax_kept). Whether they are; else
    // s holds the scores.
    FSA_DEVICE bool keep(HalfScores& s, ListedBlocks blocks, int j, u32 keys) {
        const bool sees_low = rows.limits[lane_number()].end_low != 0, sees_high = rows.limits[lane_number()].end_high != 0;  // others have any scores
        const f32 low_max = maxima()[0], high_max = maxima()[2];
        const bool has_low = low_max == maxima()[1] && low_max > neg_inf(), has_high = high_max == maxima()[3] && high_max > neg_inf();
        if (!__all_sync(ALL_LANES, (has_low || !sees_low) && (has_high || !sees_high))) return false;
        const int key = halves().key(j);
        const HalfRow<false> first = half_row<false>(blocks, key);
        const HalfRow<true> second = half_row<true>(blocks, key);
        if (work().keys.needs_mask(key, HALF_KEYS)) {
            first.hide(s);
            second.hide(s);
        }
        const bool cuts = key < halves().all_see;
        f32 listed[2], shown[2];
        first.exponentiate(s, low_max, p.scale_log2, cuts, listed[0], shown[0]);
        second.exponentiate(s, high_max, p.scale_log2, cuts, listed[1], shown[1]);
        const bool low_fits = listed[0] + shown[0] <= LARGE_SUM || !sees_low, high_fits = listed[1] + shown[1] <= LARGE_SUM || !sees_high;
        if (!__all_sync(ALL_LANES, low_fits && high_fits)) {
            score_again(s, Halves::place(keys, j));
            return false;
        }
        f32 (&sum)[4] = sums();
        sum[0] += listed[0];
        sum[1] += shown[0];
        sum[2] += listed[1];
        sum[3] += shown[1];
        return true;
    }
    // Fragments for both products, when those of the half before are over.
    FSA_DEVICE void make_fragments(HalfScores& s, ListedBlocks blocks, int j, bool kept, HalfFragments& of_listed, HalfFragments& of_near) {
        const int key = halves().key(j);
        const HalfRow<false> first = half_row<false>(blocks, key);
        const HalfRow<true> second = half_row<true>(blocks, key);
        if (kept) {
            FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) to_fragment<HALF_KEYS>(of_listed[k], s, k);
            if (key < halves().all_see) {
                first.cut(s);
                second.cut(s);
            }
            FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) to_fragment<HALF_KEYS>(of_near[k], s, k);
            first.drop_unlisted(of_listed);
            second.drop_unlisted(of_listed);
            return;
        }
        if (work().keys.needs_mask(key, HALF_KEYS)) {
            first.hide(s);
            second.hide(s);
        }
        f32 carry[4];
        first.restart(s, p.scale_log2, &maxima()[0], &sums()[0], of_listed, of_near, carry[0], carry[1]);
        second.restart(s, p.scale_log2, &maxima()[2], &sums()[2], of_listed, of_near, carry[2], carry[3]);
        scale_rows(out, carry[0], carry[2]);
        scale_rows(near, carry[1], carry[3]);
    }
    // Adds what was cleared of the values of half j to the rows that see it.
    FSA_DEVICE void add_cleared(int j) {
        const int key = halves().key(j);
        const RowLimits limits = rows.limits[lane_number()], shown = {limits.end_low - 1 - window, limits.end_low, limits.end_high - 1 - window, limits.end_high};
        add_nonfinite(out, p.value, work(), key, limits, rows.lists[lane_number()].from(key), HALF_KEYS);
        add_nonfinite(near, p.value, work(), key, shown, {~0u, ~0u}, HALF_KEYS);
    }

    // `meanwhile` is done while the last product runs.
    template <typename F>
    FSA_DEVICE void attend_both(F meanwhile) {
        const BandWork& w = work();
        const Halves& h = halves();
        const RowLimits& limits = rows.limits[lane_number()];
        const RowLists& lists = rows.lists[lane_number()];
        const u32 query = m.query + group * 64 * 128;
        HalfScores s;
        HalfFragments of_listed, of_near;
        int j = h.first;
        ListedBlocks blocks;
        bool dirty = false;
        blocks = lists.from(h.key(j));
        if (h.before > 0) {
            Fragments a;
            walk(w, h.before, limits, lists, a);
            dirty = wait_for_values(w, h.before - 1);
            m.key_ring.wait(step + 1);
            take_turn();
            wgmma_fence();
            start_half_scores(s, query, Halves::place(m.key(step + 1), j));
            wgmma_commit();
            wgmma_pin(out);
            start_sum(out, a, m.value(step));
            wgmma_commit();
            give_turn();
            wgmma_wait<0>();
            wgmma_pin(s);
            wgmma_pin(out);
            m.value_ring.release(step);
            if (dirty) add_nonfinite(out, p.value, w, w.key(h.before - 1), limits, lists.from(w.key(h.before - 1)));
            ++step;
        } else {
            m.query_ring.wait(tile);
            m.key_ring.wait(step);
            wgmma_fence();
            start_half_scores(s, query, Halves::place(m.key(step), j));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(s);
        }
        if (!Halves::is_upper(j)) release_scored(w, h.step(j), step);
        clear(near);
        open_states();
        dirty = wait_for_values(w, h.step(j));
        FSA_NO_UNROLL for (bool kept = false;; ++j) {
            make_fragments(s, blocks, j, kept, of_listed, of_near);
            if (j + 1 == h.end) break;
            const bool new_step = Halves::is_upper(j + 1);
            const u32 number = step + new_step;
            blocks = lists.from(h.key(j + 1));
            if (new_step) m.key_ring.wait(number);
            take_turn();
            wgmma_fence();
            start_half_scores(s, query, Halves::place(m.key(number), j + 1));
            wgmma_commit();
            wgmma_pin(near);
            wgmma_pin(out);
            start_half_sum(near, of_near, Halves::place(m.value(step), j));
            start_half_sum(out, of_listed, Halves::place(m.value(step), j));
            wgmma_commit();
            give_turn();
            wgmma_wait<1>();
            wgmma_pin(s);
            kept = keep(s, blocks, j + 1, m.key(number));
            if (!new_step) release_scored(w, h.step(j + 1), number);
            wgmma_wait<0>();
            wgmma_pin(near);
            wgmma_pin(out);
            if (dirty) add_cleared(j);
            if (new_step) {
                m.value_ring.release(step++);
                dirty = wait_for_values(w, h.step(j + 1));
            }
        }
        wgmma_pin(near);
        wgmma_pin(out);
        wgmma_fence();
        start_half_sum(near, of_near, Halves::place(m.value(step), j));
        start_half_sum(out, of_listed, Halves::place(m.value(step), j));
        wgmma_commit();
        meanwhile();
        wgmma_wait<0>();
        wgmma_pin(near);
        wgmma_pin(out);
        m.value_ring.release(step++);
        if (dirty) add_cleared(j);
    }
};

// Where one of a thread's rows goes, and its factors there.
struct PairRow {
    char *sum, *listed, *near;      // first bytes in the sum of the branches, and of their own rows
    f32 listed_scale, near_scale;   // of the thread's sums
    f32 listed_gate, near_gate;     // the same times the weights
    bool exists;

    // With weights alone in place of the factors.
    FSA_DEVICE static PairRow open(const BandPairParams& all, const BandTile& t, int row, f32 listed_gate, f32 near_gate) {
        if (!t.exists(row)) return {nullptr, nullptr, nullptr, 0.0f, 0.0f, 0.0f, 0.0f, false};
        return {(char*)t.row_of(all.branch.sum, row), (char*)t.row_of(all.attention.out, row), (char*)t.row_of(all.out, row), 1.0f, 1.0f, listed_gate, near_gate, true};
    }
    // Both branches are done: the sums of their probabilities become factors, their log-sum-exps are written.
    FSA_DEVICE void close(const BandPairParams& all, const BandTile& t, int row, const f32* maxima, const f32* sums) {
        const f32 listed = quad_sum(sums[0]), near = quad_sum(sums[1]);
        if (!exists) return;
        if ((threadIdx.x & 3) == 0) {
            const i64 place = t.plane_index(row, all.attention.band.total_q);
            if (all.attention.lse != nullptr) all.attention.lse[place] = Consumer::log2_of({maxima[0], 0.0f}, listed) * LN_2;
            if (all.lse != nullptr) all.lse[place] = Consumer::log2_of({maxima[1], 0.0f}, near) * LN_2;
        }
        listed_scale = listed == 0.0f ? 0.0f : reciprocal_fast(listed);
        near_scale = near == 0.0f ? 0.0f : reciprocal_fast(near);
        listed_gate = listed_scale * listed_gate;
        near_gate = near_scale * near_gate;
    }
};

FSA_DEVICE f32 gate_of_row(const Branch& branch, const BandTile& t, int row) {
    return t.exists(row) ? gate_of(branch.gates, t.token + t.token_of(row), t.first_head + t.head_of(row), branch.number) : 0.0f;
}

// One group (32 columns) of a row of the sum: what it holds, and both branches times their factors.
template <bool HIGH>
FSA_DEVICE void store_both(const PairRow& row, int group, const Columns& listed, const Columns& near, Vec4 held) {
    const u32 old[4] = {held.x, held.y, held.z, held.w};
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) {
        const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
        const f32 lo = fmaf(near[e], row.near_gate, unpack_lo(old[j])), hi = fmaf(near[e + 1], row.near_gate, unpack_hi(old[j]));
        w[j] = pack2(fmaf(listed[e], row.listed_gate, lo), fmaf(listed[e + 1], row.listed_gate, hi));
    }
    const Vec4 v = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
    if (row.exists) store_global(row.sum + group * 64 + (threadIdx.x & 3) * 16, v);
}
// The sum's rows, and those of the branches where they are kept.
FSA_DEVICE void store_pair(const BandPairParams& all, const PairRow& low, const PairRow& high, const Columns& listed, const Columns& near, const HeldGroups& held) {
    const Vec4 nothing = {0, 0, 0, 0};
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        store_both<false>(low, group, listed, near, transpose_quad(held[0][group]));
        store_both<true>(high, group, listed, near, transpose_quad(held[1][group]));
    }
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        if (!all.attention.branch.discards) {
            store_group<false>(low.listed, group, listed, low.listed_scale, nothing, low.exists);
            store_group<true>(high.listed, group, listed, high.listed_scale, nothing, high.exists);
        }
        if (!all.branch.discards) {
            store_group<false>(low.near, group, near, low.near_scale, nothing, low.exists);
            store_group<true>(high.near, group, near, high.near_scale, nothing, high.exists);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_pair(const __grid_constant__ BandPairParams all) {
    const BandParams& p = all.attention;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 6 * STAGES];
    __shared__ i32 dirty[STAGES];
    __shared__ u32 nonfinite_heads;
    __shared__ PairTile tiles[2];
    __shared__ PairRows rows[CONSUMER_THREADS / 32];
    BandMemory m;
    m.query = shared_address(shared);
    m.keys = m.query + RowTile::BYTES;
    m.values = m.keys + STAGES * KeyTile::BYTES;
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    m.value_ring = Ring<STAGES>::at(shared_address(barriers + 2 + 2 * STAGES));
    m.checked = {Ring<STAGES>::at(shared_address(barriers + 2 + 4 * STAGES)), dirty, &nonfinite_heads};
    if (threadIdx.x == 0) {
        nonfinite_heads = 0;
        m.query_ring.open();
        m.key_ring.open();
        m.value_ring.open(CHECKED_READERS);
        m.checked.ring.open(0, CHECKERS);
        barriers_ready();
    }
    __syncthreads();
    find_nonfinite_heads(p, &nonfinite_heads);
    __syncthreads();
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce_pairs(p, all.window, m, tiles);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(walks_of(p), total_tiles(p), m.value_ring, [&](u32 step) { return m.value(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    PairConsumer c = {{p, p, m, group, 0, 0, 0}, min_i(all.window, 1 << 30), tiles, rows[thread_number() / 32], 0};
    if (group == 1) c.give_turn();      // the first goes first
    FSA_NO_UNROLL for (;; c.place ^= 1) {
        m.query_ring.wait(c.tile = c.place);    // whose parity says all
        const BandWork& w = c.work();
        if (w.tile.tokens == 0) break;
        const int row = first_row_of_thread();
        c.rows.limits[lane_number()] = RowLimits::of(p.band, w.tile, row);
        c.rows.lists[lane_number()] = RowLists::of(p.band, w.tile, w.kv_head, row);
        clear(c.out);
        c.low = c.high = {neg_inf(), 0.0f};
        HeldGroups held;
        f32 gates[4];
        const auto meanwhile = [&] {
            const int row = first_row_of_thread();
            const bool low = w.tile.exists(row), high = w.tile.exists(row + 8);
            load_held(held, p.branch, low ? w.tile.row_of(p.branch.sum, row) : nullptr, high ? w.tile.row_of(p.branch.sum, row + 8) : nullptr, low, high, 0);
            FSA_UNROLL for (int i = 0; i < 4; ++i) gates[i] = gate_of_row(i & 1 ? all.branch : p.branch, w.tile, row + (i & 2) * 4);
        };
        if (w.steps > 0) {
            c.attend_both(meanwhile);
        } else {
            clear(c.near);
            c.open_states();
            meanwhile();
            m.query_ring.release(c.tile);
        }
        wgmma_pin(c.near);
        PairRow low = PairRow::open(all, w.tile, row, gates[0], gates[1]), high = PairRow::open(all, w.tile, row + 8, gates[2], gates[3]);
        low.close(all, w.tile, row, &c.maxima()[0], &c.sums()[0]);
        high.close(all, w.tile, row + 8, &c.maxima()[2], &c.sums()[2]);
        store_pair(all, low, high, c.out, c.near, held);
    }
}
