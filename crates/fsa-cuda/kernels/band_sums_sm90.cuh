// WHAT   Backward of attention of rows to an interval of keys on Hopper in one pass: five products where the two passes of `band_backward` take seven. A tile
//        of keys meets its rows once, for grad_key and grad_value and for its part of grad_query, which is added to the target itself, as f16 in the place of
//        bf16 and scaled so that nothing overflows (block/query_sums.cuh). The order of these additions is that of time.
//        band_sums_open clears the target and takes the bounds of keys, band_delta those of rows where the caller has no statistics; band_sums_finish
//        makes bf16 of f16 in place, band_backward_merge adds up splits.
// GRID   (tiles of 128 keys, kv heads, splits) as the pass of keys: block/key_walk.cuh.
// ROLES  Two warpgroups of 64 keys consume tiles of 64 rows, and multiply half the columns each of dS K. Of a third two warps bring the rows, and a thread
//        each of the other two sends a warpgroup's half of grad_query on its way.
// SMEM   128 keys and values, three stages of 64 rows of query and gradient, two of dS^T, 64 x 64 sums of each warpgroup.
// SYNC   mbarriers: keys loaded, cleaned; rows loaded, checked, free; dS full, free; sums full, free. dS of a tile is multiplied beside the products of the
//        next.
#include "block/key_walk.cuh"
#include "ptx/bulk.cuh"
#include "ptx/thread.cuh"

static_assert(HEAD_DIM == 128 && IS_BF16, "a warpgroup's half of the columns is one box; f16 has no room to spare for sums");
constexpr int SUM_ROWS = 64, ROW_STAGES = 3, DS_STAGES = 2;
// Statistics of the rows of a tile, each number by itself: two neighbouring rows' are 8 bytes, for which there are registers.
struct SplitStats {
    struct __align__(8) Pair { f32 first, second; };
    f32 lse[SUM_ROWS], delta[SUM_ROWS];

    FSA_DEVICE void put(int row, const RowStats& stats) { lse[row] = stats.lse; delta[row] = stats.delta; }
    // x = f(x, number of its row) for 64 keys x 64 rows.
    template <typename F>
    static FSA_DEVICE void apply(PieceScores& s, const f32* numbers, F f) {
        FSA_UNROLL for (int i = 0; i < PIECE_KEYS / 8; ++i) {
            const Pair pair = *(const Pair*)(numbers + 8 * i + 2 * (threadIdx.x & 3));
            FSA_UNROLL for (int e = 0; e < 4; ++e) s[4 * i + e] = f(s[4 * i + e], e & 1 ? pair.second : pair.first, 4 * i + e);
        }
    }
};
typedef RowRecords<SUM_ROWS, SplitStats> SumRecords;
typedef RowRing<SumRecords, ROW_STAGES> SumRowRing;
constexpr int DS_BYTES = CTA_KEYS * 128, SUM_COLUMNS = HEAD_DIM / CONSUMERS, SUM_BYTES = SUM_ROWS * SUM_COLUMNS * 2;
constexpr int SUMS_SMEM_BYTES = 2 * KeyTile::BYTES + SumRowRing::BYTES + DS_STAGES * DS_BYTES + CONSUMERS * SUM_BYTES;
typedef f32 SumColumns[SUM_COLUMNS / 2];

struct SumMemory {
    u32 key, value, ds, sums;
    u32 loaded_keys, clean_keys;        // barriers
    const f32* scale;                   // of the sums
    SumRowRing rows;
    Ring<DS_STAGES> ds_ring;
    Ring<CONSUMERS> sum_rings;          // one place for each warpgroup

    FSA_DEVICE u32 ds_tile(u32 n) const { return ds + Ring<DS_STAGES>::place(n) * DS_BYTES; }
    FSA_DEVICE u32 sum_tile(int group) const { return sums + group * SUM_BYTES; }
};

// The producing warpgroup. An exact zero of dS must not meet NaN or infinity; keys that are not finite have made so the statistics of the rows that see them.
FSA_DEVICE void clean_keys(const SumMemory& m) {
    const int thread = threadIdx.x - CONSUMER_THREADS;
    barrier_wait(m.loaded_keys, 0);
    FSA_NO_UNROLL for (u32 at = m.key + thread * 16; at < m.key + KeyTile::BYTES; at += WARPGROUP * 16) {
        const Vec4 v = load_shared(at);
        store_shared(at, Vec4{finite_or_zero(v.x), finite_or_zero(v.y), finite_or_zero(v.z), finite_or_zero(v.w)});
    }
    fence_async_proxy();
    barrier_arrive(m.clean_keys);
}

// One thread for each consuming warpgroup: adds its sums of every tile to grad_query.
FSA_DEVICE void send_sums(const BandBackwardParams& p, const SumMemory& m, const KeyWork& w, int group) {
    FSA_NO_UNROLL for (int n = 0; n < w.steps; ++n) {
        const RowPlace place = RowPlace::find(p.band, w, n);
        barrier_wait(m.sum_rings.full + 8 * group, n & 1);
        add_box(&p.sums_map, m.sum_tile(group), group * SUM_COLUMNS, w.rows.first_head + place.head, w.tokens.token + place.token);
        bulk_commit();
        bulk_wait_read();
        barrier_arrive(m.sum_rings.empty + 8 * group);
    }
}

// Stores 64 x 64 values as a warpgroup's fragments to rows of 128 bytes.
FSA_DEVICE void store_fragments(u32 tile, const PieceFragments& a) {
    const int lane = lane_number(), row = thread_number() % WARPGROUP / 32 * 16 + (lane & 15);
    FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) store_matrices(tile + SwizzledTile<PIECE_KEYS>::offset(row, 2 * k + (lane >> 4)), a[k]);
    fence_async_proxy();
    __syncwarp();
}

struct SumConsumer {
    const BandBackwardParams& p;
    const SumMemory& m;
    int group, key_low;             // the thread's first key of the tile
    Columns grad_key, grad_value;

    // Passes dS^T of this warpgroup's keys on to both, as the n-th item: zeros, then those of the tiles. A branch around the product of the one before the
    // first would make ptxas wait for every product.
    FSA_DEVICE void pass_on(const PieceFragments& a, int n) const {
        m.ds_ring.wait_free(n);
        store_fragments(m.ds_tile(n) + group * PIECE_BYTES, a);
        if (lane_number() == 0) barrier_arrive(m.ds_ring.full + 8 * Ring<DS_STAGES>::place(n));
    }
    // Starts this warpgroup's columns of dS K, dS being the n-th item.
    FSA_DEVICE void start_queries(SumColumns& acc, int n) const {
        const u32 ds = m.ds_tile(n), columns = m.key + group * KeyTile::HALF_BYTES;
        m.ds_ring.wait(n);
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < CTA_KEYS / 16; ++k)
            Wgmma<SUM_COLUMNS>::template shared_shared<1, 1>(acc, over_rows<SUM_ROWS>(ds, k, 0), over_rows<CTA_KEYS>(columns, k, 0), k != 0);
        wgmma_commit();
    }
    // That product is done: its sums, those of the tile before the n-th, leave.
    FSA_DEVICE void finish_queries(SumColumns& acc, int n) const {
        wgmma_pin(acc);
        m.ds_ring.release(n);
        if (n == 0) return;
        barrier_wait(m.sum_rings.empty + 8 * group, n & 1);
        const f32 scale = *(const volatile f32*)m.scale;
        PieceFragments a;
        FSA_UNROLL for (int k = 0; k < SUM_COLUMNS / 16; ++k)
            FSA_UNROLL for (int i = 0; i < 4; ++i) a[k][i] = pack_sums(acc[8 * k + 2 * i] * scale, acc[8 * k + 2 * i + 1] * scale);
        store_fragments(m.sum_tile(group), a);
        if (lane_number() == 0) barrier_arrive(m.sum_rings.full + 8 * group);
    }

    FSA_DEVICE void walk(int steps) {
        const u32 keys = m.key + group * PIECE_BYTES, values = m.value + group * PIECE_BYTES;
        pass_on({}, 0);
        FSA_NO_UNROLL for (int n = 0; n < steps; ++n) {
            const u32 query = m.rows.query(n), grad = m.rows.grad(n);
            PieceScores s, dp;
            m.rows.loaded.wait(n);
            wgmma_fence();
            start_piece<SUM_ROWS>(s, keys, query);
            wgmma_commit();
            start_piece<SUM_ROWS>(dp, values, grad);
            wgmma_commit();
            m.rows.checked.wait(n);
            const SumRecords& records = m.rows.record(n);
            const i32 special = records.special[0] | records.special[1];
            wgmma_wait<1>();
            wgmma_pin(s);
            SplitStats::apply(s, records.stats.lse, [&](f32 x, f32 lse, int) { return exp2_fast(fmaf(x, p.scale_log2, -lse)); });
            if (special & MASKED) mask_keys(s, records.spans, key_low);
            if (special & NEGATIVE) SplitStats::apply(s, records.stats.delta, [](f32 x, f32 delta, int) { return with_sign_of(x, delta); });
            wgmma_wait<0>();
            wgmma_pin(dp);
            SplitStats::apply(dp, records.stats.delta, [&](f32 x, f32 delta, int e) { return s[e] * (x - delta); });
            if (special & MASKED) mask_keys(dp, records.spans, key_low);
            PieceFragments a, b;
            FSA_UNROLL for (int k = 0; k < PIECE_KEYS / 16; ++k) {
                to_fragment<PIECE_KEYS>(a[k], s, k);
                to_fragment<PIECE_KEYS>(b[k], dp, k);
            }
            SumColumns acc;
            start_queries(acc, n);
            wgmma_fence();
            start_piece_sum<SUM_ROWS>(grad_value, a, grad);
            start_piece_sum<SUM_ROWS>(grad_key, b, query);
            wgmma_commit();
            pass_on(b, n + 1);
            wgmma_wait<1>();
            finish_queries(acc, n);
            wgmma_wait<0>();
            wgmma_pin(grad_key);
            wgmma_pin(grad_value);
            m.rows.loaded.release(n);
        }
        SumColumns acc;
        start_queries(acc, steps);
        wgmma_wait<0>();
        finish_queries(acc, steps);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) band_sums(const __grid_constant__ BandBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) SumRecords records[ROW_STAGES];
    __shared__ __align__(8) u64 barriers[2 + SumRowRing::BARRIERS + 2 * DS_STAGES + 2 * CONSUMERS];
    __shared__ KeyWork w;       // no role has registers for it
    __shared__ f32 scale;
    if (threadIdx.x == 0) {
        w = KeyWork::find(p.band, p.num_kv_heads, p.resident);
        scale = sum_scale(*p.row_bounds, *p.key_bounds).scale;
    }
    __syncthreads();
    if (w.rows.keys <= 0) return;
    SumMemory m;
    m.key = shared_address(shared);
    m.value = m.key + KeyTile::BYTES;
    m.ds = m.value + KeyTile::BYTES;
    m.sums = m.ds + DS_STAGES * DS_BYTES;
    m.loaded_keys = shared_address(barriers);
    m.clean_keys = m.loaded_keys + 8;
    m.scale = &scale;
    m.rows = SumRowRing::at(m.sums + CONSUMERS * SUM_BYTES, records, m.clean_keys + 8);
    m.ds_ring = Ring<DS_STAGES>::at(m.clean_keys + 8 + 8 * SumRowRing::BARRIERS);
    m.sum_rings = Ring<CONSUMERS>::at(m.ds_ring.full + Ring<DS_STAGES>::BYTES);
    if (threadIdx.x == 0) {
        barrier_init(m.loaded_keys, 1);
        barrier_init(m.clean_keys, WARPGROUP);
        m.rows.open();
        m.ds_ring.open(CONSUMER_THREADS / 32, CONSUMER_THREADS / 32);
        m.sum_rings.open(1, WARPGROUP / 32);
        barriers_ready();
    }
    m.rows.clear_uncovered(p.band);
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    if (group == CONSUMERS) {
        registers_shrink<24>();
        if (threadIdx.x == CONSUMER_THREADS) load_keys(p, m.key, m.value, m.loaded_keys, w);
        clean_keys(m);
        const int thread = threadIdx.x - CONSUMER_THREADS;
        if (thread < SUM_ROWS) m.rows.bring(p, w);
        else if (thread % 32 == 0) send_sums(p, m, w, thread / 32 - SUM_ROWS / 32);
        return;
    }
    registers_grow<240>();
    SumConsumer c = {p, m, group, first_row_of_thread()};
    clear(c.grad_key);
    clear(c.grad_value);
    barrier_wait(m.clean_keys, 0);
    if (w.steps > 0) c.walk(w.steps);
    store_key_sums(p, c.grad_key, p.grad_key, p.scale, 0, w, c.key_low);
    store_key_sums(p, c.grad_value, p.grad_value, 1.0f, 1, w, c.key_low);
}

// ---- Before and after ----

constexpr int SMALL_THREADS = 256, TARGET_COPIES = 4, TARGET_BYTES = SMALL_THREADS * TARGET_COPIES * 16, OPEN_KEYS = 64;

// Calls f with the address and number of every piece of grad_query that is this thread's.
template <typename F>
FSA_DEVICE void for_each_target(const BandBackwardParams& p, F f) {
    const u32 heads = (u32)(p.num_kv_heads * p.band.group_size);
    FSA_UNROLL for (int i = 0; i < TARGET_COPIES; ++i) {
        const i64 n = ((i64)blockIdx.x * TARGET_COPIES + i) * SMALL_THREADS + threadIdx.x;
        const u32 row = (u32)(n / PIECES_PER_ROW), token = row / heads;     // 2^32 rows fit nowhere
        if (token < (u32)p.band.total_q) f((char*)tensor_row(p.grad_query, token, (int)(row % heads)) + n % PIECES_PER_ROW * 16, i);
    }
}

// Zeros in grad_query; the first ctas take the bounds of some keys of a head each.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS) band_sums_open(const __grid_constant__ BandBackwardParams p) {
    for_each_target(p, [](char* at, int) { store_global(at, Vec4{0, 0, 0, 0}); });
    const int head = blockIdx.x % p.num_kv_heads, first = blockIdx.x / p.num_kv_heads * OPEN_KEYS;
    const int keys = min_i(p.band.cu_keys[p.band.batch] - first, OPEN_KEYS);        // total_keys may be a bound
    if (keys > 0) raise_key_bounds<SMALL_THREADS>(p.key_bounds, p.key, p.value, head, first, keys);
}

// bf16 of the sums, in their place.
extern "C" __global__ void __launch_bounds__(SMALL_THREADS) band_sums_finish(const __grid_constant__ BandBackwardParams p) {
    const f32 scale = p.scale * sum_scale(*p.row_bounds, *p.key_bounds).inverse;
    const auto finish = [&](u32 word) {
        f32 low, high;
        unpack_sums(word, low, high);
        return pack2(low * scale, high * scale);
    };
    Vec4 v[TARGET_COPIES];
    for_each_target(p, [&](char* at, int i) { v[i] = load_global_once(at); });
    for_each_target(p, [&](char* at, int i) { store_global(at, Vec4{finish(v[i].x), finish(v[i].y), finish(v[i].z), finish(v[i].w)}); });
}
