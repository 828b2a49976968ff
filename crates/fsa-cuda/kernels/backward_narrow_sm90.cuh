// WHAT   The main kernel of backward_sm90.cuh for head_dim 256, where the sums of the wide kernel (512 accumulators per thread and
//        more) do not fit: the same five products with twice the warps. Two warpgroups share a 64-key, 64-row tile. For scores and dS each
//        takes half of the rows, for the three sums half of the columns. At head_dim 128 it fits 128 registers and two ctas per SM, and is
//        10 % slower than the wide kernel all the same (docs/kernels/backward.md), so it is not used there.
// GRID   (units of the chunk, parts of a block of 64 keys, query heads).
// ROLES  Two warpgroups; all eight warps gather.
// SMEM   key and value tiles, two stages of query and grad_out tiles, P^T, dS^T.
// SYNC   cp.async group per row tile. Two barriers per tile: tile arrived (and everything of the previous one free), P^T and dS^T written.
#pragma once

constexpr int NARROW_THREADS = 2 * WARPGROUP;
constexpr int NARROW_ROWS = TILE_ROWS / 2;                      // rows of a tile whose scores one warpgroup computes
constexpr int NARROW_COLUMNS = HEAD_DIM / 2;                    // columns of the sums that it holds
constexpr int NARROW_WARP_ROWS = TILE_ROWS / (NARROW_THREADS / 32);
constexpr int NARROW_CTAS = HEAD_DIM <= 128 ? 2 : 1;
typedef f32 NarrowScores[NARROW_ROWS / 2];
typedef f32 NarrowSums[NARROW_COLUMNS / 2];
static_assert(!QUERY_PARTIALS && !SCALED_SUMS, "see the wide kernel");
static_assert(HEAD_DIM == 64 || HEAD_DIM % 128 == 0, "half of the columns starts at a half tile or stays inside one");

// Adds a thread's two rows of sums to f32 rows in fragment order; the pointers include column and lane.
template <int PAIR = 0>
FSA_DEVICE void add_sums(f32* low_row, f32* high_row, const NarrowSums& acc) {
    if constexpr (PAIR < NARROW_COLUMNS / 16) {
        constexpr int OFFSET = PAIR * 64, E = PAIR * 8;
        add_global<OFFSET>(low_row, acc[E], acc[E + 1], acc[E + 4], acc[E + 5]);
        add_global<OFFSET>(high_row, acc[E + 2], acc[E + 3], acc[E + 6], acc[E + 7]);
        add_sums<PAIR + 1>(low_row, high_row, acc);
    }
}

// Writes scores as 16-bit rows of keys: element (key, row) of a 64 x 64 tile with 128-byte swizzle.
FSA_DEVICE void store_scores(u32 tile, const NarrowScores& s, int key, int half) {
    FSA_UNROLL for (int i = 0; i < NARROW_ROWS / 8; ++i) {
        const u32 at = tile + key * 128 + (((half * (NARROW_ROWS / 8) + i) ^ (key & 7)) << 4) + (threadIdx.x & 3) * 4;
        store_shared(at, pack2(s[4 * i], s[4 * i + 1]));
        store_shared(at + 8 * 128, pack2(s[4 * i + 2], s[4 * i + 3]));
    }
}

extern "C" __global__ void __launch_bounds__(NARROW_THREADS, NARROW_CTAS) backward(const __grid_constant__ BackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(16) RowStats stats[2][TILE_ROWS];
    const Index& index = p.index;
    const int head = p.first_head + blockIdx.z, kv_head = head / p.group_size;
    const i64 list = (i64)kv_head * p.layout.num_chunks + p.chunk;
    const Unit* record = find_unit(index, list, blockIdx.x);
    if (record == nullptr || !in_range(p, record->kv_row)) return;
    const Unit unit = *record;
    const int chunk_token = p.layout.chunk_token[p.chunk], chunk_rows = p.layout.chunk_token[p.chunk + 1] - chunk_token;
    const int part = blockIdx.y * 64, keys = min_i(64, unit.valid_keys - part);
    if (keys <= 0) return;
    const u32* entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots + unit.entry_begin;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, half = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
    const char *queries = tensor_row(p.query, chunk_token, head), *grads = tensor_row(p.grad_out, chunk_token, head);
    const u32 query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES, grad_row_bytes = (u32)p.grad_out.row_stride * ELEMENT_BYTES;
    const u32 key_tile = shared_address(shared), value_tile = key_tile + RowTile::BYTES, stages = value_tile + RowTile::BYTES;
    const u32 p_tile = stages + 2 * STAGE_BYTES, ds_tile = p_tile + DS_BYTES;
    const i64 head_row = (i64)blockIdx.z * p.rows;

    auto tile_entry = [&](int row) { return row < unit.entry_count ? __ldg(entries + row) : NO_ENTRY; };
    auto gather_entry = [&](int first) { return tile_entry(first + warp * NARROW_WARP_ROWS + lane % NARROW_WARP_ROWS); };
    // Keys up to the limit are visible to the row; a row that does not exist sees none.
    auto row_limit = [&](u32 entry) { return entry == NO_ENTRY ? -1 : min_i((int)(entry & 0xffffffu) + chunk_token - unit.first_token - part, keys - 1); };
    auto start_tile = [&](int stage, u32 entry) {
        const int token = entry == NO_ENTRY ? -1 : (int)(entry & 0xffffffu);    // relative to the chunk
        gather_rows<NARROW_WARP_ROWS, true>(stages + stage * STAGE_BYTES, queries, query_row_bytes, grads, grad_row_bytes, token, warp * NARROW_WARP_ROWS);
        if (lane < NARROW_WARP_ROWS) {
            RowStats* target = &stats[stage][warp * NARROW_WARP_ROWS + lane];
            if (token >= 0) copy_async8(shared_address(target), row_stats_at(p, blockIdx.z, token));
            else *target = no_row_stats();
        }
        copy_commit();
        return row_limit(entry) < 63;
    };
    auto query_row = [&](u32 entry, int row) {  // padding rows add their zeros to a row that differs from unit to unit
        const u32 target = entry != NO_ENTRY ? entry & 0xffffffu : (u32)(unit.entry_begin + row) % (u32)chunk_rows;
        return (f32*)p.grad_query + (head_row + target) * HEAD_DIM + half * NARROW_COLUMNS + (lane & 3) * 4;
    };

    const u32 first_entry = gather_entry(0);
    u32 next_entry = gather_entry(TILE_ROWS);
    copy_rows<64, NARROW_THREADS>(key_tile, p.key, kv_head, unit.kv_row + part, keys);
    copy_rows<64, NARROW_THREADS>(value_tile, p.value, kv_head, unit.kv_row + part, keys);
    bool masked = start_tile(0, first_entry), keys_clean = false;
    NarrowSums grad_key, grad_value;
    FSA_UNROLL for (int i = 0; i < NARROW_COLUMNS / 2; ++i) grad_key[i] = grad_value[i] = 0.0f;
    const int row = (warp & 3) * 16 + lane / 4;     // of a 64-row accumulator: a key, or a query row
    const int tiles = ceil_div(unit.entry_count, TILE_ROWS);

    FSA_NO_UNROLL for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile & 1;
        const u32 query_tile = stages + stage * STAGE_BYTES, grad_tile = query_tile + RowTile::BYTES;
        copy_wait<0>();
        fence_async_proxy();
        masked |= p.given_stats && lane < NARROW_WARP_ROWS && is_negative(stats[stage][warp * NARROW_WARP_ROWS + lane]);
        const bool any_masked = __syncthreads_or(masked);
        if (any_masked && !keys_clean) {    // see backward_sm90.cuh
            clean_keys<RowTile::BYTES, NARROW_THREADS>(key_tile);
            keys_clean = true;
            fence_async_proxy();
            __syncthreads();
        }
        const u32 entry_low = tile_entry(tile * TILE_ROWS + row), entry_high = tile_entry(tile * TILE_ROWS + row + 8);
        NarrowScores s, dp;
        const u32 half_rows = half * NARROW_ROWS * 128;
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<NARROW_ROWS>::shared_shared<0, 0>(s, over_columns<64>(key_tile, k), over_columns<64>(query_tile + half_rows, k), k != 0);
        wgmma_commit();
        FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
            Wgmma<NARROW_ROWS>::shared_shared<0, 0>(dp, over_columns<64>(value_tile, k), over_columns<64>(grad_tile + half_rows, k), k != 0);
        wgmma_commit();
        if (tile + 1 < tiles) {
            masked = start_tile(stage ^ 1, next_entry);
            next_entry = gather_entry((tile + 2) * TILE_ROWS);
        }
        const RowStats* mine = stats[stage] + half * NARROW_ROWS + 2 * (lane & 3);
        wgmma_wait<1>();
        wgmma_pin(s);
        FSA_UNROLL for (int i = 0; i < NARROW_ROWS / 8; ++i) {
            const StatsPair pair = *(const StatsPair*)(mine + 8 * i);
            FSA_UNROLL for (int e = 0; e < 4; ++e) s[4 * i + e] = exp2_fast(fmaf(s[4 * i + e], p.scale_log2, e & 1 ? -pair.second.lse : -pair.first.lse));
        }
        if (any_masked)
            FSA_UNROLL for (int i = 0; i < NARROW_ROWS / 2; ++i) {
                const int column = i / 4 * 8 + 2 * (lane & 3) + (i & 1);
                const int limit = row_limit(tile_entry(tile * TILE_ROWS + half * NARROW_ROWS + column));
                if (row + (i & 2) * 4 > limit) s[i] = 0.0f;
                else if (is_negative(stats[stage][half * NARROW_ROWS + column])) s[i] = -s[i];
            }
        store_scores(p_tile, s, row, half);
        wgmma_wait<0>();
        wgmma_pin(dp);
        FSA_UNROLL for (int i = 0; i < NARROW_ROWS / 8; ++i) {
            const StatsPair pair = *(const StatsPair*)(mine + 8 * i);
            FSA_UNROLL for (int e = 0; e < 4; ++e) {
                const f32 value = s[4 * i + e] * (dp[4 * i + e] - (e & 1 ? pair.second.delta : pair.first.delta));
                dp[4 * i + e] = any_masked && s[4 * i + e] == 0.0f ? 0.0f : value;  // a masked dP may be NaN
            }
        }
        store_scores(ds_tile, dp, row, half);
        fence_async_proxy();
        __syncthreads();

        NarrowSums grad_query;
        const int column = half * NARROW_COLUMNS;
        const u32 column_bytes = (column >> 6) * RowTile::HALF_BYTES + (column & 63) * 2;
        wgmma_fence();
        FSA_UNROLL for (int k = 0; k < 4; ++k)
            Wgmma<NARROW_COLUMNS>::shared_shared<1, 1>(grad_query, over_rows<64>(ds_tile, k, 0), over_rows<64>(key_tile + column_bytes, k, 0), k != 0);
        wgmma_commit();
        FSA_UNROLL for (int k = 0; k < 4; ++k)
            Wgmma<NARROW_COLUMNS>::shared_shared<0, 1>(grad_value, over_columns<64>(p_tile, k), over_rows<64>(grad_tile + column_bytes, k, 0), 1);
        FSA_UNROLL for (int k = 0; k < 4; ++k)
            Wgmma<NARROW_COLUMNS>::shared_shared<0, 1>(grad_key, over_columns<64>(ds_tile, k), over_rows<64>(query_tile + column_bytes, k, 0), 1);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_pin(grad_query);
        add_sums(query_row(entry_low, row), query_row(entry_high, row + 8), grad_query);
        wgmma_wait<0>();
        wgmma_pin(grad_key);
        wgmma_pin(grad_value);
    }

    const i64 first = ((kv_head - p.first_head / p.group_size) * p.sum_rows + unit.kv_row + part + row) * HEAD_DIM + half * NARROW_COLUMNS + (lane & 3) * 4;
    if (row < keys) {       // a second row that does not exist has sums of zero
        const i64 second = row + 8 < keys ? first + 8 * HEAD_DIM : first;
        add_sums(p.grad_key + first, p.grad_key + second, grad_key);
        add_sums(p.grad_value + first, p.grad_value + second, grad_value);
    }
}
