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
#include "block/band_gradients.cuh"
#include "block/band_pipeline.cuh"

static_assert(HEAD_DIM <= 128, "above that sums and tiles do not fit: the portable kernels do it");
constexpr int STAGES = 2;
constexpr int PIECE_KEYS = 64, PIECES_PER_STEP = STEP_KEYS / PIECE_KEYS;    // keys, or rows, of one score tile
constexpr int CTA_KEYS = 128;
static_assert(STEP_KEYS == CTA_KEYS && CTA_ROWS == CTA_KEYS, "tiles of both passes have one size");
constexpr int SMEM_BYTES = 2 * RowTile::BYTES + 2 * STAGES * KeyTile::BYTES;
typedef f32 PieceScores[PIECE_KEYS / 2];
typedef u32 PieceFragments[PIECE_KEYS / 16][4];

// 64 x 64 scores: rows of one tile times rows of another.
FSA_DEVICE void start_piece(PieceScores& s, u32 a, u32 b) {
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
        Wgmma<64>::shared_shared<0, 0>(s, over_columns<CTA_ROWS>(a, k), over_columns<CTA_ROWS>(b, k), k != 0);
}
// Adds scores times 64 rows of a tile.
FSA_DEVICE void start_piece_sum(Columns& acc, const PieceFragments& a, u32 rows) {
    FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) Wgmma<HEAD_DIM>::template registers_shared<1>(acc, a[k], over_rows<CTA_ROWS>(rows, k, 0), 1);
}
constexpr int PIECE_BYTES = PIECE_KEYS * 128;   // from one piece to the next inside a half of a tile

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
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
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
                start_piece(s, query, key);
                wgmma_commit();
                start_piece(dp, grad, value);
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
                start_piece_sum(grad_query, a, key);
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
        if (threadIdx.x >= CONSUMER_THREADS + 32) m.checked.check(p.band, p.num_kv_heads, total, m.key_ring, [&](u32 step) { return m.key(step); });
        return;
    }
    registers_grow<CONSUMER_REGISTERS>();
    QueryConsumer c = {p, m, group, 0, 0, 0};
    if (group == 1) named_arrive(TURN, CONSUMER_THREADS);       // the first goes first
    const int row = first_row_of_thread();
    FSA_NO_UNROLL for (int number = blockIdx.x; number < total; number += gridDim.x) {
        const BandWork w = BandWork::find(p.band, number, p.num_kv_heads);
        if (w.tile.tokens == 0) continue;
        clear(c.grad_query);
        if (w.steps > 0) c.walk(w, row);
        c.store<false>(w.tile, row);
        c.store<true>(w.tile, row + 8);
    }
}

// ---- grad_key and grad_value ----

// What the producing warps bring for a stage of rows.
struct RowRecords {
    RowStats stats[CTA_ROWS];
    KeySpan spans[CTA_ROWS];
    i32 special[CTA_ROWS / 32];     // of 32 rows: MASKED and NEGATIVE
};
constexpr i32 MASKED = 1, NEGATIVE = 2;     // some row does not see some key, has a gate below zero

// A tile of keys and the tiles of rows that meet it: tokens from the first that sees a key on, as many at a time as fit.
struct KeyWork {
    KeyTileRows rows;
    BandSequence tokens;            // those that see a key of the tile, as a sequence of their own
    i32 kv_head, tiles;             // of tokens times of heads
    bool backwards;                 // the last tile of the split comes first
    i32 ends;                       // numbers of its first and last, added

    FSA_DEVICE static KeyWork find(const Band& band, int num_kv_heads, int resident) {
        KeyWork w;
        const int number = blockIdx.y * gridDim.x + blockIdx.x;     // heads side by side, so that the longest walks start first
        w.kv_head = number % num_kv_heads;
        w.rows = find_key_tile(band, number / num_kv_heads, w.kv_head, CTA_KEYS);
        w.tokens = w.rows.sequence;
        w.tokens.token += w.rows.first_token;
        w.tokens.position += w.rows.first_token;
        w.tokens.tokens = (i32)(w.rows.rows / (u32)band.group_size);
        w.tiles = ceil_div(w.tokens.tokens, band.tile_tokens) * band.head_tiles;
        // Ctas of one time meet the same rows, so that all but one find them in L2. Those of the first wave start together, and share the last rows.
        // Those of the next start one by one as the shortest walks end, each as much later as its first row is further on: forwards they go side by
        // side, and end together for the wave after them.
        w.backwards = (number + gridDim.x * gridDim.y * blockIdx.z) / resident % 2 == 0;
        const int split = blockIdx.z, splits = gridDim.z;
        w.ends = split + w.tiles - 1 - (w.tiles - 1 - split) % splits;
        return w;
    }
    // The tile that is walked in the place of the split's tile n.
    FSA_DEVICE int walked(int n) const { return backwards ? ends - n : n; }
};

struct KeyMemory {
    u32 key, value, stages;
    RowRecords* records;            // [STAGES]
    u32 key_barrier;
    Ring<STAGES> loaded, checked;   // of `checked` only `full` is used

    FSA_DEVICE u32 query(u32 n) const { return stages + Ring<STAGES>::place(n) * 2 * RowTile::BYTES; }
    FSA_DEVICE u32 grad(u32 n) const { return query(n) + RowTile::BYTES; }
};

// One thread: the keys and values of the tile.
FSA_DEVICE void load_keys(const BandBackwardParams& p, const KeyMemory& m, const KeyWork& w) {
    barrier_expect(m.key_barrier, 2 * KeyTile::BYTES);
    const int row = w.tokens.key_row + w.rows.first_key;
    load_tile<CTA_KEYS>(m.key, &p.key_map, m.key_barrier, w.kv_head, row);
    load_tile<CTA_KEYS>(m.value, &p.value_map, m.key_barrier, w.kv_head, row);
}

// What boxes brought of a row that does not exist belongs to somebody else, and may not be finite.
FSA_DEVICE void clear_row(u32 tile, int row) {
    FSA_UNROLL for (int half = 0; half < RowTile::HALVES; ++half)
        FSA_UNROLL for (int piece = 0; piece < 8; ++piece) store_shared(tile + half * RowTile::HALF_BYTES + row * 128 + piece * 16, Vec4{0, 0, 0, 0});
}

// The producing warpgroup: its first thread loads the tiles of rows, and each of its 128 threads brings the records of one row.
FSA_DEVICE void bring_rows(const BandBackwardParams& p, const KeyMemory& m, const KeyWork& w) {
    const int row = threadIdx.x - CONSUMER_THREADS, token_of_tile = row / p.band.tile_heads, head_of_tile = row - token_of_tile * p.band.tile_heads;
    u32 stage = 0;
    FSA_NO_UNROLL for (int n = blockIdx.z; n < w.tiles; n += gridDim.z, ++stage) {
        const int number = w.walked(n), token_tile = number / p.band.head_tiles, first_token = token_tile * p.band.tile_tokens;
        const int first_head = (number - token_tile * p.band.head_tiles) * p.band.tile_heads;
        m.loaded.wait_free(stage);
        if (row == 0) {
            const u32 barrier = m.loaded.expect(stage, 2 * row_tile_bytes(p.band));
            load_tile<CTA_ROWS>(m.query(stage), &p.query_map, barrier, w.rows.first_head + first_head, w.tokens.token + first_token);
            load_tile<CTA_ROWS>(m.grad(stage), &p.grad_out_map, barrier, w.rows.first_head + first_head, w.tokens.token + first_token);
        }
        const int token = first_token + token_of_tile, head = first_head + head_of_tile;
        const bool exists = token_of_tile < p.band.tile_tokens && token < w.tokens.tokens && head < p.band.group_size;
        RowRecords& records = m.records[Ring<STAGES>::place(stage)];
        RowStats stats = no_row_stats();
        KeySpan span = make_span(0, 0, 0);
        if (exists) {
            stats = p.row_stats[(i64)(w.rows.first_head + head) * p.band.total_q + w.tokens.token + token];
            const u32 blocks = blocks_of_row(p.band, w.kv_head, w.tokens.token + token, w.rows.first_key);
            span = key_span(p.band, w.tokens.position + token, w.rows.first_key, w.rows.keys, w.tokens.keys, blocks);
        }
        records.stats[row] = stats;
        records.spans[row] = span;
        // A row that does not exist is masked, too: its zeros times a key that is not finite are NaN.
        const bool masked = __any_sync(0xffffffffu, !exists || !span.sees_all<CTA_KEYS>(w.rows.keys)), negative = __any_sync(0xffffffffu, is_negative(stats));
        if (__any_sync(0xffffffffu, !exists && token_of_tile < p.band.tile_tokens)) {
            m.loaded.wait(stage);
            if (!exists) { clear_row(m.query(stage), row); clear_row(m.grad(stage), row); }
            fence_async_proxy();
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            records.special[row / 32] = (masked ? MASKED : 0) | (negative ? NEGATIVE : 0);
            barrier_arrive(m.checked.full + 8 * Ring<STAGES>::place(stage));
        }
    }
}

struct KeyConsumer {
    const BandBackwardParams& p;
    const KeyMemory& m;
    int key_low;                    // the thread's first key of the tile
    Columns grad_key, grad_value;

    // Zero for keys that a row does not see. Not a variant of the whole step: with two of them the compiler runs out of registers.
    FSA_DEVICE void mask(PieceScores& s, const KeySpan* spans) const {
        FSA_UNROLL for (int i = 0; i < PIECE_KEYS / 8; ++i) {
            const SpanPair span = *(const SpanPair*)(spans + 8 * i + 2 * (threadIdx.x & 3));
            FSA_UNROLL for (int e = 0; e < 4; ++e)
                if (!(e & 1 ? span.second : span.first).sees(key_low, (e >> 1) * 8)) s[4 * i + e] = 0.0f;     // 16 keys lie in one block
        }
    }

    FSA_DEVICE void add_rows(u32 keys, u32 values, u32 query, u32 grad, const RowStats* stats, const KeySpan* spans, i32 special) {
        PieceScores s, dp;
        wgmma_fence();
        start_piece(s, keys, query);
        wgmma_commit();
        start_piece(dp, values, grad);
        wgmma_commit();
        wgmma_wait<1>();        // of the rows before too
        wgmma_pin(s);
        wgmma_pin(grad_key);
        wgmma_pin(grad_value);
        key_probabilities<PIECE_KEYS, false>(s, stats, spans, key_low, p.scale_log2);
        if (special & MASKED) mask(s, spans);
        if (special & NEGATIVE) apply_signs<PIECE_KEYS>(s, stats);
        PieceFragments a;
        FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) to_fragment<PIECE_KEYS>(a[k], s, k);
        wgmma_fence();
        start_piece_sum(grad_value, a, grad);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_pin(dp);
        key_gradients<PIECE_KEYS, false>(dp, s, stats, spans, key_low);
        if (special & MASKED) mask(dp, spans);
        wgmma_wait<0>();        // frees the fragments: there are no registers for two sets
        wgmma_pin(grad_value);
        FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) to_fragment<PIECE_KEYS>(a[k], dp, k);
        wgmma_fence();
        start_piece_sum(grad_key, a, query);
        wgmma_commit();
    }

    FSA_DEVICE void walk(const KeyWork& w, int group) {
        const u32 keys = m.key + group * PIECE_BYTES, values = m.value + group * PIECE_BYTES;
        u32 stage = 0;
        barrier_wait(m.key_barrier, 0);
        FSA_NO_UNROLL for (int number = blockIdx.z; number < w.tiles; number += gridDim.z, ++stage) {
            m.loaded.wait(stage);
            m.checked.wait(stage);
            const RowRecords& records = m.records[Ring<STAGES>::place(stage)];
            FSA_NO_UNROLL for (int piece = 0; piece < CTA_ROWS / PIECE_KEYS; ++piece) {
                const u32 query = m.query(stage) + piece * PIECE_BYTES, grad = m.grad(stage) + piece * PIECE_BYTES;
                const RowStats* stats = records.stats + piece * PIECE_KEYS;
                const KeySpan* spans = records.spans + piece * PIECE_KEYS;
                add_rows(keys, values, query, grad, stats, spans, records.special[2 * piece] | records.special[2 * piece + 1]);
            }
            wgmma_wait<0>();
            wgmma_pin(grad_key);
            wgmma_pin(grad_value);
            m.loaded.release(stage);
        }
    }

    FSA_DEVICE void store_sums(Columns& acc, const Tensor& target, f32 scale, int which, const KeyWork& w) const {
        const int key = w.rows.first_key + key_low, row = w.tokens.key_row + key;
        const bool has_low = key_low < w.rows.keys, has_high = key_low + 8 < w.rows.keys;
        if (p.splits == 1) {
            char *low = (char*)tensor_row(target, row, w.kv_head), *high = (char*)tensor_row(target, row + 8, w.kv_head);
            if (p.accumulate_keys) {
                add_held<false>(acc, low, scale, has_low);
                add_held<true>(acc, high, scale, has_high);
                scale = 1.0f;
            }
            store_row<false>(low, acc, scale, has_low);
            store_row<true>(high, acc, scale, has_high);
            return;
        }
        f32* sums = p.partial_keys + ((((i64)blockIdx.z * 2 + which) * p.band.total_keys + row) * p.num_kv_heads + w.kv_head) * HEAD_DIM + 2 * (threadIdx.x & 3);
        const i64 high = (i64)8 * p.num_kv_heads * HEAD_DIM;
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 8; ++i) {
            if (has_low) store_global8(sums + 8 * i, __float_as_uint(acc[4 * i]), __float_as_uint(acc[4 * i + 1]));
            if (has_high) store_global8(sums + high + 8 * i, __float_as_uint(acc[4 * i + 2]), __float_as_uint(acc[4 * i + 3]));
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_backward_keys(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) RowRecords records[STAGES];
    __shared__ __align__(8) u64 barriers[1 + 4 * STAGES];
    __shared__ KeyWork w;       // no role has registers for it
    if (threadIdx.x == 0) w = KeyWork::find(p.band, p.num_kv_heads, p.resident);
    __syncthreads();
    if (w.rows.keys <= 0) return;
    KeyMemory m;
    m.key = shared_address(shared);
    m.value = m.key + KeyTile::BYTES;
    m.stages = m.value + KeyTile::BYTES;
    m.records = records;
    m.key_barrier = shared_address(barriers);
    m.loaded = Ring<STAGES>::at(shared_address(barriers + 1));
    m.checked = Ring<STAGES>::at(shared_address(barriers + 1 + 2 * STAGES));
    if (threadIdx.x == 0) {
        barrier_init(m.key_barrier, 1);
        m.loaded.open();
        m.checked.open(0, WARPGROUP / 32);
        barriers_ready();
    }
    // Rows of a stage that no box covers stay zero for ever.
    if (p.band.tile_tokens * p.band.tile_heads < CTA_ROWS) {
        FSA_NO_UNROLL for (int at = threadIdx.x * 16; at < STAGES * 2 * RowTile::BYTES; at += THREADS * 16) store_shared(m.stages + at, Vec4{0, 0, 0, 0});
        fence_async_proxy();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<24>();
        if (threadIdx.x == CONSUMER_THREADS) load_keys(p, m, w);
        bring_rows(p, m, w);
        return;
    }
    registers_grow<240>();
    KeyConsumer c = {p, m, first_row_of_thread()};
    clear(c.grad_key);
    clear(c.grad_value);
    c.walk(w, group);
    c.store_sums(c.grad_key, p.grad_key, p.scale, 0, w);
    c.store_sums(c.grad_value, p.grad_value, 1.0f, 1, w);
}
