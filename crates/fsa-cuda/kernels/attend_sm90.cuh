// WHAT   Selected attention forward, KV-outer: one block of keys against every row that chose it. Each (row, block) pair
//        gets a softmax of its own; the normalised partial of 16 or 12 bits an element and its log2-sum-exp go to the row's slot.
// GRID   (units of the chunk, query heads of the launch). A unit is at most a full unit's rows of one block (index.cuh); the last ctas
//        have none and leave. Heads are the slow axis, so that one head's queries stay in L2.
// ROLES  One warpgroup, 64 gathered rows a step; the ctas of an SM hide each other's latency.
// SMEM   key tile, value tile, QUERY_STAGES query tiles; the largest value that each warp found.
// SYNC   cp.async groups in order: keys + first queries, values, then one group per query tile. One barrier per tile makes a
//        query tile visible to wgmma and tells that the previous tile's stage is free. Rows see every key of the block
//        (block/sequence.cuh), so there is no mask.
#include "block/partial_rows.cuh"
#include "block/sequence.cuh"
#include "block/softmax.cuh"
#include "ptx/wgmma.cuh"
#include "tile/swizzled_tile.cuh"

// Keys per score tile: bounded so that scores, output and fragments fit in registers.
constexpr int STEP_KEYS = BLOCK_SIZE < 128 ? BLOCK_SIZE : (HEAD_DIM <= 128 ? 128 : 64);
constexpr int KEY_STEPS = BLOCK_SIZE / STEP_KEYS;
#ifndef FSA_QUERY_STAGES
#define FSA_QUERY_STAGES 2
#endif
constexpr int QUERY_STAGES = FSA_QUERY_STAGES;
typedef SwizzledTile<BLOCK_SIZE> KeyTile;
typedef SwizzledTile<TILE_ROWS> QueryTile;
constexpr int TILE_BYTES = 2 * KeyTile::BYTES + QUERY_STAGES * QueryTile::BYTES;
// A word per warp behind the tiles: a static variable would take a kilobyte because of their alignment, and three ctas no longer 196 KB, which costs 7 %.
constexpr int SMEM_BYTES = TILE_BYTES + (PACKS_PARTIALS ? WARPGROUP / 32 * 4 : 0);
static_assert(SMEM_BYTES <= 227 * 1024, "key, value and query tiles fit in shared memory");
// Resident ctas per SM: 228 KB of shared memory, and at most 3 for the sake of registers.
constexpr int CTAS_BY_SMEM = 228 * 1024 / (SMEM_BYTES + 1024);
constexpr int MAX_CTAS = HEAD_DIM <= 128 && KEY_STEPS == 1 ? (QUERY_STAGES == 1 ? 4 : 3) : 2;
constexpr int ATTEND_CTAS = CTAS_BY_SMEM < MAX_CTAS ? CTAS_BY_SMEM : MAX_CTAS;

template <bool VALUE>
struct Flag {
    static constexpr bool value = VALUE;
};

extern "C" __global__ void __launch_bounds__(WARPGROUP, ATTEND_CTAS) attend(const __grid_constant__ AttendParams p) {
    extern __shared__ __align__(1024) char shared[];
    let_next_start();
    const Index& index = p.index;
    const int head = p.first_head + blockIdx.y, kv_head = head / p.group_size;
    const i64 list = (i64)kv_head * p.layout.num_chunks + p.chunk;
    const Unit* found = find_unit(index, list, blockIdx.x);
    if (found == nullptr) {
        wait_for_previous();
        return;
    }
    const Unit unit = *found;
    const int chunk_token = p.layout.chunk_token[p.chunk];
    const u32* entries = index.entries + ((i64)kv_head * p.layout.total_q + chunk_token) * index.slots + unit.entry_begin;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int low = lane / 4;               // this thread's rows of its warp's 16: low and low + 8
    const u32 query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES;
    const char* queries = tensor_row(p.query, chunk_token, head);
    const i64 head_slots = (i64)blockIdx.y * p.layout.chunk_tiles * TILE_ROWS * index.slots;
    char* partials = (char*)p.partial + head_slots * PARTIAL_BYTES;
    f32* partial_lse = p.partial_lse + head_slots * PARTIAL_NUMBERS;

    // Entry of row lane % 16 of the warp's rows; rows beyond the unit repeat its last one and are not stored.
    auto tile_entry = [&](int first) { return __ldg(entries + min_i(first + warp * 16 + (lane & 15), unit.entry_count - 1)); };
    auto gather = [&](u32 tile, u32 entry) { gather_rows<16, false>(tile, queries, query_row_bytes, nullptr, 0, (int)(entry & 0xffffffu), warp * 16); };

    const u32 key_tile = shared_address(shared), value_tile = key_tile + KeyTile::BYTES, query_tiles = value_tile + KeyTile::BYTES;
    u32 entry = tile_entry(0), next_entry = tile_entry(TILE_ROWS);
    copy_rows<BLOCK_SIZE>(key_tile, p.key, kv_head, unit.kv_row, unit.valid_keys);
    gather(query_tiles, entry);
    copy_commit();
    copy_rows<BLOCK_SIZE>(value_tile, p.value, kv_head, unit.kv_row, unit.valid_keys);
    copy_commit();
    const int tiles = ceil_div(unit.entry_count, TILE_ROWS);
    f32 largest = 0.0f;     // size of a value of the block
    // Attends all tiles. Blocks with values that are large or not finite have a loop of their own: false if it turns out to be needed, before anything is stored.
    const auto attend_tiles = [&](auto is_far) {
        constexpr bool IS_FAR = decltype(is_far)::value;
        FSA_NO_UNROLL for (int tile = 0; tile < tiles; ++tile) {
            const u32 query_tile = query_tiles + (QUERY_STAGES == 2 ? (tile & 1) * QueryTile::BYTES : 0);
            copy_wait<0>();
            fence_async_proxy();
            __syncthreads();
            Piece out[PIECES];
            RowState state_low, state_high;
            FSA_UNROLL for (int step = 0; step < KEY_STEPS; ++step) {
                f32 s[STEP_KEYS / 2];
                wgmma_fence();
                FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k)
                    Wgmma<STEP_KEYS>::shared_shared<0, 0>(s, over_columns<TILE_ROWS>(query_tile, k), over_columns<BLOCK_SIZE>(key_tile, k, step * STEP_KEYS), k != 0);
                wgmma_commit();
                if (QUERY_STAGES == 2 && step == 0 && tile + 1 < tiles)
                    gather(query_tiles + (~tile & 1) * QueryTile::BYTES, next_entry);   // every warp is past the product that read it
                if (PACKS_PARTIALS && !IS_FAR && tile == 0 && step == 0) {
                    largest = ROUNDED_UP * largest_value(value_tile, (u32*)(shared + TILE_BYTES));
                    if (!(largest <= MOST_PLAIN_VALUE)) {
                        wgmma_wait<0>();
                        return false;
                    }
                }
                wgmma_wait<0>();
                wgmma_pin(s);
                if (QUERY_STAGES == 1 && step == KEY_STEPS - 1 && tile + 1 < tiles) {
                    __syncthreads();
                    gather(query_tiles, next_entry);
                }
                if (step == KEY_STEPS - 1) copy_commit();
                const f32 carry_low = softmax_step<STEP_KEYS, false, false>(s, state_low, p.scale_log2, step == 0, NO_LIMIT);
                const f32 carry_high = softmax_step<STEP_KEYS, true, false>(s, state_high, p.scale_log2, step == 0, NO_LIMIT);
                u32 a[STEP_KEYS / 16][4];
                FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
                FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                    if (step > 0) scale_piece(out[piece], carry_low, carry_high);
                    wgmma_fence();
                    FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k)
                        Wgmma<PIECE_COLUMNS>::registers_shared<1>(
                            out[piece], a[k], over_rows<BLOCK_SIZE>(value_tile, step * (STEP_KEYS / 16) + k, piece * PIECE_COLUMNS), step + k != 0);
                    wgmma_commit();
                }
                if (step < KEY_STEPS - 1) wgmma_wait<0>();
            }

            const f32 sum_low = quad_sum(state_low.sum), sum_high = quad_sum(state_high.sum);
            const f32 scale_low = sum_low == 0.0f ? 0.0f : reciprocal_fast(sum_low), scale_high = sum_high == 0.0f ? 0.0f : reciprocal_fast(sum_high);
            const u32 entry_low = __shfl_sync(0xffffffffu, entry, low), entry_high = __shfl_sync(0xffffffffu, entry, low + 8);
            const u32 slot_low = (entry_low & 0xffffffu) * index.slots + (entry_low >> 24), slot_high = (entry_high & 0xffffffu) * index.slots + (entry_high >> 24);
            const int row = tile * TILE_ROWS + warp * 16 + low;
            const bool keep_low = row < unit.entry_count, keep_high = row + 8 < unit.entry_count;
            if (tile == 0) wait_for_previous();     // the buffer's earlier partials are merged
            entry = next_entry;
            next_entry = tile_entry((tile + 2) * TILE_ROWS);
            // One store for the 16 rows of the warp: lane 0 of a quad writes the low row's, lane 1 the high row's.
            const bool is_high = lane & 1, stores_lse = (lane & 2) == 0 && (is_high ? keep_high : keep_low);
            const f32 row_lse = (is_high ? state_high.max : state_low.max) + log2_fast(is_high ? sum_high : sum_low);
            f32* const to_lse = partial_lse + (i64)(is_high ? slot_high : slot_low) * PARTIAL_NUMBERS;
            // Pieces finish in order: one is stored, or looked at, while the others are still being multiplied.
            const auto finish_piece = [&](int piece) {
                if (piece == PIECES - 1) wgmma_wait<0>(); else if (piece == PIECES - 2) wgmma_wait<1>(); else wgmma_wait<2>();
                wgmma_pin(out[piece]);
            };
            if constexpr (PACKS_PARTIALS) {
                char* const rows = partials + (threadIdx.x & 3) * 16;
                char *const to_low = rows + (i64)slot_low * PARTIAL_BYTES, *const to_high = rows + (i64)slot_high * PARTIAL_BYTES;
                PackedRow<false> packed_low;
                PackedRow<true> packed_high;
                f32 factor_low, factor_high;
                if constexpr (IS_FAR) {
                    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) finish_piece(piece);
                    factor_low = packed_low.store_far(to_low, keep_low, out, scale_low);
                    factor_high = packed_high.store_far(to_high, keep_high, out, scale_high);
                } else {
                    factor_low = packed_low.begin(to_low, keep_low, largest * sum_low, scale_low);
                    factor_high = packed_high.begin(to_high, keep_high, largest * sum_high, scale_high);
                    FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                        finish_piece(piece);
                        packed_low.add(piece, out[piece]);
                        packed_high.add(piece, out[piece]);
                    }
                }
                if (stores_lse) store_kept(to_lse, row_lse, is_high ? factor_high : factor_low);
            } else {
                if (stores_lse) store_kept(to_lse, row_lse);
                const FragmentRows rows_low = fragment_rows(partials, slot_low, keep_low), rows_high = fragment_rows(partials, slot_high, keep_high);
                FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                    finish_piece(piece);
                    store_fragment<false>(rows_low, piece, out[piece], scale_low);
                    store_fragment<true>(rows_high, piece, out[piece], scale_high);
                }
            }
        }
        return true;
    };
    if (!attend_tiles(Flag<false>{})) attend_tiles(Flag<true>{});
    copy_wait<0>();
}
