// WHAT   Attention of rows to the blocks that they list and to their window, two branches of the whole, in one walk of the keys on Hopper: a key that both may see
//        takes one product with the query and one exponential for both. Writes the sum of the whole's branches: both times their gates, and the rows of compressed
//        attention, which are there, times theirs.
// GRID   As band_sm90.cuh, of whose parts it is made.
// ROLES  As there. A tile first takes the steps before its window, which are of the listed blocks alone, then those of the window, half a step at a time, with
//        accumulators for both branches.
// SMEM   As there. Two tiles, which the thread that loads finds, and what the consumers have no registers for.
// SYNC   As there; a tile comes with its queries. A named barrier when it is known which heads have values that are not finite; the warp that loads does not wait there.
#define FSA_BLOCK_MASK 1
#define FSA_BAND_PARTS 1
#include "band_sm90.cuh"
#include "block/half_steps.cuh"
#include "block/pair_rows.cuh"

static_assert(HEAD_DIM <= 128, "registers are for two accumulators of this size");
constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int HEADS_FOUND = CHOSEN + 1;     // a named barrier, of all threads

// A tile, in shared memory: consumers have no registers for what is not used all the time, nor time to find it. Without tokens: there are no more.
struct PairTile {
    BandWork work;
    Halves halves;
};
// What a thread's two rows have there, by lanes of a warp; at last half of the columns of the warp's rows on their way out.
struct __align__(128) PairRows {
    __align__(16) f32 maxima[32][4];    // and sums of RowState: of the first row in the blocks, in the window, of the second
    __align__(16) f32 sums[32][4];
    __align__(16) RowLimits limits[32];
    __align__(16) RowLists lists[32];
};

// As produce(); a tile comes with its queries, also one whose rows see no key.
FSA_DEVICE void produce_pairs(const BandParams& p, int window, const BandMemory& m, PairTile (&tiles)[2]) {
    u32 step = 0;
    int number = blockIdx.x;
    FSA_NO_UNROLL for (u32 tile = 0;; ++tile, number = next_tile(number)) {
        BandWork w = {};
        if (number < total_tiles(p)) w = BandWork::find(p.band, number, p.num_kv_heads);
        m.query_ring.wait_free(tile);       // so all consumers have left the tile before the last
        tiles[tile & 1].work = w;
        if (w.steps > 0) {      // the rows are on their way while the halves are found; the tile is there with the arrival behind it
            m.query_ring.expect_more(tile, row_tile_bytes(p.band));
            load_tile<CTA_ROWS>(m.query, &p.query_map, m.query_ring.full, w.tile.first_head, w.tile.token);
            tiles[tile & 1].halves = Halves::of(w, window);
        }
        barrier_arrive(m.query_ring.full);
        if (w.tile.tokens == 0) return;
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
            const int row = w.tile.key_row + w.key(n);
            load_step(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, row);
            load_step(m.value(step), &p.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
        }
    }
}

struct PairConsumer : Consumer {
    const BandPairParams& pair;
    PairTile (&tiles)[2];
    PairRows (&all_rows)[CONSUMER_THREADS / 32];
    i32 place;                  // of the tile
    Columns near;               // sums of the window, `out` being those of the blocks

    FSA_DEVICE PairRows& warp_rows() const { return all_rows[thread_number() / 32]; }
    FSA_DEVICE int window() const { return min_i(pair.window, 1 << 30); }
    FSA_DEVICE const BandWork& work() const { return tiles[place].work; }
    FSA_DEVICE const Halves& halves() const { return tiles[place].halves; }
    FSA_DEVICE f32 (&maxima() const)[4] { return warp_rows().maxima[lane_number()]; }
    FSA_DEVICE f32 (&sums() const)[4] { return warp_rows().sums[lane_number()]; }

    // Those of the blocks before the window, and none of the window.
    FSA_DEVICE void open_states() const {
        f32 (&max)[4] = maxima(), (&sum)[4] = sums();
        max[0] = low.max; max[1] = neg_inf(); max[2] = high.max; max[3] = neg_inf();
        sum[0] = low.sum; sum[1] = 0.0f; sum[2] = high.sum; sum[3] = 0.0f;
    }

    // Row in half j. One that sees no key has a window somewhere.
    template <bool HIGH>
    FSA_DEVICE HalfRow<HIGH> half_row(ListedBlocks blocks, int j) const {
        const RowLimits& limits = warp_rows().limits[lane_number()];
        const int end = (HIGH ? limits.end_high : limits.end_low) - halves().key(j) - 2 * (int)(threadIdx.x & 3);
        return {HIGH ? blocks.high : blocks.low, end - 1 - window(), end};
    }
    // What is in registers, to shared memory, and back. `opens`: the window has no reference yet.
    FSA_DEVICE void leave(const HalfRows& r) const {
        f32 (&sum)[4] = sums();
        sum[0] = r.sums.low_listed; sum[1] = r.sums.low; sum[2] = r.sums.high_listed; sum[3] = r.sums.high;
    }
    FSA_DEVICE void take(HalfRows& r, bool opens) const {
        const f32 (&max)[4] = maxima(), (&sum)[4] = sums();
        const RowLimits& limits = warp_rows().limits[lane_number()];
        r.low_max = max[0];
        r.high_max = max[2];
        r.sums = {sum[0], sum[1], sum[2], sum[3]};
        const bool sees_low = limits.end_low != 0, sees_high = limits.end_high != 0;
        const bool has_low = (opens || max[0] == max[1]) && max[0] > neg_inf(), has_high = (opens || max[2] == max[3]) && max[2] > neg_inf();
        const bool shares = __all_sync(ALL_LANES, (has_low || !sees_low) && (has_high || !sees_high));
        r.facts = (r.facts & HalfRows::CLEARED) | (sees_low ? HalfRows::LOW : 0) | (sees_high ? HalfRows::HIGH : 0) | (shares ? HalfRows::SHARES : 0);
    }
    FSA_DEVICE void hide(HalfScores& s, ListedBlocks blocks, int j) const {
        if (!work().keys.needs_mask(halves().key(j), HALF_KEYS)) return;
        half_row<false>(blocks, j).hide(s);
        half_row<true>(blocks, j).hide(s);
    }
    FSA_DEVICE bool cuts(int j) const { return halves().key(j) < halves().all_see; }
    FSA_DEVICE void sum_shown(const HalfScores& s, ListedBlocks blocks, int j, HalfSums& now) const {
        now.low = half_row<false>(blocks, j).shown_sum(s);
        now.high = half_row<true>(blocks, j).shown_sum(s);
    }

    // Probabilities relative to the reference of the halves before, if both branches have one, the same, which will do (Consumer::softmax_kept). A half that `opens` the window
    // takes that of the blocks for both; a row's window does not become too small by that. Whether they are; else scores of rows that share references are lost.
    FSA_DEVICE bool keep(HalfScores& s, HalfRows& r, ListedBlocks blocks, int j, bool opens) {
        if (!r.is(HalfRows::SHARES)) return false;
        hide(s, blocks, j);
        HalfSums now = r.exponentiate(s, blocks, p.scale_log2);
        if (cuts(j)) sum_shown(s, blocks, j, now);
        if (!r.fits(now)) return false;
        // The first keys of a row's window are in such a half.
        if (work().keys.needs_mask(halves().key(j), HALF_KEYS)) {
            const RowLimits& limits = warp_rows().limits[lane_number()];
            const bool low_fits = quad_sum(r.sums.low + now.low) >= SMALL_SUM || limits.end_low <= halves().key(j);
            const bool high_fits = quad_sum(r.sums.high + now.high) >= SMALL_SUM || limits.end_high <= halves().key(j);
            if (!__all_sync(ALL_LANES, low_fits & high_fits)) return false;
        }
        if (opens) {
            maxima()[1] = r.low_max;
            maxima()[3] = r.high_max;
        }
        r.add(now);
        return true;
    }
    // Makes scores of half j, which the references do not fit, probabilities, when the products of the half before are over. Whether they have a common reference; else they are
    // those of the window, and the fragments of the blocks' are there.
    FSA_DEVICE bool restart(HalfScores& s, HalfRows& r, ListedBlocks blocks, int j, HalfFragments& of_listed) {
        const HalfRow<false> low = half_row<false>(blocks, j);
        const HalfRow<true> high = half_row<true>(blocks, j);
        const f32 scale_log2 = p.scale_log2;
        hide(s, blocks, j);
        leave(r);
        f32 (&max)[4] = maxima(), (&sum)[4] = sums();
        f32 carry[4];
        low.raise(s, scale_log2, &max[0], &sum[0], carry[0], carry[1]);
        high.raise(s, scale_log2, &max[2], &sum[2], carry[2], carry[3]);
        scale_rows(out, carry[0], carry[2]);
        scale_rows(near, carry[1], carry[3]);
        take(r, false);
        if (r.is(HalfRows::SHARES)) {
            HalfSums now = r.exponentiate(s, blocks, scale_log2);
            if (cuts(j)) sum_shown(s, blocks, j, now);
            r.add(now);
            return true;
        }
        low.attend_listed(s, scale_log2, max[0], r.sums.low_listed, of_listed);
        high.attend_listed(s, scale_log2, max[2], r.sums.high_listed, of_listed);
        low.attend_near(s, scale_log2, max[1], r.sums.low);
        high.attend_near(s, scale_log2, max[3], r.sums.high);
        return false;
    }
    // Fragments for both products of half j; those of the listed probabilities only if references are `common`.
    FSA_DEVICE void finish_fragments(const HalfScores& s, ListedBlocks blocks, int j, bool common, HalfFragments& of_listed, HalfFragments& of_near) const {
        if (common) {
            make_fragments(s, blocks, of_listed, of_near);
            if (cuts(j)) {
                half_row<false>(blocks, j).cut(of_near);
                half_row<true>(blocks, j).cut(of_near);
            }
            return;
        }
        FSA_UNROLL for (int k = 0; k < HALF_KEYS / 16; ++k) to_fragment<HALF_KEYS>(of_near[k], s, k);
    }

    // Starts the scores of half j, and both products of the half before.
    FSA_DEVICE void start_half(HalfScores& s, int j, const HalfFragments& of_listed, const HalfFragments& of_near) {
        const u32 number = step + Halves::is_upper(j);
        if (Halves::is_upper(j)) m.key_ring.wait(number);
        take_turn();
        wgmma_fence();
        start_half_scores(s, m.query + group * 64 * 128, Halves::place(m.key(number), j));
        wgmma_commit();
        wgmma_pin(near);
        wgmma_pin(out);
        start_half_sum(near, of_near, Halves::place(m.value(step), j - 1));
        start_half_sum(out, of_listed, Halves::place(m.value(step), j - 1));
        wgmma_commit();
        give_turn();
    }
    // Where its keys are.
    FSA_DEVICE u32 keys_of_half(int j) const { return Halves::place(m.key(step + Halves::is_upper(j)), j); }
    FSA_DEVICE void wait_for_sums() {
        wgmma_wait<0>();
        wgmma_pin(near);
        wgmma_pin(out);
    }
    // The scores of half j are done, and the products of the half before; whether something was cleared of the values of half j.
    FSA_DEVICE bool release_half(int j) {
        const BandWork& w = work();
        if (!Halves::is_upper(j)) {
            release_scored(w, halves().step(j), step);
            return false;
        }
        m.value_ring.release(step++);
        return wait_for_values(w, halves().step(j));
    }
    // Adds what is not finite of the values of half j, whether it was cleared or not, to the rows that see it.
    FSA_DEVICE void add_nonfinite_half(int j) {
        const int key = halves().key(j);
        const RowLimits limits = warp_rows().limits[lane_number()], shown = {limits.end_low - 1 - window(), limits.end_low, limits.end_high - 1 - window(), limits.end_high};
        add_nonfinite(out, p.value, work(), key, limits, warp_rows().lists[lane_number()].from(key), HALF_KEYS);
        add_nonfinite(near, p.value, work(), key, shown, {~0u, ~0u}, HALF_KEYS);
    }

    // `meanwhile` is done while the last product runs.
    template <typename F>
    FSA_DEVICE void attend_both(F meanwhile) {
        const BandWork& w = work();
        const Halves& h = halves();
        const RowLimits& limits = warp_rows().limits[lane_number()];
        const RowLists& lists = warp_rows().lists[lane_number()];
        const u32 query = m.query + group * 64 * 128;
        HalfScores s;
        HalfFragments of_listed, of_near;
        HalfRows r;
        int j = h.first;
        bool kept = false;
        r.facts = 0;
        ListedBlocks blocks;
        if (h.before > 0) {
            Fragments a;
            walk<false>(w, h.before, limits, lists, a);
            const bool dirty = wait_for_values(w, h.before - 1);
            m.key_ring.wait(step + 1);
            take_turn();
            wgmma_fence();
            start_half_scores(s, query, Halves::place(m.key(step + 1), j));
            wgmma_commit();
            wgmma_pin(out);
            start_sum(out, a, m.value(step));
            wgmma_commit();
            give_turn();
            open_states();
            take(r, true);
            blocks = r.blocks(lists, h.key(j), false);
            wgmma_wait<1>();
            wgmma_pin(s);
            kept = keep(s, r, blocks, j, true);
            wgmma_wait<0>();
            wgmma_pin(out);
            if (!kept && r.is(HalfRows::SHARES)) score_again(s, Halves::place(m.key(step + 1), j));
            m.value_ring.release(step);
            if (dirty) add_nonfinite(out, p.value, w, w.key(h.before - 1), limits, lists.from(w.key(h.before - 1)));
            ++step;
        } else {
            m.query_ring.wait(tile);
            m.key_ring.wait(step);
            wgmma_fence();
            start_half_scores(s, query, Halves::place(m.key(step), j));
            wgmma_commit();
            open_states();
            take(r, false);
            blocks = r.blocks(lists, h.key(j), false);
            wgmma_wait<0>();
            wgmma_pin(s);
        }
        if (!Halves::is_upper(j)) release_scored(w, h.step(j), step);
        clear(near);
        if (wait_for_values(w, h.step(j))) r.facts |= HalfRows::CLEARED;
        FSA_NO_UNROLL for (;;) {
            finish_fragments(s, blocks, j, kept || restart(s, r, blocks, j, of_listed), of_listed, of_near);
            // Most halves, in code of their own that is short: a warp that has to start again leaves it.
            kept = true;
            const int plain_end = j + 1 >= h.plain_first && !m.checked.flagged(w) ? h.plain_end : 0, top = h.top;
            FSA_NO_UNROLL while (j + 1 < plain_end) {
                start_half(s, ++j, of_listed, of_near);
                blocks = r.blocks(lists, top - j * HALF_KEYS, true);
                wgmma_wait<1>();
                wgmma_pin(s);
                kept = r.is(HalfRows::SHARES);
                HalfSums now;
                if (kept) {
                    now = r.exponentiate(s, blocks, p.scale_log2);
                    kept = r.fits(now);
                }
                wait_for_sums();
                if (!kept) break;
                r.add(now);
                if (Halves::is_upper(j)) {
                    m.value_ring.release(step++);
                    m.value_ring.wait(step);
                } else {
                    m.key_ring.release(step);
                }
                make_fragments(s, blocks, of_listed, of_near);
            }
            if (kept) {
                if (j + 1 == h.end) break;
                start_half(s, ++j, of_listed, of_near);
                blocks = r.blocks(lists, h.key(j), false);
                wgmma_wait<1>();
                wgmma_pin(s);
                kept = keep(s, r, blocks, j, false);
                wait_for_sums();
            }
            if (!kept && r.is(HalfRows::SHARES)) score_again(s, keys_of_half(j));
            if (release_half(j)) r.facts |= HalfRows::CLEARED;
        }
        leave(r);
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
        if (!r.is(HalfRows::CLEARED)) return;
        FSA_NO_UNROLL for (j = h.first; j < h.end; ++j) add_nonfinite_half(j);
    }
};

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
    if (threadIdx.x == CONSUMER_THREADS) {
        prefetch_map(&p.query_map);
        prefetch_map(&p.key_map);
        prefetch_map(&p.value_map);
    }
    if (threadIdx.x == 0) {
        nonfinite_heads = 0;
        m.query_ring.open();
        m.key_ring.open();
        m.value_ring.open(CHECKED_READERS);
        m.checked.ring.open(0, CHECKERS);
        barriers_ready();
    }
    __syncthreads();
    const int group = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0), warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0);
    // All others look for values that are not finite and wait for each other; the warp that loads, which does not ask, starts meanwhile.
    if (warp == CONSUMER_THREADS / 32) {
        named_arrive(HEADS_FOUND, THREADS);
    } else {
        find_nonfinite_heads(p, &nonfinite_heads, threadIdx.x < CONSUMER_THREADS ? threadIdx.x : threadIdx.x - 32, THREADS - 32);
        named_sync(HEADS_FOUND, THREADS);
    }
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce_pairs(p, all.window, m, tiles);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(walks_of(p), total_tiles(p), m.value_ring, [&](u32 step) { return m.value(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    PairConsumer c = {{p, p, m, group, 0, 0, 0}, all, tiles, rows, 0};
    if (group == 1) c.give_turn();      // the first goes first
    FSA_NO_UNROLL for (;; c.place ^= 1) {
        m.query_ring.wait(c.tile = c.place);    // whose parity says all
        const BandWork& w = c.work();
        if (w.tile.tokens == 0) break;
        c.warp_rows().limits[lane_number()] = RowLimits::of(p.band, w.tile, first_row_of_thread());
        c.warp_rows().lists[lane_number()] = RowLists::of(p.band, w.tile, w.kv_head, first_row_of_thread());
        clear(c.out);
        c.low = c.high = {neg_inf(), 0.0f};
        PairRow low, high;
        HeldGroups held;
        PairGates low_gates, high_gates;
        const auto meanwhile = [&] {
            low_gates = PairGates::of(all, w.tile, first_row_of_thread());
            high_gates = PairGates::of(all, w.tile, first_row_of_thread() + 8);
            low.open(all, w.tile, first_row_of_thread());
            high.open(all, w.tile, first_row_of_thread() + 8);
            load_row(held[0], low.compressed, true);
            load_row(held[1], high.compressed, true);
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
        low.close(all, w.tile, first_row_of_thread(), &c.maxima()[0], &c.sums()[0], low_gates);
        high.close(all, w.tile, first_row_of_thread() + 8, &c.maxima()[2], &c.sums()[2], high_gates);
        __syncwarp();       // what lies in the warp's rows was read
        store_pair<0>(all, StagedRows::at(shared_address(&c.warp_rows())), low, high, c.out, c.near, held);
    }
}
