// WHAT   Selected attention backward, KV-major, for every device from sm_80 on: five products in one pass. Scores and probabilities are
//        computed again with keys as rows; P^T and dS^T pass through shared memory, as A operands of grad_value += P^T dO and
//        grad_key += dS^T Q and, transposed, of grad_query = dS K, which is added to f32 rows in L2 or stored as partials.
// GRID   (ctas, parts of a block of CTA_KEYS keys, query heads). A cta takes every gridDim.x-th unit of the chunk and every gridDim.y-th
//        part. With partials that has to be all parts, because a row has one slot per block: what the first part stored, the next
//        adds to, in the same threads.
// ROLES  Four warps. Scores: 16 keys each, and the sums of these keys. Where 64 keys with their sums do not fit (head_dim 192, 256),
//        a cta has 32 keys, and two warps share 16 of them: half of the rows for scores, half of the columns for sums. grad_query: 16
//        rows each, of half of the columns where a tile has 32 rows.
// SMEM   key and value tile, one query and one grad_out tile, P^T, dS^T: at most 80 KB, for devices of 100 KB and two ctas on those of 164.
// SYNC   cp.async groups alternate queries, grad_out. Barriers: queries there; grad_out there; past the queries, dS written (next queries
//        start, to load under two products); past grad_out (next grad_out starts, to load under two products).
#include "block/backward_rows.cuh"
#include "block/piece_products.cuh"
#include "block/quad_sums.cuh"
#include "block/score_gradients.cuh"
#include "block/unit_list.cuh"
#include "tile/warp_rows.cuh"

constexpr int CTA_KEYS = HEAD_DIM <= 128 ? 64 : 32;         // smaller blocks are padded with masked keys
constexpr int SPLIT = 64 / CTA_KEYS;                        // warps that share 16 keys
constexpr int TILE_QUERIES = HEAD_DIM <= 192 ? 64 : 32;     // gathered rows of a step
constexpr int QUERY_SPLIT = 64 / TILE_QUERIES;              // warps that share 16 rows of grad_query
constexpr int SCORE_ROWS = TILE_QUERIES / SPLIT;            // rows of which a warp computes scores
constexpr int SUM_COLUMNS = HEAD_DIM / SPLIT;               // columns of which it holds the sums of its keys
constexpr int WARP_ROWS = TILE_QUERIES / 4;                 // rows that it gathers
constexpr int KEYS_PER_PART = BLOCK_SIZE < CTA_KEYS ? BLOCK_SIZE : CTA_KEYS;
typedef SwizzledTile<CTA_KEYS> KeyTile;
typedef SwizzledTile<TILE_ROWS> RowTile;
// A tile of 32 rows takes half of the rows of a row tile, and grad_out the other half.
constexpr int GRAD_OFFSET = TILE_QUERIES == TILE_ROWS ? RowTile::BYTES : TILE_QUERIES * 128;
constexpr int ROW_BYTES_BOTH = 2 / QUERY_SPLIT * RowTile::BYTES;
constexpr int SCORE_BYTES = CTA_KEYS * 128;
constexpr int SMEM_BYTES = 2 * KeyTile::BYTES + ROW_BYTES_BOTH + 2 * SCORE_BYTES;
static_assert(SMEM_BYTES <= 80 * 1024, "two ctas fit in the 164 KB of sm_80");
static_assert(SPLIT == 1 || HEAD_DIM % 64 == 0, "the halves of the columns are halves of every 64");
constexpr u32 NO_ENTRY = 0xffffffffu;
typedef signed char i8;
typedef f32 ScoreTile[SCORE_ROWS / 2];
typedef f32 KeySums[SUM_COLUMNS / 2];

// What the cta knows of the gathered rows of the current tile.
struct RowRecords {
    __align__(16) RowStats stats[TILE_QUERIES];
    i8 limits[TILE_QUERIES];        // last key of the part that the row sees, or -1
    u32 targets[TILE_QUERIES];      // row of grad_query, or slot of the partial
};

// Addresses in shared memory.
struct Tiles {
    u32 key, value, query, grad, probability, gradient;
};
FSA_DEVICE Tiles tiles_at(u32 shared) {
    const u32 query = shared + 2 * KeyTile::BYTES, probability = query + ROW_BYTES_BOTH;
    return {shared, shared + KeyTile::BYTES, query, query + GRAD_OFFSET, probability, probability + SCORE_BYTES};
}

// What a cta works on: a unit and a part of its block. In shared memory, because the sums of the keys leave no registers for what is used
// once per tile. With RowRecords at most 1 KB, so that two ctas with 80 KB of tiles, and the system's kilobyte for each, fit in the 164 KB
// of sm_80.
struct BackwardUnit : CtaUnits {
    int part;                       // of the unit's block
    int tiles;
    int first_key, keys;            // of the part
    int first_token;                // whose position is the part's first key, relative to the chunk
    int launch_kv_head;             // counted from the launch's first
    const char *queries, *grads;    // of the chunk's first row
    u32 query_row_bytes, grad_row_bytes;

    // One thread: before the first unit.
    FSA_DEVICE void open(const BackwardParams& p) {
        const int head = p.first_head + blockIdx.z;
        CtaUnits::open(p.layout, p.index, head, p.group_size, p.chunk);
        launch_kv_head = kv_head - p.first_head / p.group_size;
        part = blockIdx.y;
        unit.valid_keys = 0;
        queries = tensor_row(p.query, chunk_token, head);
        grads = tensor_row(p.grad_out, chunk_token, head);
        query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES;
        grad_row_bytes = (u32)p.grad_out.row_stride * ELEMENT_BYTES;
    }
    // One thread: goes to the next part that the cta takes, of the same unit or of its next one.
    FSA_DEVICE void advance(const BackwardParams& p) {
        part += gridDim.y;
        while (part * KEYS_PER_PART >= unit.valid_keys || !in_range(p, unit.kv_row)) {
            if (!CtaUnits::advance(p.layout, p.index)) return;
            part = blockIdx.y;
        }
        tiles = ceil_div(unit.entry_count, TILE_QUERIES);
        first_key = part * KEYS_PER_PART;
        keys = min_i(KEYS_PER_PART, unit.valid_keys - first_key);
        first_token = unit.first_token + first_key - chunk_token;
    }
    // Entry of row lane % WARP_ROWS of the rows that the warp gathers.
    FSA_DEVICE u32 entry(int tile) const {
        const int thread = thread_number(), row = tile * TILE_QUERIES + thread / 32 * WARP_ROWS + thread % WARP_ROWS;
        return row < unit.entry_count ? __ldg(entries + row) : NO_ENTRY;
    }
    static FSA_DEVICE int token(u32 entry) { return entry == NO_ENTRY ? -1 : (int)(entry & 0xffffffu); }     // relative to the chunk

    // Starts the copies of the part's keys and values.
    FSA_DEVICE void start_keys(const BackwardParams& p, const Tiles& tiles) const {
        copy_tile<CTA_KEYS>(tiles.key, p.key, kv_head, unit.kv_row + first_key, keys);
        copy_tile<CTA_KEYS>(tiles.value, p.value, kv_head, unit.kv_row + first_key, keys);
    }
    // Starts the copies of a tile's queries and statistics; true if some row of this warp needs a mask.
    FSA_DEVICE bool start_queries(const BackwardParams& p, const Tiles& tiles, RowRecords& records, u32 entry, int slots) const {
        const int token = BackwardUnit::token(entry), lane = threadIdx.x & 31, first_row = threadIdx.x / 32 * WARP_ROWS;
        gather_warp_rows<WARP_ROWS>(tiles.query, queries, query_row_bytes, token, first_row);
        int limit = CTA_KEYS;
        if (lane < WARP_ROWS) {
            const int row = first_row + lane;
            if (token >= 0) {
                copy_async8(shared_address(&records.stats[row]), row_stats_at(p, blockIdx.z, token));
                limit = max_i(min_i(token - first_token, keys - 1), -1);
            } else {
                records.stats[row] = no_row_stats();
                limit = -1;     // its zeros times a key or value that is not finite would be NaN
            }
            records.limits[row] = (i8)limit;
            records.targets[row] = token < 0 ? NO_ROW : QUERY_PARTIALS ? (u32)token * slots + (entry >> 24) : (u32)token;
        }
        copy_commit();
        return limit < CTA_KEYS - 1;
    }
    FSA_DEVICE void start_grads(const Tiles& tiles, u32 entry) const {
        gather_warp_rows<WARP_ROWS>(tiles.grad, grads, grad_row_bytes, token(entry), threadIdx.x / 32 * WARP_ROWS);
        copy_commit();
    }
};

static_assert(sizeof(RowRecords) + sizeof(BackwardUnit) <= 1024, "static shared memory");

// Which keys, rows and columns the warp has.
struct WarpPlace {
    int key;            // first of its 16 keys
    int half;           // which half of rows of scores and columns of sums, where two warps share keys
    int row, piece;     // first of its 16 rows of grad_query, and first piece of columns
};
FSA_DEVICE WarpPlace warp_place() {
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    return {warp % (CTA_KEYS / 16) * 16, SPLIT == 1 ? 0 : warp / (CTA_KEYS / 16), warp % (TILE_QUERIES / 16) * 16,
            QUERY_SPLIT == 1 ? 0 : warp / (TILE_QUERIES / 16) * (PIECES / QUERY_SPLIT)};
}

// Scores, keys as rows, to the storage type in shared memory: key i is row i of a tile with 128-byte swizzle.
FSA_DEVICE void store_scores(u32 tile, const ScoreTile& s, const WarpPlace& w) {
    const int key = w.key + (threadIdx.x & 31) / 4;
    FSA_UNROLL for (int i = 0; i < SCORE_ROWS / 8; ++i) {
        const u32 at = tile + key * 128 + (((w.half * (SCORE_ROWS / 8) + i) ^ (key & 7)) << 4) + (threadIdx.x & 3) * 4;
        store_shared(at, pack2(s[4 * i], s[4 * i + 1]));
        store_shared(at + 8 * 128, pack2(s[4 * i + 2], s[4 * i + 3]));
    }
}

// 16 columns of the warp's part of a row: with two warps per row, each has 32 of every 64.
FSA_DEVICE constexpr int sum_unit(int unit) { return SPLIT == 1 ? unit : unit / 2 * 4 + unit % 2; }
constexpr int HALF_UNITS = 2;

// sums += scores [keys, rows] x rows of a tile.
FSA_DEVICE void add_rows(KeySums& sums, u32 scores, u32 tile, const WarpPlace& w) {
    const u32 a = tall_address(scores, w.key), b = tall_address(tile, 0) ^ (w.half * HALF_UNITS << 5);
    FSA_UNROLL for (int k = 0; k < TILE_QUERIES / 16; ++k) {
        u32 m[4];
        load_matrices(m, unit_address<CTA_KEYS>(a, k));
        FSA_UNROLL for (int unit = 0; unit < SUM_COLUMNS / 16; ++unit)
            multiply_unit(sums, 8 * unit, m, unit_address<TILE_ROWS>(b, sum_unit(unit)) + k * 16 * 128);
    }
}
// Adds the sums of the warp's keys to those of all units.
FSA_DEVICE void flush_sums(f32* base, const KeySums& sums, const WarpPlace& w, int keys) {
    const int key = w.key + (threadIdx.x & 31) / 4;
    const SumRows low = sum_rows(base, key < keys ? key : NO_ROW), high = sum_rows(base, key + 8 < keys ? key + 8 : NO_ROW);
    FSA_UNROLL for (int unit = 0; unit < SUM_COLUMNS / 16; ++unit) add_unit(low, high, (w.half * HALF_UNITS + sum_unit(unit)) * 16, sums, 8 * unit);
}

// Adds to a piece what store_fragment stored at the same place, in the same threads.
template <bool HIGH>
FSA_DEVICE void add_fragment(Piece& acc, const FragmentRows& rows, int piece) {
    const bool odd = threadIdx.x & 4;
    auto load = [](const char* at, bool keep) { return keep ? load_global_once(at) : Vec4{0, 0, 0, 0}; };
    auto add = [&](int group, Vec4 v) {
        const u32 word[4] = {v.x, v.y, v.z, v.w};
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
            acc[e] += unpack_lo(word[j]);
            acc[e + 1] += unpack_hi(word[j]);
        }
    };
    if constexpr (PIECE_GROUPS == 2) {
        const Vec4 even = load(rows.even + piece * 128, rows.keep_even), other = load(rows.odd + piece * 128, rows.keep_odd);
        const Vec4 received = swap_with_neighbour(odd ? even : other);
        add(0, odd ? received : even);
        add(1, odd ? other : received);
    } else {
        add(0, load((odd ? rows.odd : rows.even) + piece * 64, odd ? rows.keep_odd : rows.keep_even));
    }
}

// grad_query of the warp's rows: dS K over the keys of the part. `target_low` and `target_high` name the thread's two rows.
FSA_DEVICE void query_gradients(const BackwardParams& p, const Tiles& tiles, int first_key, const WarpPlace& w, u32 target_low, u32 target_high) {
    u32 a[CTA_KEYS / 16][4];
    const u32 scores = wide_address(tiles.gradient, 0) ^ (w.row / 16 << 5);
    FSA_UNROLL for (int k = 0; k < CTA_KEYS / 16; ++k) load_transposed(a[k], scores + k * 16 * 128);
    const u32 keys = tall_address(tiles.key, 0) + w.piece * KeyTile::HALF_BYTES;  // a first piece other than 0 has whole halves before it
    const i64 head_row = (i64)blockIdx.z * p.rows;
    FragmentRows partial_low, partial_high;
    SumRows sums_low, sums_high;
    if constexpr (QUERY_PARTIALS) {
        char* partials = (char*)p.partial + head_row * p.index.slots * ROW_BYTES;
        partial_low = fragment_rows(partials, target_low, target_low != NO_ROW);
        partial_high = fragment_rows(partials, target_high, target_high != NO_ROW);
    } else {
        sums_low = sum_rows((f32*)p.grad_query + head_row * HEAD_DIM, target_low);
        sums_high = sum_rows((f32*)p.grad_query + head_row * HEAD_DIM, target_high);
    }
    FSA_UNROLL for (int i = 0; i < PIECES / QUERY_SPLIT; ++i) {
        const int piece = w.piece + i;
        Piece acc;
        clear(acc);
        FSA_UNROLL for (int k = 0; k < CTA_KEYS / 16; ++k) multiply_piece<CTA_KEYS>(acc, a[k], keys + k * 16 * 128, i);
        if constexpr (QUERY_PARTIALS) {
            if (first_key > 0) {
                add_fragment<false>(acc, partial_low, piece);
                add_fragment<true>(acc, partial_high, piece);
            }
            store_fragment<false>(partial_low, piece, acc, 1.0f);
            store_fragment<true>(partial_high, piece, acc, 1.0f);
        } else {
            FSA_UNROLL for (int unit = 0; unit < PIECE_COLUMNS / 16; ++unit) add_unit(sums_low, sums_high, piece * PIECE_COLUMNS + unit * 16, acc, 8 * unit);
        }
    }
}

FSA_DEVICE NaturalColumns natural_columns(Vec4 v) {
    const int q = threadIdx.x & 3;
    return {natural_pairs(v), (q & 1) * 8 + (q >> 1) * 4};
}

// P^T of the warp's keys and rows, to shared memory and in `s`.
FSA_DEVICE void compute_probabilities(ScoreTile& s, const Tiles& tiles, const RowRecords& records, const WarpPlace& w, bool masked, f32 scale_log2) {
    const int row = w.half * SCORE_ROWS, key = w.key + (threadIdx.x & 31) / 4;
    multiply_tiles<SCORE_ROWS, CTA_KEYS, TILE_ROWS>(s, tall_address(tiles.key, w.key), wide_address(tiles.query, row));
    if (masked) probabilities<SCORE_ROWS, true>(s, records.stats + row, records.limits + row, key, scale_log2);
    else probabilities<SCORE_ROWS, false>(s, records.stats + row, records.limits + row, key, scale_log2);
    store_scores(tiles.probability, s, w);
}
// dS^T likewise, from P^T in `s`.
FSA_DEVICE void compute_score_gradients(const ScoreTile& s, const Tiles& tiles, const RowRecords& records, const WarpPlace& w, bool masked) {
    const int row = w.half * SCORE_ROWS, key = w.key + (threadIdx.x & 31) / 4;
    ScoreTile dp;
    multiply_tiles<SCORE_ROWS, CTA_KEYS, TILE_ROWS>(dp, tall_address(tiles.value, w.key), wide_address(tiles.grad, row));
    if (masked) score_gradients<SCORE_ROWS, true>(dp, s, records.stats + row, records.limits + row, key);
    else score_gradients<SCORE_ROWS, false>(dp, s, records.stats + row, records.limits + row, key);
    store_scores(tiles.gradient, dp, w);
}

// All tiles of a unit against one part of its block.
FSA_DEVICE void backward_part(const BackwardParams& p, const BackwardUnit& u, RowRecords& records, const Tiles& tiles) {
    const WarpPlace w = warp_place();
    const int row_low = w.row + (threadIdx.x & 31) / 4;
    u32 entry = u.entry(0);
    u.start_keys(p, tiles);
    bool masked = u.start_queries(p, tiles, records, entry, p.index.slots), keys_clean = false;
    u.start_grads(tiles, entry);
    entry = u.entry(1);
    KeySums grad_key, grad_value;
    clear(grad_key);
    clear(grad_value);
    FSA_NO_UNROLL for (int tile = 0; tile < u.tiles; ++tile) {
        copy_wait<1>();
        const int lane = threadIdx.x & 31;
        masked |= p.given_stats && lane < WARP_ROWS && is_negative(records.stats[threadIdx.x / 32 * WARP_ROWS + lane]);
        const bool any_masked = __syncthreads_or(masked);       // queries of all warps are there
        if (any_masked && !keys_clean) {
            // A key that is not finite makes log2-sum-exp, and so everything, NaN for the rows that see it; the others must
            // not meet it in dS K, where their dS is zero.
            clean_tile<CTA_KEYS>(tiles.key);
            keys_clean = true;
            __syncthreads();
        }
        ScoreTile s;
        compute_probabilities(s, tiles, records, w, any_masked, p.scale_log2);
        copy_wait<0>();
        __syncthreads();                                        // grad_out is there
        compute_score_gradients(s, tiles, records, w, any_masked);
        if (SPLIT == 1) __syncwarp(); else __syncthreads();     // scores of the warp's keys
        add_rows(grad_key, tiles.gradient, tiles.query, w);
        const u32 target_low = records.targets[row_low], target_high = records.targets[row_low + 8];
        __syncthreads();                                        // all are past the queries and their records; all of dS is written
        if (tile + 1 < u.tiles) masked = u.start_queries(p, tiles, records, entry, p.index.slots);
        else copy_commit();
        add_rows(grad_value, tiles.probability, tiles.grad, w);
        __syncthreads();                                        // all are past grad_out
        if (tile + 1 < u.tiles) {
            u.start_grads(tiles, entry);
            entry = u.entry(tile + 2);
        }
        query_gradients(p, tiles, u.first_key, w, target_low, target_high);
    }
    const i64 first = u.launch_kv_head * p.sum_rows + u.unit.kv_row + u.first_key;
    flush_sums(p.grad_key + first * HEAD_DIM, grad_key, w, u.keys);
    flush_sums(p.grad_value + first * HEAD_DIM, grad_value, w, u.keys);
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, 2) backward(const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ RowRecords records;
    __shared__ BackwardUnit u;
    if (threadIdx.x == 0) u.open(p);
    while (true) {
        if (threadIdx.x == 0) u.advance(p);
        __syncthreads();
        if (!u.exists()) return;
        backward_part(p, u, records, tiles_at(shared_address(shared)));
        __syncthreads();            // all are past the part's keys and the record
    }
}
