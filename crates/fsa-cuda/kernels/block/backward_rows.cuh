// The kernels of the backward before and after the main one, which the host launches around it: what it needs of rows, and of blocks of keys where it is the
// first of the launches that share their sums; then gradients of rows, and where it was the last of these launches, of keys.
#pragma once
#include "block/query_sums.cuh"
#include "block/row_stats.cuh"
#include "block/sequence.cuh"
#include "tile/swizzled_tile.cuh"

// Sums of grad_query: 1 takes scaled f16, 0 f32.
#ifndef FSA_SCALED_SUMS
#define FSA_SCALED_SUMS 0
#endif
constexpr bool SCALED_SUMS = FSA_SCALED_SUMS != 0;
// grad_query of a (row, block) pair: 0 adds it to rows in L2 (unordered), 1 stores it as a 16-bit partial in the row's slot, summed in slot order.
#ifndef FSA_QUERY_PARTIALS
#define FSA_QUERY_PARTIALS 0
#endif
constexpr bool QUERY_PARTIALS = FSA_QUERY_PARTIALS != 0;
static_assert(!(QUERY_PARTIALS && SCALED_SUMS), "partials are not added up in memory");
// Heads of a group that a unit takes: they lie side by side in tiles of rows, and in statistics and sums of grad_query in memory.
#ifndef FSA_TILE_HEADS
#define FSA_TILE_HEADS 1
#endif
constexpr int TILE_HEADS = FSA_TILE_HEADS;
static_assert(TILE_HEADS == 1 || SCALED_SUMS, "only scaled sums have strides");
static_assert(8 % TILE_HEADS == 0, "every head has a warp of backward_prepare");
constexpr int QUERY_SUM_BYTES = HEAD_DIM * (SCALED_SUMS ? 2 : 4);      // of a row
constexpr int ROW_WORDS = HEAD_DIM / 4;     // pieces of four f32 sums
// In each kernel file, because the order of its sums is its own: four neighbouring columns of the 16 that a quad loaded, from what the
// lane loaded, and the first of them.
struct NaturalColumns {
    Vec4 sums;
    int first;
};
FSA_DEVICE NaturalColumns natural_columns(Vec4 v);

// Whether a launch does a block: where the sums of all keys have no room, ranges of keys take turns.
FSA_DEVICE bool in_range(const BackwardParams& p, int kv_row) { return kv_row >= p.first_key && kv_row < p.end_key; }

// Statistics of a row of the launch's head `launch_head`, `token` being relative to the chunk. The caller's are those of all heads and tokens. From
// parameters and memory alone: no register holds anything for it over a loop.
FSA_DEVICE RowStats* row_stats_at(const BackwardParams& p, int launch_head, int token) {
    RowStats* stats = (RowStats*)p.row_stats + ((i64)launch_head * p.stats_head + (i64)token * p.stats_row);
    return p.given_stats ? stats + ((i64)p.first_head * p.stats_head + p.layout.chunk_token[p.chunk]) : stats;
}

// Sums of grad_query of a row of the launch's head `launch_head`, `row` being relative to the chunk, which begins at row `first`: in memory of their own, or where
// the gradient will be.
FSA_DEVICE char* query_sums(const BackwardParams& p, int launch_head, int first, i64 row) {
    if constexpr (!SCALED_SUMS) return (char*)p.grad_query + ((i64)launch_head * p.rows + row) * QUERY_SUM_BYTES;
    return (char*)p.grad_query + (row + (p.in_place ? first : 0)) * p.query_row_bytes + launch_head * p.query_head_bytes;
}

// 16 bytes of a row that a gradient is added to, as words in fragment order; zeros for a row that is only written. All lanes of a quad take part.
FSA_DEVICE Vec4 words_before(const char* row, bool accumulate, bool present) {
    Vec4 v = {0, 0, 0, 0};
    if (!accumulate) return v;
    if (present) v = load_global_once(row);
    return transpose_quad(v);
}
FSA_DEVICE u32 add_pair(u32 word, f32 lo, f32 hi, f32 scale) { return pack2(fmaf(lo, scale, unpack_lo(word)), fmaf(hi, scale, unpack_hi(word))); }

// Stores four neighbouring columns of f32 sums, or adds them to what is there; rounded once.
FSA_DEVICE void store_columns(char* target, Vec4 sums, f32 scale, bool accumulate) {
    u32 x = 0, y = 0;
    if (accumulate) {
        x = ((const u32*)target)[0];
        y = ((const u32*)target)[1];
    }
    x = add_pair(x, __uint_as_float(sums.x), __uint_as_float(sums.y), scale);
    y = add_pair(y, __uint_as_float(sums.z), __uint_as_float(sums.w), scale);
    store_global8(target, x, y);
}

// The scale of a launch's head, the same in all kernels and ctas of the launch.
FSA_DEVICE SumScale launch_scale(const BackwardParams& p, int launch_head) {
    const int head = p.first_head + launch_head;
    return sum_scale(log2_bound(p.row_bounds[p.given_stats ? 0 : head], p.key_bounds[head / p.group_size]));
}

FSA_DEVICE f32 dot_pairs(f32 sum, u32 a, u32 b) { return fmaf(unpack_lo(a), unpack_lo(b), fmaf(unpack_hi(a), unpack_hi(b), sum)); }

// The kernels below take places of ctas of the main one for as long as their loads take, so no load waits for another that it does not need.
// A cta has rows of TILE_HEADS heads of the launch, `rows` of all together, or blocks of a kv head; those of blocks come last, where the grid has them.
FSA_DEVICE int block_cta(const BackwardParams& p, int rows) { return (int)blockIdx.x - ceil_div(p.rows, rows / TILE_HEADS); }
// The launch's first head of a cta of rows, the last first: the main kernel goes from the first to the last, so it finds the first in L2 and leaves the last there.
FSA_DEVICE int rows_head() { return (gridDim.y - 1 - blockIdx.y) * TILE_HEADS; }
// kv heads of the launch. Where it has a part of a group, one.
FSA_DEVICE int launch_kv_heads(const BackwardParams& p) { return max_i(gridDim.y * TILE_HEADS / p.group_size, 1); }

// Rows of the launch.
struct ChunkRows {
    int first, end;
};
FSA_DEVICE ChunkRows chunk_rows(const BackwardParams& p) {
    if (p.layout.num_chunks == 1) return {0, p.layout.total_q};
    return {p.layout.chunk_token[p.chunk], p.layout.chunk_token[p.chunk + 1]};
}

// Rows of key and value of a block; none where there is no such block.
struct KeyRows {
    int first, count;
};
FSA_DEVICE KeyRows block_rows(const Layout& layout, int block) {
    const int s = find_sequence(layout.block_base, layout.batch, block), end = layout.cu_seqlens_kv[s + 1];
    const int first = layout.cu_seqlens_kv[s] + (block - layout.block_base[s]) * BLOCK_SIZE;
    return {first, max_i(min_i(BLOCK_SIZE, end - first), 0)};
}
// A block of the launch's kv head blockIdx.y.
struct KeyBlock {
    int row, keys;      // of key and value; no keys where there is no such block, or the launch does not do it
    int sums;           // row of its sums, LISTED_BY_NONE or LISTED_BY_ONE_UNIT
    FSA_DEVICE i64 first_sum(const BackwardParams& p) const { return (blockIdx.y * p.sum_rows + sums) * HEAD_DIM; }
};
FSA_DEVICE KeyBlock key_block(const BackwardParams& p, int block) {
    const i64 kv_head = p.first_head / p.group_size + blockIdx.y;
    const KeyRows rows = block_rows(p.layout, block);
    const i32* sums = p.index.block_sums;
    return {rows.first, in_range(p, rows.first) ? rows.count : 0, sums ? sums[kv_head * p.index.max_blocks + block] : rows.first};
}

// Zeros for the rows' sums of grad_query, and their statistics, unless they are the caller's. A lane per 16 bytes of a row, eight rows a warp whose loads are
// under way together.
constexpr int DELTA_LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int DELTA_STEPS = 8 * DELTA_LANES / 32, PREPARE_ROWS = 64, PREPARE_BLOCKS = 8;    // of a cta
FSA_DEVICE f32 sum_lanes(f32 x) {
    FSA_UNROLL for (int delta = DELTA_LANES / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(0xffffffffu, x, delta);
    return x;
}
FSA_DEVICE void prepare_rows(const BackwardParams& p) {
    const ChunkRows rows = chunk_rows(p);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, piece = lane % DELTA_LANES;
    const int launch_head = rows_head() + warp % TILE_HEADS, head = p.first_head + launch_head;
    const int first = rows.first + blockIdx.x * (PREPARE_ROWS / TILE_HEADS) + warp / TILE_HEADS * 8 + lane / DELTA_LANES;
    auto token = [&](int step) { return first + step * (32 / DELTA_LANES); };
    auto exists = [&](int step) { return piece < HEAD_DIM / 8 && token(step) < rows.end; };
    auto clear = [&](int step) {
        char* sums = query_sums(p, launch_head, rows.first, token(step) - rows.first) + piece * 16;
        FSA_UNROLL for (int at = 0; at < QUERY_SUM_BYTES; at += ROW_BYTES) store_global(sums + at, Vec4{0, 0, 0, 0});
    };
    if (p.given_stats) {
        FSA_UNROLL for (int step = 0; step < DELTA_STEPS; ++step) if (!QUERY_PARTIALS && exists(step)) clear(step);
        return;
    }
    Vec4 out[DELTA_STEPS], grad[DELTA_STEPS];
    f32 lse[DELTA_STEPS], grad_lse[DELTA_STEPS];
    FSA_UNROLL for (int step = 0; step < DELTA_STEPS; ++step) {
        out[step] = grad[step] = {0, 0, 0, 0};
        lse[step] = grad_lse[step] = 0.0f;
        if (!exists(step)) continue;
        out[step] = load_global_once(tensor_row(p.out, token(step), head) + piece * 16);
        grad[step] = load_global(tensor_row(p.grad_out, token(step), head) + piece * 16);
        const i64 at = (i64)head * p.layout.total_q + token(step);
        lse[step] = p.lse[at];
        if (p.grad_lse != nullptr) grad_lse[step] = p.grad_lse[at];
    }
    RowBounds most = {0, 0};
    FSA_UNROLL for (int step = 0; step < DELTA_STEPS; ++step) {
        if (!QUERY_PARTIALS && exists(step)) clear(step);
        const Vec4 a = out[step], b = grad[step];
        const f32 delta = sum_lanes(dot_pairs(dot_pairs(dot_pairs(dot_pairs(0.0f, a.x, b.x), a.y, b.y), a.z, b.z), a.w, b.w)) - grad_lse[step];
        const f32 size = SCALED_SUMS ? sum_lanes(sum_sizes(b)) : 0.0f;
        if (piece == 0 && exists(step)) *row_stats_at(p, launch_head, token(step) - rows.first) = make_row_stats(lse[step], delta);
        if (!exists(step) || lse[step] == neg_inf()) continue;      // sees no key
        most.grad = max_u(most.grad, bound_bits(size));
        most.delta = max_u(most.delta, bound_bits(delta));
    }
    if constexpr (SCALED_SUMS) raise_bounds<256, TILE_HEADS>(&p.row_bounds[p.first_head + rows_head()].grad, most.grad, most.delta);
}

// Before the main kernel. Of blocks: the bounds of those that rows list, zeros for sums that units will be added to, and for gradients where no row lists the block.
extern "C" __global__ void __launch_bounds__(256) backward_prepare(const __grid_constant__ BackwardParams p) {
    const int number = block_cta(p, PREPARE_ROWS), kv_head = p.first_head / p.group_size + blockIdx.y;
    if (number < 0) return prepare_rows(p);
    if (blockIdx.y >= launch_kv_heads(p)) return;
    // A block a warp; those of one cta lie far apart, because blocks of several units, whose sums become zero, are neighbours.
    const int blocks = p.index.max_blocks, at = number + ceil_div(blocks, PREPARE_BLOCKS) * (threadIdx.x / 32), lane = threadIdx.x & 31;
    KeyBounds most = {0, 0};
    if (at < blocks) {
        const KeyBlock block = key_block(p, at);
        if (SCALED_SUMS && block.sums != LISTED_BY_NONE && block.keys > 0) most = p.block_bounds[(i64)kv_head * blocks + at];
        if (block.sums >= 0) {
            for (int n = lane; n < block.keys * ROW_WORDS; n += 32) {
                store_global(p.grad_key + block.first_sum(p) + 4 * n, Vec4{0, 0, 0, 0});
                store_global(p.grad_value + block.first_sum(p) + 4 * n, Vec4{0, 0, 0, 0});
            }
        } else if (block.sums == LISTED_BY_NONE && !p.accumulate_keys) {
            for (int n = lane; n < block.keys * (HEAD_DIM / 8); n += 32) {
                const int row = block.row + n / (HEAD_DIM / 8), column = n % (HEAD_DIM / 8) * 16;
                store_global((char*)tensor_row(p.grad_key_out, row, kv_head) + column, Vec4{0, 0, 0, 0});
                store_global((char*)tensor_row(p.grad_value_out, row, kv_head) + column, Vec4{0, 0, 0, 0});
            }
        }
    }
    if constexpr (SCALED_SUMS) raise_bounds<256>(&p.key_bounds[kv_head].key, most.key, most.value);
}

// Beside the index: what bounds the keys of every block, for all kv heads from that of first_head on. Which blocks count, the index says later.
extern "C" __global__ void __launch_bounds__(256) backward_bounds(const __grid_constant__ BackwardParams p) {
    const int kv_head = p.first_head / p.group_size + blockIdx.y, block = blockIdx.x;
    const KeyRows rows = block_rows(p.layout, block);
    const KeyBounds mine = thread_largest<256>(p.key, p.value, kv_head, rows.first, rows.count).bounds();
    const u32 bits = cta_bound<256>(mine.key, mine.value);
    if (threadIdx.x < 2) (&p.block_bounds[(i64)kv_head * p.index.max_blocks + block].key)[threadIdx.x] = bits;
}

// grad_query of rows, from scaled f16 or f32 sums or 16-bit partials, times the softmax scale.
#if FSA_QUERY_PARTIALS
// Partials in slot order. 16 bytes a lane.
constexpr int FINISH_LANES = HEAD_DIM / 8, FINISH_ROWS = 256 / FINISH_LANES;    // of a row; of a cta
// A row of 16-bit words in fragment order, 16 bytes a lane, times a factor.
FSA_DEVICE void store_words(char* target, const f32 (&sum)[8], f32 scale, bool accumulate, bool present) {
    const Vec4 before = words_before(target, accumulate, present);
    const u32 word[4] = {before.x, before.y, before.z, before.w};
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) w[j] = add_pair(word[j], sum[2 * j], sum[2 * j + 1], scale);
    const Vec4 natural = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
    if (present) store_global(target, natural);
}
FSA_DEVICE void finish_rows(const BackwardParams& p) {
    constexpr int AHEAD = 8;
    const ChunkRows chunk = chunk_rows(p);
    const int row = blockIdx.x * FINISH_ROWS + threadIdx.x / FINISH_LANES, lane = threadIdx.x % FINISH_LANES;
    const bool present = threadIdx.x < FINISH_ROWS * FINISH_LANES && row < chunk.end - chunk.first;
    const int launch_head = rows_head(), head = p.first_head + launch_head;
    RowInfo info = {0};
    if (present) info.word = p.index.row_info[(i64)(head / p.group_size) * p.layout.total_q + chunk.first + row];
    const char* source = (const char*)p.partial + ((i64)launch_head * p.rows + row) * p.index.slots * ROW_BYTES + lane * 16;
    f32 sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int first = 0; first < info.partials(); first += AHEAD) {
        Vec4 v[AHEAD];
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            v[a] = Vec4{0, 0, 0, 0};
            if (first + a < info.partials()) v[a] = load_global_once(source + (first + a) * ROW_BYTES);
        }
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            sum[0] += unpack_lo(v[a].x); sum[1] += unpack_hi(v[a].x); sum[2] += unpack_lo(v[a].y); sum[3] += unpack_hi(v[a].y);
            sum[4] += unpack_lo(v[a].z); sum[5] += unpack_hi(v[a].z); sum[6] += unpack_lo(v[a].w); sum[7] += unpack_hi(v[a].w);
        }
    }
    store_words((char*)tensor_row(p.grad_query_out, chunk.first + row, head) + lane * 16, sum, p.scale, p.accumulate, present);
}
#else
// Some rows a thread, whose loads are under way together: of f16 sums 16 bytes a lane, which are as many of the gradient; of f32 sums a lane has four of the 16
// columns of its quad.
constexpr int FINISH_LANES = QUERY_SUM_BYTES / 16, FINISH_STEPS = 4, STEP_ROWS = 256 / FINISH_LANES / TILE_HEADS * TILE_HEADS, FINISH_ROWS = FINISH_STEPS * STEP_ROWS;
FSA_DEVICE void finish_rows(const BackwardParams& p) {
    constexpr int STEP = STEP_ROWS / TILE_HEADS;        // rows of a head
    const ChunkRows chunk = chunk_rows(p);
    const int row = threadIdx.x / FINISH_LANES, lane = threadIdx.x % FINISH_LANES, first = blockIdx.x * (FINISH_ROWS / TILE_HEADS) + row / TILE_HEADS;
    const int launch_head = rows_head() + row % TILE_HEADS, head = p.first_head + launch_head;
    auto present = [&](int step) { return threadIdx.x < STEP_ROWS * FINISH_LANES && first + step * STEP < chunk.end - chunk.first; };
    auto sums = [&](int step) { return query_sums(p, launch_head, chunk.first, first + step * STEP) + lane * 16; };
    auto target = [&](int step) { return (char*)tensor_row(p.grad_query_out, chunk.first + first + step * STEP, head); };
    const bool adds_sums = SCALED_SUMS && p.sums[0].rows != nullptr;        // to scaled f16 of other attentions
    Vec4 v[FINISH_STEPS], before[FINISH_STEPS];
    FSA_UNROLL for (int step = 0; step < FINISH_STEPS; ++step) {
        v[step] = before[step] = Vec4{0, 0, 0, 0};
        if (!present(step)) continue;
        v[step] = load_global_once(sums(step));
        if (SCALED_SUMS && (adds_sums || p.accumulate)) before[step] = load_global_once(target(step) + lane * 16);
    }
    f32 inverse = 1.0f, other_inverse = 1.0f;
    if constexpr (SCALED_SUMS) inverse = launch_scale(p, launch_head).inverse;
    if (adds_sums) other_inverse = sum_scale(p.sums).inverse;
    FSA_UNROLL for (int step = 0; step < FINISH_STEPS; ++step) {
        if constexpr (SCALED_SUMS) {
            const Vec4 held = transpose_quad(before[step]);
            const u32 word[4] = {v[step].x, v[step].y, v[step].z, v[step].w}, other[4] = {held.x, held.y, held.z, held.w};
            u32 w[4];
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                f32 low, high, other_low, other_high;
                unpack_sums(word[j], low, high);
                unpack_sums(other[j], other_low, other_high);
                low *= inverse, high *= inverse;
                if (adds_sums) low = fmaf(other_low, other_inverse, low), high = fmaf(other_high, other_inverse, high);
                w[j] = add_pair(adds_sums ? 0 : other[j], low, high, p.scale);
            }
            const Vec4 natural = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
            if (present(step)) store_global(target(step) + lane * 16, natural);
        } else {
            const NaturalColumns columns = natural_columns(v[step]);
            if (present(step)) store_columns(target(step) + ((lane * 4 & ~15) + columns.first) * ELEMENT_BYTES, columns.sums, p.scale, p.accumulate);
        }
    }
}
#endif

// After the main kernel. Of blocks that have sums, two ctas each, for keys and values: rows of the storage type. What a single unit finished is left alone.
extern "C" __global__ void __launch_bounds__(256, TILE_HEADS == 1 ? 0 : 4) backward_finish(const __grid_constant__ BackwardParams p) {
    const int number = block_cta(p, FINISH_ROWS), kv_head = p.first_head / p.group_size + blockIdx.y;
    if (number < 0) return finish_rows(p);
    if (blockIdx.y >= launch_kv_heads(p)) return;
    int listed = number / 2;
    if (p.index.packs_sums) listed = p.index.split_blocks[(i64)kv_head * p.index.max_split_blocks + listed];
    if (listed < 0) return;
    const KeyBlock block = key_block(p, listed);
    if (block.sums < 0) return;
    const bool is_key = number % 2 == 0;
    const f32* sums = (is_key ? p.grad_key : p.grad_value) + block.first_sum(p);
    for (int n = threadIdx.x; n < BLOCK_SIZE * ROW_WORDS; n += 256) {       // whole warps
        const int row = n / ROW_WORDS, place = n % ROW_WORDS * 4;
        Vec4 v = {0, 0, 0, 0};
        if (row < block.keys) v = load_global_once(sums + 4 * n);
        const NaturalColumns columns = natural_columns(v);
        if (row >= block.keys) continue;
        char* target = (char*)tensor_row(is_key ? p.grad_key_out : p.grad_value_out, block.row + row, kv_head);
        store_columns(target + ((place & ~15) + columns.first) * ELEMENT_BYTES, columns.sums, is_key ? p.scale : 1.0f, p.accumulate_keys);
    }
}
