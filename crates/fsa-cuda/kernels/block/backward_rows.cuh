// The kernels of the backward that work row by row and are the same for every architecture: statistics of rows before the main pass,
// the sum of a row's partials after it.
#pragma once
#include "block/rows.cuh"
#include "block/sequence.cuh"
#include "tile/swizzled_tile.cuh"

// Whether a launch does a block: where the sums of all keys have no room, ranges of keys take turns.
FSA_DEVICE bool in_range(const BackwardParams& p, int kv_row) { return kv_row >= p.first_key && kv_row < p.end_key; }

// Rows of the target that a launch of backward_convert writes, and where it finds a row's sum.
FSA_DEVICE int convert_first(const ConvertParams& p) { return p.first_row ? *p.first_row : p.first_key; }
FSA_DEVICE bool is_converted(const ConvertParams& p, i64 row) {
    if (row >= (p.end_row ? *p.end_row : p.rows)) return false;
    if (p.cu_seqlens_kv == nullptr) return true;
    const int start = p.cu_seqlens_kv[find_sequence(p.cu_seqlens_kv, p.batch, (int)row)], block = start + ((int)row - start) / BLOCK_SIZE * BLOCK_SIZE;
    return block >= p.first_key && block < p.end_key;
}
// Stores 8 bytes of a row, or adds them to what is there.
FSA_DEVICE void store_converted(const ConvertParams& p, char* target, u32 x, u32 y) {
    if (p.accumulate) {
        const u32 a = ((const u32*)target)[0], b = ((const u32*)target)[1];
        x = pack2(unpack_lo(a) + unpack_lo(x), unpack_hi(a) + unpack_hi(x));
        y = pack2(unpack_lo(b) + unpack_lo(y), unpack_hi(b) + unpack_hi(y));
    }
    store_global8(target, x, y);
}

// Row statistics of one head for the rows of the chunk. One warp per row.
extern "C" __global__ void __launch_bounds__(256) backward_delta(const __grid_constant__ BackwardParams p) {
    const int chunk_token = p.layout.chunk_token[p.chunk], end = p.layout.chunk_token[p.chunk + 1];
    const int token = chunk_token + blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (token >= end) return;
    const int head = p.first_head + blockIdx.y;
    const u32* out = (const u32*)tensor_row(p.out, token, head);
    const u32* grad = (const u32*)tensor_row(p.grad_out, token, head);
    f32 sum = 0.0f;
    FSA_UNROLL for (int i = 0; i < (HEAD_DIM / 2 + 31) / 32; ++i)
        if (i * 32 + lane < HEAD_DIM / 2) {
            const u32 a = out[i * 32 + lane], b = grad[i * 32 + lane];
            sum += unpack_lo(a) * unpack_lo(b) + unpack_hi(a) * unpack_hi(b);
        }
    FSA_UNROLL for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    if (lane == 0) {
        const i64 at = (i64)head * p.layout.total_q + token;
        if (p.grad_lse != nullptr) sum -= p.grad_lse[at];
        f32* stats = p.row_stats + 2 * ((i64)blockIdx.y * p.rows + token - chunk_token);
        stats[0] = p.lse[at] * LOG2_E;
        stats[1] = sum;
    }
}

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
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) w[j] = pack2(sum[2 * j] * p.scale, sum[2 * j + 1] * p.scale);
    const Vec4 natural = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
    if (present) store_global((char*)tensor_row(p.grad_query_out, chunk_token + row, head) + lane * 16, natural);
}
