// WHAT   Inverse index of topk_indices: for each kv head and chunk of query tiles, the rows that chose each block, as
//        CSR, cut into units of bounded size. No sort, no global atomics, no plane of tokens times blocks. On request the
//        order of a block's entries follows from the input alone, so that everything downstream is repeatable.
// GRID   prepare: 1 cta. count, scatter: (pieces of chunks, kv heads, windows of blocks). scan: (chunks, kv heads).
//        From shapes alone; what does not exist writes nothing.
// ROLES  count: shared-memory histogram of a piece. scan: starts of all (block, piece), and the units. scatter: each
//        warp owns consecutive tiles, a lane a row, and takes places from counters; repeatably, from the warp's own, with ranks inside
//        a step by match.any. The entries of a small piece are put in order in shared memory, so that what leaves are runs, not words.
// SMEM   count: window_blocks counters. scatter: as many, in order for every warp; staged: the shifts of window_blocks runs, and the entries.
// SYNC   four launches on one stream.
#include "block/sequence.cuh"
#include "ptx/memory.cuh"

constexpr u32 ALL_LANES = 0xffffffffu;
FSA_DEVICE void no_rows(int, u32) {}

// A row's ids from `slot` on, -1 where there are none; a vector where rows are whole vectors.
constexpr int IDS_AHEAD = 16;       // of a lane, loaded before the first is used
FSA_DEVICE void load_ids(int (&id)[IDS_AHEAD], const i32* row, int slot, int topk, bool exists, bool vectors) {
    if (vectors) {
        FSA_UNROLL for (int i = 0; i < IDS_AHEAD; i += 4) {
            Vec4 v = {~0u, ~0u, ~0u, ~0u};
            if (exists && slot + i < topk) v = *(const Vec4*)(row + slot + i);
            id[i] = (int)v.x; id[i + 1] = (int)v.y; id[i + 2] = (int)v.z; id[i + 3] = (int)v.w;
        }
    } else {
        FSA_UNROLL for (int i = 0; i < IDS_AHEAD; ++i) id[i] = exists && slot + i < topk ? row[slot + i] : -1;
    }
}

// Runs f(keep, block, rank, token) for every listed id of a tile, one warp: a lane has a row, so that what is counted along a row needs no
// other lane. `rank` counts the gathered blocks of the row; ids that are absent (negative, in the future) or dense give keep = false.
// Then g(token, info) once per row with WITH_ROWS.
template <bool WITH_ROWS, typename F, typename G>
FSA_DEVICE void for_each_entry(const IndexParams& p, int kv_head, int tile, F f, G g) {
    const Index& index = p.index;
    const Tile t = p.layout.tiles[tile];
    const DenseRule rule = dense_rule(t, index.has_dense);
    const int topk = index.topk;
    const i32* ids = index.topk_indices + ((i64)kv_head * p.layout.total_q + t.token) * topk;
    const bool vectors = topk % 4 == 0 && ((u64)index.topk_indices & 15) == 0;
    for (int first = 0; first < t.rows; first += 32) {
        const int row = first + (threadIdx.x & 31);
        const bool exists = row < t.rows;
        const int own = (t.position + row) / BLOCK_SIZE;
        // The gathered ids are one range, whose first is 1 or 0.
        const u32 range_begin = rule.enabled, range_size = rule.enabled ? rule.first_local - 1 : own + 1;
        int rank = 0;
        u32 info = 0;
        for (int slot = 0; slot < topk; slot += IDS_AHEAD) {
            int loaded[IDS_AHEAD];
            load_ids(loaded, ids + (i64)row * topk, slot, topk, exists, vectors);
            FSA_UNROLL for (int i = 0; i < IDS_AHEAD; ++i) {
                if (slot + i >= topk) break;
                const int id = loaded[i];
                const bool gathered = (u32)id - range_begin < range_size, has_slot = rank < index.slots;
                f(gathered && has_slot, t.block_base + id, rank, t.token + row);
                if (WITH_ROWS) {
                    if (gathered && !has_slot) info |= (u32)(id + 1) << RowInfo::SPILLED_SHIFT;
                    if (!gathered && (u32)id <= (u32)own) info |= dense_bit(rule, id);
                }
                rank += gathered;
            }
        }
        if (WITH_ROWS && exists) g(t.token + row, info | (u32)min_i(rank, index.slots) << RowInfo::PARTIALS_SHIFT);
    }
}

// Prefix sums over sequences by one warp, then tiles and chunks by all.
extern "C" __global__ void __launch_bounds__(1024) index_prepare(const __grid_constant__ IndexParams p) {
    const Layout& layout = p.layout;
    const int lane = threadIdx.x;
    if (threadIdx.x < 32) {
        int tiles = 0, blocks = 0;
        for (int first = 0; first < layout.batch; first += 32) {
            const int s = first + lane;
            int tile_sum = 0, block_sum = 0;
            if (s < layout.batch) {
                tile_sum = ceil_div(layout.cu_seqlens_q[s + 1] - layout.cu_seqlens_q[s], TILE_ROWS);
                block_sum = ceil_div(layout.cu_seqlens_kv[s + 1] - layout.cu_seqlens_kv[s], BLOCK_SIZE);
            }
            FSA_UNROLL for (int delta = 1; delta < 32; delta *= 2) {
                const int t = __shfl_up_sync(ALL_LANES, tile_sum, delta), b = __shfl_up_sync(ALL_LANES, block_sum, delta);
                if (lane >= delta) { tile_sum += t; block_sum += b; }
            }
            if (s < layout.batch) {
                layout.tile_base[s + 1] = tiles + tile_sum;
                layout.block_base[s + 1] = blocks + block_sum;
            }
            tiles += __shfl_sync(ALL_LANES, tile_sum, 31);
            blocks += __shfl_sync(ALL_LANES, block_sum, 31);
        }
        if (lane == 0) { layout.tile_base[0] = 0; layout.block_base[0] = 0; }
    }
    __syncthreads();
    const int tiles = layout.tile_base[layout.batch];
    for (int i = threadIdx.x; i < layout.max_tiles; i += blockDim.x) {
        Tile none = {};
        layout.tiles[i] = i < tiles ? find_tile(layout, i) : none;
    }
    for (int chunk = threadIdx.x; chunk <= layout.num_chunks; chunk += blockDim.x) {
        const int tile = chunk * layout.chunk_tiles;
        layout.chunk_token[chunk] = tile < tiles ? find_tile(layout, tile).token : layout.total_q;
    }
}

extern "C" __global__ void __launch_bounds__(256) index_count(const __grid_constant__ IndexParams p) {
    extern __shared__ i32 histogram[];
    const int piece = blockIdx.x, kv_head = p.first_kv_head + blockIdx.y, window = blockIdx.z * p.index.window_blocks;
    const int blocks = min_i(p.index.window_blocks, p.index.max_blocks - window);
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    const int tiles = p.layout.tile_base[p.layout.batch];
    const int last = min_i(tiles, (piece + 1) * p.index.sub_tiles);
    for (int tile = piece * p.index.sub_tiles + threadIdx.x / 32; tile < last; tile += blockDim.x / 32)
        for_each_entry<false>(p, kv_head, tile, [&](bool keep, int block, int, int) {
            const u32 local = (u32)(block - window);
            if (keep && local < (u32)blocks) atomicAdd(&histogram[local], 1);
        }, no_rows);
    __syncthreads();
    i32* counts = p.index.plane + ((i64)kv_head * p.index.num_subs + piece) * p.index.max_blocks + window;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) counts[i] = histogram[i];
}

// Exclusive sums of COUNT values over the cta; `total` gets the sums over all threads.
template <int COUNT>
FSA_DEVICE void cta_scan(int (&value)[COUNT], int (&total)[COUNT]) {
    __shared__ int warp_sum[COUNT][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    auto sum_lanes = [&](int x) {
        FSA_UNROLL for (int delta = 1; delta < 32; delta *= 2) {
            const int y = __shfl_up_sync(ALL_LANES, x, delta);
            if (lane >= delta) x += y;
        }
        return x;
    };
    int inclusive[COUNT];
    FSA_UNROLL for (int k = 0; k < COUNT; ++k) {
        inclusive[k] = sum_lanes(value[k]);
        if (lane == 31) warp_sum[k][warp] = inclusive[k];
    }
    __syncthreads();
    for (int k = warp; k < COUNT; k += warps) warp_sum[k][lane] = sum_lanes(lane < warps ? warp_sum[k][lane] : 0);
    __syncthreads();
    FSA_UNROLL for (int k = 0; k < COUNT; ++k) {
        const int before = warp == 0 ? 0 : warp_sum[k][warp - 1];
        value[k] = before + inclusive[k] - value[k];
        total[k] = warp_sum[k][31];
    }
    __syncthreads();
}

// Writes the units of one block: the full ones at `full`, the remainder at `rest`. `split` counts the blocks before that have several. Returns the row of its sums.
FSA_DEVICE i32 write_units(const IndexParams& p, Unit* units, int unit_entries, int block, int begin, int count, int full, int rest, int split) {
    const Layout& layout = p.layout;
    const int s = find_sequence(layout.block_base, layout.batch, block);
    const int q_begin = layout.cu_seqlens_q[s], q_len = layout.cu_seqlens_q[s + 1] - q_begin;
    const int kv_begin = layout.cu_seqlens_kv[s], kv_len = layout.cu_seqlens_kv[s + 1] - kv_begin;
    const int key = (block - layout.block_base[s]) * BLOCK_SIZE;
    Unit unit;
    unit.kv_row = kv_begin + key;
    unit.valid_keys = min_i(BLOCK_SIZE, kv_len - key);
    unit.first_token = key - (kv_len - q_len) + q_begin;
    unit.block = block;
    unit.split = count > unit_entries;
    unit.sums_row = p.index.packs_sums ? split * BLOCK_SIZE : unit.kv_row;
    for (; count >= unit_entries; count -= unit_entries, begin += unit_entries) {
        unit.entry_begin = begin;
        unit.entry_count = unit_entries;
        units[full++] = unit;
    }
    if (count > 0) {
        unit.entry_begin = begin;
        unit.entry_count = count;
        units[p.index.full_units + rest] = unit;
    }
    return unit.sums_row;
}

// A block's counts in consecutive pieces, 0 beyond the last: all loads are under way at once.
constexpr int PIECES_AHEAD = 8;
FSA_DEVICE void load_counts(int (&count)[PIECES_AHEAD], const i32* column, int stride, int piece, int last, bool exists) {
    FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) count[i] = exists && piece + i < last ? column[(i64)(piece + i) * stride] : 0;
}

// Entries of a full unit: as few of these as leave no more units than a launch has ctas for, which the last always does. Given the units
// beyond the first of all blocks, by each.
constexpr int UNIT_SIZES = 4, MOST_UNIT_GROWTH = 2;
FSA_DEVICE int unit_size(const Index& index, int number) {
    const int quarters = number == UNIT_SIZES - 1 ? 4 * MOST_UNIT_GROWTH : 4 + number;
    return index.unit_entries * quarters / 4;
}
FSA_DEVICE int fitting_unit_size(const Index& index, const int (&beyond)[UNIT_SIZES - 1]) {
    int number = 0;
    while (number < UNIT_SIZES - 1 && beyond[number] > index.spare_units) ++number;
    return unit_size(index, number);
}

extern "C" __global__ void __launch_bounds__(1024, 1) index_scan(const __grid_constant__ IndexParams p) {
    const Index& index = p.index;
    const int chunk = blockIdx.x, kv_head = p.first_kv_head + blockIdx.y;
    const int pieces_per_chunk = p.layout.chunk_tiles / index.sub_tiles;
    const int first = chunk * pieces_per_chunk, last = min_i(index.num_subs, first + pieces_per_chunk);
    i32* plane = index.plane + (i64)kv_head * index.num_subs * index.max_blocks;
    Unit* units = index.units + ((i64)kv_head * p.layout.num_chunks + chunk) * (index.full_units + index.max_blocks);
    i32* split_blocks = index.split_blocks + (i64)kv_head * index.max_split_blocks;
    auto count_block = [&](int block) {
        int count = 0;
        for (int piece = first; piece < last; piece += PIECES_AHEAD) {
            int here[PIECES_AHEAD];
            load_counts(here, plane + block, index.max_blocks, piece, last, block < index.max_blocks);
            FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) count += here[i];
        }
        return count;
    };
    int unit_entries = index.unit_entries, count = 0;
    if (index.spare_units < index.full_units) {
        int beyond[UNIT_SIZES - 1] = {}, total[UNIT_SIZES - 1];
        for (int base = 0; base < index.max_blocks; base += 1024) {
            count = count_block(base + threadIdx.x);
            FSA_UNROLL for (int i = 0; i < UNIT_SIZES - 1; ++i) beyond[i] += max_i(count - 1, 0) / unit_size(index, i);
        }
        cta_scan(beyond, total);
        unit_entries = fitting_unit_size(index, total);
    }
    const bool counted = index.spare_units < index.full_units && index.max_blocks <= 1024;
    int carry[4] = {0, 0, 0, 0};    // entries, full units, remainders, blocks of several units
    for (int base = 0; base < index.max_blocks; base += 1024) {
        const int block = base + threadIdx.x;
        const bool exists = block < index.max_blocks;
        if (!counted) count = count_block(block);
        const bool splits = count > unit_entries;
        int sum[4] = {count, count / unit_entries, count % unit_entries != 0, splits}, total[4];
        cta_scan(sum, total);
        int start = carry[0] + sum[0];
        i32 sums = LISTED_BY_NONE;
        if (count > 0) {
            const i32 row = write_units(p, units, unit_entries, block, start, count, carry[1] + sum[1], carry[2] + sum[2], carry[3] + sum[3]);
            sums = splits ? row : LISTED_BY_ONE_UNIT;
            if (splits && index.packs_sums) split_blocks[carry[3] + sum[3]] = block;
        }
        if (index.block_sums && exists) index.block_sums[(i64)kv_head * index.max_blocks + block] = sums;
        for (int piece = first; piece < last; piece += PIECES_AHEAD) {      // blocks without entries, too: the next piece's start is a run's end
            int here[PIECES_AHEAD];
            load_counts(here, plane + block, index.max_blocks, piece, last, exists);
            FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) {
                if (exists && piece + i < last) plane[(i64)(piece + i) * index.max_blocks + block] = start;
                start += here[i];
            }
        }
        FSA_UNROLL for (int k = 0; k < 4; ++k) carry[k] += total[k];
    }
    if (index.packs_sums) for (int i = carry[3] + threadIdx.x; i < index.max_split_blocks; i += 1024) split_blocks[i] = -1;
    if (threadIdx.x == 0) {
        i32* counts = index.unit_counts + ((i64)kv_head * p.layout.num_chunks + chunk) * 2;
        counts[0] = carry[1];
        counts[1] = carry[2];
    }
}

// Where the runs of a piece start in its chunk, one per block, and where they end: at the start of the next piece's run, and those of the
// last piece at the next block's. The last block of all has no end here.
struct Runs {
    const i32 *starts, *ends;
};
FSA_DEVICE Runs find_runs(const IndexParams& p, int kv_head, int piece, int window) {
    const Index& index = p.index;
    const int pieces_per_chunk = p.layout.chunk_tiles / index.sub_tiles, first = piece / pieces_per_chunk * pieces_per_chunk;
    const bool is_last = piece + 1 == min_i(index.num_subs, first + pieces_per_chunk);
    const i32* plane = index.plane + (i64)kv_head * index.num_subs * index.max_blocks + window;
    return {plane + (i64)piece * index.max_blocks, is_last ? plane + (i64)first * index.max_blocks + 1 : plane + (i64)(piece + 1) * index.max_blocks};
}

// Places of the runs side by side in the stage, and what leads from there to their places in the chunk.
FSA_DEVICE void place_runs(const Runs& runs, i32* places, i32* shifts, int blocks) {
    constexpr int EACH = 4;     // consecutive blocks of a thread
    int carry = 0;
    for (int base = 0; base < blocks; base += EACH * blockDim.x) {
        const int first = base + EACH * threadIdx.x;
        int start[EACH], count[EACH], place[1] = {0}, total[1];
        FSA_UNROLL for (int i = 0; i < EACH; ++i) {
            start[i] = first + i < blocks ? runs.starts[first + i] : 0;
            count[i] = first + i + 1 < blocks ? runs.ends[first + i] - start[i] : 0;    // nothing follows the last run
            place[0] += count[i];
        }
        cta_scan(place, total);
        int next = carry + place[0];
        FSA_UNROLL for (int i = 0; i < EACH; ++i) {
            if (first + i < blocks) { places[first + i] = next; shifts[first + i] = start[i] - next; }
            next += count[i];
        }
        carry += total[0];
    }
}

// Turns starts of the blocks' entries, in `next` for the first warp, into starts for each warp, in order: counts what the warps before have.
FSA_DEVICE void warp_starts(const IndexParams& p, i32* next, int kv_head, int window, int blocks, int first, int last) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < (warps - 1) * blocks; i += blockDim.x) next[blocks + i] = 0;
    __syncthreads();
    i32* following = next + (warp + 1) * blocks;
    for (int tile = first; tile < last && warp + 1 < warps; ++tile)
        for_each_entry<false>(p, kv_head, tile, [&](bool keep, int block, int, int) {
            const u32 local = (u32)(block - window);
            if (keep && local < (u32)blocks) atomicAdd(&following[local], 1);
        }, no_rows);
    __syncthreads();
    for (int i = threadIdx.x; i < blocks; i += blockDim.x)
        for (int w = 1; w < warps; ++w) next[w * blocks + i] += next[(w - 1) * blocks + i];
}

// Copies the runs out, eight lanes a run: `ends` in the stage, one after the other.
FSA_DEVICE void copy_runs(u32* entries, const u32* stage, const i32* ends, const i32* shifts, int blocks) {
    constexpr int LANES = 8;
    for (int i = threadIdx.x / LANES; i < blocks; i += blockDim.x / LANES) {
        const int end = ends[i], shift = shifts[i];
        for (int place = (i == 0 ? 0 : ends[i - 1]) + threadIdx.x % LANES; place < end; place += LANES) entries[place + shift] = stage[place];
    }
}

extern "C" __global__ void __launch_bounds__(256) index_scatter(const __grid_constant__ IndexParams p) {
    extern __shared__ i32 next[];       // [blocks], in order [warps, blocks]; staged: shifts [blocks], entries
    const Index& index = p.index;
    const int piece = blockIdx.x, kv_head = p.first_kv_head + blockIdx.y, window = blockIdx.z * index.window_blocks;
    const int blocks = min_i(index.window_blocks, index.max_blocks - window);
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int per_warp = ceil_div(index.sub_tiles, warps);
    const int tiles = min_i(p.layout.tile_base[p.layout.batch], (piece + 1) * index.sub_tiles);
    const int first = piece * index.sub_tiles + warp * per_warp, last = min_i(tiles, first + per_warp);
    const int sets = index.ordered ? warps : 1;
    i32 *mine = next + (index.ordered ? warp : 0) * blocks, *shifts = next + sets * blocks;
    const Runs runs = find_runs(p, kv_head, piece, window);
    if (p.staged) place_runs(runs, next, shifts, blocks);
    else for (int i = threadIdx.x; i < blocks; i += blockDim.x) next[i] = runs.starts[i];
    if (index.ordered) warp_starts(p, next, kv_head, window, blocks, first, last);
    __syncthreads();
    const int chunk = piece * index.sub_tiles / p.layout.chunk_tiles;
    const int chunk_token = p.layout.chunk_token[chunk];
    u32 *entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots, *stage = (u32*)(shifts + blocks);
    auto put = [&](int place, int token, int rank) {
        const u32 entry = (u32)(token - chunk_token) | (u32)rank << 24;
        if (p.staged) stage[place] = entry; else entries[place] = entry;
    };
    const bool write_rows = blockIdx.z == 0;
    u32* row_info = index.row_info + (i64)kv_head * p.layout.total_q;
    for (int tile = first; tile < last; ++tile)
        for_each_entry<true>(p, kv_head, tile, [&](bool keep, int block, int rank, int token) {
            const u32 local = (u32)(block - window);
            keep = keep && local < (u32)blocks;
            if (!index.ordered) {
                if (keep) put(atomicAdd(&mine[local], 1), token, rank);
                return;
            }
            // Lanes with the same block, lowest lane (earliest token) first; lanes without work form groups of one.
            const u32 peers = __match_any_sync(ALL_LANES, keep ? local : ~(u32)lane);
            const int before = __popc(peers & ((1u << lane) - 1));
            int place = 0;
            if (keep) place = mine[local] + before;
            __syncwarp();
            if (keep) {
                put(place, token, rank);
                if (before == 0) mine[local] += __popc(peers);
            }
            __syncwarp();
        }, [&](int token, u32 info) {
            if (write_rows) row_info[token] = info;
        });
    if (!p.staged) return;
    __syncthreads();
    copy_runs(entries, stage, next + (sets - 1) * blocks, shifts, blocks);      // every counter of the last set stands at its run's end
}
