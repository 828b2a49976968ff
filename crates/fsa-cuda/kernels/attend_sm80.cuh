// WHAT   Selected attention forward, KV-outer, for every device from sm_80 on: one block of keys against every row that chose it.
//        Each (row, block) pair gets a softmax of its own; the normalised 16-bit partial and its log2-sum-exp go to the row's slot.
// GRID   (ctas, query heads of the launch). A cta takes every gridDim.x-th unit of the chunk; a unit is at most a full unit's rows
//        of one block (index.cuh). Heads are the slow axis, so that one head's queries stay in L2.
// ROLES  Four warps of 16 gathered rows. A warp gathers, multiplies and stores its own rows: where the whole block is in shared
//        memory, warps meet once per unit and hide each other's latency afterwards.
// SMEM   key tile, value tile, one query tile; at most 95 KB, so that a cta fits devices of 100 KB (sm_86, sm_89). Tiles hold the
//        whole block if that fits, else STEP_KEYS keys and values, which every tile of rows streams through them again.
// SYNC   cp.async groups. Whole block: one barrier when keys and values are there; from then on a warp waits for its own copies, and
//        gathers the next queries as soon as the current ones are in registers. Streamed: keys and values alternate, the next
//        keys load under softmax and second product, the next values under the next first product; four barriers a step.
#include "block/piece_products.cuh"
#include "block/sequence.cuh"
#include "block/softmax.cuh"
#include "block/unit_list.cuh"
#include "tile/warp_rows.cuh"

typedef SwizzledTile<TILE_ROWS> QueryTile;
constexpr int MAX_SMEM_BYTES = 95 * 1024;       // 99 KB per cta, less the 4 KB that the host leaves alone
constexpr bool RESIDENT = 2 * SwizzledTile<BLOCK_SIZE>::BYTES + QueryTile::BYTES <= MAX_SMEM_BYTES;
// Keys per score tile: bounded by registers where the block is resident, by shared memory where it is streamed.
constexpr int MAX_STEP_KEYS = RESIDENT ? (HEAD_DIM <= 128 ? 128 : 64) : (HEAD_DIM <= 128 ? 64 : 32);
constexpr int STEP_KEYS = BLOCK_SIZE < MAX_STEP_KEYS ? BLOCK_SIZE : MAX_STEP_KEYS;
constexpr int KEY_STEPS = BLOCK_SIZE / STEP_KEYS;
constexpr int LOADED_KEYS = RESIDENT ? BLOCK_SIZE : STEP_KEYS;
typedef SwizzledTile<LOADED_KEYS> KeyTile;
constexpr int SMEM_BYTES = 2 * KeyTile::BYTES + QueryTile::BYTES;
static_assert(SMEM_BYTES <= MAX_SMEM_BYTES, "key, value and query tile fit in shared memory");
// Queries wait in registers, which frees their tile for the next ones, where there are registers for them.
constexpr bool QUERIES_IN_REGISTERS = HEAD_DIM <= (KEY_STEPS == 1 ? 192 : 128);
// Resident ctas per SM of the largest device: 228 KB of shared memory, of which each takes two more for AttendUnit and the system.
constexpr int CTAS_BY_SMEM = 228 * 1024 / (SMEM_BYTES + 2 * 1024);
constexpr int MAX_CTAS = HEAD_DIM <= 128 && KEY_STEPS == 1 ? (STEP_KEYS <= 64 ? 4 : 3) : 2;
constexpr int ATTEND_CTAS = CTAS_BY_SMEM < MAX_CTAS ? CTAS_BY_SMEM : MAX_CTAS;
typedef u32 Queries[QUERIES_IN_REGISTERS ? HEAD_DIM / 16 : 1][4];
typedef f32 Scores[STEP_KEYS / 2];

// What a cta works on, in shared memory.
struct AttendUnit : CtaUnits {
    int tiles;
    const char* queries;            // of the chunk's first row
    u32 query_row_bytes;

    // One thread: before the first unit.
    FSA_DEVICE void open(const AttendParams& p) {
        const int head = p.first_head + blockIdx.y;
        CtaUnits::open(p.layout, p.index, head, p.group_size, p.chunk);
        queries = tensor_row(p.query, chunk_token, head);
        query_row_bytes = (u32)p.query.row_stride * ELEMENT_BYTES;
    }
    // One thread: goes to the next unit.
    FSA_DEVICE void advance(const AttendParams& p) {
        if (CtaUnits::advance(p.layout, p.index)) tiles = ceil_div(unit.entry_count, TILE_ROWS);
    }
    // Entry of row lane % 16 of the warp's rows; rows beyond the unit repeat its last one and are not stored.
    FSA_DEVICE u32 entry(int tile) const {
        const int thread = thread_number(), row = tile * TILE_ROWS + thread / 32 * 16 + (thread & 15);
        return __ldg(entries + min_i(row, unit.entry_count - 1));
    }
    FSA_DEVICE void gather(u32 query_tile, u32 entry) const {
        gather_warp_rows<16>(query_tile, queries, query_row_bytes, (int)(entry & 0xffffffu), threadIdx.x / 32 * 16);
    }
    FSA_DEVICE void copy_keys(u32 tile, const Tensor& source, int step) const {
        copy_tile<LOADED_KEYS>(tile, source, kv_head, unit.kv_row + step * LOADED_KEYS, unit.valid_keys - step * LOADED_KEYS);
    }
    // Streamed: the next step's keys or values replace this step's, once every warp is past them. After the last step those of
    // the first follow, for the next tile.
    FSA_DEVICE void copy_next(u32 tile, const Tensor& source, int step, bool more_tiles) const {
        __syncthreads();
        if (step + 1 < KEY_STEPS || more_tiles) copy_keys(tile, source, (step + 1) % KEY_STEPS);
        copy_commit();
    }
};
// Streamed: waits for the older of two groups under way, and for everyone's part of it.
FSA_DEVICE void wait_step() {
    copy_wait<1>();
    __syncthreads();
}

// Where the partials of the thread's two rows go, and what normalises them.
struct PartialRows {
    FragmentRows low, high;
    f32 scale_low, scale_high;

    FSA_DEVICE void store(int piece, const Piece& out) const {
        store_fragment<false>(low, piece, out, scale_low);
        store_fragment<true>(high, piece, out, scale_high);
    }
};
// Stores the log2-sum-exps of the warp's rows of a tile, and finds their partials in the slots that the entries name.
FSA_DEVICE PartialRows partial_rows(const AttendParams& p, const AttendUnit& u, const RowState& low, const RowState& high, int tile, u32 entry) {
    const int lane = threadIdx.x & 31, row = tile * TILE_ROWS + threadIdx.x / 32 * 16 + lane / 4;
    const f32 sum_low = quad_sum(low.sum), sum_high = quad_sum(high.sum);
    const u32 entry_low = __shfl_sync(0xffffffffu, entry, lane / 4), entry_high = __shfl_sync(0xffffffffu, entry, lane / 4 + 8);
    const u32 slots = p.index.slots;
    const u32 slot_low = (entry_low & 0xffffffu) * slots + (entry_low >> 24), slot_high = (entry_high & 0xffffffu) * slots + (entry_high >> 24);
    const bool keep_low = row < u.unit.entry_count, keep_high = row + 8 < u.unit.entry_count;
    const i64 head_slots = (i64)blockIdx.y * p.layout.chunk_tiles * TILE_ROWS * p.index.slots;
    if ((lane & 3) == 0) {
        f32* partial_lse = p.partial_lse + head_slots;
        if (keep_low) store_kept(partial_lse + slot_low, low.max + log2_fast(sum_low));
        if (keep_high) store_kept(partial_lse + slot_high, high.max + log2_fast(sum_high));
    }
    char* partials = (char*)p.partial + head_slots * ROW_BYTES;
    return {fragment_rows(partials, slot_low, keep_low), fragment_rows(partials, slot_high, keep_high),
            sum_low == 0.0f ? 0.0f : reciprocal_fast(sum_low), sum_high == 0.0f ? 0.0f : reciprocal_fast(sum_high)};
}

// Scores of the warp's rows and the keys of a step, from tall and wide addresses; queries from registers, or through them.
FSA_DEVICE void compute_scores(Scores& s, Queries& queries, u32 query_rows, u32 keys) {
    clear(s);
    FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) {
        if (!QUERIES_IN_REGISTERS) load_matrices(queries[0], unit_address<TILE_ROWS>(query_rows, k));
        multiply_rows<STEP_KEYS>(s, queries[QUERIES_IN_REGISTERS ? k : 0], unit_address<LOADED_KEYS>(keys, k));
    }
}
// Columns of a piece: out += probabilities of a step x its values, which start at the tall address `values`.
FSA_DEVICE void add_values(Piece& out, const u32 (&a)[STEP_KEYS / 16][4], u32 values, int piece) {
    FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) multiply_piece<LOADED_KEYS>(out, a[k], values + k * 16 * 128, piece);
}

// All tiles of a unit.
FSA_DEVICE void attend_rows(const AttendParams& p, const AttendUnit& u, u32 shared) {
    const u32 key_tile = shared, value_tile = shared + KeyTile::BYTES, query_tile = shared + 2 * KeyTile::BYTES;
    u32 entry = u.entry(0), next_entry = u.entry(1);
    u.copy_keys(key_tile, p.key, 0);
    u.gather(query_tile, entry);
    copy_commit();
    u.copy_keys(value_tile, p.value, 0);
    copy_commit();
    const u32 query_rows = tall_address(query_tile, threadIdx.x / 32 * 16);
    FSA_NO_UNROLL for (int tile = 0; tile < u.tiles; ++tile) {
        const bool more_tiles = tile + 1 < u.tiles;
        Queries queries;
        Piece out[PIECES];
        FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) clear(out[piece]);
        RowState low = {neg_inf(), 0.0f}, high = low;
        auto gather_next = [&] {    // the warp is done with its part of the query tile
            __syncwarp();
            if (more_tiles) u.gather(query_tile, next_entry);
            if (RESIDENT) copy_commit();
        };
        auto do_step = [&](int step) {
            const int first_key = RESIDENT ? step * STEP_KEYS : 0;
            if (!RESIDENT) wait_step();
            if (QUERIES_IN_REGISTERS && step == 0) {
                FSA_UNROLL for (int k = 0; k < HEAD_DIM / 16; ++k) load_matrices(queries[QUERIES_IN_REGISTERS ? k : 0], unit_address<TILE_ROWS>(query_rows, k));
                gather_next();
            }
            Scores s;
            compute_scores(s, queries, query_rows, wide_address(key_tile, first_key));
            if (!QUERIES_IN_REGISTERS && step == KEY_STEPS - 1) gather_next();
            if (!RESIDENT) u.copy_next(key_tile, p.key, step, more_tiles);
            const f32 carry_low = softmax_step<STEP_KEYS, false, false>(s, low, p.scale_log2, KEY_STEPS == 1, NO_LIMIT);
            const f32 carry_high = softmax_step<STEP_KEYS, true, false>(s, high, p.scale_log2, KEY_STEPS == 1, NO_LIMIT);
            u32 a[STEP_KEYS / 16][4];
            FSA_UNROLL for (int k = 0; k < STEP_KEYS / 16; ++k) to_fragment<STEP_KEYS>(a[k], s, k);
            if (!RESIDENT) wait_step();
            const u32 values = tall_address(value_tile, first_key);
            if constexpr (KEY_STEPS == 1) {     // a piece is done after its step: it takes registers while it is computed only
                const PartialRows rows = partial_rows(p, u, low, high, tile, entry);
                FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                    add_values(out[piece], a, values, piece);
                    rows.store(piece, out[piece]);
                }
            } else {
                FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) {
                    scale_piece(out[piece], carry_low, carry_high);
                    add_values(out[piece], a, values, piece);
                }
            }
            if (!RESIDENT) u.copy_next(value_tile, p.value, step, more_tiles);
        };
        if (RESIDENT) {
            copy_wait<0>();
            if (tile == 0) __syncthreads(); else __syncwarp();
        }
        if constexpr (KEY_STEPS == 1) do_step(0);
        else FSA_NO_UNROLL for (int step = 0; step < KEY_STEPS; ++step) do_step(step);
        if constexpr (KEY_STEPS > 1) {
            const PartialRows rows = partial_rows(p, u, low, high, tile, entry);
            FSA_UNROLL for (int piece = 0; piece < PIECES; ++piece) rows.store(piece, out[piece]);
        }
        entry = next_entry;
        next_entry = u.entry(tile + 2);
    }
    copy_wait<0>();
}

extern "C" __global__ void __launch_bounds__(WARPGROUP, ATTEND_CTAS) attend(const __grid_constant__ AttendParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ AttendUnit u;
    if (threadIdx.x == 0) u.open(p);
    while (true) {
        if (threadIdx.x == 0) u.advance(p);
        __syncthreads();
        if (!u.exists()) return;
        attend_rows(p, u, shared_address(shared));
        __syncthreads();        // all are past the keys, the values and the record
    }
}
