// WHAT   Stage compress, kind linear, and its gradients: out[i] = flatten(window i) @ weight[h] + bias[h], the position embedding having
//        become the bias position @ weight, in f32. Windows overlap: rows of the products are put together by the copies, so the matrix
//        of windows, kernel_size / kernel_stride times the input, exists in shared memory only.
// GRID   compress_linear: (64 windows, kv heads). compress_linear_backward (gradient of the input): (64 cells x place in the cell, kv heads).
//        compress_grad_weight: (64 rows of the weight, kv heads). compress_bias: (32 columns, kv heads). compress_totals (sums of grad_out over
//        the windows): (pieces, kv heads). compress_grad_position: (64 rows of the weight, kv heads).
// ROLES  Products: block/strip_product.cuh; every thread copies as much as any other. The rest: threads over rows and 16-byte pieces.
// SMEM   Products: the ring of stages, then the sums on their way out.
// SYNC   Products: one barrier a step. Sums over windows and over the contraction have one order, whatever runs beside them.
#include "block/strip_product.cuh"
#include "block/windows.cuh"

FSA_DEVICE const char* weight_row(const CompressParams& p, int head, int row) {
    return (const char*)p.weight + ((i64)head * p.kernel_size * HEAD_DIM + row) * ROW_BYTES;
}
FSA_DEVICE i64 row_bytes(const Tensor& t) { return t.row_stride * ELEMENT_BYTES; }

// Copies of a left tile: a thread has piece threadIdx.x % 8 of rows threadIdx.x / 8 + COPY_ROWS * i.
constexpr int COPY_ROWS = LINEAR_THREADS / 8, LEFT_COPIES = 64 / COPY_ROWS;
FSA_DEVICE u32 strip_offset(int row) { return row * 128 + (((threadIdx.x & 7) ^ (row & 7)) << 4); }

// 16 bytes of the contraction over the tokens of a window, which runs over all parts of one place before the next: a token is then read as
// part 0 of one window and part 1 of the window before at nearly the same time, and comes from HBM once.
struct WindowPiece {
    int token;      // of the window, kernel_size where there is none
    int piece;      // of its row
};
FSA_DEVICE WindowPiece window_piece(const CompressParams& p, int ratio, int number) {
    const int ordinal = number / PIECES_PER_ROW;
    return {ordinal < p.kernel_size ? ordinal % ratio * p.kernel_stride + ordinal / ratio : p.kernel_size, number % PIECES_PER_ROW};
}

extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, LINEAR_CTAS) compress_linear(const __grid_constant__ CompressParams p) {
    extern __shared__ __align__(1024) char shared[];
    const int first = blockIdx.x * 64, head = blockIdx.y, windows = p.cu_compressed[p.batch] - first, ratio = p.kernel_size / p.kernel_stride;
    if (windows <= 0) return;
    const char* inputs[LEFT_COPIES];    // of the windows that this thread copies pieces of
    WindowCursor cursor;
    cursor.open(p, min_i(threadIdx.x / 8, windows - 1) + first);
    FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i)
        inputs[i] = tensor_row(p.input, cursor.token(p, min_i(threadIdx.x / 8 + COPY_ROWS * i, windows - 1) + first), head);
    StripSums sums;
    multiply_strip<false, false>(sums, shared_address(shared), ceil_div(p.kernel_size * HEAD_DIM, STEP), [&](int step, u32 left, u32 right) {
        const WindowPiece mine = window_piece(p, ratio, step * 8 + (threadIdx.x & 7));
        const bool exists = mine.token < p.kernel_size;
        const i64 offset = exists ? mine.token * row_bytes(p.input) + mine.piece * 16 : 0;
        FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i;
            copy_async(left + strip_offset(row), inputs[i] + offset, exists && row < windows ? 16 : 0);
        }
        // 64 rows of the weight: of one token, or, where that does not divide evenly, each of its own.
        constexpr bool EVEN = HEAD_DIM % STEP == 0;
        const WindowPiece first_row = window_piece(p, ratio, step * 8);
        const char* rows = weight_row(p, head, first_row.token * HEAD_DIM + first_row.piece * 8);
        FSA_UNROLL for (int i = 0; i < STEP * PIECES_PER_ROW / LINEAR_THREADS; ++i) {
            const int n = threadIdx.x + i * LINEAR_THREADS, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
            const u32 at = right + SwizzledTile<STEP>::offset(row, piece);
            if (EVEN) {
                copy_async(at, rows + n * 16);
            } else {
                const WindowPiece own = window_piece(p, ratio, step * 8 + row / 8);
                const bool present = own.token < p.kernel_size;
                copy_async(at, weight_row(p, head, present ? own.token * HEAD_DIM + own.piece * 8 + row % 8 : 0) + piece * 16, present ? 16 : 0);
            }
        }
    });
    store_strip(sums, shared, [&](int row, int piece, Eight& x) {
        if (row >= windows) return;
        if (p.bias != nullptr) {
            const f32* bias = p.bias + head * HEAD_DIM + piece * 8;
            FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] += bias[e];
        }
        store_global((char*)tensor_row(p.out, first + row, head) + piece * 16, narrow(x));
    });
}

// Token m of residue class `place`, place being its number in its cell, is token place + n * kernel_stride of window m - n: grad_input[m] =
// sum over n of grad_out[m - n] @ transpose(weight of that token).
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, LINEAR_CTAS) compress_linear_backward(const __grid_constant__ CompressBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ i32 tokens[64];          // row of grad_input, -1 where there is nothing to store
    __shared__ bool covered[64];        // whether some window has the token
    const CompressParams& f = p.forward;
    const int head = blockIdx.y, place = blockIdx.x % f.kernel_stride, first = blockIdx.x / f.kernel_stride * 64;
    const int ratio = f.kernel_size / f.kernel_stride;
    const char* grads[LEFT_COPIES];     // of the windows that start at this thread's cells
    int first_part[LEFT_COPIES], last_part[LEFT_COPIES];
    FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
        const int row = threadIdx.x / 8 + COPY_ROWS * i;
        const Cell cell = find_cell(f, ratio, first + row);
        grads[i] = tensor_row(p.grad_out, cell.window, head);
        first_part[i] = cell.first_part;
        last_part[i] = cell.last_part;
        if ((threadIdx.x & 7) == 0) {
            tokens[row] = place < cell.tokens ? cell.token + place : -1;
            covered[row] = cell.first_part <= cell.last_part;
        }
    }
    StripSums sums;
    multiply_strip<false, true>(sums, shared_address(shared), ceil_div(ratio * HEAD_DIM, STEP), [&](int step, u32 left, u32 right) {
        const int number = step * 8 + (threadIdx.x & 7), part = number / PIECES_PER_ROW, piece = number % PIECES_PER_ROW;
        FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i;
            const bool exists = part >= first_part[i] && part <= last_part[i];
            const char* source = exists ? grads[i] - part * row_bytes(p.grad_out) + piece * 16 : (const char*)p.forward.weight;
            copy_async(left + strip_offset(row), source, exists ? 16 : 0);
        }
        const bool exists = part < ratio;
        const char* rows = weight_row(f, head, exists ? (place + part * f.kernel_stride) * HEAD_DIM : 0) + piece * 16;
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / COPY_ROWS; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i;
            copy_async(right + strip_offset(row), rows + row * ROW_BYTES, exists ? 16 : 0);
        }
    });
    store_strip(sums, shared, [&](int row, int piece, Eight& x) {
        if (tokens[row] < 0 || (p.accumulate && !covered[row])) return;
        char* target = (char*)tensor_row(p.grad_input, tokens[row], head) + piece * 16;
        if (!covered[row]) fill(x, 0.0f);       // a weight that is not finite must not reach it
        if (p.accumulate) {
            Eight old;
            widen(old, load_global_once(target));
            add_scaled(x, 1.0f, old);
        }
        store_global(target, narrow(x));
    });
}

// Sum of grad_out over all windows, from the sums of the pieces: one column.
FSA_DEVICE f32 window_total(const CompressBackwardParams& p, int head, int column) {
    f32 sum = 0.0f;
    for (int piece = 0; piece < p.pieces; ++piece) sum += p.partial[((i64)head * p.pieces + piece) * HEAD_DIM + column];
    return sum;
}

// Row (token j, element d) of grad_weight: sum over the windows of (input + position)[token j, d] * grad_out, position taken out of the sum.
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, LINEAR_CTAS) compress_grad_weight(const __grid_constant__ CompressBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ f32 totals[HEAD_DIM];
    const CompressParams& f = p.forward;
    const int head = blockIdx.y, first = blockIdx.x * 64, rows = f.kernel_size * HEAD_DIM, windows = f.cu_compressed[f.batch];
    const bool positioned = f.position != nullptr && windows > 0;
    if (positioned)
        for (int column = threadIdx.x; column < HEAD_DIM; column += LINEAR_THREADS) totals[column] = window_total(p, head, column);
    const int number = blockIdx.x * 8 + (threadIdx.x & 7), token = number / PIECES_PER_ROW;
    const bool exists = token < f.kernel_size;
    const char* input = tensor_row(f.input, 0, head) + (exists ? token * row_bytes(f.input) + number % PIECES_PER_ROW * 16 : 0);
    WindowCursor cursor;
    if (windows > 0) cursor.open(f, min_i(threadIdx.x / 8, windows - 1));
    StripSums sums;
    multiply_strip<true, false>(sums, shared_address(shared), ceil_div(windows, STEP), [&](int step, u32 left, u32 right) {
        FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i, window = step * STEP + row;
            const bool present = exists && window < windows;
            copy_async(left + strip_offset(row), input + (present ? cursor.token(f, window) * row_bytes(f.input) : 0), present ? 16 : 0);
        }
        copy_rows<STEP, LINEAR_THREADS>(right, p.grad_out, head, step * STEP, windows - step * STEP);
    });
    store_strip(sums, shared, [&](int row, int piece, Eight& x) {
        if (first + row >= rows) return;
        const i64 at = (i64)head * rows + first + row;
        if (positioned) {
            const f32 position = widen_element(f.position, at);
            FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] += position * totals[piece * 8 + e];
        }
        store_global((char*)p.grad_weight + at * ROW_BYTES + piece * 16, narrow(x));
    });
}

// Threads of the kernels below stand side by side on pieces of rows, and their sums are added in the order of the rows.
constexpr int SUM_THREADS = 256;

// Sums of a piece of the rows of grad_out.
extern "C" __global__ void __launch_bounds__(SUM_THREADS, 4) compress_totals(const __grid_constant__ CompressBackwardParams p) {
    constexpr int ROWS = SUM_THREADS / PIECES_PER_ROW;
    __shared__ f32 all[ROWS][HEAD_DIM];
    const int head = blockIdx.y, row = threadIdx.x / PIECES_PER_ROW, piece = threadIdx.x % PIECES_PER_ROW;
    const int windows = p.forward.cu_compressed[p.forward.batch], per_piece = ceil_div(windows, p.pieces);
    const i64 begin = (i64)blockIdx.x * per_piece;
    const int count = begin >= windows ? 0 : min_i(per_piece, windows - (int)begin);
    if (row < ROWS) {
        Eight sum;
        fill(sum, 0.0f);
        FSA_NO_UNROLL for (int i = row; i < count; i += 4 * ROWS) {
            Vec4 v[4];
            FSA_UNROLL for (int a = 0; a < 4; ++a) {
                v[a] = {0, 0, 0, 0};
                if (i + a * ROWS < count) v[a] = load_global(tensor_row(p.grad_out, begin + i + a * ROWS, head) + piece * 16);
            }
            FSA_UNROLL for (int a = 0; a < 4; ++a) {
                Eight x;
                widen(x, v[a]);
                add_scaled(sum, 1.0f, x);
            }
        }
        FSA_UNROLL for (int e = 0; e < 8; ++e) all[row][piece * 8 + e] = sum[e];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < HEAD_DIM; column += SUM_THREADS) {
        f32 sum = 0.0f;
        for (int r = 0; r < ROWS; ++r) sum += all[r][column];
        p.partial[((i64)head * p.pieces + blockIdx.x) * HEAD_DIM + column] = sum;
    }
}

// A quad per row of the weight.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) compress_grad_position(const __grid_constant__ CompressBackwardParams p) {
    __shared__ f32 totals[HEAD_DIM];
    const int head = blockIdx.y, lane = threadIdx.x & 3, rows = p.forward.kernel_size * HEAD_DIM;
    const int row = blockIdx.x * (SUM_THREADS / 4) + threadIdx.x / 4;
    for (int column = threadIdx.x; column < HEAD_DIM; column += SUM_THREADS) totals[column] = window_total(p, head, column);
    __syncthreads();
    const bool any = p.forward.cu_compressed[p.forward.batch] > 0;      // without a window, a weight that is not finite reaches nothing
    f32 sum = 0.0f;
    if (any && row < rows) {
        const char* source = weight_row(p.forward, head, row);
        FSA_UNROLL for (int i = 0; i < PIECES_PER_ROW / 4; ++i) {
            Eight x, total;
            widen(x, load_global(source + (i * 4 + lane) * 16));
            FSA_UNROLL for (int e = 0; e < 8; ++e) total[e] = totals[(i * 4 + lane) * 8 + e];
            sum = dot(sum, x, total);
        }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane == 0 && row < rows) store_element(p.grad_position, (i64)head * rows + row, sum);
}

// 32 columns of position @ weight: four threads side by side, 128 rows at a time.
constexpr int BIAS_THREADS = 512;
extern "C" __global__ void __launch_bounds__(BIAS_THREADS) compress_bias(const __grid_constant__ CompressParams p) {
    constexpr int ROWS = BIAS_THREADS / 4, WARPS = BIAS_THREADS / 32;
    __shared__ f32 all[WARPS][32];
    const int head = blockIdx.y, piece = threadIdx.x & 3, rows = p.kernel_size * HEAD_DIM;
    const char* source = weight_row(p, head, 0) + blockIdx.x * 64 + piece * 16;
    Eight sum;
    fill(sum, 0.0f);
    FSA_NO_UNROLL for (int row = threadIdx.x / 4; row < rows; row += 4 * ROWS) {
        Vec4 v[4];
        f32 position[4];
        FSA_UNROLL for (int a = 0; a < 4; ++a) {
            v[a] = {0, 0, 0, 0};
            position[a] = 0.0f;
            if (row + a * ROWS < rows) {
                v[a] = load_global(source + (i64)(row + a * ROWS) * ROW_BYTES);
                position[a] = widen_element(p.position, (i64)head * rows + row + a * ROWS);
            }
        }
        FSA_UNROLL for (int a = 0; a < 4; ++a) {
            Eight x;
            widen(x, v[a]);
            add_scaled(sum, position[a], x);
        }
    }
    FSA_UNROLL for (int e = 0; e < 8; ++e) {
        FSA_UNROLL for (int delta = 4; delta < 32; delta *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], delta);
        if ((threadIdx.x & 31) < 4) all[threadIdx.x / 32][piece * 8 + e] = sum[e];
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        f32 total = 0.0f;
        FSA_UNROLL for (int warp = 0; warp < WARPS; ++warp) total += all[warp][threadIdx.x];
        p.bias[head * HEAD_DIM + blockIdx.x * 32 + threadIdx.x] = total;
    }
}
