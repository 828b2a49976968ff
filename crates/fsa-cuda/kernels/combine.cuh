// WHAT   Stage combine: out = sum over the branches of gate * branch, in f32 and rounded once, and its gradients: grad_branch = gate * grad_out,
//        grad_gate = branch . grad_out, summed over the heads where they share a gate. combine_statistics is what stage nsa does instead of the latter:
//        the gradients of the gates, the statistics with which the attentions read grad_out as it is (block/row_stats.cuh), and their bounds; and, where it
//        is wanted, what else comes before attentions that add to grad_query in memory (block/sums_opening.cuh). Memory-bound.
// GRID   (groups of 4 rows); combine_statistics: (groups of keys x kv heads, groups of rows).
// ROLES  64 threads a row: a thread has a 16-byte piece of every few heads. In combine_statistics then a thread for each statistic.
// SMEM   Sums of the gates' gradients of a row's phases, where heads share a gate. combine_statistics: the sums of up to 32 heads.
// SYNC   combine: none; each element is read and written by one thread, so out may be one of the branches. The others: sums within a head by
//        shuffles; over the heads each phase in their order, then one barrier and the phases in theirs. combine_statistics: two barriers for every
//        32 heads; over the heads in their order. It may overlap the kernel before it, which clears the bounds and
//        fills tables, until a cta has loaded rows; then the next kernel may start, which reads tables before it waits for this one.
#include "block/gates.cuh"
#include "block/query_sums.cuh"
#include "block/row_stats.cuh"
#include "block/sums_opening.cuh"

constexpr int CTA_THREADS = 256, CTAS_OF_MULTIPROCESSOR = 4, CTA_ROWS = 4, ROW_THREADS = CTA_THREADS / CTA_ROWS, BRANCHES = 3;
// Threads side by side on a head's row: a power of two, so that they can shuffle. At 96 and 192 a quarter of them has nothing to do.
constexpr int LANES = PIECES_PER_ROW <= 8 ? 8 : PIECES_PER_ROW <= 16 ? 16 : 32, PHASES = ROW_THREADS / LANES;

// A piece of a row's head, zeros where there is none.
FSA_DEVICE Vec4 load_piece(const Tensor& t, i64 row, int head, int piece, bool present) {
    return present ? load_global_once(tensor_row(t, row, head) + piece * 16) : Vec4{0, 0, 0, 0};
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) combine(const __grid_constant__ CombineParams p) {
    constexpr int AHEAD = 2;
    const i64 row = (i64)blockIdx.x * CTA_ROWS + threadIdx.x / ROW_THREADS;
    const int phase = threadIdx.x % ROW_THREADS / LANES, piece = threadIdx.x % LANES;
    if (row >= p.rows || piece >= PIECES_PER_ROW) return;
    FSA_NO_UNROLL for (int first = phase; first < p.heads; first += AHEAD * PHASES) {
        Vec4 v[AHEAD][BRANCHES];        // loads that are under way together
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a)
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b)
                v[a][b] = load_piece(p.branches[b], row, first + a * PHASES, piece, first + a * PHASES < p.heads);
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            const int head = first + a * PHASES;
            if (head >= p.heads) break;
            Eight sum, x;
            fill(sum, 0.0f);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
                widen(x, v[a][b]);
                add_scaled(sum, gate_of(p.gates, row, head, b), x);
            }
            store_global((char*)tensor_row(p.out, row, head) + piece * 16, narrow(sum));
        }
    }
}

// Sums over the threads of a head: lane i gets that of x[i % 4].
FSA_DEVICE f32 sum_lanes(const f32 (&x)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const auto pass = [](f32 mine, f32 others, int delta) { return mine + __shfl_xor_sync(0xffffffffu, others, delta); };
    const f32 low = pass(odd ? x[1] : x[0], odd ? x[0] : x[1], 1), high = pass(odd ? x[3] : x[2], odd ? x[2] : x[3], 1);
    f32 sum = pass(upper ? high : low, upper ? low : high, 2);
    FSA_UNROLL for (int delta = 4; delta < LANES; delta *= 2) sum = pass(sum, sum, delta);
    return sum;
}
// The products of a head's grad_out with the branches end up in lane b for branch b, the sum of `last` in lane 3. All threads of a warp come here together.
FSA_DEVICE f32 sum_products(const Vec4* branches, const Eight& grad, f32 last) {
    f32 sums[BRANCHES + 1];
    FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
        Eight x;
        widen(x, branches[b]);
        sums[b] = dot(0.0f, x, grad);
    }
    sums[BRANCHES] = last;
    return sum_lanes(sums);
}

// The gradients of the gates, of which lane b has that of branch b.
struct GateGrads {
    void* grad_gates;
    int rows, heads;
    bool per_head;
    f32 total;          // of the phase's heads so far, where all share their gates

    FSA_DEVICE void add(f32 sum, i64 row, int head, int lane, bool stored) {
        if (per_head && stored && lane < BRANCHES) store_element(grad_gates, (row * heads + head) * BRANCHES + lane, sum);
        total += sum;
    }
    // The phases' totals of a row, in their order.
    FSA_DEVICE void finish(i64 row, int local, int phase, int lane) const {
        __shared__ f32 all[CTA_ROWS][PHASES][BRANCHES];
        if (per_head) return;
        if (lane < BRANCHES) all[local][phase][lane] = total;
        __syncthreads();
        if (phase > 0 || lane >= BRANCHES || row >= rows) return;
        f32 sum = total;
        FSA_UNROLL for (int other = 1; other < PHASES; ++other) sum += all[local][other][lane];
        store_element(grad_gates, row * BRANCHES + lane, sum);
    }
};

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) combine_backward(const __grid_constant__ CombineBackwardParams p) {
    const CombineParams& f = p.forward;
    const int local = threadIdx.x / ROW_THREADS, phase = threadIdx.x % ROW_THREADS / LANES, lane = threadIdx.x % LANES;
    const i64 row = (i64)blockIdx.x * CTA_ROWS + local;
    GateGrads gates = {p.grad_gates, f.rows, f.heads, f.gates.head_stride != 0, 0.0f};
    FSA_NO_UNROLL for (int first = 0; first < f.heads; first += PHASES) {
        const int head = first + phase;
        const bool present = row < f.rows && lane < PIECES_PER_ROW && head < f.heads;
        const Vec4 grad_words = load_piece(p.grad_out, row, head, lane, present);
        Vec4 v[BRANCHES];
        FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) v[b] = load_piece(f.branches[b], row, head, lane, present);
        Eight grad;
        widen(grad, grad_words);
        gates.add(sum_products(v, grad, 0.0f), row, head, lane, present);
        if (!present) continue;
        FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
            const f32 gate = gate_of(f.gates, row, head, b);
            Eight x;
            FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] = gate * grad[e];
            store_global((char*)tensor_row(p.grad_branches[b], row, head) + lane * 16, narrow(x));
        }
    }
    gates.finish(row, local, phase, lane);
}

// Statistics of rows. Heads of a cta's rows whose sums wait in shared memory together, and what becomes of them: a statistic of a branch of each.
constexpr int SUM_HEADS = 32, SUMS = SUM_HEADS * CTA_ROWS, STATS = (BRANCHES * SUMS + CTA_THREADS - 1) / CTA_THREADS;
static_assert(SUMS % 32 == 0, "a warp's statistics are of one branch");

struct SumsOfRows {
    f32 of[BRANCHES + 1][SUMS + 8];     // [head][row], of grad_out with each branch and of sizes of grad_out; lanes 0 to 3 write side by side
    u32 bounds[BRANCHES][2];            // the largest so far
};

template <typename T>
FSA_DEVICE T of_branch(T const (&all)[BRANCHES], int b) { return b == 0 ? all[0] : b == 1 ? all[1] : all[2]; }

// What a thread knows of one of its statistics.
struct Stat {
    int branch, sum, head, row;
    bool exists;
    f32 lse;
    u16 gate;       // as it came: to convert it is to wait for it, and then loads behind it wait, too

    FSA_DEVICE void find(const CombineParams& f, int i, int first_head, int first_row) {
        const int n = threadIdx.x + i * CTA_THREADS;
        branch = n / SUMS, sum = n % SUMS, head = first_head + sum / CTA_ROWS, row = first_row + sum % CTA_ROWS;
        exists = branch < BRANCHES && head < f.heads && row < f.rows;
    }
    FSA_DEVICE void load(const CombineStatisticsParams& p) {
        const Gates& gates = p.forward.gates;
        lse = 0.0f, gate = 0;
        if (!exists || p.row_stats[0] == nullptr) return;
        lse = __ldg(of_branch(p.lse, branch) + (i64)head * p.forward.rows + row);
        gate = __ldg((const u16*)gates.data + row * gates.row_stride + head * gates.head_stride + branch);
    }
    // A warp comes here together.
    FSA_DEVICE void finish(const CombineStatisticsParams& p, SumsOfRows& sums) const {
        const CombineParams& f = p.forward;
        const f32 delta = sums.of[branch][sum], size = sums.of[BRANCHES][sum], weight = unpack_lo(gate);
        if (exists && f.gates.head_stride != 0 && p.grad_gates != nullptr) store_element(p.grad_gates, ((i64)row * f.heads + head) * BRANCHES + branch, delta);
        if (p.row_stats[0] == nullptr) return;
        if (exists) of_branch(p.row_stats, branch)[(i64)head * f.rows + row] = gated_row_stats(lse, delta, weight);
        const auto raise = [&](u32* bound, f32 x) {
            const u32 most = __reduce_max_sync(0xffffffffu, exists && lse != neg_inf() ? bound_bits(x) : 0);     // -inf: sees no key
            if ((threadIdx.x & 31) == 0) atomicMax(bound, most);
        };
        raise(&sums.bounds[branch][0], weight * size);
        raise(&sums.bounds[branch][1], weight * delta);
    }
};

// Sums of a row's heads from `first` on. What does not exist is read from its neighbour and counts for nothing: no load waits for a branch.
FSA_DEVICE void sum_heads(const CombineStatisticsParams& p, const char* const (&at)[BRANCHES + 1], int first, int count, SumsOfRows& sums) {
    constexpr int AHEAD = 2;
    static_assert(SUM_HEADS % (AHEAD * PHASES) == 0, "sums of heads that do not exist have places");
    const int local = threadIdx.x / ROW_THREADS, phase = threadIdx.x % ROW_THREADS / LANES, lane = threadIdx.x % LANES;
    const u64 strides[BRANCHES + 1] = {(u64)p.forward.branches[0].head_stride, (u64)p.forward.branches[1].head_stride, (u64)p.forward.branches[2].head_stride,
                                       (u64)p.grad_out.head_stride};
    FSA_NO_UNROLL for (int base = phase; base < count + phase; base += AHEAD * PHASES) {
        Vec4 v[AHEAD][BRANCHES + 1];        // loads that are under way together
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            const u64 head = (u32)(first + min_i(base + a * PHASES, count - 1));
            FSA_UNROLL for (int t = 0; t <= BRANCHES; ++t) v[a][t] = load_global_once(at[t] + head * (strides[t] * ELEMENT_BYTES));
        }
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            if (lane >= PIECES_PER_ROW) FSA_UNROLL for (int t = 0; t <= BRANCHES; ++t) v[a][t] = Vec4{0, 0, 0, 0};
            Eight grad;
            widen(grad, v[a][BRANCHES]);
            const f32 sum = sum_products(v[a], grad, sum_sizes(v[a][BRANCHES]));
            if (lane <= BRANCHES) sums.of[lane][(base + a * PHASES) * CTA_ROWS + local] = sum;
        }
    }
}

// Zeros in the same heads of some rows of t.
FSA_DEVICE void clear_heads(const Tensor& t, int first_row, int rows, int first, int count) {
    constexpr int TEAMS = CTA_THREADS / LANES;
    const int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (t.data == nullptr || lane >= PIECES_PER_ROW) return;
    char* const place = (char*)tensor_row(t, first_row, first + team) + lane * 16;
    FSA_UNROLL for (int r = 0; r < CTA_ROWS; ++r)
        FSA_UNROLL for (int head = 0; head < SUM_HEADS; head += TEAMS)
            if (r < rows && team + head < count) store_global(place + (r * t.row_stride + head * t.head_stride) * ELEMENT_BYTES, Vec4{0, 0, 0, 0});
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, CTAS_OF_MULTIPROCESSOR) combine_statistics(const __grid_constant__ CombineStatisticsParams p) {
    __shared__ SumsOfRows sums;
    const CombineParams& f = p.forward;
    const int first_row = ((int)blockIdx.x - p.opening.row_cta) * CTA_ROWS;
    if (first_row < 0) return open_keys<CTA_THREADS>(p.opening, blockIdx.x);
    if (first_row >= f.rows) return open_keys<CTA_THREADS>(p.opening, (int)blockIdx.x - ceil_div(f.rows, CTA_ROWS));
    const int rows = min_i(f.rows - first_row, CTA_ROWS);
    if (threadIdx.x < 2 * BRANCHES) sums.bounds[threadIdx.x / 2][threadIdx.x % 2] = 0;
    const int row = first_row + min_i(threadIdx.x / ROW_THREADS, rows - 1), piece = min_i(threadIdx.x % LANES, PIECES_PER_ROW - 1);
    const auto piece_of = [&](const Tensor& t) { return tensor_row(t, row, 0) + piece * 16; };
    const char* const at[BRANCHES + 1] = {piece_of(f.branches[0]), piece_of(f.branches[1]), piece_of(f.branches[2]), piece_of(p.grad_out)};
    const int shared_branch = threadIdx.x / CTA_ROWS, shared_row = threadIdx.x % CTA_ROWS;
    const bool has_shared_gate = f.gates.head_stride == 0 && p.grad_gates != nullptr && shared_branch < BRANCHES && shared_row < rows;
    f32 total = 0.0f;
    FSA_NO_UNROLL for (int first = 0; first < f.heads; first += SUM_HEADS) {
        const int count = min_i(f.heads - first, SUM_HEADS);
        Stat stats[STATS];
        FSA_UNROLL for (int i = 0; i < STATS; ++i) stats[i].find(f, i, first, first_row), stats[i].load(p);
        sum_heads(p, at, first, count, sums);
        wait_for_previous();        // it clears the bounds, and fills the tables that the next reads at once
        let_next_start();
        clear_heads(p.opening.grad_query, first_row, rows, first, count);
        __syncthreads();
        FSA_UNROLL for (int i = 0; i < STATS; ++i)
            if (stats[i].branch < BRANCHES) stats[i].finish(p, sums);
        if (has_shared_gate) _Pragma("unroll 8") for (int head = 0; head < count; ++head) total += sums.of[shared_branch][head * CTA_ROWS + shared_row];
        __syncthreads();
    }
    if (has_shared_gate) store_element(p.grad_gates, (i64)(first_row + shared_row) * BRANCHES + shared_branch, total);
    if (threadIdx.x < 2 * BRANCHES && p.row_bounds[0] != nullptr) {
        const int branch = threadIdx.x / 2, which = threadIdx.x % 2;
        u32* const bound = &of_branch(p.row_bounds, branch)->grad + which;
        if (sums.bounds[branch][which] > load_relaxed(bound)) max_global(bound, sums.bounds[branch][which]);
    }
}
