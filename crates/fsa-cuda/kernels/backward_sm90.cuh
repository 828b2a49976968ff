// WHAT   Selected attention backward, KV-major, five products in one pass: scores and probabilities are computed again, keys as
//        rows, so that P^T and dS^T stay in registers as A operands of grad_value += P^T dO and grad_key += dS^T Q;
//        only dS goes through shared memory, for grad_query = dS K, which is added to f32 or scaled f16 rows in L2.
// GRID   (units of the chunk, parts of a block of 128 keys, query heads / TILE_HEADS). As many heads per launch as keep their sums of grad_query in L2.
//        A tile of rows has all heads of its entries side by side: keys come once, sums of keys leave once.
// ROLES  One warpgroup per 64 keys; all share the gathered query and grad_out tiles; each computes its share of the
//        columns of grad_query over all keys of the cta.
// SMEM   key and value tiles, two stages of query and grad_out tiles with row statistics, one dS tile per warpgroup.
// SYNC   cp.async group per row tile. Two barriers per tile: tile arrived (and previous stage free), dS written. In the tensor cores' queue
//        dV stands behind dP and runs under the arithmetic of dS, dK behind dQ and runs while dQ leaves.
#include "block/backward_rows.cuh"
#include "block/score_gradients.cuh"
#include "ptx/bulk.cuh"
#include "ptx/thread.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzled_tile.cuh"

constexpr int CTA_KEYS = BLOCK_SIZE <= 64 ? 64 : 128;      // smaller blocks are padded with masked keys
constexpr int GROUPS = CTA_KEYS / 64;                      // warpgroups
constexpr int THREADS = GROUPS * WARPGROUP;
constexpr int WARP_ROWS = 64 / (THREADS / 32);             // rows of a tile that one warp gathers
constexpr int KEYS_PER_PART = BLOCK_SIZE < 128 ? BLOCK_SIZE : 128;
constexpr int GROUP_PIECES = PIECES % GROUPS == 0 ? PIECES / GROUPS : PIECES;  // pieces of grad_query per warpgroup
typedef SwizzledTile<CTA_KEYS> KeyTile;
typedef SwizzledTile<TILE_ROWS> RowTile;
constexpr int DS_BYTES = 64 * 128;
constexpr int STAGE_BYTES = 2 * RowTile::BYTES;
constexpr u32 NO_ENTRY = 0xffffffffu;
constexpr int TILE_ENTRIES = TILE_ROWS / TILE_HEADS;        // row r of a tile is entry r / TILE_HEADS, head r % TILE_HEADS
static_assert(!QUERY_PARTIALS || BLOCK_SIZE <= 128, "the two parts of a block of 256 would share a slot");
constexpr int BACKWARD_CTAS = GROUPS == 1 ? 2 : 1;
// dV while dS is computed, dK while dQ leaves: needs the fragments of P beside dP. Wider rows have no registers left for that.
constexpr bool OVERLAP = HEAD_DIM <= 128;

// Clears NaN and infinity in a tile that is there for all threads. A loop, whose addresses take no registers of the main loop; a few loads at a time.
template <int BYTES, int THREADS>
FSA_DEVICE void clean_keys(u32 tile) {
    constexpr int AHEAD = 4, STEP = THREADS * 16;
    static_assert(BYTES % (AHEAD * STEP) == 0, "whole steps");
    FSA_NO_UNROLL for (u32 at = tile + thread_number() * 16, end = tile + BYTES; at < end; at += AHEAD * STEP) {
        Vec4 v[AHEAD];
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) v[i] = load_shared(at + i * STEP);
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i)
            store_shared(at + i * STEP, Vec4{finite_or_zero(v[i].x), finite_or_zero(v[i].y), finite_or_zero(v[i].z), finite_or_zero(v[i].w)});
    }
}

// The thread's two rows of grad_key or grad_value. All columns in one product: in pieces there are twice as many to start.
typedef f32 Sums[HEAD_DIM / 2];

// Puts them into the warp's 16 rows in shared memory, f32 in fragment order.
constexpr int SUM_BYTES = HEAD_DIM * 4;
constexpr int SUMS_OFFSET = GROUPS == 1 ? 2 * KeyTile::BYTES : 0;       // the row tiles, or all tiles
static_assert(2 * CTA_KEYS * SUM_BYTES <= (GROUPS == 1 ? 0 : 2 * KeyTile::BYTES) + 2 * STAGE_BYTES, "both sums fit where the tiles were");
FSA_DEVICE void stage_sums(u32 rows, const Sums& acc) {
    const u32 row = rows + (threadIdx.x & 31) / 4 * SUM_BYTES + (threadIdx.x & 3) * 16;
    FSA_UNROLL for (int pair = 0; pair < HEAD_DIM / 16; ++pair) {
        const f32* sums = &acc[pair * 8];
        store_shared(row + pair * 64, as_words(sums[0], sums[1], sums[4], sums[5]));
        store_shared(row + pair * 64 + 8 * SUM_BYTES, as_words(sums[2], sums[3], sums[6], sums[7]));
    }
}

// Adds what launches before left of the thread's two rows of grad_key or grad_value. At the end of a unit: its start has no registers for them.
FSA_DEVICE void add_sums(Sums& acc, const f32* low, bool has_low, bool has_high) {
    FSA_UNROLL for (int pair = 0; pair < HEAD_DIM / 16; ++pair) {
        const f32* at = low + pair * 16 + (threadIdx.x & 3) * 4;
        Vec4 v = {0, 0, 0, 0}, w = {0, 0, 0, 0};
        if (has_low) v = load_global_once(at);
        if (has_high) w = load_global_once(at + 8 * HEAD_DIM);
        f32* sums = &acc[pair * 8];
        sums[0] += __uint_as_float(v.x); sums[1] += __uint_as_float(v.y); sums[4] += __uint_as_float(v.z); sums[5] += __uint_as_float(v.w);
        sums[2] += __uint_as_float(w.x); sums[3] += __uint_as_float(w.y); sums[6] += __uint_as_float(w.z); sums[7] += __uint_as_float(w.w);
    }
}

// One of the two rows, finished: written, or added to what is there.
template <bool HIGH>
FSA_DEVICE void finish_row(char* row, const Sums& acc, f32 scale, bool accumulate, bool present) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
        char* at = row + group * 64 + (threadIdx.x & 3) * 16;
        const Vec4 before = words_before(at, accumulate, present);
        const u32 word[4] = {before.x, before.y, before.z, before.w};
        u32 w[4];
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
            w[j] = add_pair(word[j], acc[e], acc[e + 1], scale);
        }
        const Vec4 natural = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
        if (present) store_global(at, natural);
    }
}

// Where the thread adds or stores its rows of grad_query. Two quads write one 128-byte line of one row, then of the other
// (block/rows.cuh): that is 3 % of the pass with additions, too.
struct QueryRows {
    char* sums;                                     // with this lane's offset
    f32 scale;                                      // only with SCALED_SUMS, of the thread's own rows
    u32 head_bytes;                                 // with TILE_HEADS > 1: from the row of a quad with an even number to that of the next one
    u32 row_bytes;                                  // of sums
    const u32* targets;                             // of the quad with an even number and of the next one, and 8 rows on
    FragmentRows partial_low, partial_high;         // only with QUERY_PARTIALS
};

// Adds a piece, from column COLUMN on, to two f32 rows in fragment order: rows r of an even quad and of the next one, or r + 8.
template <int COLUMN, bool HIGH, int PAIR = 0>
FSA_DEVICE void add_piece(f32* even, f32* odd, const Piece& acc) {
    if constexpr (PAIR < PIECE_COLUMNS / 16) {
        constexpr int OFFSET = (COLUMN + PAIR * 16) * 4;
        const bool is_odd = threadIdx.x & 4;
        f32 mine[4], other[4];
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = PAIR * 8 + (j >> 1) * 4 + (j & 1) + (HIGH ? 2 : 0);
            const f32 received = __shfl_xor_sync(0xffffffffu, is_odd ? acc[e] : acc[e + 8], 4);
            mine[j] = is_odd ? received : acc[e];
            other[j] = is_odd ? acc[e + 8] : received;
        }
        add_global<OFFSET>(even, mine[0], mine[1], mine[2], mine[3]);
        add_global<OFFSET>(odd, other[0], other[1], other[2], other[3]);
        add_piece<COLUMN, HIGH, PAIR + 2>(even, odd, acc);
    }
}

// The same for f16 rows: all columns of a piece at once.
template <int PIECE, bool HIGH>
FSA_DEVICE void add_scaled_piece(char* even, char* odd, const Piece& acc, f32 scale) {
    const bool is_odd = threadIdx.x & 4;
    const Vec4 first = pack_group_sums<HIGH>(acc, 0, scale);
    if constexpr (PIECE_GROUPS == 2) {
        const Vec4 second = pack_group_sums<HIGH>(acc, 1, scale), received = swap_with_neighbour(is_odd ? first : second);
        add_global_f16<PIECE * 128>(even, is_odd ? received : first);
        add_global_f16<PIECE * 128>(odd, is_odd ? second : received);
    } else {
        add_global_f16<PIECE * 64>(is_odd ? odd : even, first);
    }
}

template <int PIECE>
FSA_DEVICE void start_query_gradients(Piece& acc, u32 ds_tiles, u32 key_tile) {
    wgmma_fence();
    FSA_UNROLL for (int k = 0; k < CTA_KEYS / 16; ++k)
        Wgmma<PIECE_COLUMNS>::shared_shared<1, 1>(acc, over_rows<64>(ds_tiles, k, 0), over_rows<CTA_KEYS>(key_tile, k, PIECE * PIECE_COLUMNS), k != 0);
    wgmma_commit();
}
template <int PIECE>
FSA_DEVICE void finish_query_gradients(Piece& acc, const QueryRows& rows) {
    wgmma_pin(acc);
    if constexpr (QUERY_PARTIALS) {
        store_fragment<false>(rows.partial_low, PIECE, acc, 1.0f);
        store_fragment<true>(rows.partial_high, PIECE, acc, 1.0f);
    } else {
        auto sums = [&](int row) { return rows.sums + (u64)rows.targets[row] * rows.row_bytes; };
        if constexpr (TILE_HEADS > 1) {     // two heads of one entry
            char *const low = sums(0), *const high = sums(8);
            add_scaled_piece<PIECE, false>(low, low + rows.head_bytes, acc, rows.scale);
            add_scaled_piece<PIECE, true>(high, high + rows.head_bytes, acc, rows.scale);
        } else if constexpr (SCALED_SUMS) {
            add_scaled_piece<PIECE, false>(sums(0), sums(1), acc, rows.scale);
            add_scaled_piece<PIECE, true>(sums(8), sums(9), acc, rows.scale);
        } else {
            add_piece<PIECE * PIECE_COLUMNS, false>((f32*)sums(0), (f32*)sums(1), acc);
            add_piece<PIECE * PIECE_COLUMNS, true>((f32*)sums(8), (f32*)sums(9), acc);
        }
    }
}

// grad_query of the tile, dS K over all keys of the cta, piece by piece; `last` starts the products that run while the last piece leaves.
template <int PIECE, int END, typename F>
FSA_DEVICE void query_gradients(u32 ds_tiles, u32 key_tile, const QueryRows& rows, F last) {
    constexpr bool LAST = PIECE + 1 >= END;
    Piece acc;
    start_query_gradients<PIECE>(acc, ds_tiles, key_tile);
    if constexpr (LAST) last();
    wgmma_wait<LAST && OVERLAP ? 1 : 0>();
    finish_query_gradients<PIECE>(acc, rows);
    if constexpr (!LAST) query_gradients<PIECE + 1, END>(ds_tiles, key_tile, rows, last);
}

// A lane loaded columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t; an even one takes the first pair of its neighbour, an odd one the second.
FSA_DEVICE NaturalColumns natural_columns(Vec4 v) {
    const bool odd = threadIdx.x & 1;
    const u32 a = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.z, 1), b = __shfl_xor_sync(0xffffffffu, odd ? v.y : v.w, 1);
    return {odd ? Vec4{a, b, v.z, v.w} : Vec4{v.x, v.y, a, b}, (odd ? 8 : 0) + (int)(threadIdx.x & 2) * 2};
}

// Which main kernel: the host knows the same rule.
#define FSA_BACKWARD_NARROW (FSA_HEAD_DIM == 256 && !FSA_QUERY_PARTIALS)
#if FSA_BACKWARD_NARROW
#include "backward_narrow_sm90.cuh"
#else

// Where a row that does not exist adds its zeros: another row for every block, and nothing that a register holds over the loop.
FSA_DEVICE u32 padding_row(const BackwardParams& p, int number) {
    const i32* chunk_token = p.layout.chunk_token + p.chunk;
    return (u32)number % (u32)(chunk_token[1] - chunk_token[0]);
}
// The launch's kv head that the cta's sums are of; computed when it is asked for.
FSA_DEVICE int sums_head(const BackwardParams& p) {
    int launch_head = blockIdx.z * TILE_HEADS;
    asm volatile("" : "+r"(launch_head));
    return (p.first_head + launch_head) / p.group_size - p.first_head / p.group_size;
}

// What a unit is about: in shared memory, because sums and scores leave no registers for what is used once per tile.
struct Work {
    const char *queries, *grads;    // of the chunk's first row, of the unit's first head
    const RowStats* stats;          // the same
    char* sums;                     // the same
    const u32* entries;
    int count;                      // entries
    int tiles;
    int first_token;                // that sees the part's first key, relative to the chunk
    int kv_row, keys;               // the part's keys
    int sums_row;                   // of the first
    bool alone;                     // no other unit has keys of the block
};

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_CTAS) backward(const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) RowStats stats[2][TILE_ROWS];
    __shared__ i32 limits[2][TILE_ROWS];
    __shared__ u32 targets[2][TILE_ROWS];     // row of grad_query, or slot of the partial
    __shared__ f32 scales[TILE_HEADS];          // of the heads' sums
    __shared__ Work work;
    const Index& index = p.index;
    const int launch_head = blockIdx.z * TILE_HEADS, head = p.first_head + launch_head, kv_head = head / p.group_size;
    const i64 list = (i64)kv_head * p.layout.num_chunks + p.chunk;
    const Unit* record = find_unit(index, list, blockIdx.x);
    if (record == nullptr || !in_range(p, record->kv_row)) return;
    const Unit unit = *record;
    const int chunk_token = p.layout.chunk_token[p.chunk];
    const int part = blockIdx.y * KEYS_PER_PART, keys = min_i(KEYS_PER_PART, unit.valid_keys - part);
    if (keys <= 0) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = GROUPS == 1 ? 0 : __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    const u32 query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES, grad_row_bytes = (u32)p.grad_out.row_stride * ELEMENT_BYTES;
    const u32 key_tile = shared_address(shared), value_tile = key_tile + KeyTile::BYTES, stages = value_tile + KeyTile::BYTES;
    const u32 ds_tiles = stages + 2 * STAGE_BYTES;

    // What the first rows wait for comes first.
    const u32* entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots + unit.entry_begin;
    const int lane_entry = (warp * WARP_ROWS + lane % WARP_ROWS) / TILE_HEADS;       // of a tile, which this lane loads
    const bool has_first = lane_entry < unit.entry_count, has_next = TILE_ENTRIES + lane_entry < unit.entry_count;
    const u32 first_entry = has_first ? __ldg(entries + lane_entry) : NO_ENTRY;
    u32 next_entry = has_next ? __ldg(entries + TILE_ENTRIES + lane_entry) : NO_ENTRY;
    copy_rows<CTA_KEYS, THREADS>(key_tile, p.key, kv_head, unit.kv_row + part, keys);
    copy_rows<CTA_KEYS, THREADS>(value_tile, p.value, kv_head, unit.kv_row + part, keys);
    // By several warps, because all wait for it.
    if (threadIdx.x == 0) {
        work.queries = tensor_row(p.query, chunk_token, head);
        work.grads = tensor_row(p.grad_out, chunk_token, head);
    } else if (threadIdx.x == 32) {
        work.stats = row_stats_at(p, launch_head, 0);
        work.sums = query_sums(p, launch_head, chunk_token, 0);
    } else if (threadIdx.x == 64) {
        work.tiles = ceil_div(unit.entry_count, TILE_ENTRIES);
        work.entries = entries;
        work.count = unit.entry_count;
        work.first_token = unit.first_token + part - chunk_token;
        work.kv_row = unit.kv_row + part;
        work.sums_row = unit.sums_row + part;
        work.keys = keys;
        work.alone = !unit.split;
    }
    __syncthreads();
    auto tile_entry = [&](int first) {  // unpacked when used, so that nothing waits here
        const int number = first + (warp * WARP_ROWS + lane % WARP_ROWS) / TILE_HEADS;
        return number < work.count ? __ldg(work.entries + number) : NO_ENTRY;
    };
    // Starts the copies of a tile; the return value says that some row of this warp needs a mask.
    auto start_tile = [&](int stage, u32 entry) {
        const int token = entry == NO_ENTRY ? -1 : (int)(entry & 0xffffffu);    // relative to the chunk
        gather_rows<WARP_ROWS, true, TILE_HEADS>(stages + stage * STAGE_BYTES, work.queries, query_row_bytes, work.grads, grad_row_bytes, token, warp * WARP_ROWS,
                                                 (u32)p.query.head_stride * ELEMENT_BYTES, (u32)p.grad_out.head_stride * ELEMENT_BYTES);
        const int row = warp * WARP_ROWS + lane;
        bool partly = false;
        if (lane < WARP_ROWS) {
            const int at = TILE_HEADS == 1 ? token : token * p.stats_row + lane % TILE_HEADS * p.stats_head;
            if (token >= 0) copy_async8(shared_address(&stats[stage][row]), work.stats + at);
            else stats[stage][row] = no_row_stats();
            // A row that does not exist sees nothing: its zeros times a key or value that is not finite would be NaN.
            const int limit = token < 0 ? -1 : min_i(token - work.first_token, work.keys - 1);
            limits[stage][row] = limit;
            partly = limit < CTA_KEYS - 1;
            if (QUERY_PARTIALS) targets[stage][row] = token >= 0 ? (u32)token * index.slots + (entry >> 24) : NO_ENTRY;
            else targets[stage][row] = token >= 0 ? (u32)token : padding_row(p, work.first_token + row);
        }
        copy_commit();
        return partly;
    };

    bool masked = start_tile(0, first_entry), keys_clean = false;
    if (SCALED_SUMS && threadIdx.x < TILE_HEADS) scales[threadIdx.x] = launch_scale(p, launch_head + threadIdx.x).scale;
    const int key_low = group * 64 + (warp & 3) * 16 + lane / 4;
    Sums grad_key, grad_value;
    FSA_UNROLL for (int i = 0; i < HEAD_DIM / 2; ++i) grad_key[i] = grad_value[i] = 0.0f;
    const u32 my_keys = key_tile + group * 64 * 128, my_values = value_tile + group * 64 * 128;
    // The row of 8 x 8 matrices of dS whose address this lane gives.
    const u32 ds_row = ds_tiles + group * DS_BYTES + ((warp & 3) * 16 + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);

    int tile = 0, stage = 0;
    FSA_NO_UNROLL while (true) {
        const u32 query_tile = stages + stage * STAGE_BYTES, grad_tile = query_tile + RowTile::BYTES;
        copy_wait<0>();
        fence_async_proxy();
        const bool ends = tile + 1 == work.tiles;
        masked |= p.given_stats && lane < WARP_ROWS && is_negative(stats[stage][warp * WARP_ROWS + lane]);
        const bool any_masked = __syncthreads_or(masked);
        if (any_masked && !keys_clean) {
            // A key that is not finite makes log2-sum-exp, and so everything, NaN for the rows that see it; the others must
            // not meet it in dS K, where their dS is zero.
            clean_keys<KeyTile::BYTES, THREADS>(key_tile);
            keys_clean = true;
            fence_async_proxy();
            __syncthreads();
        }
        f32 s[32], dp[32];
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<64>::shared_shared<0, 0>(s, over_columns<CTA_KEYS>(my_keys, k), over_columns<TILE_ROWS>(query_tile, k), k != 0);
        wgmma_commit();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<64>::shared_shared<0, 0>(dp, over_columns<CTA_KEYS>(my_values, k), over_columns<TILE_ROWS>(grad_tile, k), k != 0);
        wgmma_commit();
        if (!ends) {
            masked = start_tile(stage ^ 1, next_entry);
            next_entry = tile_entry((tile + 2) * TILE_ENTRIES);
        }
        wgmma_wait<1>();
        wgmma_pin(s);
        if (any_masked) probabilities<64, true>(s, stats[stage], limits[stage], key_low, p.scale_log2);
        else probabilities<64, false>(s, stats[stage], limits[stage], key_low, p.scale_log2);
        u32 a[4][4], b[4][4];
        FSA_UNROLL for (int k = 0; k < 4; ++k) to_fragment<64>(a[k], s, k);
        auto add_grad_value = [&]() {
            FSA_UNROLL for (int k = 0; k < 4; ++k) Wgmma<HEAD_DIM>::registers_shared<1>(grad_value, a[k], over_rows<TILE_ROWS>(grad_tile, k, 0), 1);
        };
        auto add_grad_key = [&]() {
            FSA_UNROLL for (int k = 0; k < 4; ++k) Wgmma<HEAD_DIM>::registers_shared<1>(grad_key, b[k], over_rows<TILE_ROWS>(query_tile, k, 0), 1);
        };
        if constexpr (OVERLAP) {
            wgmma_fence();
            add_grad_value();
            wgmma_commit();
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        wgmma_pin(dp);
        if (any_masked) score_gradients<64, true>(dp, s, stats[stage], limits[stage], key_low);
        else score_gradients<64, false>(dp, s, stats[stage], limits[stage], key_low);
        FSA_UNROLL for (int k = 0; k < 4; ++k) to_fragment<64>(b[k], dp, k);
        FSA_UNROLL for (int k = 0; k < 4; ++k) store_matrices(ds_row ^ (k << 5), b[k]);     // columns 16 k .. 16 k + 15
        if constexpr (!OVERLAP) {
            wgmma_fence();
            add_grad_value();
            add_grad_key();
            wgmma_commit();
        }
        fence_async_proxy();
        __syncthreads();

        const int row = (warp & 3) * 16 + lane / 4;
        QueryRows rows;
        if constexpr (QUERY_PARTIALS) {
            char* partials = (char*)p.partial + (i64)blockIdx.z * p.rows * index.slots * ROW_BYTES;
            const u32 target_low = targets[stage][row], target_high = targets[stage][row + 8];
            rows.partial_low = fragment_rows(partials, target_low, target_low != NO_ENTRY);
            rows.partial_high = fragment_rows(partials, target_high, target_high != NO_ENTRY);
        } else {
            // A row that does not exist has probability zero and adds zeros to some row, another one for every unit (the same row for
            // all made the pass 1.6x slower): cheaper than a branch around every addition.
            rows.row_bytes = SCALED_SUMS ? (u32)p.query_row_bytes : QUERY_SUM_BYTES;
            rows.sums = work.sums + (SCALED_SUMS && PIECE_GROUPS == 1 ? lane & 3 : lane & 7) * 16;
            if (SCALED_SUMS) rows.scale = scales[row % TILE_HEADS];
            rows.targets = &targets[stage][row & ~1];
            if constexpr (TILE_HEADS > 1) {
                rows.head_bytes = (u32)p.query_head_bytes;
                rows.sums += (u64)((row & ~1) % TILE_HEADS) * rows.head_bytes;
            }
        }
        auto last = [&]() {
            if constexpr (OVERLAP) {
                wgmma_fence();
                add_grad_key();
                wgmma_commit();
            }
        };
        if (GROUPS == 1 || group == 0) query_gradients<0, GROUP_PIECES>(ds_tiles, key_tile, rows, last);
        else if constexpr (GROUP_PIECES < PIECES) query_gradients<GROUP_PIECES, PIECES>(ds_tiles, key_tile, rows, last);
        else last();
        wgmma_wait<0>();
        wgmma_pin(grad_key);
        wgmma_pin(grad_value);
        if (ends) break;
        ++tile;
        stage ^= 1;
    }

    const int thread = thread_number(), first_key = thread / 32 * 16, my_key = first_key + (thread & 31) / 4, row = work.kv_row, all_keys = work.keys;
    const int launch_kv_head = sums_head(p), sums_kv_head = p.first_head / p.group_size + launch_kv_head;
    const i64 sums_row = launch_kv_head * p.sum_rows + work.sums_row;
    if (p.finish_sums && work.alone) {
        const bool has_low = my_key < all_keys, has_high = my_key + 8 < all_keys;
        if (!p.first_sums) {
            add_sums(grad_key, p.grad_key + (sums_row + my_key) * HEAD_DIM, has_low, has_high);
            add_sums(grad_value, p.grad_value + (sums_row + my_key) * HEAD_DIM, has_low, has_high);
        }
        auto finish = [&](const Tensor& target, const Sums& acc, f32 scale) {
            char* first = (char*)tensor_row(target, row + my_key, sums_kv_head);
            finish_row<false>(first, acc, scale, p.accumulate_keys, has_low);
            finish_row<true>(first + 8 * target.row_stride * ELEMENT_BYTES, acc, scale, p.accumulate_keys, has_high);
        };
        finish(p.grad_key_out, grad_key, p.scale);
        finish(p.grad_value_out, grad_value, 1.0f);
        return;
    }
    // All products are done once every warp is here: the sums leave through the tiles, 16 keys a warp.
    __syncthreads();
    const int warp_keys = min_i(16, all_keys - first_key);
    const i64 offset = (sums_row + first_key) * HEAD_DIM;
    // Additions to memory outside L2 run at a third of the rate of stores.
    const bool is_first = p.first_sums && work.alone;
    const u32 sums = SUMS_OFFSET + key_tile + first_key * SUM_BYTES;
    stage_sums(sums, grad_key);
    stage_sums(sums + CTA_KEYS * SUM_BYTES, grad_value);
    fence_async_proxy();
    __syncwarp();
    if ((thread & 31) == 0 && warp_keys > 0) {
        const int bytes = warp_keys * SUM_BYTES;
        if (is_first) {
            bulk_store(p.grad_key + offset, sums, bytes);
            bulk_store(p.grad_value + offset, sums + CTA_KEYS * SUM_BYTES, bytes);
        } else {
            bulk_add(p.grad_key + offset, sums, bytes);
            bulk_add(p.grad_value + offset, sums + CTA_KEYS * SUM_BYTES, bytes);
        }
    }
    bulk_commit();
    bulk_wait_read();
}
#endif
