// WHAT   Inverse index of topk_indices: for each kv head and chunk of query tiles, the rows that chose each block, as
//        CSR, cut into units of bounded size. No sort, no plane of tokens times blocks. On request the
//        order of a block's entries follows from the input alone, so that everything downstream is repeatable.
// GRID   prepare: 1 cta, and one per list of build. count, scatter: (pieces of chunks, kv heads, windows of blocks). scan: (chunks, kv heads).
//        build, in place of these three: (pieces of chunks, kv heads). From shapes alone; what does not exist writes nothing.
// ROLES  count: shared-memory histogram of a piece. scan: starts of all (block, piece), and the units. scatter: each
//        warp owns consecutive tiles, a lane a row, and takes places from counters; repeatably, from the warp's own, with ranks inside
//        a step by match.any. The entries of a small piece are put in order in shared memory, so that what leaves are runs, not words.
//        build: a lane holds the ids of its rows, of other tiles than its neighbours', from the count on; one atomic sum a block orders the pieces, in any order.
// SMEM   count: window_blocks counters. scatter: as many, in order for every warp; staged: the shifts of window_blocks runs, and the entries. build: as staged.
// SYNC   two or four launches on one stream. The ctas of build that share a chunk wait until all of them have counted: the host asks for it only
//        where they are on the device at once.
#include "block/sequence.cuh"
#include "block/unit_writer.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

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

// How many pieces of a chunk have added their counts, then the sums of its blocks.
FSA_DEVICE i32* chunk_sums(const IndexParams& p, int kv_head, int chunk) {
    return p.index.plane + ((i64)kv_head * p.layout.num_chunks + chunk) * (p.index.max_blocks + 1);
}

// Prefix sums over sequences by one warp, then tiles and chunks by all.
extern "C" __global__ void __launch_bounds__(1024) index_prepare(const __grid_constant__ IndexParams p) {
    const Layout& layout = p.layout;
    const int lane = threadIdx.x;
    let_next_start();
    if (blockIdx.x > 0) {       // what index_build adds to
        i32* sums = chunk_sums(p, p.first_kv_head, 0) + (i64)(blockIdx.x - 1) * (p.index.max_blocks + 1);
        for (int i = threadIdx.x; i <= p.index.max_blocks; i += blockDim.x) sums[i] = 0;
        return;
    }
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

// A block's counts in consecutive pieces, 0 beyond the last: all loads are under way at once.
constexpr int PIECES_AHEAD = 8;
FSA_DEVICE void load_counts(int (&count)[PIECES_AHEAD], const i32* column, int stride, int piece, int last, bool exists) {
    FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) count[i] = exists && piece + i < last ? column[(i64)(piece + i) * stride] : 0;
}

extern "C" __global__ void __launch_bounds__(1024, 1) index_scan(const __grid_constant__ IndexParams p) {
    const Index& index = p.index;
    const int chunk = blockIdx.x, kv_head = p.first_kv_head + blockIdx.y;
    const int pieces_per_chunk = p.layout.chunk_tiles / index.sub_tiles;
    const int first = chunk * pieces_per_chunk, last = min_i(index.num_subs, first + pieces_per_chunk);
    i32* plane = index.plane + (i64)kv_head * index.num_subs * index.max_blocks;
    auto count_block = [&](int block) {
        int count = 0;
        for (int piece = first; piece < last; piece += PIECES_AHEAD) {
            int here[PIECES_AHEAD];
            load_counts(here, plane + block, index.max_blocks, piece, last, block < index.max_blocks);
            FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) count += here[i];
        }
        return count;
    };
    write_lists(p, chunk, kv_head, count_block, [&](int block, int start) {     // blocks without entries, too: the next piece's start is a run's end
        for (int piece = first; piece < last; piece += PIECES_AHEAD) {
            int here[PIECES_AHEAD];
            load_counts(here, plane + block, index.max_blocks, piece, last, block < index.max_blocks);
            FSA_UNROLL for (int i = 0; i < PIECES_AHEAD; ++i) {
                if (block < index.max_blocks && piece + i < last) plane[(i64)(piece + i) * index.max_blocks + block] = start;
                start += here[i];
            }
        }
    });
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

// Where all of a piece's ids fit in the registers of a cta and all pieces of a chunk on the device at once, one kernel does it all, and reads the ids once.
// A cta counts, has its places in the blocks' lists from an atomic sum for each, puts its entries in order, and when all pieces of the chunk have
// counted it knows where the lists start.
constexpr int BUILD_THREADS = 512, HELD_PARTS = 2;      // of IDS_AHEAD ids, each lane: of two rows, or of one that is longer
constexpr int COUNTS_AHEAD = 4;      // of a lane, under way at once
constexpr int STAGED_RANK_SHIFT = 10;                   // a staged entry: row of the piece, rank, four times the block from bit 16 on

extern "C" __global__ void __launch_bounds__(BUILD_THREADS, 2) index_build(const __grid_constant__ IndexParams p) {
    extern __shared__ i32 places[];     // [blocks] counts, then starts of runs; [32] a lane's count of what is no entry; shifts [blocks]; entries
    const Index& index = p.index;
    const int piece = blockIdx.x, kv_head = p.first_kv_head + blockIdx.y, blocks = index.max_blocks, topk = index.topk;
    const int pieces_per_chunk = p.layout.chunk_tiles / index.sub_tiles, chunk = piece / pieces_per_chunk, chunk_first = chunk * pieces_per_chunk;
    const int lane = threadIdx.x & 31;
    i32 *shifts = places + blocks + 32, *sums = chunk_sums(p, kv_head, chunk) + 1;
    u32* stage = (u32*)(shifts + blocks);
    const u32 counters = shared_address(places), entry_base = shared_address(stage);
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) places[i] = 0;
    wait_for_previous();
    // A tile has 32 lanes, or 64 where a row has two parts, by fours: a warp counts for rows of all over the piece, because rows side by side list the
    // same blocks, and lanes that count the same block wait for each other.
    const bool is_long = topk > IDS_AHEAD;
    const int number = piece * index.sub_tiles + (threadIdx.x / 4 & (index.sub_tiles - 1)), lanes_log = 33 - __clz(index.sub_tiles);    // a power of two
    auto first_row = [&]() {    // has no register of its own
        const int thread = thread_number();
        return (thread & 3) + (thread >> lanes_log << 2);
    };
    Tile t = {};
    if (number < p.layout.max_tiles) t = p.layout.tiles[number];        // that does not exist: no rows
    const DenseRule rule = dense_rule(t, index.has_dense);
    const i64 head_row = (i64)kv_head * p.layout.total_q + t.token;
    const bool vectors = topk % 4 == 0 && ((u64)index.topk_indices & 15) == 0;
    int held[HELD_PARTS][IDS_AHEAD];
    FSA_UNROLL for (int part = 0; part < HELD_PARTS; ++part) {
        const int row = first_row() + (is_long ? 0 : part * 32);
        load_ids(held[part], index.topk_indices + (head_row + row) * topk, is_long ? part * IDS_AHEAD : 0, topk, row < t.rows, vectors);
    }
    __syncthreads();
    const u32 range_begin = rule.enabled, no_offset = 4 * (blocks + lane);
    int rank = 0;
    u32 dense = 0;
    FSA_UNROLL for (int part = 0; part < HELD_PARTS; ++part) {
        const int row = first_row() + (is_long ? 0 : part * 32), own = (t.position + row) / BLOCK_SIZE;
        const u32 range_size = rule.enabled ? rule.first_local - 1 : own + 1;
        FSA_UNROLL for (int i = 0; i < IDS_AHEAD; i += COUNTS_AHEAD) {
            u32 offset[COUNTS_AHEAD], place[COUNTS_AHEAD];
            FSA_UNROLL for (int j = 0; j < COUNTS_AHEAD; ++j) {
                const int id = held[part][i + j];
                const bool gathered = (u32)id - range_begin < range_size;
                offset[j] = gathered && rank < index.slots ? 4 * (t.block_base + id) : no_offset;
                place[j] = count_shared(counters + offset[j]);
                dense |= shift_left(2, id - rule.first_local) | (id == 0);
                rank += gathered;
            }
            asm volatile("" : "+r"(dense), "+r"(rank));     // done with these ids
            FSA_UNROLL for (int j = 0; j < COUNTS_AHEAD; ++j) {
                held[part][i + j] = (int)(place[j] << 16 | offset[j]);
                asm volatile("" : "+r"(held[part][i + j]));     // in one register from here on
            }
        }
        if (!is_long || part + 1 == HELD_PARTS) {
            // Of the local blocks those that exist. A row has more gathered blocks than slots only if all are gathered; the last is the one without.
            u32 info = rule.enabled ? dense & (low_bits(own - rule.first_local + 2) | 1) : 0;
            if (row < t.rows) {
                if (rank > index.slots) info |= (u32)(index.topk_indices[(head_row + row) * topk + topk - 1] + 1) << RowInfo::SPILLED_SHIFT;
                index.row_info[head_row + row] = info | (u32)min_i(rank, index.slots) << RowInfo::PARTIALS_SHIFT;
            }
            rank = 0;
            dense = 0;
        }
    }
    __syncthreads();
    const int total = scan_blocks(blocks, [&](int block, int& before) {
        const int count = places[block];
        before = count > 0 ? atomicAdd(sums + block, count) : 0;
        return count;
    }, [&](int block, int start, int before) {
        places[block] = start;
        shifts[block] = before - start;
    });
    u32* arrived = (u32*)(sums - 1);
    if (threadIdx.x == 0) add_release(arrived, 1);
    const int piece_token = p.layout.tiles[piece * index.sub_tiles].token;
    u32 word = 0;
    FSA_UNROLL for (int part = 0; part < HELD_PARTS; ++part) {
        if (!is_long || part == 0) word = t.token - piece_token + first_row() + (is_long ? 0 : part * 32);
        FSA_UNROLL for (int i = 0; i < IDS_AHEAD; ++i) {
            const u32 kept = (u32)held[part][i], offset = kept & 0xffff, place = kept >> 16;
            const bool keep = offset < 4 * (u32)blocks;
            store_shared_if(keep, entry_base + 4 * (load_shared_word(counters + offset) + place), word + (offset << 16));
            if (keep) word += 1 << STAGED_RANK_SHIFT;
        }
    }
    if (threadIdx.x == 0) {
        const u32 all = min_i(index.num_subs - chunk_first, pieces_per_chunk);
        while (load_relaxed(arrived) < all) {}
        load_acquire(arrived);
    }
    __syncthreads();
    scan_blocks(blocks, [&](int block, int& sum) { return sum = __ldcg(sums + block); }, [&](int block, int start, int sum) {
        shifts[block] += start;
        places[block] = sum;
    });
    const int chunk_token = p.layout.chunk_token[chunk];
    u32* entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots;
    const u32 token = p.layout.tiles[piece * index.sub_tiles].token - chunk_token;
    _Pragma("unroll 4") for (int place = threadIdx.x; place < total; place += blockDim.x) {
        const u32 word = stage[place], row = word & ((1 << STAGED_RANK_SHIFT) - 1), rank = word >> STAGED_RANK_SHIFT & 63;
        entries[place + *(const i32*)((const char*)shifts + (word >> 16))] = token + row | rank << 24;
    }
    if (piece == chunk_first) write_lists(p, chunk, kv_head, [&](int block) { return block < blocks ? places[block] : 0; }, [](int, int) {});
}
