// WHAT   Compressed attention and the blocks of every row in one pass on Hopper: as band_sm90.cuh, of whose parts it is made; the consumers also leave the probabilities of
//        every step, pooled to blocks, and as select_sm90.cuh the lists of best blocks, without a second product of queries and keys.
// GRID   As band_sm90.cuh.
// ROLES  As there, and the warps of a fourth warpgroup, which choose the blocks of a tile's tokens while the consumers attend to the next tile. The thread that loads also
//        finds the tiles, and sends their rows, which lie in the place of the last keys and values.
// SMEM   As there, and what is chosen from by each of these warps. Two tiles.
// SYNC   As there, and an mbarrier pair for each of a cta's two slots of scores in global memory. A tile comes with its queries; another mbarrier says that its rows
//        lie there. May start before compressed keys are there: only the copies of these wait for them.
#define FSA_BLOCK_SCORES 1
#define FSA_BAND_PARTS 1
#include "band_sm90.cuh"
#include "ptx/bulk.cuh"

// Whether the rows of a tile leave as boxes, which hold all of its tokens: no cta waits for the memory that they go to.
FSA_DEVICE bool leaves_as_box(const BandParams& p, const BandWork& w) {
    return w.steps > 0 && w.tile.tokens == p.band.tile_tokens && w.tile.heads == p.band.tile_heads && !p.branch.accumulate;
}

// What a cta has besides the tiles of band_sm90.cuh.
struct SelectMemory {
    BandWork (&works)[2];       // this tile and the next
    u32 staged;                 // barriers, of tiles in turns: a tile's rows lie in the place of its last keys and values. Who attends may be done with the next tile, too

    FSA_DEVICE const BandWork& work(u32 tile) const { return works[tile & 1]; }
};

// Sends the rows of a tile, `step` being its last.
FSA_DEVICE void send_rows(const BandSelectParams& all, const BandMemory& m, const SelectMemory& s, u32 tile, u32 step) {
    const BandParams& p = all.attention;
    const BandWork& w = s.work(tile);
    barrier_wait(s.staged + 8 * (tile & 1), tile >> 1 & 1);
    if (!leaves_as_box(p, w)) return;
    FSA_UNROLL for (int half = 0; half < RowTile::HALVES; ++half) {
        if (!p.branch.discards) store_box(&all.out_map, m.key(step) + half * RowTile::HALF_BYTES, half * 64, w.tile.first_head, w.tile.token);
        if (p.branch.sum.data != nullptr) store_box(&all.sum_map, m.value(step) + half * RowTile::HALF_BYTES, half * 64, w.tile.first_head, w.tile.token);
    }
    bulk_commit();
}

FSA_DEVICE void produce_tiles(const BandSelectParams& all, const BandMemory& m, const SelectMemory& s) {
    const BandParams& p = all.attention;
    u32 step = 0;
    prefetch_map(&p.query_map);
    prefetch_map(&p.key_map);
    prefetch_map(&p.value_map);
    int number = blockIdx.x;
    FSA_NO_UNROLL for (u32 tile = 0;; ++tile, number = next_tile(number)) {
        m.query_ring.wait_free(tile);       // so all consumers have left the tile before the last
        s.works[tile & 1] = BandWork::find(p.band, number, p.num_kv_heads);     // without tokens behind the last
        const volatile BandWork& w = s.works[tile & 1];
        const int steps = w.steps;
        const u32 barrier = m.query_ring.expect(tile, steps > 0 ? row_tile_bytes(p.band) : 0);
        if (steps > 0) load_tile<CTA_ROWS>(m.query, &p.query_map, barrier, w.tile.first_head, w.tile.token);
        if (tile == 0) wait_for_previous();     // which makes compressed keys
        const u32 before = step;
        int n = 0;
        FSA_NO_UNROLL do {
            if (n < steps) {
                const int row = w.tile.key_row + n * STEP_KEYS;
                const u32 full = m.key_ring.start(step, KeyTile::BYTES);
                bulk_wait_read();       // rows may have left from there
                load_step(m.key(step), &p.key_map, full, w.kv_head, row);
                load_step(m.value(step), &p.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
                ++step;
            }
            if (n == 0 && tile > 0) send_rows(all, m, s, tile - 1, before - 1);
        } while (++n < steps);
        if (w.tile.tokens == 0) break;
    }
    bulk_wait();
}

// Chooses blocks for the tokens of a tile while the consumers attend to the next one.
FSA_DEVICE void choose(const BandParams& p, const BlockChoice& choice, const ScoreSlots& slots, ChoiceMemory* memory, ChosenBits& bits) {
    if (choice.mask.rows != nullptr)        // before there is a tile to choose for
        find_nonfinite_values(choice.mask, choice.value, p.band.cu_seqlens_kv[p.band.batch], p.num_kv_heads, Chooser::warp(), CHOOSERS);
    for (u32 n = 0; slots.ring.wait(n), slots.tile_of(n).tokens > 0; ++n) {
        Chooser c = {choice, slots, memory[__shfl_sync(ALL_LANES, Chooser::warp(), 0)], bits, p.band.tile_heads, n};
        c.choose(p);
    }
}

// A row's weight as it is in memory; of one that does not exist that of the tile's first.
FSA_DEVICE u16 load_gate(const Branch& branch, const BandTile& t, int row) {
    const int r = t.exists(row) ? row : 0;
    return __ldg((const u16*)branch.gates.data + (i64)(t.token + t.token_of(r)) * branch.gates.row_stride + (t.first_head + t.head_of(r)) * branch.gates.head_stride + branch.number);
}

struct SelectConsumer : Consumer {
    // One over the sum of a row, whose log-sum-exp is written.
    FSA_DEVICE f32 close_row(const BandTile& t, int row, const RowState& state) const {
        const f32 sum = quad_sum(state.sum);
        if (p.lse != nullptr && (threadIdx.x & 3) == 0 && t.exists(row)) p.lse[t.plane_index(row, p.band.total_q)] = log2_of(state, sum) * LN_2;
        return sum == 0.0f ? 0.0f : reciprocal_fast(sum);
    }
    // The warp's rows times factors, in a tile in shared memory.
    FSA_DEVICE void stage(u32 tile, f32 of_low, f32 of_high) const {
        const u32 at = tall_address(tile, thread_number() / 32 * 16);
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 16; ++i) {
            u32 v[4];
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                const int e = 8 * i + 2 * j;    // low, high of eight columns, then of the next
                const f32 by = j & 1 ? of_high : of_low;
                v[j] = pack2(fmaf(out[e], by, 0.0f), fmaf(out[e + 1], by, 0.0f));
            }
            store_matrices(unit_address<CTA_ROWS>(at, i), v);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band(const __grid_constant__ BandSelectParams all) {
    let_next_start();
    const BandParams& p = all.attention;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[4 + 6 * STAGES];
    __shared__ BandWork works[2];
    __shared__ i32 dirty[STAGES];
    __shared__ HandOver handover;
    static_assert(KeyTile::BYTES == RowTile::BYTES, "rows take the place of keys");
    BandMemory m = {shared_address(shared)};
    m.keys = m.query + RowTile::BYTES;
    m.values = m.keys + STAGES * KeyTile::BYTES;
    m.query_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    m.value_ring = Ring<STAGES>::at(shared_address(barriers + 2 + 2 * STAGES));
    m.checked = {Ring<STAGES>::at(shared_address(barriers + 2 + 4 * STAGES)), dirty, nullptr};
    const SelectMemory s = {works, shared_address(barriers + 2 + 6 * STAGES)};
    if (threadIdx.x == 0) {
        m.query_ring.open();
        m.key_ring.open();
        m.value_ring.open(CHECKED_READERS);
        m.checked.ring.open(0, CHECKERS);
        for (int i = 0; i < 2; ++i) barrier_init(s.staged + 8 * i, CONSUMER_THREADS / 32);
        handover.slots(all.choice).ring.open(CHOOSERS, CONSUMER_THREADS / 32);
        for (int i = 0; i < 2 * CHOSEN_WORDS; ++i) handover.bits.open(i / CHOSEN_WORDS, i % CHOSEN_WORDS);
        barriers_ready();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce_tiles(all, m, s);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(walks_of(all), total_tiles(p), m.value_ring, [&](u32 step) { return m.value(step); });
        return;
    }
    if (group > CONSUMERS) {
        registers_shrink<CHOOSER_REGISTERS>();
        choose(p, all.choice, handover.slots(all.choice), (ChoiceMemory*)(shared + SMEM_BYTES), handover.bits);
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    SelectConsumer c = {{all, p, m, group, 0, 0, 0}};
    if (group == 1) c.give_turn();      // the first goes first
    u32 n = 0;
    FSA_NO_UNROLL for (;; ++n) {
        m.query_ring.wait(c.tile = n);
        const BandWork& w = s.work(n);
        if (w.tile.tokens == 0) break;
        c.begin();
        const ScoreSlots slots = handover.slots(all.choice);
        slots.ring.wait_free(n);
        c.scores.open(slots, n, first_row_of_thread());
        c.differing = 0;
        const Results to = Results::of(p);
        f32 of_low, of_high;        // what the rows are multiplied by, and their weights
        u16 low_gate, high_gate;
        const auto meanwhile = [&] {
            const int row = first_row_of_thread();
            const bool adds = p.branch.sum.data != nullptr;
            low_gate = adds ? load_gate(p.branch, w.tile, row) : (u16)0;
            high_gate = adds ? load_gate(p.branch, w.tile, row + 8) : (u16)0;
            c.scores.close(c.low, c.high, p.band.kernel_size != p.band.kernel_stride);
            leave_references(slots, n, row, c.low, c.high, c.differing);
            hand_over(slots, n, {w.tile.position, w.tile.tokens, w.steps, w.tile.token, w.kv_head, w.number});
            of_low = c.close_row(w.tile, row, c.low);
            of_high = c.close_row(w.tile, row + 8, c.high);
        };
        if (w.steps > 0) {
            c.attend(w, RowLimits::of(p.band, w.tile, first_row_of_thread()), {}, meanwhile);
            named_sync(ALL_CONSUMERS, CONSUMER_THREADS);    // all products with the last keys and values are done
        } else {
            meanwhile();
            m.query_ring.release(n);
        }
        if (leaves_as_box(p, w)) {
            if (!p.branch.discards) c.stage(m.key(c.step - 1), of_low, of_high);
            if (p.branch.sum.data != nullptr) c.stage(m.value(c.step - 1), of_low * unpack_lo(low_gate), of_high * unpack_lo(high_gate));
            fence_async_proxy();
        } else {
            StoredRows target;
            target.open(to, w.tile, first_row_of_thread());
            target.low.scale = of_low;
            target.low.gated_scale *= of_low;
            target.high.scale = of_high;
            target.high.gated_scale *= of_high;
            store_branch(to.branch, target.low, target.high, c.out, target.held);
        }
        __syncwarp();
        if (lane_number() == 0) barrier_arrive(s.staged + 8 * (n & 1));
        if (w.steps > 0) {
            m.key_ring.release(c.step - 1);
            m.value_ring.release(c.step - 1);
        }
    }
    const ScoreSlots slots = handover.slots(all.choice);
    slots.ring.wait_free(n);
    hand_over(slots, n, {});
}
