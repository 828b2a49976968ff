// WHAT   Stage combine: out = sum over the branches of gate * branch, in f32 and rounded once, and its gradients: grad_branch = gate * grad_out,
//        grad_gate = branch . grad_out, summed over the heads where they share a gate. combine_statistics is what stage nsa does instead of the latter:
//        the gradients of the gates, the statistics with which the attentions read grad_out as it is (block/row_stats.cuh), and their bounds. Memory-bound.
// GRID   (groups of 4 rows).
// ROLES  64 threads a row: a thread has a 16-byte piece of every few heads.
// SMEM   Sums of the gates' gradients of a row's phases, where heads share a gate.
// SYNC   combine: none; each element is read and written by one thread, so out may be one of the branches. The others: sums within a head by
//        shuffles; over the heads each phase in their order, then one barrier and the phases in theirs. combine_statistics may overlap the kernel
//        before it, which clears the bounds, until it raises them.
#include "block/gates.cuh"
#include "block/query_sums.cuh"
#include "block/row_stats.cuh"

constexpr int CTA_THREADS = 256, CTA_ROWS = 4, ROW_THREADS = CTA_THREADS / CTA_ROWS, BRANCHES = 3;
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

// Sum over the threads of a head, in all of them.
FSA_DEVICE f32 sum_lanes(f32 x) {
    FSA_UNROLL for (int delta = LANES / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(0xffffffffu, x, delta);
    return x;
}
// Element `b` of three, where b is not known to the compiler.
FSA_DEVICE f32 pick(const f32 (&x)[BRANCHES], int b) { return b == 0 ? x[0] : b == 1 ? x[1] : x[2]; }

// What a thread does for both backward kernels: the products of a head's grad_out with the branches end up in lane b for branch b.
struct GateGrads {
    void* grad_gates;
    int rows, heads;
    bool per_head;
    f32 total;          // of the phase's heads so far, where all share their gates

    // All threads of a warp come here together, because they shuffle.
    FSA_DEVICE f32 add(const Vec4 (&branches)[BRANCHES], const Eight& grad, i64 row, int head, int lane, bool stored) {
        f32 sums[BRANCHES];
        FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
            Eight x;
            widen(x, branches[b]);
            sums[b] = sum_lanes(dot(0.0f, x, grad));
        }
        const f32 sum = pick(sums, lane);
        if (per_head && stored && lane < BRANCHES) store_element(grad_gates, (row * heads + head) * BRANCHES + lane, sum);
        total += sum;
        return sum;
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
        gates.add(v, grad, row, head, lane, present);
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

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 3) combine_statistics(const __grid_constant__ CombineStatisticsParams p) {
    constexpr int AHEAD = 2;
    const CombineParams& f = p.forward;
    const int local = threadIdx.x / ROW_THREADS, phase = threadIdx.x % ROW_THREADS / LANES, lane = threadIdx.x % LANES;
    const i64 row = (i64)blockIdx.x * CTA_ROWS + local;
    const bool wanted = p.grad_gates != nullptr;
    GateGrads gates = {p.grad_gates, f.rows, f.heads, f.gates.head_stride != 0, 0.0f};
    const f32* lse = lane == 0 ? p.lse[0] : lane == 1 ? p.lse[1] : p.lse[2];
    RowStats* row_stats = lane >= BRANCHES ? nullptr : lane == 0 ? p.row_stats[0] : lane == 1 ? p.row_stats[1] : p.row_stats[2];
    u32 grad_bound = 0, delta_bound = 0;
    FSA_NO_UNROLL for (int first = phase; first < f.heads + phase; first += AHEAD * PHASES) {
        Vec4 grads[AHEAD], v[AHEAD][BRANCHES];      // loads that are under way together
        f32 gate[AHEAD], row_lse[AHEAD];
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            const int head = first + a * PHASES;
            const bool present = row < f.rows && lane < PIECES_PER_ROW && head < f.heads;
            grads[a] = load_piece(p.grad_out, row, head, lane, present);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) v[a][b] = load_piece(f.branches[b], row, head, lane, present);
            if (!present || row_stats == nullptr) continue;
            gate[a] = gate_of(f.gates, row, head, lane);
            row_lse[a] = lse[head * (i64)f.rows + row];
        }
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            const int head = first + a * PHASES;
            const bool present = row < f.rows && head < f.heads;
            Eight grad;
            widen(grad, grads[a]);
            const f32 delta = gates.add(v[a], grad, row, head, lane, present && wanted);
            const f32 size = sum_lanes(sum_sizes(grads[a]));
            if (!present || row_stats == nullptr) continue;
            row_stats[head * (i64)f.rows + row] = gated_row_stats(row_lse[a], delta, gate[a]);
            if (row_lse[a] == neg_inf()) continue;      // sees no key
            grad_bound = max_u(grad_bound, bound_bits(gate[a] * size));
            delta_bound = max_u(delta_bound, bound_bits(gate[a] * delta));
        }
    }
    FSA_UNROLL for (int other = LANES; other < 32; other *= 2) {
        grad_bound = max_u(grad_bound, __shfl_xor_sync(0xffffffffu, grad_bound, other));
        delta_bound = max_u(delta_bound, __shfl_xor_sync(0xffffffffu, delta_bound, other));
    }
    wait_for_previous();        // it clears the bounds
    RowBounds* row_bounds = lane == 0 ? p.row_bounds[0] : lane == 1 ? p.row_bounds[1] : p.row_bounds[2];
    // A lane for each branch, so that a warp waits for the bounds once.
    if ((threadIdx.x & 31) < BRANCHES && row_bounds != nullptr) {
        const u32 grad = load_relaxed(&row_bounds->grad), delta = load_relaxed(&row_bounds->delta);
        if (grad_bound > grad) max_global(&row_bounds->grad, grad_bound);
        if (delta_bound > delta) max_global(&row_bounds->delta, delta_bound);
    }
    if (wanted) gates.finish(row, local, phase, lane);
}
