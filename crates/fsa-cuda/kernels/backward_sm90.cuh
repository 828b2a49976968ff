// WHAT   Selected attention backward, KV-major, five products in one pass: scores and probabilities are computed again, keys as
//        rows, so that P^T and dS^T stay in registers as A operands of grad_value += P^T dO and grad_key += dS^T Q;
//        only dS goes through shared memory, for grad_query = dS K, which is added to f32 rows in L2.
// GRID   (units of the chunk, parts of a block of 128 keys, query heads). As many heads per launch as keep their f32 grad_query in L2.
// ROLES  One warpgroup per 64 keys; all share the gathered query and grad_out tiles; each computes its share of the
//        columns of grad_query over all keys of the cta.
// SMEM   key and value tiles, two stages of query and grad_out tiles with row statistics, one dS tile per warpgroup.
// SYNC   cp.async group per row tile. Two barriers per tile: tile arrived (and previous stage free), dS written. In the tensor cores' queue
//        dV stands behind dP and runs under the arithmetic of dS, dK behind dQ and runs while dQ leaves.
#include "block/backward_rows.cuh"
#include "block/score_gradients.cuh"
#include "ptx/bulk.cuh"
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
// grad_query of a (row, block) pair: 0 adds it to f32 rows in L2 (unordered), 1 stores it as a 16-bit partial in the row's slot,
// summed in slot order by backward_merge.
#ifndef FSA_QUERY_PARTIALS
#define FSA_QUERY_PARTIALS 0
#endif
constexpr bool QUERY_PARTIALS = FSA_QUERY_PARTIALS != 0;
static_assert(!QUERY_PARTIALS || BLOCK_SIZE <= 128, "the two parts of a block of 256 would share a slot");
constexpr int BACKWARD_CTAS = GROUPS == 1 ? 2 : 1;
// dV while dS is computed, dK while dQ leaves: needs the fragments of P beside dP. Wider rows have no registers left for that.
constexpr bool OVERLAP = HEAD_DIM <= 128;

// Puts the thread's two rows of grad_key or grad_value into the warp's 16 rows in shared memory, f32 in fragment order.
constexpr int SUM_BYTES = HEAD_DIM * 4;
constexpr int SUMS_OFFSET = GROUPS == 1 ? 2 * KeyTile::BYTES : 0;       // the row tiles, or all tiles
static_assert(2 * CTA_KEYS * SUM_BYTES <= (GROUPS == 1 ? 0 : 2 * KeyTile::BYTES) + 2 * STAGE_BYTES, "both sums fit where the tiles were");
FSA_DEVICE void stage_sums(u32 rows, const Piece (&acc)[PIECES]) {
    const u32 row = rows + (threadIdx.x & 31) / 4 * SUM_BYTES + (threadIdx.x & 3) * 16;
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
        FSA_UNROLL for (int pair = 0; pair < PIECE_COLUMNS / 16; ++pair) {
            const f32* sums = &acc[piece][pair * 8];
            const u32 at = row + (piece * PIECE_COLUMNS + pair * 16) * 4;
            store_shared(at, as_words(sums[0], sums[1], sums[4], sums[5]));
            store_shared(at + 8 * SUM_BYTES, as_words(sums[2], sums[3], sums[6], sums[7]));
        }
}

// Where the thread adds or stores its rows of grad_query. Two quads write one 128-byte line of one row, then of the other
// (block/rows.cuh): that is 3 % of the pass with additions, too.
struct QueryRows {
    f32* sums;                                      // with this lane's offset
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
        auto sums = [&](int row) { return rows.sums + (u64)rows.targets[row] * HEAD_DIM; };
        add_piece<PIECE * PIECE_COLUMNS, false>(sums(0), sums(1), acc);
        add_piece<PIECE * PIECE_COLUMNS, true>(sums(8), sums(9), acc);
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

// A quad per 16 columns of a row, a lane per 16 bytes of the source.
extern "C" __global__ void __launch_bounds__(256) backward_convert(const __grid_constant__ ConvertParams p) {
    const int first = convert_first(p);
    const i64 n = (i64)blockIdx.x * 256 + threadIdx.x;
    const i64 row = n / (HEAD_DIM / 4);
    const int column = (int)(n % (HEAD_DIM / 4)) * 4, t = threadIdx.x & 3;
    const bool present = is_converted(p, first + row);
    Vec4 v = {0, 0, 0, 0};
    if (present) v = load_global_once(p.source + (i64)blockIdx.y * p.source_stride + row * HEAD_DIM + column);
    // Columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of the sixteen; an even lane takes the first pair of its neighbour, an odd one
    // the second, so that each stores 8 bytes.
    const u32 lower = pack2(__uint_as_float(v.x) * p.scale, __uint_as_float(v.y) * p.scale);
    const u32 upper = pack2(__uint_as_float(v.z) * p.scale, __uint_as_float(v.w) * p.scale);
    const u32 received = __shfl_xor_sync(0xffffffffu, t & 1 ? lower : upper, 1);
    if (!present) return;
    char* target = (char*)tensor_row(p.target, first + row, p.first_head + blockIdx.y) + (column & ~15) * ELEMENT_BYTES;
    if (t & 1) store_converted(p, target + 16 + (t & 2) * 4, received, upper);
    else store_converted(p, target + (t & 2) * 4, lower, received);
}

// Which main kernel: the host knows the same rule.
#define FSA_BACKWARD_NARROW (FSA_HEAD_DIM == 256 && !FSA_QUERY_PARTIALS)
#if FSA_BACKWARD_NARROW
#include "backward_narrow_sm90.cuh"
#else

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_CTAS) backward(const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) RowStats stats[2][TILE_ROWS];
    __shared__ i32 limits[2][TILE_ROWS];
    __shared__ u32 targets[2][TILE_ROWS];     // row of grad_query, or slot of the partial
    const Index& index = p.index;
    const int head = p.first_head + blockIdx.z, kv_head = head / p.group_size;
    const i64 list = (i64)kv_head * p.layout.num_chunks + p.chunk;
    const int unit_number = blockIdx.x;
    if (!unit_exists(index, list, unit_number)) return;
    const Unit* record = &index.units[list * (index.full_units + index.max_blocks) + unit_number];
    if (!in_range(p, record->kv_row)) return;
    const Unit unit = *record;
    const int chunk_token = p.layout.chunk_token[p.chunk], chunk_rows = p.layout.chunk_token[p.chunk + 1] - chunk_token;
    const int part = blockIdx.y * KEYS_PER_PART, keys = min_i(KEYS_PER_PART, unit.valid_keys - part);
    if (keys <= 0) return;
    const u32* entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots + unit.entry_begin;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = GROUPS == 1 ? 0 : __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    const char *queries = tensor_row(p.query, chunk_token, head), *grads = tensor_row(p.grad_out, chunk_token, head);
    const u32 query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES, grad_row_bytes = (u32)p.grad_out.row_stride * ELEMENT_BYTES;
    const u32 key_tile = shared_address(shared), value_tile = key_tile + KeyTile::BYTES, stages = value_tile + KeyTile::BYTES;
    const u32 ds_tiles = stages + 2 * STAGE_BYTES;

    const i64 head_row = (i64)blockIdx.z * p.rows;
    const f32* row_stats = p.row_stats + 2 * head_row;
    auto tile_entry = [&](int first) {  // of row lane % WARP_ROWS of this warp's rows; unpacked when used, so that nothing waits here
        const int row = first + warp * WARP_ROWS + lane % WARP_ROWS;
        return row < unit.entry_count ? __ldg(entries + row) : NO_ENTRY;
    };
    // Starts the copies of a tile; the return value says that some row of this warp needs a mask.
    auto start_tile = [&](int stage, u32 entry) {
        const int token = entry == NO_ENTRY ? -1 : (int)(entry & 0xffffffu);    // relative to the chunk
        gather_rows<WARP_ROWS, true>(stages + stage * STAGE_BYTES, queries, query_row_bytes, grads, grad_row_bytes, token, warp * WARP_ROWS);
        const int row = warp * WARP_ROWS + lane;
        bool partly = false;
        if (lane < WARP_ROWS) {
            if (token >= 0) copy_async8(shared_address(&stats[stage][row]), row_stats + 2 * token);
            else stats[stage][row] = {__int_as_float(0x7f800000), 0.0f};   // probability 2^-inf
            // A row that does not exist sees nothing: its zeros times a key or value that is not finite would be NaN.
            const int limit = token < 0 ? -1 : min_i(token + chunk_token - unit.first_token - part, keys - 1);
            limits[stage][row] = limit;
            partly = limit < CTA_KEYS - 1;
            if (QUERY_PARTIALS) targets[stage][row] = token >= 0 ? (u32)token * index.slots + (entry >> 24) : NO_ENTRY;
            else targets[stage][row] = token >= 0 ? (u32)token : (u32)(unit.entry_begin + row) % (u32)chunk_rows;
        }
        copy_commit();
        return partly;
    };

    const u32 first_entry = tile_entry(0);
    u32 next_entry = tile_entry(TILE_ROWS);
    copy_rows<CTA_KEYS, THREADS>(key_tile, p.key, kv_head, unit.kv_row + part, keys);
    copy_rows<CTA_KEYS, THREADS>(value_tile, p.value, kv_head, unit.kv_row + part, keys);
    bool masked = start_tile(0, first_entry), keys_clean = false;
    Piece grad_key[PIECES], grad_value[PIECES];
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
        FSA_UNROLL for (int i = 0; i < PIECE_COLUMNS / 2; ++i) grad_key[piece][i] = grad_value[piece][i] = 0.0f;
    const int key_low = group * 64 + (warp & 3) * 16 + lane / 4;
    const u32 ds_tile = ds_tiles + group * DS_BYTES, my_keys = key_tile + group * 64 * 128, my_values = value_tile + group * 64 * 128;
    f32* grad_query = p.grad_query + head_row * HEAD_DIM;
    char* partials = (char*)p.partial + head_row * index.slots * ROW_BYTES;
    const int tiles = ceil_div(unit.entry_count, TILE_ROWS);

    FSA_NO_UNROLL for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile & 1;
        const u32 query_tile = stages + stage * STAGE_BYTES, grad_tile = query_tile + RowTile::BYTES;
        copy_wait<0>();
        fence_async_proxy();
        const bool any_masked = __syncthreads_or(masked);
        if (any_masked && !keys_clean) {
            // A key that is not finite makes log2-sum-exp, and so everything, NaN for the rows that see it; the others must
            // not meet it in dS K, where their dS is zero.
            clean_rows<CTA_KEYS, THREADS>(key_tile);
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
        if (tile + 1 < tiles) {
            masked = start_tile(stage ^ 1, next_entry);
            next_entry = tile_entry((tile + 2) * TILE_ROWS);
        }
        wgmma_wait<1>();
        wgmma_pin(s);
        if (any_masked) probabilities<64, true>(s, stats[stage], limits[stage], key_low, p.scale_log2);
        else probabilities<64, false>(s, stats[stage], limits[stage], key_low, p.scale_log2);
        u32 a[4][4], b[4][4];
        FSA_UNROLL for (int k = 0; k < 4; ++k) to_fragment<64>(a[k], s, k);
        auto add_grad_value = [&]() {
            FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
                FSA_UNROLL for (int k = 0; k < 4; ++k)
                    Wgmma<PIECE_COLUMNS>::registers_shared<1>(grad_value[piece], a[k], over_rows<TILE_ROWS>(grad_tile, k, piece * PIECE_COLUMNS), 1);
        };
        auto add_grad_key = [&]() {
            FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
                FSA_UNROLL for (int k = 0; k < 4; ++k)
                    Wgmma<PIECE_COLUMNS>::registers_shared<1>(grad_key[piece], b[k], over_rows<TILE_ROWS>(query_tile, k, piece * PIECE_COLUMNS), 1);
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
        FSA_UNROLL for (int i = 0; i < 8; ++i) {    // fragment b[i / 2] holds {low, high} x pair i
            const int row = key_low & 63;
            const u32 at = ds_tile + row * 128 + ((i ^ (row & 7)) << 4) + (lane & 3) * 4;
            store_shared(at, b[i / 2][i % 2 * 2]);
            store_shared(at + 8 * 128, b[i / 2][i % 2 * 2 + 1]);
        }
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
            const u32 target_low = targets[stage][row], target_high = targets[stage][row + 8];
            rows.partial_low = fragment_rows(partials, target_low, target_low != NO_ENTRY);
            rows.partial_high = fragment_rows(partials, target_high, target_high != NO_ENTRY);
        } else {
            // A row that does not exist has probability zero and adds zeros to some row, another one for every unit (the same row for
            // all made the pass 1.6x slower): cheaper than a branch around every addition.
            rows.sums = grad_query + (lane & 7) * 4;
            rows.targets = &targets[stage][row & ~1];
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
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) { wgmma_pin(grad_key[piece]); wgmma_pin(grad_value[piece]); }
    }

    // All products are done once every warp is here: the sums leave through the tiles, 16 keys a warp.
    bulk_wait_read();
    __syncthreads();
    const int first_key = group * 64 + (warp & 3) * 16, warp_keys = min_i(16, keys - first_key);
    const i64 launch_kv_head = kv_head - p.first_head / p.group_size;
    const i64 offset = (launch_kv_head * p.sum_rows + record->kv_row + part + first_key) * HEAD_DIM;     // read again: no register held it
    // Additions to memory outside L2 run at a third of the rate of stores.
    const bool alone = p.first_sums && !record->split;
    const u32 sums = SUMS_OFFSET + key_tile + first_key * SUM_BYTES;
    stage_sums(sums, grad_key);
    stage_sums(sums + CTA_KEYS * SUM_BYTES, grad_value);
    fence_async_proxy();
    __syncwarp();
    if (lane == 0 && warp_keys > 0) {
        const int bytes = warp_keys * SUM_BYTES;
        if (alone) {
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
