// WHAT   From lists of blocks to masks (struct BlockMask): the blocks of every row as bits, and for every tile of rows the steps of keys of which some row lists
//        a block. Any i32 in a list is safe: ids that the sequence does not have are no blocks. An id that comes twice counts once. And where values are not
//        finite, which few are: who finds none need not look at those of a step that some row does not list.
// GRID   (tiles of tokens, kv heads), from shapes; a cta without a tile looks at values alone.
// ROLES  All threads look at some rows of value. A warp per row of a tile, its lanes have the ids; then the first warp finds the steps, one per lane.
// SMEM   What any row of the tile lists, and what every row does.
// SYNC   One barrier for every VALUE_ROWS rows of value, two behind them. May start before the kernel ahead of it has ended, if that started behind the tables:
//        waits for it before it reads lists or writes.
#include "block/mask_steps.cuh"

constexpr int MASK_THREADS = 128, MASK_WARPS = MASK_THREADS / 32, MAX_WORDS = 64;      // no more words than ids in a row
constexpr int MASK_AHEAD = 8;       // rows of a warp whose ids are under way together: they are all that a short call waits for

// Bits of the word that an id belongs to.
FSA_DEVICE u32 bit_of(int id, int word) { return id >> 5 == word ? 1u << (id & 31) : 0u; }

struct TileBlocks {
    u32 any[MAX_WORDS], all[MAX_WORDS];
};

// Of the rows of a warp: their bits to memory. Lane i has the words i and i + 32.
FSA_DEVICE void find_blocks(const BlockMaskParams& p, const BandTile& t, int kv_head, TileBlocks& tile) {
    const BlockMask& mask = p.band.mask;
    const int lane = threadIdx.x & 31, blocks = ceil_div(t.keys, BLOCK_SIZE);
    const i64 first_row = (i64)kv_head * p.band.total_q + t.token;
    u32 any[2] = {0, 0}, all[2] = {~0u, ~0u};
    FSA_NO_UNROLL for (int ahead = threadIdx.x / 32; ahead < t.tokens; ahead += MASK_AHEAD * MASK_WARPS) {
        int ids[MASK_AHEAD][2];
        FSA_UNROLL for (int i = 0; i < MASK_AHEAD; ++i)
            FSA_UNROLL for (int half = 0; half < 2; ++half) {
                const int token = ahead + i * MASK_WARPS, place = lane + 32 * half;
                const int id = token < t.tokens && place < p.topk ? p.topk_indices[(first_row + token) * p.topk + place] : -1;
                ids[i][half] = id < blocks ? id : -1;
            }
        FSA_UNROLL for (int i = 0; i < MASK_AHEAD; ++i) {
            const int token = ahead + i * MASK_WARPS;
            if (token >= t.tokens) break;
            FSA_UNROLL for (int half = 0; half < 2; ++half) {
                u32 mine = 0;
                FSA_NO_UNROLL for (int word = 32 * half; word < min_i(mask.words, 32 * half + 32); ++word) {
                    const u32 bits = __reduce_or_sync(0xffffffffu, bit_of(ids[i][0], word) | bit_of(ids[i][1], word));
                    if (lane == word - 32 * half) mine = bits;
                }
                if (lane + 32 * half < mask.words) mask.rows[(first_row + token) * mask.words + lane + 32 * half] = mine;
                any[half] |= mine;
                all[half] &= mine;
            }
        }
    }
    FSA_UNROLL for (int half = 0; half < 2; ++half) {
        atomicOr(&tile.any[lane + 32 * half], any[half]);
        atomicAnd(&tile.all[lane + 32 * half], all[half]);
    }
}

// Whether a value of a group of rows is not finite, in all threads.
FSA_DEVICE bool is_nonfinite(const BlockMaskParams& p, int kv_head, int group) {
    constexpr int LOADS = VALUE_ROWS * PIECES_PER_ROW / MASK_THREADS;
    static_assert(VALUE_ROWS * PIECES_PER_ROW % MASK_THREADS == 0, "all threads have as many pieces");
    const int rows = p.band.cu_keys[p.band.batch];      // total_keys may be a bound
    Vec4 v[LOADS];
    FSA_UNROLL for (int i = 0; i < LOADS; ++i) {
        const int piece = threadIdx.x + i * MASK_THREADS, row = group * VALUE_ROWS + piece / PIECES_PER_ROW;
        v[i] = row < rows ? load_global(tensor_row(p.value, row, kv_head) + piece % PIECES_PER_ROW * 16) : Vec4{0, 0, 0, 0};
    }
    u32 sum = 0;
    FSA_UNROLL for (int i = 0; i < LOADS; ++i) sum = taint(taint(taint(taint(sum, v[i].x), v[i].y), v[i].z), v[i].w);
    return __syncthreads_or(has_nonfinite(sum));
}

extern "C" __global__ void __launch_bounds__(MASK_THREADS) block_mask(const __grid_constant__ BlockMaskParams p) {
    __shared__ TileBlocks tile;
    const int number = blockIdx.x * p.band.head_tiles, kv_head = blockIdx.y;        // all tiles of these tokens list the same
    const int groups = p.value.data == nullptr ? 0 : p.band.mask.value_groups;
    // Most ctas have one group of values at most. No kernel ahead writes them.
    int group = blockIdx.x;
    bool found = group < groups && is_nonfinite(p, kv_head, group);
    const BandTile t = find_band_tile(p.band, number, kv_head);
    wait_for_previous();
    FSA_NO_UNROLL while (group < groups) {
        if (threadIdx.x == 0) p.band.mask.nonfinite[(i64)kv_head * groups + group] = found;
        group += gridDim.x;
        found = group < groups && is_nonfinite(p, kv_head, group);
    }
    if (t.tokens == 0) return;
    if (threadIdx.x < MAX_WORDS) {
        tile.any[threadIdx.x] = 0;
        tile.all[threadIdx.x] = ~0u;
    }
    __syncthreads();
    find_blocks(p, t, kv_head, tile);
    __syncthreads();
    if (threadIdx.x < 32)
        list_steps(p.band.mask, {t.position, t.last_position(), band_interval(p.band, t).end, p.window, p.step_keys}, listed_steps(p.band, number, kv_head), tile.any, tile.all);
}
