// WHAT   Attention of rows to an interval of keys (window, compressed, dense) on Hopper: online softmax over steps of keys, out and the natural-log
//        lse. A row without a key gets 0 and -inf. With FSA_BLOCK_MASK to those keys of blocks that the row lists; steps that no row of a tile lists are
//        left out. With FSA_WINDOW_TOO three branches of the whole, tile by tile: a window, with its sums the keys before it, and compressed keys
//        (block/band_walks.cuh). With FSA_BLOCK_SCORES of compressed attention: chooses blocks by the way (stage select), where all heads of a group vote, 1, 2, 4, 8 or
//        16 of them, kernel_size is kernel_stride or twice that, and a block has four compressed keys.
// GRID   As many ctas as there are multiprocessors, at most one per tile; each takes one of every gridDim.x tiles of all heads, those with the most keys first.
// ROLES  Two warpgroups of 64 rows consume, a thread of a third produces, its other warps check values. It finds the tiles ahead, too. A consumer computes the next scores beside the
//        current values' product, and the two consumers take turns to start products, so that the softmax of one runs under the products of the other.
//        With FSA_BLOCK_SCORES keys and values come every fourth at a time, first steps first; consumers pool the probabilities of a step and leave the sums
//        in memory (block/score_slots.cuh). Of several heads a fourth warpgroup chooses, in a kernel of its own that is made of these parts (band_select_sm90.cuh). Of
//        one head there are too many lists for that: the consumers' warps choose for their own rows at the end of a tile (block/pair_choice.cuh,
//        block/row_choice.cuh).
// SMEM   Query tile of 128 rows, two stages of keys and of values (128 rows each; 64 above head_dim 128). Boxes land swizzled as wgmma reads them. Behind
//        them what the warps that choose need; with FSA_WINDOW_TOO two tiles of rows on their way out.
// SYNC   An mbarrier pair per stage, for the queries and per tile found ahead, another barrier per stage for values that were checked; named barriers for the
//        turns. An mbarrier pair per slot of scores. With FSA_WINDOW_TOO it may start before compressed keys are there: only the copies of these wait for them.
#ifndef FSA_WINDOW_TOO
#define FSA_WINDOW_TOO 0
#endif
#ifndef FSA_BAND_PARTS      // another kernel takes the parts of this one
#define FSA_BAND_PARTS 0
#endif
#include "block/band_pipeline.cuh"
#include "block/nonfinite_values.cuh"
#include "block/softmax.cuh"
#include "tile/fragments.cuh"
#if FSA_WINDOW_TOO
#include "block/band_walks.cuh"
#else
#include "block/stored_rows.cuh"
#endif
#if FSA_BLOCK_SCORES == 1
#include "block/choice.cuh"
#elif FSA_BLOCK_SCORES == 2
#include "block/pair_choice.cuh"
#endif

constexpr int STAGES = 2, TILES_AHEAD = 2, LAST_WALK = 2;
constexpr bool WINDOW_TOO = FSA_WINDOW_TOO;
constexpr int TILE_BYTES = RowTile::BYTES + 2 * STAGES * KeyTile::BYTES;
constexpr int SMEM_BYTES = TILE_BYTES + (WINDOW_TOO ? 2 * RowTile::BYTES : 0);

struct BandMemory {
    u32 query, keys, values;    // tiles
    Ring<TILES_AHEAD> tile_ring;
    Ring<1> query_ring;
    Ring<STAGES> key_ring, value_ring;
    Checked<STAGES, BLOCK_MASK> checked;

    FSA_DEVICE u32 key(u32 n) const { return keys + Ring<STAGES>::place(n) * KeyTile::BYTES; }
    FSA_DEVICE u32 value(u32 n) const { return values + Ring<STAGES>::place(n) * KeyTile::BYTES; }
};

#if FSA_BLOCK_SCORES
typedef BandSelectParams KernelParams;
FSA_DEVICE const BandParams& attention_of(const KernelParams& p) { return p.attention; }
FSA_DEVICE void load_step(u32 tile, const TensorMap* map, u32 barrier, int head, int row) { load_groups(tile, map, barrier, head, row); }
#else
#if FSA_WINDOW_TOO
typedef BandBothParams KernelParams;
FSA_DEVICE const BandParams& attention_of(const KernelParams& p) { return p.attention; }
#else
typedef BandParams KernelParams;
FSA_DEVICE const BandParams& attention_of(const KernelParams& p) { return p; }
#endif
FSA_DEVICE void load_step(u32 tile, const TensorMap* map, u32 barrier, int head, int row) { load_tile<STEP_KEYS>(tile, map, barrier, head, row); }
#endif

// The tiles, and what the keys and values of a walk are read from.
#if FSA_WINDOW_TOO
FSA_DEVICE Walks walks_of(const KernelParams& all) { return {all}; }
FSA_DEVICE const BandParams& source_of(const KernelParams& all, int walk) { return walks_of(all).source_of(walk); }
#else
FSA_DEVICE OneWalk walks_of(const KernelParams& all) { return {attention_of(all).band, attention_of(all).num_kv_heads}; }
FSA_DEVICE const BandParams& source_of(const KernelParams& all, int) { return attention_of(all); }
#endif

// Numbers of tiles end here.
FSA_DEVICE int total_tiles(const BandParams& p) { return p.num_tiles * p.band.head_tiles * p.num_kv_heads; }

// Whether those who attend get their tiles, found ahead, from the thread that loads. With scores of one head it was not measured.
constexpr bool HANDS_TILES = !BLOCK_SCORES;
// Hands a tile over to them; one without tokens is the end.
FSA_DEVICE void hand_over(const BandMemory& m, BandWork* works, u32 number, const BandWork& w) {
    if (!HANDS_TILES) return;
    m.tile_ring.wait_free(number);
    works[m.tile_ring.place(number)] = w;
    barrier_arrive(m.tile_ring.full + 8 * m.tile_ring.place(number));
}
// The tile number `number` of the cta, which one that attends takes.
FSA_DEVICE BandWork take_tile(const BandMemory& m, const BandWork* works, u32 number) {
    m.tile_ring.wait(number);
    const BandWork w = works[m.tile_ring.place(number)];
    m.tile_ring.release(number);
    return w;
}

FSA_DEVICE void produce(const KernelParams& all, const BandMemory& m, BandWork* works) {
    const BandParams& p = attention_of(all);
    const auto walks = walks_of(all);
    u32 step = 0, tile = 0, handed = 0;
    prefetch_map(&p.query_map);
    prefetch_map(&p.key_map);
    prefetch_map(&p.value_map);
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total_tiles(p); number = next_tile(number)) {
        BandWork w = walks.find(number);
        if (HANDS_TILES && w.tile.tokens == 0) break;
        hand_over(m, works, handed++, w);
        if (w.steps == 0) continue;
        load_tile<CTA_ROWS>(m.query, &p.query_map, m.query_ring.start(tile++, row_tile_bytes(p.band)), w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL do {
            const BandParams& source = source_of(all, w.walk);
            if (BLOCK_SCORES || (WINDOW_TOO && w.walk == LAST_WALK)) wait_for_previous();     // which makes compressed keys
            FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
                const int row = w.tile.key_row + w.key(n);
                load_step(m.key(step), &source.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, row);
                load_step(m.value(step), &source.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
            }
        } while (walks.go_on(w));
    }
    if (BLOCK_SCORES || WINDOW_TOO) wait_for_previous();
    BandWork none = {};
    hand_over(m, works, handed, none);
}

FSA_DEVICE void scale_rows(Columns& out, f32 low, f32 high) {
    FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
        out[4 * i] *= low;      out[4 * i + 1] *= low;
        out[4 * i + 2] *= high; out[4 * i + 3] *= high;
    }
}

// Whether a step's probabilities are relative to the maximum of the steps before while that will do. Not where it is no faster (scores of blocks,
// several intervals), needs registers that there are not (144 keys) or was not measured.
constexpr bool KEEPS_MAXIMA = HEAD_DIM <= 128 && STEP_KEYS <= 128 && !WINDOW_TOO && !BLOCK_SCORES;

// Whether a tile's rows leave through the place of its last keys and values, which are released behind that.
constexpr bool LEAVES_BY_KEYS = FSA_BLOCK_SCORES == 1;

struct Consumer {
    const KernelParams& all;
    const BandParams& p;
    const BandMemory& m;
    int group;                  // which half of the rows
    u32 step, tile, checks;     // numbers in the rings

    Columns out;
    RowState low, high;
#if FSA_BLOCK_SCORES
    ScoreWriter scores;
    i32 differing;              // the step in which a maximum of the warp's rows was raised last
#endif

    FSA_DEVICE void begin() {
        clear(out);
        low = high = {neg_inf(), 0.0f};
    }
    FSA_DEVICE void take_turn() const { named_sync(TURN + group, CONSUMER_THREADS); }
    FSA_DEVICE void give_turn() const { named_arrive(TURN + (group ^ 1), CONSUMER_THREADS); }

    // Probabilities of a step as fragments; the factors for what was summed before. False if all of the warp's are 1.
    FSA_DEVICE bool softmax(Scores& s, const BandWork& w, const RowLimits& limits, ListedBlocks blocks, int n, f32& carry_low, f32& carry_high) {
        const RowLimits seen = limits.from(w.key(n));
#if FSA_BLOCK_SCORES
        if (w.has_end(n)) mask_groups(s, seen.end_low, seen.end_high, neg_inf());
        const bool raised = scores.leave(s, n, low, high, p.scale_log2, p.band.kernel_size != p.band.kernel_stride, carry_low, carry_high);
        if (raised) differing = n;
        return raised;
#else
        if (w.has_end(n)) mask_scores(s, seen, neg_inf());
        if (w.has_gaps(n)) mask_blocks(s, blocks, neg_inf());
        carry_low = softmax_step<STEP_KEYS, false, false>(s, low, p.scale_log2, false, NO_LIMIT);
        carry_high = softmax_step<STEP_KEYS, true, false>(s, high, p.scale_log2, false, NO_LIMIT);
        return true;
#endif
    }
    // The scores of some keys of a step once more, by the warp alone.
    template <int COUNT>
    FSA_DEVICE void score_again(f32 (&s)[COUNT], u32 keys) const {
        const u32 a = tall_address(m.query, thread_number() / 32 * 16), b = wide_address(keys, 0);
        clear(s);
        FSA_NO_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) {
            u32 rows[4];
            load_matrices(rows, unit_address<CTA_ROWS>(a, k));
            multiply_rows<2 * COUNT>(s, rows, unit_address<STEP_KEYS>(b, k));
        }
    }
    // As softmax, of a step after the first, but relative to the maximum of the steps before: any reference will do that is not far below the step's own, which then
    // need not be found, nor is anything scaled. Blocks that a row does not list have infinity in its place. Where probabilities become too large or are NaN,
    // perhaps of such a block, or a row has no maximum yet, softmax does it. Whether it did. Without ENDS every row's position sees all of the step.
    template <bool ENDS = true>
    FSA_DEVICE bool softmax_kept(Scores& s, const BandWork& w, const RowLimits& limits, ListedBlocks blocks, int n, f32& carry_low, f32& carry_high) {
        const bool sees_low = limits.end_low != 0, sees_high = limits.end_high != 0;    // rows that do not exist may have any scores
        if (__all_sync(0xffffffffu, (low.max > neg_inf() || !sees_low) && (high.max > neg_inf() || !sees_high))) {
            if (ENDS && w.has_end(n)) mask_scores(s, limits.from(w.key(n)), neg_inf());
            const f32 low_sum = kept_step<STEP_KEYS, false>(s, low.max, p.scale_log2, [&](int column) { return blocks.low_lists(column); });
            const f32 high_sum = kept_step<STEP_KEYS, true>(s, high.max, p.scale_log2, [&](int column) { return blocks.high_lists(column); });
            if (!__any_sync(0xffffffffu, (!(low_sum <= LARGE_SUM) && sees_low) || (!(high_sum <= LARGE_SUM) && sees_high))) {
                low.sum += low_sum;
                high.sum += high_sum;
                return false;
            }
            score_again(s, m.key(step + 1));
        }
        softmax(s, w, limits, blocks, n, carry_low, carry_high);
        return true;
    }
    // Waits for the values of step n; true if NaN or infinity was cleared of them.
    FSA_DEVICE bool wait_for_values(const BandWork& w, int n) {
        m.value_ring.wait(step);
        return m.checked.checks(w, n) && m.checked.wait(checks++);
    }

    // The keys of step n, and after the last one the queries, are not read again; without ENDS there is a step behind it.
    template <bool ENDS = true>
    FSA_DEVICE void release_scored(const BandWork& w, int n, u32 number) {
        if (!LEAVES_BY_KEYS || n + 1 < w.steps) m.key_ring.release(number);
        if (ENDS && n + 1 == w.steps && (!WINDOW_TOO || w.walk == LAST_WALK)) m.query_ring.release(tile++);
    }

    // The first `steps` steps of a tile, but for the product with the values of the last, whose probabilities are left. `lists` says what the rows list.
    // Without ENDS they are not a tile's last, and every row's position sees all of their keys.
    template <bool ENDS = true>
    FSA_DEVICE void walk(const BandWork& w, int steps, const RowLimits& limits, const RowLists& lists, Fragments& a) {
        const u32 query = m.query + group * 64 * 128;
        Scores s;
        f32 carry_low, carry_high;
        ListedBlocks blocks = lists.from(w.key(0));
        m.query_ring.wait(tile);
        m.key_ring.wait(step);
        wgmma_fence();
        start_scores(s, query, m.key(step));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(s);
        release_scored<ENDS>(w, 0, step);
        softmax(s, w, limits, blocks, 0, carry_low, carry_high);
        if (WINDOW_TOO) scale_rows(out, carry_low, carry_high);     // the sums of the interval before, if there was one
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
        FSA_NO_UNROLL for (int n = 1; n < steps; ++n) {
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
            bool scales = true;
            if constexpr (KEEPS_MAXIMA) {
                scales = softmax_kept<ENDS>(s, w, limits, blocks, n, carry_low, carry_high);
                release_scored<ENDS>(w, n, step + 1);
            } else {
                release_scored<ENDS>(w, n, step + 1);
                scales = softmax(s, w, limits, blocks, n, carry_low, carry_high);
            }
            wgmma_wait<0>();
            wgmma_pin(out);
            m.value_ring.release(step);
            if (dirty) add_nonfinite(out, source_of(all, w.walk).value, w, w.key(n - 1), limits, lists.from(w.key(n - 1)));
            if (scales) scale_rows(out, carry_low, carry_high);
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
            ++step;
        }
    }
    // `meanwhile` is done while the last product runs: nothing changes the rows' sums any more.
    template <typename F>
    FSA_DEVICE void attend(const BandWork& w, const RowLimits& limits, const RowLists& lists, F meanwhile) {
        Fragments a;
        walk(w, w.steps, limits, lists, a);
        const bool dirty = wait_for_values(w, w.steps - 1);
        wgmma_pin(out);
        wgmma_fence();
        start_sum(out, a, m.value(step));
        wgmma_commit();
        meanwhile();
        wgmma_wait<0>();
        wgmma_pin(out);
        if (!LEAVES_BY_KEYS) m.value_ring.release(step);
        ++step;
        if (dirty) add_nonfinite(out, source_of(all, w.walk).value, w, w.key(w.steps - 1), limits, lists.from(w.key(w.steps - 1)));
    }

    // Log2-sum-exp of a row.
    FSA_DEVICE static f32 log2_of(const RowState& state, f32 sum) { return (state.max == neg_inf() ? 0.0f : state.max) + log2_fast(sum); }
#if FSA_WINDOW_TOO
    // One over the sum of a row, whose log-sum-exp is written for each of two branches that want it.
    FSA_DEVICE f32 finish(const StoredRows& target, int i, const RowState& state, f32* lse, f32* lse_too) const {
        const f32 sum = quad_sum(state.sum);
        if ((threadIdx.x & 3) == 0 && target.tokens[i] >= 0) {
            const f32 natural = log2_of(state, sum) * LN_2;
            const i64 place = (i64)target.heads[i] * p.band.total_q + target.tokens[i];
            if (lse != nullptr) lse[place] = natural;
            if (lse_too != nullptr) lse_too[place] = natural;
        }
        return sum == 0.0f ? 0.0f : reciprocal_fast(sum);
    }
    // `twice`: the next walk adds no keys.
    FSA_DEVICE void store(int walk, bool twice, const StoredRows& target) const {
        f32 *lse = walk == WINDOW ? p.lse : walk == BEFORE ? all.lse : all.compressed.lse, *lse_too = twice ? all.lse : nullptr;
        const f32 of_low = finish(target, 0, low, lse, lse_too), of_high = finish(target, 1, high, lse, lse_too);
        target.store(all, walk, twice, out, of_low, of_high);
    }
#else
    // Scales a row that is stored; writes its lse.
    FSA_DEVICE void finish(const Results& to, const BandTile& t, int row, const RowState& state, BranchRow& target) const {
        const f32 sum = quad_sum(state.sum);
        if (!target.exists) return;
        if (to.lse != nullptr && (threadIdx.x & 3) == 0) to.lse[t.plane_index(row, p.band.total_q)] = log2_of(state, sum) * LN_2;
        target.normalise(sum);
    }
    FSA_DEVICE void store(const Results& to, const BandTile& t, int row, StoredRows& target) const {
        finish(to, t, row, low, target.low);
        finish(to, t, row + 8, high, target.high);
        store_branch(to.branch, target.low, target.high, out, target.held);
    }
#endif
};

#if FSA_BLOCK_SCORES
// What consumers and those who choose share besides the slots.
struct HandOver {
    f32 references[SLOTS * CTA_ROWS];
    f32 factors[HAS_CHOOSERS ? SLOTS * CTA_ROWS : 1];
    i32 differing[HAS_CHOOSERS ? SLOTS * ROW_WARPS : 1];
    ChosenTile tiles[SLOTS];
    u64 barriers[2 * SLOTS];
#if FSA_BLOCK_SCORES == 1
    ChosenBits bits;
#endif

    FSA_DEVICE ScoreSlots slots(const BlockChoice& choice) {
        f32* scores = choice.scores + (i64)blockIdx.x * SLOTS * CTA_ROWS * (GROUPS + 1) * choice.max_steps;
        return {Ring<SLOTS>::at(shared_address(barriers)), references, factors, differing, tiles, scores, choice.max_steps};
    }
};

// Hands a slot over to those who choose, or says that there are no more.
FSA_DEVICE void hand_over(const ScoreSlots& slots, u32 n, const ChosenTile& tile) {
    if (threadIdx.x == 0) slots.tile_of(n) = tile;
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(slots.ring.full + 8 * Ring<SLOTS>::place(n));
}
// Leaves what turns the sums of a row into scores; whether it votes.
FSA_DEVICE bool leave_reference(const ScoreSlots& slots, u32 n, int row, const RowState& state) {
    const f32 sum = quad_sum(state.sum), reference = Consumer::log2_of(state, sum);
    const bool votes = fabsf(reference) < -neg_inf();
    if ((threadIdx.x & 3) == 0) {
        slots.references_of(n)[row] = HAS_CHOOSERS ? state.max : votes ? reference : -neg_inf();
        if (HAS_CHOOSERS) slots.factors_of(n)[row] = votes ? reciprocal_fast(sum) : 0.0f;
    }
    return votes;
}
// The same for the thread's rows `row` and `row` + 8; a maximum of the warp's rows was raised last in step `differing`.
FSA_DEVICE void leave_references(const ScoreSlots& slots, u32 n, int row, const RowState& low, const RowState& high, int differing) {
    const bool low_votes = leave_reference(slots, n, row, low), high_votes = leave_reference(slots, n, row + 8, high);
    if (HAS_CHOOSERS) {
        const bool all = __all_sync(0xffffffffu, low_votes && high_votes);
        if (lane_number() == 0) slots.differing_of(n)[row / WARP_TILE_ROWS] = all ? differing : NO_LIMIT;
    }
    __syncwarp();
}
#endif

#if FSA_BLOCK_SCORES == 2
// Chooses blocks for the warp's rows, a token each.
FSA_DEVICE void choose(const BandParams& p, const BlockChoice& choice, const ScoreSlots& slots, PairMemory* memory, const BandWork& w) {
    const int first = __shfl_sync(ALL_LANES, threadIdx.x / 32 * 16, 0), rows = min_i(w.tile.tokens, first + 16);
    if (first >= rows) return;
    const PairChooser c = {choice, slots.sums(0), slots.maxima(0), slots.references_of(0), memory[first / 16], w.tile.position, first, rows, w.steps, lane_number()};
    c.choose(choice.topk_indices + ((i64)w.kv_head * p.band.total_q + w.tile.token) * choice.topk);
}
#endif

#if !FSA_BAND_PARTS
extern "C" __global__ void __launch_bounds__(THREADS, 1) band(const __grid_constant__ KernelParams all) {
    if (BLOCK_SCORES) let_next_start();     // block_mask looks at values first
    const BandParams& p = attention_of(all);
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 6 * STAGES + 2 * TILES_AHEAD * HANDS_TILES];
    __shared__ BandWork works[TILES_AHEAD];
    __shared__ i32 dirty[STAGES];
    __shared__ u32 nonfinite_heads;
#if FSA_BLOCK_SCORES
    __shared__ HandOver handover;
#endif
    BandMemory m = {shared_address(shared)};
    m.keys = m.query + RowTile::BYTES;
    m.values = m.keys + STAGES * KeyTile::BYTES;
    m.tile_ring = Ring<TILES_AHEAD>::at(shared_address(barriers + 2 + 6 * STAGES));
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    m.value_ring = Ring<STAGES>::at(shared_address(barriers + 2 + 2 * STAGES));
    m.checked = {Ring<STAGES>::at(shared_address(barriers + 2 + 4 * STAGES)), dirty, &nonfinite_heads};
    if (threadIdx.x == 0) {
        if (BLOCK_MASK) nonfinite_heads = 0;
        if (HANDS_TILES) m.tile_ring.open();
        m.query_ring.open();
        m.key_ring.open();
        m.value_ring.open(CHECKED_READERS);
        m.checked.ring.open(0, CHECKERS);
        barriers_ready();
    }
    __syncthreads();
    if constexpr (BLOCK_MASK) {
        find_nonfinite_heads(p, &nonfinite_heads);
        __syncthreads();
    }
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce(all, m, works);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(walks_of(all), total_tiles(p), m.value_ring, [&](u32 step) { return m.value(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    Consumer c = {all, p, m, group, 0, 0, 0};
    const auto walks = walks_of(all);
    if (group == 1) c.give_turn();      // the first goes first
#if FSA_WINDOW_TOO
    StoredRows target;
    target.open(m.query + TILE_BYTES);
#endif
    int number = blockIdx.x;
    FSA_NO_UNROLL for (u32 taken = 0;; ++taken, number = next_tile(number)) {
        if (!HANDS_TILES && number >= total_tiles(p)) break;
        BandWork w = HANDS_TILES ? take_tile(m, works, taken) : walks.find(number);
        if (w.tile.tokens == 0) break;
        c.begin();
#if FSA_BLOCK_SCORES
        const ScoreSlots slots = handover.slots(all.choice);
        c.scores.open(slots, 0, first_row_of_thread());
        c.differing = 0;
#endif
#if FSA_WINDOW_TOO
        FSA_NO_UNROLL do {
            if (w.walk == COMPRESSED) c.begin();
            const auto meanwhile = [&] {
                if (w.walk == WINDOW) target.find(p.branch, w.tile);
            };
            if (w.steps > 0) c.attend(w, RowLimits::of(walks.band_of(w.walk), w.tile, first_row_of_thread()), {}, meanwhile);
            const bool twice = w.walk == WINDOW && walks.sees_all(w);
            c.store(w.walk, twice, target);
            if (twice) ++w.walk;
        } while (walks.go_on(w));
        if (w.steps == 0) m.query_ring.release(c.tile++);
#else
        const Results to = Results::of(p);
        StoredRows target;
        const auto meanwhile = [&] {
            const int row = first_row_of_thread();
#if FSA_BLOCK_SCORES
            c.scores.close(c.low, c.high, p.band.kernel_size != p.band.kernel_stride);
            leave_references(slots, 0, row, c.low, c.high, c.differing);
#endif
            if (OPENS_EARLY) target.open(to, w.tile, row);
        };
        if (w.steps > 0) c.attend(w, RowLimits::of(p.band, w.tile, first_row_of_thread()), RowLists::of(p.band, w.tile, w.kv_head, first_row_of_thread()), meanwhile);
        else meanwhile();
        if (!OPENS_EARLY) target.open(to, w.tile, first_row_of_thread());
        c.store(to, w.tile, first_row_of_thread(), target);
#endif
#if FSA_BLOCK_SCORES == 2
        choose(p, all.choice, slots, (PairMemory*)(shared + SMEM_BYTES), w);
#endif
    }
}
#endif
