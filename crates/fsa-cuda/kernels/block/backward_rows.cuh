// The kernels of the backward that work row by row: statistics of rows before the main pass, the sum of a row's partials or its f32 sums after it,
// and what the sums of keys need before the first and after the last launch of the main kernel.
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
    if (!p.given_stats) return (RowStats*)p.row_stats + ((i64)launch_head * p.rows + token);
    return (RowStats*)p.row_stats + ((i64)(p.first_head + launch_head) * p.layout.total_q + p.layout.chunk_token[p.chunk] + token);
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
    return sum_scale(p.row_bounds[p.given_stats ? 0 : head], p.key_bounds[head / p.group_size]);
}

FSA_DEVICE f32 dot_pairs(f32 sum, u32 a, u32 b) { return fmaf(unpack_lo(a), unpack_lo(b), fmaf(unpack_hi(a), unpack_hi(b), sum)); }

// Row statistics of the launch's heads for the rows of the chunk. A lane per 16 bytes of a row, eight rows a warp whose loads are under way together.
constexpr int DELTA_LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int DELTA_STEPS = 8 * DELTA_LANES / 32, DELTA_ROWS = 64;      // of a cta
FSA_DEVICE f32 sum_lanes(f32 x) {
    FSA_UNROLL for (int delta = DELTA_LANES / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(0xffffffffu, x, delta);
    return x;
}
extern "C" __global__ void __launch_bounds__(256) backward_delta(const __grid_constant__ BackwardParams p) {
    const int chunk_token = p.layout.chunk_token[p.chunk], end = p.layout.chunk_token[p.chunk + 1];
    const int lane = threadIdx.x & 31, piece = lane % DELTA_LANES, head = p.first_head + blockIdx.y;
    const int first = chunk_token + blockIdx.x * DELTA_ROWS + threadIdx.x / 32 * 8 + lane / DELTA_LANES;
    auto token = [&](int step) { return first + step * (32 / DELTA_LANES); };
    Vec4 out[DELTA_STEPS], grad[DELTA_STEPS];
    FSA_UNROLL for (int step = 0; step < DELTA_STEPS; ++step) {
        out[step] = grad[step] = {0, 0, 0, 0};
        if (piece < HEAD_DIM / 8 && token(step) < end) {
            out[step] = load_global(tensor_row(p.out, token(step), head) + piece * 16);
            grad[step] = load_global(tensor_row(p.grad_out, token(step), head) + piece * 16);
        }
    }
    u32 grad_bound = 0, delta_bound = 0;
    FSA_UNROLL for (int step = 0; step < DELTA_STEPS; ++step) {
        const Vec4 a = out[step], b = grad[step];
        f32 sum = sum_lanes(dot_pairs(dot_pairs(dot_pairs(dot_pairs(0.0f, a.x, b.x), a.y, b.y), a.z, b.z), a.w, b.w));
        const f32 size = SCALED_SUMS ? sum_lanes(sum_sizes(b)) : 0.0f;
        if (piece == 0 && token(step) < end) {
            const i64 at = (i64)head * p.layout.total_q + token(step);
            const f32 lse = p.lse[at];
            if (p.grad_lse != nullptr) sum -= p.grad_lse[at];
            *row_stats_at(p, blockIdx.y, token(step) - chunk_token) = make_row_stats(lse, sum);
            if (lse == neg_inf()) continue;     // sees no key
            grad_bound = max_u(grad_bound, bound_bits(size));
            delta_bound = max_u(delta_bound, bound_bits(sum));
        }
    }
    if constexpr (SCALED_SUMS) {
        raise_bound(&p.row_bounds[head].grad, grad_bound);
        raise_bound(&p.row_bounds[head].delta, delta_bound);
    }
}

// A row of 16-bit words in fragment order, 16 bytes a lane, times a factor.
FSA_DEVICE void store_words(char* target, const f32 (&sum)[8], f32 scale, bool accumulate, bool present) {
    const Vec4 before = words_before(target, accumulate, present);
    const u32 word[4] = {before.x, before.y, before.z, before.w};
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) w[j] = add_pair(word[j], sum[2 * j], sum[2 * j + 1], scale);
    const Vec4 natural = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
    if (present) store_global(target, natural);
}

#if FSA_SCALED_SUMS
// f16 sums of the chunk's rows to rows of the storage type.
extern "C" __global__ void __launch_bounds__(256) backward_convert(const __grid_constant__ BackwardParams p) {
    constexpr int LANES = HEAD_DIM / 8;
    const int chunk_token = p.layout.chunk_token[p.chunk], rows = p.layout.chunk_token[p.chunk + 1] - chunk_token;
    const i64 n = (i64)blockIdx.x * 256 + threadIdx.x, row = n / LANES;
    const int at = (int)(n % LANES) * 16;
    const bool present = row < rows;
    Vec4 v = {0, 0, 0, 0};
    if (present) v = load_global_once((const char*)p.grad_query + ((i64)blockIdx.y * p.rows + row) * ROW_BYTES + at);
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    const f32 inverse = launch_scale(p, blockIdx.y).inverse;
    f32 sum[8];
    FSA_UNROLL for (int j = 0; j < 4; ++j) {
        unpack_sums(word[j], sum[2 * j], sum[2 * j + 1]);
        sum[2 * j] *= inverse, sum[2 * j + 1] *= inverse;
    }
    store_words((char*)tensor_row(p.grad_query_out, chunk_token + row, p.first_head + blockIdx.y) + at, sum, p.scale, p.accumulate, present);
}
#else
// f32 sums of the chunk's rows to rows of the storage type. A quad per 16 columns of a row, a lane per 16 bytes of the source.
extern "C" __global__ void __launch_bounds__(256) backward_convert(const __grid_constant__ BackwardParams p) {
    const int chunk_token = p.layout.chunk_token[p.chunk], rows = p.layout.chunk_token[p.chunk + 1] - chunk_token;
    const i64 n = (i64)blockIdx.x * 256 + threadIdx.x, row = n / ROW_WORDS;
    const int place = (int)(n % ROW_WORDS) * 4;
    const bool present = row < rows;
    Vec4 v = {0, 0, 0, 0};
    if (present) v = load_global_once((const f32*)p.grad_query + ((i64)blockIdx.y * p.rows + row) * HEAD_DIM + place);
    const NaturalColumns columns = natural_columns(v);
    if (!present) return;
    char* target = (char*)tensor_row(p.grad_query_out, chunk_token + row, p.first_head + blockIdx.y);
    store_columns(target + ((place & ~15) + columns.first) * ELEMENT_BYTES, columns.sums, p.scale, p.accumulate);
}
#endif

// Sum of a row's partials in slot order, times the softmax scale. HEAD_DIM / 8 lanes per row, 16 bytes each.
extern "C" __global__ void __launch_bounds__(256) backward_merge(const __grid_constant__ BackwardParams p) {
    constexpr int LANES = HEAD_DIM / 8, ROWS = 256 / LANES, AHEAD = 8;
    const int chunk_token = p.layout.chunk_token[p.chunk], rows = p.layout.chunk_token[p.chunk + 1] - chunk_token;
    const int row = blockIdx.x * ROWS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const bool present = threadIdx.x < ROWS * LANES && row < rows;
    const int head = p.first_head + blockIdx.y;
    RowInfo info = {0};
    if (present) info.word = p.index.row_info[(i64)(head / p.group_size) * p.layout.total_q + chunk_token + row];
    const char* source = (const char*)p.partial + ((i64)blockIdx.y * p.rows + row) * p.index.slots * ROW_BYTES + lane * 16;
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
    store_words((char*)tensor_row(p.grad_query_out, chunk_token + row, head) + lane * 16, sum, p.scale, p.accumulate, present);
}

// The block of a cta of the kernels below: blockIdx.x, of the launch's kv head blockIdx.y.
struct KeyBlock {
    int row, keys;      // of key and value; no keys where the launch does not do the block
    int units;          // that add to its sums; more than one if nobody counted
    i64 sums;           // first of its sums
};
FSA_DEVICE KeyBlock key_block(const BackwardParams& p) {
    const Layout& layout = p.layout;
    const int block = blockIdx.x, kv_head = p.first_head / p.group_size + blockIdx.y;
    if (block >= layout.block_base[layout.batch]) return {0, 0, 0, 0};
    const int s = find_sequence(layout.block_base, layout.batch, block);
    const int row = layout.cu_seqlens_kv[s] + (block - layout.block_base[s]) * BLOCK_SIZE;
    const int keys = in_range(p, row) ? min_i(BLOCK_SIZE, layout.cu_seqlens_kv[s + 1] - row) : 0;
    const int units = p.index.block_units ? p.index.block_units[(i64)kv_head * p.index.max_blocks + block] : 2;
    return {row, keys, units, (blockIdx.y * p.sum_rows + row) * HEAD_DIM};
}

// Largest elements of the keys of the launch's kv heads, for the scale; where the units of a block were counted, without the blocks that no row lists.
extern "C" __global__ void __launch_bounds__(256) backward_bounds(const __grid_constant__ BackwardParams p) {
    const KeyBlock block = key_block(p);
    const int kv_head = p.first_head / p.group_size + blockIdx.y;
    if (block.units > 0) raise_key_bounds<256>(p.key_bounds + kv_head, p.key, p.value, kv_head, block.row, block.keys);
}

// Before the first launch of the main kernel, where units without others finish their sums: zeros for those of several units.
extern "C" __global__ void __launch_bounds__(256) backward_clear(const __grid_constant__ BackwardParams p) {
    const KeyBlock block = key_block(p);
    if (block.units < 2) return;
    for (int n = threadIdx.x; n < block.keys * ROW_WORDS; n += 256) {
        store_global(p.grad_key + block.sums + 4 * n, Vec4{0, 0, 0, 0});
        store_global(p.grad_value + block.sums + 4 * n, Vec4{0, 0, 0, 0});
    }
}

// After the last: f32 sums of keys to rows of the storage type, and zeros for blocks that no row lists. What a single unit finished is left alone.
extern "C" __global__ void __launch_bounds__(256) backward_finish(const __grid_constant__ BackwardParams p) {
    const KeyBlock block = key_block(p);
    const bool is_key = blockIdx.z == 0;
    if (block.units == 1) return;
    const f32* sums = (is_key ? p.grad_key : p.grad_value) + block.sums;
    for (int n = threadIdx.x; n < BLOCK_SIZE * ROW_WORDS; n += 256) {       // whole warps
        const int row = n / ROW_WORDS, place = n % ROW_WORDS * 4;
        Vec4 v = {0, 0, 0, 0};
        if (row < block.keys && block.units > 0) v = load_global_once(sums + 4 * n);
        const NaturalColumns columns = natural_columns(v);
        if (row >= block.keys) continue;
        char* target = (char*)tensor_row(is_key ? p.grad_key_out : p.grad_value_out, block.row + row, p.first_head / p.group_size + blockIdx.y);
        store_columns(target + ((place & ~15) + columns.first) * ELEMENT_BYTES, columns.sums, is_key ? p.scale : 1.0f, p.accumulate_keys);
    }
}
