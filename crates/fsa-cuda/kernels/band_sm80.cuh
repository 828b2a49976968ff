// WHAT   Attention to an interval of keys (window, compressed, dense; struct Band), for every device from sm_80 on: online softmax over steps of
//        keys; writes out and the natural-log lse. A row that sees no key gets 0 and -inf. With FSA_BLOCK_MASK to those keys of blocks that the row
//        lists; steps that no row of a tile lists are left out.
// GRID   (tiles of rows x head tiles, kv heads), tiles with the most keys first (find_band_tile). From shapes; a cta without a tile leaves.
// ROLES  Four warps of 16 of the tile's 64 rows: consecutive tokens times query heads of one kv head, so that rows share their keys at any
//        group size.
// SMEM   query tile, key tile, value tile of STEP_KEYS keys; 48 KB at head_dim 128, so that two ctas fit devices of 100 KB (sm_86, sm_89).
// SYNC   cp.async; two barriers a step. The values of a step load under its first product, the keys of the next under the second.
// Only steps at the ends of the interval are masked. Values that are NaN or infinite cost nothing unless they are there: a cta that
// ends with sums that are not finite starts again, and then takes them out and adds them to the rows that see them.
#include "block/band_rows.cuh"
#include "block/band_softmax.cuh"
#include "block/branch_rows.cuh"
#include "block/listed_blocks.cuh"
#include "block/piece_products.cuh"
#include "tile/warp_rows.cuh"

constexpr int STEP_KEYS = HEAD_DIM <= 128 ? 64 : 32;
typedef SwizzledTile<TILE_ROWS> QueryTile;
typedef SwizzledTile<STEP_KEYS> KeyTile;
static_assert(QueryTile::BYTES + 2 * KeyTile::BYTES <= 95 * 1024, "query, key and value tile fit in shared memory");
// Queries wait in registers where they do not take those of the sums: a fifth less of what the first product reads from shared memory.
constexpr bool QUERIES_IN_REGISTERS = HEAD_DIM <= 96;
constexpr int BAND_CTAS = HEAD_DIM <= 128 ? 3 : 2;
typedef u32 Queries[QUERIES_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];
typedef f32 Scores[STEP_KEYS / 2];

// What is used once per step or less, in shared memory: sums, scores and queries take the registers.
struct BandCta {
    BandTile tile;
    BandInterval interval;
    int kv_head;
    i32 begin[TILE_ROWS], end[TILE_ROWS];       // keys that each row sees
    const i32* listed;                          // with a mask of blocks: the steps, and how many
    i32 steps;

    static FSA_DEVICE int row_low() {
        const int thread = thread_number();
        return thread / 32 * 16 + (thread & 31) / 4;
    }
    FSA_DEVICE void find_keys(const Band& band) {
        if (threadIdx.x < TILE_ROWS) {
            const int position = tile.position_of(threadIdx.x);
            begin[threadIdx.x] = first_key(band, position);
            end[threadIdx.x] = end_key(band, position, tile.keys);
        }
    }
    FSA_DEVICE void find_steps(const Band& band) {
        const i64 list = listed_steps(band, blockIdx.x, kv_head);
        listed = band.mask.steps + list * band.mask.max_steps;
        steps = band.mask.step_counts[list];
    }
    // First key of step n, the step before it starting with `key`; the end of the interval behind the last.
    FSA_DEVICE int step_after(int key, int n) const {
        if constexpr (!BLOCK_MASK) return key + STEP_KEYS;
        return n < steps ? listed[n] & ~1 : interval.end;
    }
    FSA_DEVICE bool has_gaps(int n) const { return BLOCK_MASK && (listed[n] & 1); }
    // Columns of the step that starts with `key`, for a row of the tile.
    FSA_DEVICE SeenColumns seen(int row, int key) const { return {begin[row] - key, end[row] - key}; }
    FSA_DEVICE void copy_step(u32 target, const Tensor& source, int key) const {
        copy_tile<STEP_KEYS>(target, source, kv_head, (i64)tile.key_row + key, interval.end - key);
    }
};

struct BandSums {
    Piece out[PIECES];
    RowState low, high;
};

FSA_DEVICE void load_queries(Queries& queries, u32 query_rows) {
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) load_matrices(queries[QUERIES_IN_REGISTERS ? k : 0], unit_address<TILE_ROWS>(query_rows, k));
}
FSA_DEVICE void compute_scores(Scores& s, Queries& queries, u32 query_rows, u32 keys) {
    clear(s);
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) {
        if (!QUERIES_IN_REGISTERS) load_matrices(queries[0], unit_address<TILE_ROWS>(query_rows, k));
        multiply_rows<STEP_KEYS>(s, queries[QUERIES_IN_REGISTERS ? k : 0], unit_address<STEP_KEYS>(keys, k));
    }
}

// All steps of a tile. With `clean`, values that are not finite reach only the rows that see them.
FSA_DEVICE void attend_interval(BandSums& sums, const BandParams& p, const BandCta& c, u32 shared, bool clean) {
    const u32 query_rows = tall_address(shared, threadIdx.x / 32 * 16), key_tile = shared + QueryTile::BYTES, value_tile = key_tile + KeyTile::BYTES;
    const u32 keys = wide_address(key_tile, 0), values = tall_address(value_tile, 0);
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) clear(sums.out[piece]);
    sums.low = sums.high = {neg_inf(), 0.0f};
    const f32 scale_log2 = fmaxf(p.scale_log2, 1.2e-38f);   // 0 times a masked score would be NaN
    const int end = c.interval.end;
    const RowLists lists = RowLists::of(p.band, c.tile, c.kv_head, c.row_low());
    int key = BLOCK_MASK ? c.step_after(0, 0) : c.interval.first;
    if (key >= end) return;
    c.copy_step(key_tile, p.key, key);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    Queries queries;
    if (QUERIES_IN_REGISTERS) load_queries(queries, query_rows);
    FSA_NO_UNROLL for (int n = 0, next; key < end; key = next, ++n) {   // here the keys are there, and all are past the values
        next = c.step_after(key, n + 1);
        c.copy_step(value_tile, p.value, key);
        copy_commit();
        Scores s;
        compute_scores(s, queries, query_rows, keys);
        if (c.interval.needs_mask(key, STEP_KEYS)) {
            mask_scores<STEP_KEYS, false>(s, c.seen(c.row_low(), key));
            mask_scores<STEP_KEYS, true>(s, c.seen(c.row_low() + 8, key));
        }
        if (c.has_gaps(n)) mask_blocks(s, lists.from(key), neg_inf());
        const f32 carry_low = softmax_step<STEP_KEYS, false, false>(s, sums.low, scale_log2, false, NO_LIMIT);
        const f32 carry_high = softmax_step<STEP_KEYS, true, false>(s, sums.high, scale_log2, false, NO_LIMIT);
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) scale_piece(sums.out[piece], carry_low, carry_high);
        u32 a[STEP_KEYS / 16][4];
        FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
        copy_wait<0>();
        bool dirty = false;
        if (clean) dirty = clean_tile<STEP_KEYS>(value_tile);
        dirty = __syncthreads_or(dirty);
        if (next < end) c.copy_step(key_tile, p.key, next);
        copy_commit();
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) multiply_piece<STEP_KEYS>(sums.out[piece], a[k], values + k * 16 * 128, piece);
        if (dirty) {
            add_seen_nonfinite(sums.out, min_i(STEP_KEYS, end - key), c.seen(c.row_low(), key), c.seen(c.row_low() + 8, key), lists.from(key),
                               [&](int column) { return tensor_row(p.value, (i64)c.tile.key_row + key + column, c.kv_head); });
        }
        copy_wait<0>();
        __syncthreads();
    }
}

// Where one of the thread's rows goes; writes its lse.
FSA_DEVICE BranchRow finish_row(const BandParams& p, const BandTile& tile, int row, const RowState& state) {
    const f32 sum = quad_sum(state.sum);
    if (!tile.exists(row)) return no_row();
    if (p.lse != nullptr && (threadIdx.x & 3) == 0)
        p.lse[tile.plane_index(row, p.band.total_q)] = ((state.max == neg_inf() ? 0.0f : state.max) + log2_fast(sum)) * LN_2;
    return branch_row(p.out, p.branch, tile.token + tile.token_of(row), tile.first_head + tile.head_of(row), sum);
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, BAND_CTAS) band(const __grid_constant__ BandParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ BandCta c;
    const BandTile tile = find_band_tile(p.band, blockIdx.x, blockIdx.y);
    if (tile.tokens == 0) return;
    copy_band_rows<TILE_ROWS>(shared_address(shared), p.query, tile);
    if (threadIdx.x == 0) {
        c.tile = tile;
        c.interval = band_interval(p.band, tile);
        c.kv_head = blockIdx.y;
        if constexpr (BLOCK_MASK) c.find_steps(p.band);
    }
    __syncthreads();
    c.find_keys(p.band);

    BandSums sums;
    FSA_NO_UNROLL for (bool clean = false;; clean = true) {
        attend_interval(sums, p, c, shared_address(shared), clean);
        const int low = c.row_low();
        if (clean || !__syncthreads_or(has_nonfinite_sums(sums.out, c.tile.exists(low), c.tile.exists(low + 8)))) break;
    }
    copy_commit();      // a tile without keys has waited for nothing
    copy_wait<0>();
    const BranchRow low = finish_row(p, c.tile, c.row_low(), sums.low), high = finish_row(p, c.tile, c.row_low() + 8, sums.high);
    store_branch(p.branch, low, high, sums.out);
}
