// WHAT   Stage compress, kinds mean and weighted, and their gradients: windows of kernel_size tokens, kernel_stride apart, to one vector
//        each, out[i] = sum over j of factor[j] * input[i * kernel_stride + j], and zeros behind the last window. Memory-bound: every row of the input crosses from HBM once.
// GRID   compress_sum: (groups of runs x kv heads, kv heads fastest: what one token has lies together; inputs, which differ in tensors alone).
//        compress_windows, for short calls: (groups of CTA_WINDOWS windows x kv heads; inputs).
//        compress_sum_backward: (groups of cells x kv heads). compress_factors: (pieces of the windows, kv heads). compress_factors_merge: a warp per factor.
// ROLES  A thread has one 16-byte piece of a head's row. compress_sum: of a run of consecutive windows, whose sums it carries from cell to
//        cell (block/windows.cuh), so that what they share is loaded once. What two runs share is loaded twice: runs are as short as threads
//        allow, at most kernel_size / kernel_stride windows, so that it is still in L2. compress_windows: of one window,
//        after all threads have brought the tokens of the cta's windows, all loads under way together. Backward: of the tokens of a cell, from the gradients
//        of the windows that they share. compress_factors: of every token that has the thread's place in its cell; threads meet at the end.
// SMEM   The head's factors [kernel_size] f32; compress_windows: behind them the tokens of CTA_WINDOWS windows.
// SYNC   compress_sum and compress_windows may start before the kernel ahead of them has ended, and wait for it; the latter, where few sequences' lengths
//        say what its tables say, with its tokens under way. One barrier, when the factors are
//        there, and one when the tokens are. Sums are taken in one order whatever the grid; those of compress_factors per piece, then
//        over the pieces.
#include "block/windows.cuh"
#include "tile/pieces.cuh"

constexpr int CTA_THREADS = 256;
constexpr int RUNS = CTA_THREADS / PIECES_PER_ROW;      // rows that the threads of a cta have side by side
constexpr int CTA_WINDOWS = 8;                          // of compress_windows

// Fills the factors of a head.
FSA_DEVICE void load_factors(f32* factors, const CompressParams& p, int head) {
    for (int j = threadIdx.x; j < p.kernel_size; j += CTA_THREADS)
        factors[j] = p.weight == nullptr ? 1.0f / p.kernel_size : widen_element(p.weight, (i64)head * p.kernel_size + j);
    __syncthreads();
}

// `windows` windows of one sequence. Cell c is part n of window c - n: part RATIO - 1 is its last. Sums of windows that do not exist take
// part at both ends, and are dropped.
template <int RATIO>
FSA_DEVICE void sum_windows(const CompressParams& p, const f32* factors, const char* input, char* out, int windows) {
    constexpr int AHEAD = RATIO <= 2 ? 8 : 4;   // loads under way: with two ctas on an SM, 64 KB
    const i64 row_bytes = p.input.row_stride * ELEMENT_BYTES;
    Eight sums[RATIO];
    FSA_UNROLL for (int n = 0; n < RATIO; ++n) fill(sums[n], 0.0f);
    FSA_NO_UNROLL for (int window = 1 - RATIO; window < windows; ++window) {
        FSA_NO_UNROLL for (int first = 0; first < p.kernel_stride; first += AHEAD) {
            Vec4 rows[AHEAD];
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a)
                if (first + a < p.kernel_stride) rows[a] = load_global(input + a * row_bytes);
            input += min_i(AHEAD, p.kernel_stride - first) * row_bytes;
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
                if (first + a >= p.kernel_stride) break;
                Eight x;
                widen(x, rows[a]);
                FSA_UNROLL for (int n = 0; n < RATIO; ++n) add_scaled(sums[n], factors[n * p.kernel_stride + first + a], x);
            }
        }
        if (window >= 0) {
            store_global(out, narrow(sums[RATIO - 1]));
            out += p.out.row_stride * ELEMENT_BYTES;
        }
        FSA_UNROLL for (int n = RATIO - 1; n > 0; --n) FSA_UNROLL for (int e = 0; e < 8; ++e) sums[n][e] = sums[n - 1][e];
        fill(sums[0], 0.0f);
    }
}
// The same for any ratio, window by window.
FSA_DEVICE void sum_each_window(const CompressParams& p, const f32* factors, const char* input, char* out, int windows) {
    constexpr int AHEAD = 4;
    const i64 row_bytes = p.input.row_stride * ELEMENT_BYTES;
    FSA_NO_UNROLL for (int window = 0; window < windows; ++window) {
        Eight sum;
        fill(sum, 0.0f);
        FSA_NO_UNROLL for (int first = 0; first < p.kernel_size; first += AHEAD) {
            Vec4 rows[AHEAD];
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a)
                if (first + a < p.kernel_size) rows[a] = load_global(input + (first + a) * row_bytes);
            FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
                if (first + a >= p.kernel_size) break;
                Eight x;
                widen(x, rows[a]);
                add_scaled(sum, factors[first + a], x);
            }
        }
        store_global(out, narrow(sum));
        input += p.kernel_stride * row_bytes;
        out += p.out.row_stride * ELEMENT_BYTES;
    }
}

// Which head and which of the runs of all ctas a thread has; `run` < 0 where it has none.
struct RunPlace {
    int head, run, piece;
};
FSA_DEVICE RunPlace run_place(int num_kv_heads) {
    const int run = threadIdx.x / PIECES_PER_ROW;
    return {(int)(blockIdx.x % num_kv_heads), run < RUNS ? (int)(blockIdx.x / num_kv_heads) * RUNS + run : -1, (int)(threadIdx.x % PIECES_PER_ROW)};
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 2) compress_sum(const __grid_constant__ CompressSumParams both) {
    extern __shared__ __align__(1024) char shared[];
    f32* factors = (f32*)shared;
    const CompressParams& p = both.inputs[blockIdx.y];
    const RunPlace place = run_place(p.num_kv_heads);
    wait_for_previous();
    load_factors(factors, p, place.head);
    if (place.run < 0) return;
    const int total = p.cu_compressed[p.batch], runs = gridDim.x / p.num_kv_heads * RUNS, per_run = ceil_div(p.total_compressed, runs);
    const int ratio = p.kernel_size / p.kernel_stride;
    const i64 first = (i64)place.run * per_run;     // runs are cut from a bound of the windows
    int window = (int)first;
    const int end = first >= total ? window : min_i(per_run, total - window) + window;
    while (window < end) {      // once for every sequence that the run touches
        WindowCursor cursor;
        cursor.open(p, window);
        const int windows = min_i(end, cursor.end) - window;
        const char* input = tensor_row(p.input, cursor.token(p, window), place.head) + place.piece * 16;
        char* out = (char*)tensor_row(p.out, window, place.head) + place.piece * 16;
        switch (ratio) {
            case 1: sum_windows<1>(p, factors, input, out, windows); break;
            case 2: sum_windows<2>(p, factors, input, out, windows); break;
            case 4: sum_windows<4>(p, factors, input, out, windows); break;
            default: sum_each_window(p, factors, input, out, windows);
        }
        window += windows;
    }
    // Rows that no window has are zeros, so that nobody needs to clear them.
    for (const int bound = (int)(first + per_run < p.total_compressed ? first + per_run : p.total_compressed); window < bound; ++window)
        store_global((char*)tensor_row(p.out, window, place.head) + place.piece * 16, Vec4{0, 0, 0, 0});
}

// The same sums of a short call: in one order, so with the same bits.
extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) compress_windows(const __grid_constant__ CompressSumParams both) {
    extern __shared__ __align__(1024) char shared[];
    static_assert(CTA_WINDOWS <= RUNS, "a row of threads for each window");
    constexpr int ROW_BYTES = PIECES_PER_ROW * 16;
    const CompressParams& p = both.inputs[blockIdx.y];
    f32* factors = (f32*)shared;
    char* tokens = shared + ceil_div(p.kernel_size, 4) * 16;
    const int head = blockIdx.x % p.num_kv_heads, first = blockIdx.x / p.num_kv_heads * CTA_WINDOWS;
    const int row = threadIdx.x / PIECES_PER_ROW, piece = threadIdx.x % PIECES_PER_ROW, window = first + row;
    WindowCursor cursor;
    const bool is_early = p.batch <= 32;    // the tokens are under way before the tables are there
    int total;
    if (is_early) {
        total = cursor.open_by_lengths(p, first);
    } else {
        wait_for_previous();
        total = p.cu_compressed[p.batch];
        if (first < total) cursor.open(p, first);
    }
    const int windows = min_i(total - first, CTA_WINDOWS);
    const bool together = windows > 0 && first + windows <= cursor.end;     // of one sequence, so that their tokens follow one another
    if (together) {
        const char* input = tensor_row(p.input, cursor.token(p, first), head);
        const int pieces = ((windows - 1) * p.kernel_stride + p.kernel_size) * PIECES_PER_ROW;
        for (int i = threadIdx.x; i < pieces; i += CTA_THREADS)
            copy_async(shared_address(tokens + i * 16), input + i / PIECES_PER_ROW * (p.input.row_stride * ELEMENT_BYTES) + i % PIECES_PER_ROW * 16);
        copy_commit();
    }
    if (is_early) wait_for_previous();
    let_next_start();       // behind what is ahead of this kernel, so that the next may read the tables
    load_factors(factors, p, head);
    copy_wait<0>();
    __syncthreads();
    if (row >= CTA_WINDOWS || window >= p.total_compressed) return;
    char* out = (char*)tensor_row(p.out, window, head) + piece * 16;
    if (row >= windows) {
        store_global(out, Vec4{0, 0, 0, 0});
    } else if (together) {
        const char* own = tokens + row * p.kernel_stride * ROW_BYTES + piece * 16;
        Eight sum;
        fill(sum, 0.0f);
        _Pragma("unroll 8") for (int j = 0; j < p.kernel_size; ++j) {
            Eight x;
            widen(x, *(const Vec4*)(own + j * ROW_BYTES));
            add_scaled(sum, factors[j], x);
        }
        store_global(out, narrow(sum));
    } else {
        cursor.open(p, window);
        sum_each_window(p, factors, tensor_row(p.input, cursor.token(p, window), head) + piece * 16, out, 1);
    }
}

// Gradients of the tokens of a cell. Parts of windows that do not exist have factor and gradient 0.
template <int RATIO>
FSA_DEVICE void spread_cell(const CompressBackwardParams& p, const f32* factors, const Cell& cell, const char* grads, char* target) {
    constexpr int STEP = 16;    // loads under way: a short call takes as long as what it waits for
    const int stride = p.forward.kernel_stride;
    const i64 row_bytes = p.grad_input.row_stride * ELEMENT_BYTES;
    Eight grad[RATIO];
    FSA_UNROLL for (int n = 0; n < RATIO; ++n) {
        const bool exists = n >= cell.first_part && n <= cell.last_part;
        widen(grad[n], exists ? load_global(grads - n * p.grad_out.row_stride * ELEMENT_BYTES) : Vec4{0, 0, 0, 0});
    }
    FSA_NO_UNROLL for (int first = 0; first < cell.tokens; first += STEP) {
        Vec4 old[STEP];
        FSA_UNROLL for (int a = 0; a < STEP; ++a) {
            old[a] = {0, 0, 0, 0};
            if (p.accumulate && first + a < cell.tokens) old[a] = load_global_once(target + a * row_bytes);
        }
        FSA_UNROLL for (int a = 0; a < STEP; ++a) {
            if (first + a >= cell.tokens) break;
            Eight sum;
            widen(sum, old[a]);
            FSA_UNROLL for (int n = 0; n < RATIO; ++n) {
                const bool exists = n >= cell.first_part && n <= cell.last_part;
                add_scaled(sum, exists ? factors[n * stride + first + a] : 0.0f, grad[n]);
            }
            store_global(target + a * row_bytes, narrow(sum));
        }
        target += STEP * row_bytes;
    }
}
FSA_DEVICE void spread_each_token(const CompressBackwardParams& p, const f32* factors, const Cell& cell, const char* grads, char* target) {
    FSA_NO_UNROLL for (int token = 0; token < cell.tokens; ++token) {
        Eight sum;
        widen(sum, p.accumulate ? load_global_once(target) : Vec4{0, 0, 0, 0});
        for (int n = cell.first_part; n <= cell.last_part; ++n) {
            Eight grad;
            widen(grad, load_global(grads - n * p.grad_out.row_stride * ELEMENT_BYTES));
            add_scaled(sum, factors[n * p.forward.kernel_stride + token], grad);
        }
        store_global(target, narrow(sum));
        target += p.grad_input.row_stride * ELEMENT_BYTES;
    }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 2) compress_sum_backward(const __grid_constant__ CompressBackwardParams p) {
    extern __shared__ __align__(1024) char shared[];
    f32* factors = (f32*)shared;
    const RunPlace place = run_place(p.forward.num_kv_heads);
    load_factors(factors, p.forward, place.head);
    if (place.run < 0) return;
    const int ratio = p.forward.kernel_size / p.forward.kernel_stride;
    const Cell cell = find_cell(p.forward, ratio, place.run);
    if (cell.tokens == 0 || (p.accumulate && cell.first_part > cell.last_part)) return;
    const char* grads = tensor_row(p.grad_out, cell.window, place.head) + place.piece * 16;
    char* target = (char*)tensor_row(p.grad_input, cell.token, place.head) + place.piece * 16;
    switch (ratio) {
        case 1: spread_cell<1>(p, factors, cell, grads, target); break;
        case 2: spread_cell<2>(p, factors, cell, grads, target); break;
        case 4: spread_cell<4>(p, factors, cell, grads, target); break;
        default: spread_each_token(p, factors, cell, grads, target);
    }
}

constexpr int PARTS = 4;    // parts of windows that a thread sums at a time

// Sums over the cells of a piece of input[place in the cell] . gradient of window cell - n, per thread and for n = first_part .. + PARTS - 1.
// `phase` of `phases` cells.
FSA_DEVICE void sum_products(f32 (&sums)[PARTS], const CompressBackwardParams& p, int place, int first_part, int phase, int phases, int head,
                             int column) {
    const CompressParams& f = p.forward;
    const int ratio = f.kernel_size / f.kernel_stride, cells = f.total_compressed + f.batch * ratio, per_piece = ceil_div(cells, p.pieces);
    const int begin = blockIdx.x * per_piece, end = min_i(cells, begin + per_piece);
    const i64 grad_bytes = p.grad_out.row_stride * ELEMENT_BYTES;
    FSA_UNROLL for (int n = 0; n < PARTS; ++n) sums[n] = 0.0f;
    for (int number = begin + phase; number < end; number += phases) {
        const Cell cell = find_cell(f, ratio, number);
        const int first = max_i(cell.first_part, first_part), last = min_i(cell.last_part, first_part + PARTS - 1);
        if (first > last) continue;     // the token need not exist, nor be finite
        const char* grads = tensor_row(p.grad_out, cell.window, head) + column * 16;
        Vec4 rows[PARTS];
        const Vec4 row = load_global_once(tensor_row(f.input, cell.token + place, head) + column * 16);
        FSA_UNROLL for (int n = 0; n < PARTS; ++n)
            if (first_part + n >= first && first_part + n <= last) rows[n] = load_global(grads - (first_part + n) * grad_bytes);
        Eight x, grad;
        widen(x, row);
        FSA_UNROLL for (int n = 0; n < PARTS; ++n) {
            if (first_part + n < first || first_part + n > last) continue;
            widen(grad, rows[n]);
            sums[n] = dot(sums[n], x, grad);
        }
    }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) compress_factors(const __grid_constant__ CompressBackwardParams p) {
    __shared__ f32 all[PARTS][CTA_THREADS];
    const int stride = p.forward.kernel_stride, ratio = p.forward.kernel_size / stride, head = blockIdx.y;
    const int row = threadIdx.x / PIECES_PER_ROW, column = threadIdx.x % PIECES_PER_ROW;
    const int places = min_i(stride, RUNS), phases = RUNS / places;     // places of a cell at a time, and cells
    const bool active = row < places * phases;
    f32* partial = p.partial + ((i64)head * p.pieces + blockIdx.x) * p.forward.kernel_size;
    for (int first_place = 0; first_place < stride; first_place += places) {
        FSA_NO_UNROLL for (int first_part = 0; first_part < ratio; first_part += PARTS) {
            const int place = first_place + row % places;
            f32 sums[PARTS] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (active && place < stride) sum_products(sums, p, place, first_part, row / places, phases, head, column);
            FSA_UNROLL for (int n = 0; n < PARTS; ++n) all[n][threadIdx.x] = sums[n];
            __syncthreads();
            for (int i = threadIdx.x; i < places * PARTS; i += CTA_THREADS) {
                const int local = i % places, n = i / places;
                if (first_place + local >= stride || first_part + n >= ratio) continue;
                f32 sum = 0.0f;
                for (int phase = 0; phase < phases; ++phase)
                    for (int c = 0; c < PIECES_PER_ROW; ++c) sum += all[n][(phase * places + local) * PIECES_PER_ROW + c];
                partial[(first_part + n) * stride + first_place + local] = sum;
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS) compress_factors_merge(const __grid_constant__ CompressBackwardParams p) {
    const int size = p.forward.kernel_size, lane = threadIdx.x & 31;
    const i64 number = (i64)blockIdx.x * (CTA_THREADS / 32) + threadIdx.x / 32;
    if (number >= (i64)p.forward.num_kv_heads * size) return;
    const f32* partial = p.partial + number / size * p.pieces * size + number % size;
    f32 sum = 0.0f;
    for (int piece = lane; piece < p.pieces; piece += 32) sum += partial[(i64)piece * size];
    FSA_UNROLL for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
    if (lane == 0) store_element(p.grad_weight, number, sum);
}
