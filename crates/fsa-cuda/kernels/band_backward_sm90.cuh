// WHAT   Backward of attention of rows to an interval of keys (window, compressed, dense) on Hopper, without atomics: two passes that compute the scores
//        again. `band_backward_queries` walks the keys of a tile of rows for grad_query, `band_backward_keys` the rows of a tile of keys for
//        grad_key and grad_value, over all heads of the group. band_delta before them, where the caller has no statistics, and band_backward_merge
//        after them are those of every architecture. Gradients may be added to. With FSA_BLOCK_MASK rows see the blocks that they list.
// GRID   queries: as many ctas as there are multiprocessors, as in `band`. keys: (tiles of 128 keys, kv heads, splits), those with the most rows first;
//        split z takes every splits-th tile of rows and leaves f32 sums of its own. Waves of ctas walk the rows backwards and forwards in turns.
// ROLES  Two warpgroups of 64 rows (queries) or 64 keys (keys) consume. Of a third one thread loads boxes; in the pass of queries three warps check the
//        keys of steps with a mask, in the pass of keys every thread brings the statistics of a row and the keys that it sees.
// SMEM   queries: query and gradient tile of 128 rows, two stages of 128 keys and values. keys: 128 keys and values, two stages of query and gradient
//        tiles. Sums stay in registers: P^T and dS^T, or dS, are first factors as they are, so no score passes through shared memory.
// SYNC   mbarriers per stage: loaded, checked, free; named barriers for turns in the pass of queries.
#include "block/key_walk.cuh"

static_assert(HEAD_DIM <= 128, "above that sums and tiles do not fit: the portable kernels do it");
constexpr int STAGES = 2;
constexpr int PIECES_PER_STEP = STEP_KEYS / PIECE_KEYS;
static_assert(CTA_ROWS == CTA_KEYS, "tiles of both passes have one size");
constexpr int SMEM_BYTES = 2 * RowTile::BYTES + 2 * STAGES * KeyTile::BYTES;

// ---- grad_query ----

struct QueryMemory {
    u32 query, grad, keys, values;
    Ring<1> row_ring;
    Ring<STAGES> key_ring, value_ring;
    Checked<STAGES> checked;

    FSA_DEVICE u32 key(u32 n) const { return keys + Ring<STAGES>::place(n) * KeyTile::BYTES; }
    FSA_DEVICE u32 value(u32 n) const { return values + Ring<STAGES>::place(n) * KeyTile::BYTES; }
};

FSA_DEVICE void produce_keys(const BandBackwardParams& p, const QueryMemory& m, int total) {
    u32 step = 0, tile = 0;
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number = next_tile(number)) {
        const BandWork w = BandWork::find(p.band, number, p.num_kv_heads);
        if (w.steps == 0) continue;
        const u32 barrier = m.row_ring.start(tile++, 2 * row_tile_bytes(p.band));
        load_tile<CTA_ROWS>(m.query, &p.query_map, barrier, w.tile.first_head, w.tile.token);
        load_tile<CTA_ROWS>(m.grad, &p.grad_out_map, barrier, w.tile.first_head, w.tile.token);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
            const int row = w.tile.key_row + w.key(n);
            load_tile<STEP_KEYS>(m.key(step), &p.key_map, m.key_ring.start(step, KeyTile::BYTES), w.kv_head, row);
            load_tile<STEP_KEYS>(m.value(step), &p.value_map, m.value_ring.start(step, KeyTile::BYTES), w.kv_head, row);
        }
    }
}

FSA_DEVICE RowStats row_stats_of(const BandBackwardParams& p, const BandTile& t, int row) {
    return t.exists(row) ? p.row_stats[t.plane_index(row, p.band.total_q)] : no_row_stats();
}

struct QueryConsumer {
    const BandBackwardParams& p;
    const QueryMemory& m;
    int group;                      // which half of the rows
    u32 step, tile, checks;         // numbers in the rings
    Columns grad_query;

    template <bool MASKED>
    FSA_DEVICE void score_gradients(PieceScores& s, PieceScores& dp, const RowStats& low, const RowStats& high, KeySpan span_low, KeySpan span_high) {
        row_probabilities<PIECE_KEYS, false, MASKED>(s, low, span_low, p.scale_log2);
        row_probabilities<PIECE_KEYS, true, MASKED>(s, high, span_high, p.scale_log2);
        wgmma_wait<0>();
        wgmma_pin(dp);
        row_gradients<PIECE_KEYS, false, MASKED>(dp, s, low, span_low);
        row_gradients<PIECE_KEYS, true, MASKED>(dp, s, high, span_high);
    }

    FSA_DEVICE void walk(const BandWork& w, int row) {
        const BandTile& t = w.tile;
        const u32 query = m.query + group * PIECE_BYTES, grad = m.grad + group * PIECE_BYTES;
        const RowStats low = row_stats_of(p, t, row), high = row_stats_of(p, t, row + 8);
        const int position_low = t.position_of(row), position_high = t.position_of(row + 8);
        const int keys_low = t.exists(row) ? t.keys : 0, keys_high = t.exists(row + 8) ? t.keys : 0;
        const RowLists lists = RowLists::of(p.band, t, w.kv_head, row);
        m.row_ring.wait(tile);
        FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n, ++step) {
            const bool masked = w.needs_mask(n);
            m.key_ring.wait(step);
            if (masked) m.checked.wait(checks++);
            m.value_ring.wait(step);
            FSA_NO_UNROLL for (int piece = 0; piece < PIECES_PER_STEP; ++piece) {
                const u32 key = m.key(step) + piece * PIECE_BYTES, value = m.value(step) + piece * PIECE_BYTES;
                PieceScores s, dp;
                named_sync(TURN + group, CONSUMER_THREADS);
                wgmma_fence();
                start_piece<STEP_KEYS>(s, query, key);
                wgmma_commit();
                start_piece<STEP_KEYS>(dp, grad, value);
                wgmma_commit();
                named_arrive(TURN + (group ^ 1), CONSUMER_THREADS);
                wgmma_wait<1>();    // of the piece before too
                wgmma_pin(s);
                wgmma_pin(grad_query);
                if (piece == 0 && n > 0) m.key_ring.release(step - 1);
                if (masked) {
                    const int first = w.key(n) + piece * PIECE_KEYS;
                    const ListedBlocks blocks = lists.from(first);
                    score_gradients<true>(s, dp, low, high, key_span(p.band, position_low, first, PIECE_KEYS, keys_low, blocks.low),
                                          key_span(p.band, position_high, first, PIECE_KEYS, keys_high, blocks.high));
                } else {
                    score_gradients<false>(s, dp, low, high, {}, {});
                }
                if (piece + 1 == PIECES_PER_STEP) m.value_ring.release(step);
                PieceFragments a;
                FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) to_fragment<PIECE_KEYS>(a[k], dp, k);
                wgmma_pin(grad_query);
                wgmma_fence();
                start_piece_sum<STEP_KEYS>(grad_query, a, key);
                wgmma_commit();
            }
        }
        m.row_ring.release(tile++);
        wgmma_wait<0>();
        wgmma_pin(grad_query);
        m.key_ring.release(step - 1);
    }

    // One of the thread's two rows, with the sign of its gate.
    template <bool HIGH>
    FSA_DEVICE void store(const BandTile& t, int row) {
        const bool exists = t.exists(row);
        char* target = exists ? (char*)t.row_of(p.grad_query, row) : nullptr;
        f32 scale = is_negative(row_stats_of(p, t, row)) ? -p.scale : p.scale;
        if (p.accumulate) {
            add_held<HIGH>(grad_query, target, scale, exists);
            scale = 1.0f;
        }
        store_row<HIGH>(target, grad_query, scale, exists);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_backward_queries(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) u64 barriers[2 + 6 * STAGES];
    __shared__ i32 dirty[STAGES];
    QueryMemory m;
    m.query = shared_address(shared);
    m.grad = m.query + RowTile::BYTES;
    m.keys = m.grad + RowTile::BYTES;
    m.values = m.keys + STAGES * KeyTile::BYTES;
    m.row_ring = Ring<1>::at(shared_address(barriers));
    m.key_ring = Ring<STAGES>::at(shared_address(barriers + 2));
    m.value_ring = Ring<STAGES>::at(shared_address(barriers + 2 + 2 * STAGES));
    m.checked = {Ring<STAGES>::at(shared_address(barriers + 2 + 4 * STAGES)), dirty};
    if (threadIdx.x == 0) {
        m.row_ring.open();
        m.key_ring.open(CHECKED_READERS);
        m.value_ring.open();
        m.checked.ring.open(0, CHECKERS);
        barriers_ready();
    }
    __syncthreads();
    const int total = p.num_tiles * p.band.head_tiles * p.num_kv_heads;
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_THREADS) produce_keys(p, m, total);
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(OneWalk{p.band, p.num_kv_heads}, total, m.key_ring, [&](u32 step) { return m.key(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    QueryConsumer c = {p, m, group, 0, 0, 0};
    if (group == 1) named_arrive(TURN, CONSUMER_THREADS);       // the first goes first
    const int row = first_row_of_thread();
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number = next_tile(number)) {
        const BandWork w = BandWork::find(p.band, number, p.num_kv_heads);
        if (w.tile.tokens == 0) continue;
        clear(c.grad_query);
        if (w.steps > 0) c.walk(w, row);
        c.store<false>(w.tile, row);
        c.store<true>(w.tile, row + 8);
    }
}

// ---- grad_key and grad_value ----

constexpr i32 MASKED = 1, NEGATIVE = 2;     // some row does not see some key, has a gate below zero
struct KeyRecords {
    static constexpr int ROWS = CTA_ROWS;
    RowStats stats[ROWS];
    KeySpan spans[ROWS];
    i32 special[ROWS / 32];

    FSA_DEVICE i32 put(const BandBackwardParams& p, const KeyWork& w, const RowOfTile& r) {
        const RowStats of_row = r.stats(p.row_stats, p.band);
        const KeySpan span = r.exists ? key_span(p.band, r.position, w.rows.first_key, w.rows.keys, w.tokens.keys, r.blocks(p.band, w)) : make_span(0, 0, 0);
        stats[r.row] = of_row;
        spans[r.row] = span;
        // A row that does not exist is masked, too: its zeros times a key that is not finite are NaN.
        return __reduce_or_sync(0xffffffffu, (r.exists && span.sees_all<CTA_KEYS>(w.rows.keys) ? 0 : MASKED) | (is_negative(of_row) ? NEGATIVE : 0));
    }
};
typedef RowRing<KeyRecords, STAGES> KeyRowRing;

// Zero for keys that a row does not see. Not a variant of the whole step: with two of them the compiler runs out of registers.
FSA_DEVICE void mask_keys(PieceScores& s, const KeySpan* spans, int key_low) {
    FSA_UNROLL for (int i = 0; i < PIECE_KEYS / 8; ++i) {
        const SpanPair span = *(const SpanPair*)(spans + 8 * i + 2 * (threadIdx.x & 3));
        FSA_UNROLL for (int e = 0; e < 4; ++e)
            if (!(e & 1 ? span.second : span.first).sees(key_low, (e >> 1) * 8)) s[4 * i + e] = 0.0f;     // 16 keys lie in one block
    }
}

struct KeyConsumer {
    const BandBackwardParams& p;
    int key_low;                    // the thread's first key of the tile
    Columns grad_key, grad_value;

    FSA_DEVICE void add_rows(u32 keys, u32 values, u32 query, u32 grad, const RowStats* stats, const KeySpan* spans, i32 special) {
        PieceScores s, dp;
        wgmma_fence();
        start_piece<CTA_ROWS>(s, keys, query);
        wgmma_commit();
        start_piece<CTA_ROWS>(dp, values, grad);
        wgmma_commit();
        wgmma_wait<1>();        // of the rows before too
        wgmma_pin(s);
        wgmma_pin(grad_key);
        wgmma_pin(grad_value);
        key_probabilities<PIECE_KEYS, false>(s, stats, spans, key_low, p.scale_log2);
        if (special & MASKED) mask_keys(s, spans, key_low);
        if (special & NEGATIVE) apply_signs<PIECE_KEYS>(s, stats);
        PieceFragments a;
        FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) to_fragment<PIECE_KEYS>(a[k], s, k);
        wgmma_fence();
        start_piece_sum<CTA_ROWS>(grad_value, a, grad);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_pin(dp);
        key_gradients<PIECE_KEYS, false>(dp, s, stats, spans, key_low);
        if (special & MASKED) mask_keys(dp, spans, key_low);
        wgmma_wait<0>();        // frees the fragments: there are no registers for two sets
        wgmma_pin(grad_value);
        FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) to_fragment<PIECE_KEYS>(a[k], dp, k);
        wgmma_fence();
        start_piece_sum<CTA_ROWS>(grad_key, a, query);
        wgmma_commit();
    }

    // `keys` and `values` are those of the warpgroup.
    FSA_DEVICE void walk(const KeyRowRing& ring, u32 keys, u32 values, int steps) {
        FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
            ring.loaded.wait(n);
            ring.checked.wait(n);
            const KeyRecords& records = ring.record(n);
            FSA_NO_UNROLL for (int piece = 0; piece < CTA_ROWS / PIECE_KEYS; ++piece) {
                const u32 query = ring.query(n) + piece * PIECE_BYTES, grad = ring.grad(n) + piece * PIECE_BYTES;
                const RowStats* stats = records.stats + piece * PIECE_KEYS;
                const KeySpan* spans = records.spans + piece * PIECE_KEYS;
                add_rows(keys, values, query, grad, stats, spans, records.special[2 * piece] | records.special[2 * piece + 1]);
            }
            wgmma_wait<0>();
            wgmma_pin(grad_key);
            wgmma_pin(grad_value);
            ring.loaded.release(n);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_backward_keys(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) KeyRecords records[STAGES];
    __shared__ __align__(8) u64 barriers[1 + KeyRowRing::BARRIERS];
    __shared__ KeyWork w;       // no role has registers for it
    if (threadIdx.x == 0) w = KeyWork::find(p.band, p.num_kv_heads, p.resident);
    __syncthreads();
    if (w.rows.keys <= 0) return;
    const u32 key = shared_address(shared), value = key + KeyTile::BYTES, key_barrier = shared_address(barriers);
    const KeyRowRing ring = KeyRowRing::at(value + KeyTile::BYTES, records, key_barrier + 8);
    if (threadIdx.x == 0) {
        barrier_init(key_barrier, 2);
        ring.open();
        barriers_ready();
    }
    ring.clear_uncovered(p.band);
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<24>();
        if (threadIdx.x == CONSUMER_THREADS) {
            load_keys(p.key_map, key, key_barrier, w);
            load_keys(p.value_map, value, key_barrier, w);
        }
        ring.bring(p, w);
        return;
    }
    registers_grow<240>();
    KeyConsumer c = {p, first_row_of_thread()};
    clear(c.grad_key);
    clear(c.grad_value);
    barrier_wait(key_barrier, 0);
    c.walk(ring, key + group * PIECE_BYTES, value + group * PIECE_BYTES, w.steps);
    store_key_sums(p, c.grad_key, p.grad_key, p.scale, 0, w, c.key_low);
    store_key_sums(p, c.grad_value, p.grad_value, 1.0f, 1, w, c.key_low);
}
