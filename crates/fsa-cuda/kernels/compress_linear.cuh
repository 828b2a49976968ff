// WHAT   Stage compress, kind linear, and its gradients: out[i] = flatten(window i + position) @ weight[h], where the products with the position
//        are taken by themselves, in f32. Windows overlap: rows of the products are put together by the copies, so the matrix of windows,
//        kernel_size / kernel_stride times the input, exists in shared memory only.
// GRID   compress_linear: (strips of windows, kv heads, pieces of the contraction). compress_merge: threads over 16-byte pieces of out.
//        compress_linear_backward (gradient of the input): (strips of cells x place in the cell, kv heads). compress_grad_weight: (strips of
//        rows of the weight, kv heads). compress_totals (sums of grad_out over the windows): (pieces, kv heads). compress_grad_position:
//        (64 rows of the weight, kv heads).
// ROLES  Products: block/strip_product.cuh; every thread copies as much as any other. The rest: threads over rows and 16-byte pieces.
// SMEM   Products: the ring of stages, then the sums on their way out.
// SYNC   Products: one barrier a step. Sums over windows, over the contraction and over its pieces have one order, whatever runs beside them.
#include "block/strip_product.cuh"
#include "block/windows.cuh"

FSA_DEVICE const char* weight_row(const CompressParams& p, int head, int row) {
    return (const char*)p.weight + ((i64)head * p.kernel_size * HEAD_DIM + row) * ROW_BYTES;
}
FSA_DEVICE i64 row_bytes(const Tensor& t) { return t.row_stride * ELEMENT_BYTES; }

// Copies of a left tile: a thread has piece threadIdx.x % 8 of rows threadIdx.x / 8 + COPY_ROWS * i.
constexpr int COPY_ROWS = LINEAR_THREADS / 8, LEFT_COPIES = STRIP_ROWS / COPY_ROWS;
FSA_DEVICE u32 strip_offset(int row) { return row * 128 + (((threadIdx.x & 7) ^ (row & 7)) << 4); }

// 16 bytes of the contraction over the tokens of a window: those of a place in a cell follow each other, and of these, GROUP pieces of all
// parts. A token is then read as part 0 of one window and part 1 of the window before in neighbouring steps: once from HBM, once from L2.
constexpr int GROUP = PIECES_PER_ROW % 8 == 0 ? 8 : 4;
struct WindowPiece {
    int part, place;    // of the token; place kernel_stride and more: there is none
    int piece;          // of its row
};
FSA_DEVICE WindowPiece window_piece(int ratio, int number) {
    const int group = number / GROUP, of_part = group / ratio * GROUP + number % GROUP;
    return {group % ratio, of_part / PIECES_PER_ROW, of_part % PIECES_PER_ROW};
}

// With a position embedding the last row of every strip is the position, whose products are added to the others'.
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, LINEAR_CTAS) compress_linear(const __grid_constant__ CompressParams p) {
    extern __shared__ __align__(1024) char shared[];
    const bool positioned = p.position != nullptr;
    const int strip = STRIP_ROWS - positioned, first = blockIdx.x * strip, windows = min_i(p.cu_compressed[p.batch] - first, strip);
    if (windows <= 0) return;
    const int head = blockIdx.y, ratio = p.kernel_size / p.kernel_stride;
    const int all_steps = ceil_div(p.kernel_size * HEAD_DIM, STEP), per_piece = ceil_div(all_steps, gridDim.z), begin = blockIdx.z * per_piece;
    const char* inputs[LEFT_COPIES];    // of the windows that this thread copies pieces of
    WindowCursor cursor;
    cursor.open(p, min_i(threadIdx.x / 8, windows - 1) + first);
    FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i)
        inputs[i] = tensor_row(p.input, cursor.token(p, min_i(threadIdx.x / 8 + COPY_ROWS * i, windows - 1) + first), head);
    const bool embeds = positioned && threadIdx.x / 8 == COPY_ROWS - 1;     // the last of this thread's rows is the position
    if (embeds) inputs[LEFT_COPIES - 1] = (const char*)p.position + (i64)head * p.kernel_size * ROW_BYTES;
    const i64 token_bytes = row_bytes(p.input), last_bytes = embeds ? ROW_BYTES : token_bytes;
    StripSums sums;
    multiply_strip<false, false>(sums, shared_address(shared), min_i(per_piece, all_steps - begin), [&](int step, u32 left, u32 right) {
        const int number = (begin + step) * 8;
        const WindowPiece mine = window_piece(ratio, number + (threadIdx.x & 7));
        const bool exists = mine.place < p.kernel_stride;
        const i64 token = mine.part * p.kernel_stride + mine.place;
        FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i;
            const bool last = i == LEFT_COPIES - 1, present = exists && (row < windows || (last && embeds));
            const i64 offset = exists ? token * (last ? last_bytes : token_bytes) + mine.piece * 16 : 0;
            copy_async_cached(left + strip_offset(row), inputs[i] + offset, present ? 16 : 0);
        }
        // 64 rows of the weight: of one token, or, where that does not divide evenly, each of its own.
        constexpr bool EVEN = GROUP * 8 == STEP;
        const WindowPiece first_row = window_piece(ratio, number);
        auto weight_rows = [&](WindowPiece at) { return weight_row(p, head, (at.part * p.kernel_stride + at.place) * HEAD_DIM + at.piece * 8); };
        const char* rows = weight_rows(first_row);
        FSA_UNROLL for (int i = 0; i < STEP * PIECES_PER_ROW / LINEAR_THREADS; ++i) {
            const int n = threadIdx.x + i * LINEAR_THREADS, row = n / PIECES_PER_ROW, piece = n % PIECES_PER_ROW;
            const u32 at = right + SwizzledTile<STEP>::offset(row, piece);
            if (EVEN) {
                copy_async(at, rows + n * 16);
            } else {
                const WindowPiece own = window_piece(ratio, number + row / 8);
                const bool present = own.place < p.kernel_stride;
                copy_async(at, (present ? weight_rows(own) + row % 8 * ROW_BYTES : rows) + piece * 16, present ? 16 : 0);
            }
        }
    });
    store_strip(sums, shared, [&](int row, int piece, Eight& x) {
        if (row >= windows) return;
        if (positioned) {
            const f32* of_position = (const f32*)shared + (STRIP_ROWS - 1) * SUM_PITCH + piece * 8;
            FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] += of_position[e];
        }
        if (gridDim.z == 1) {
            store_global((char*)tensor_row(p.out, first + row, head) + piece * 16, narrow(x));
        } else {
            f32* at = p.partial + (((i64)blockIdx.z * p.total_compressed + first + row) * p.num_kv_heads + head) * HEAD_DIM + piece * 8;
            store_global(at, as_words(x[0], x[1], x[2], x[3]));
            store_global(at + 4, as_words(x[4], x[5], x[6], x[7]));
        }
    });
}

// Threads of the kernels below stand side by side on pieces of rows, and their sums are added in the order of the rows.
constexpr int SUM_THREADS = 256;

// Sum over the pieces of the contraction.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) compress_merge(const __grid_constant__ CompressParams p) {
    const i64 number = (i64)blockIdx.x * SUM_THREADS + threadIdx.x;
    const int piece = number % PIECES_PER_ROW, head = number / PIECES_PER_ROW % p.num_kv_heads;
    const i64 row = number / PIECES_PER_ROW / p.num_kv_heads;
    if (row >= p.cu_compressed[p.batch]) return;
    const f32* source = p.partial + number * 8;
    const i64 step = (i64)p.total_compressed * p.num_kv_heads * HEAD_DIM;
    Eight sum;
    fill(sum, 0.0f);
    _Pragma("unroll 8") for (int n = 0; n < p.pieces; ++n, source += step) {
        const Vec4 low = load_global_once(source), high = load_global_once(source + 4);
        sum[0] += __uint_as_float(low.x); sum[1] += __uint_as_float(low.y); sum[2] += __uint_as_float(low.z); sum[3] += __uint_as_float(low.w);
        sum[4] += __uint_as_float(high.x); sum[5] += __uint_as_float(high.y); sum[6] += __uint_as_float(high.z); sum[7] += __uint_as_float(high.w);
    }
    store_global((char*)tensor_row(p.out, row, head) + piece * 16, narrow(sum));
}

// Token m of residue class `place`, place being its number in its cell, is token place + n * kernel_stride of window m - n: grad_input[m] =
// sum over n of grad_out[m - n] @ transpose(weight of that token).
extern "C" __global__ void __launch_bounds__(LINEAR_THREADS, LINEAR_CTAS) compress_linear_backward(const __grid_constant__ CompressBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ i32 tokens[STRIP_ROWS];      // row of grad_input, -1 where there is nothing to store
    __shared__ bool covered[STRIP_ROWS];    // whether some window has the token
    const CompressParams& f = p.forward;
    const int head = blockIdx.y, place = blockIdx.x % f.kernel_stride, first = blockIdx.x / f.kernel_stride * STRIP_ROWS;
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
        const WindowPiece mine = window_piece(ratio, step * 8 + (threadIdx.x & 7));
        FSA_UNROLL for (int i = 0; i < LEFT_COPIES; ++i) {
            const int row = threadIdx.x / 8 + COPY_ROWS * i;
            const bool exists = mine.place == 0 && mine.part >= first_part[i] && mine.part <= last_part[i];
            const char* source = exists ? grads[i] - mine.part * row_bytes(p.grad_out) + mine.piece * 16 : (const char*)p.forward.weight;
            copy_async_cached(left + strip_offset(row), source, exists ? 16 : 0);
        }
        const bool exists = mine.place == 0;
        const char* rows = weight_row(f, head, exists ? (place + mine.part * f.kernel_stride) * HEAD_DIM : 0) + mine.piece * 16;
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
    const int head = blockIdx.y, first = blockIdx.x * STRIP_ROWS, rows = f.kernel_size * HEAD_DIM, windows = f.cu_compressed[f.batch];
    const bool positioned = f.position != nullptr && windows > 0;
    if (positioned)
        for (int column = threadIdx.x; column < HEAD_DIM; column += LINEAR_THREADS) totals[column] = window_total(p, head, column);
    // A thread has one piece of some windows: STRIP_ROWS / 8 threads side by side.
    constexpr int PIECES = STRIP_ROWS / 8, WINDOWS = LINEAR_THREADS / PIECES;
    const int mine = threadIdx.x % PIECES, number = blockIdx.x * PIECES + mine, token = number / PIECES_PER_ROW;
    const bool exists = token < f.kernel_size;
    const char* input = tensor_row(f.input, 0, head) + (exists ? token * row_bytes(f.input) + number % PIECES_PER_ROW * 16 : 0);
    WindowCursor cursor;
    if (windows > 0) cursor.open(f, min_i(threadIdx.x / PIECES, windows - 1));
    StripSums sums;
    multiply_strip<true, false>(sums, shared_address(shared), ceil_div(windows, STEP), [&](int step, u32 left, u32 right) {
        FSA_NO_UNROLL for (int i = 0; i < STEP / WINDOWS; ++i) {
            const int row = threadIdx.x / PIECES + WINDOWS * i, window = step * STEP + row;
            const bool present = exists && window < windows;
            copy_async(left + SwizzledTile<STEP>::offset(row, mine), input + (present ? cursor.token(f, window) * row_bytes(f.input) : 0), present ? 16 : 0);
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
