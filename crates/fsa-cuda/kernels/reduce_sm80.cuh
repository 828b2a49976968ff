// WHAT   Second half of selected attention, for every device from sm_80 on: for a tile of 64 query rows of one head, the dense
//        blocks (sink, local, and the rare block for which a row had no slot left) by online softmax, then the gathered
//        partials merged by their log2-sum-exp; writes out and the natural-log lse. A row without a key gets 0 and -inf.
// GRID   (tiles of the chunk, query heads of the launch), as reduce_sm90.cuh.
// ROLES  Four warps of 16 rows. The accumulators of the dense part are in the layout of the partials, which stream through registers.
// SMEM   query tile, key tile, value tile of at most 64 keys (32 from head_dim 192 on, so that a cta fits devices of 100 KB);
//        log2-sum-exps of the tile's partials [64, slots], which become weights.
// SYNC   cp.async groups alternate keys, values (block/dense_blocks.cuh): the next keys load under softmax and second product, the
//        next values under the next first product. Barriers around each product; the merge needs none (block/merge.cuh).
#include "block/merge.cuh"
#include "block/piece_products.cuh"

constexpr int MAX_STEP_KEYS = HEAD_DIM <= 128 ? 64 : 32;
constexpr int STEP_KEYS = BLOCK_SIZE < MAX_STEP_KEYS ? BLOCK_SIZE : MAX_STEP_KEYS;
constexpr int REDUCE_CTAS = HEAD_DIM <= 128 ? 3 : 2;
typedef SwizzledTile<TILE_ROWS> QueryTile;
typedef SwizzledTile<STEP_KEYS> KeyTile;

// The products of a step, for dense_blocks.
struct StepProducts {
    static constexpr int STEP_KEYS = ::STEP_KEYS;

    static FSA_DEVICE void arrived() {}
    static FSA_DEVICE void scores(f32 (&s)[STEP_KEYS / 2], u32 query_tile, u32 key_tile) {
        multiply_tiles<STEP_KEYS, TILE_ROWS, STEP_KEYS>(s, tall_address(query_tile, threadIdx.x / 32 * 16), wide_address(key_tile, 0));
    }
    static FSA_DEVICE void add_values(Piece (&out)[PIECES], const u32 (&a)[STEP_KEYS / 16][4], u32 value_tile) {
        const u32 values = tall_address(value_tile, 0);
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece)
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) multiply_piece<STEP_KEYS>(out[piece], a[k], values + k * 16 * 128, piece);
    }
};

extern "C" __global__ void __launch_bounds__(WARPGROUP, REDUCE_CTAS) reduce(const __grid_constant__ ReduceParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ DenseContext c;
    __shared__ DenseSteps<STEP_KEYS> steps;
    const int tile_number = p.chunk * p.layout.chunk_tiles + blockIdx.x;
    if (tile_number >= p.layout.max_tiles) return;
    const Tile tile = p.layout.tiles[tile_number];
    if (tile.rows == 0) return;
    const int head = p.first_head + blockIdx.y, kv_head = head / p.group_size, low = c.row_low(), high = low + 8;
    if (threadIdx.x == 0) {
        c.query_tile = shared_address(shared);
        c.key_tile = c.query_tile + QueryTile::BYTES;
        c.value_tile = c.key_tile + KeyTile::BYTES;
        c.tile = tile;
        c.head = head;
        c.kv_head = kv_head;
    }
    const u32* row_info = p.index.row_info + (i64)kv_head * p.layout.total_q + tile.token;
    const RowInfo info_low = {low < tile.rows ? row_info[low] : 0}, info_high = {high < tile.rows ? row_info[high] : 0};
    copy_tile<TILE_ROWS>(shared_address(shared), p.query, head, tile.token, tile.rows);
    c.infos[low] = info_low.word;
    c.infos[high] = info_high.word;
    const u32 all = steps.fill(tile, info_low.word | info_high.word);       // with barriers: c is there, too
    f32* lse = (f32*)(shared + QueryTile::BYTES + 2 * KeyTile::BYTES);      // they arrive while the dense blocks are computed
    copy_lse(lse, p, c, low, info_low.partials());
    copy_lse(lse, p, c, high, info_high.partials());

    TileState state;
    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) clear(state.out[piece]);
    state.low = state.high = {neg_inf(), 0.0f};
    const int dense_steps = steps.count(c.tile, __popc(all & 0x7f));
    dense_blocks<StepProducts>(state, p, c, steps.keys, dense_steps, [&](int n, RowInfo info) { return info.lists_dense(steps.bits[n]); });
    if (all >> RowInfo::SPILLED_SHIFT != 0) spilled_blocks<StepProducts>(state, p, c, steps);
    copy_wait<0>();
    __syncwarp();
    merge_tile(state, p, c, lse);
}
