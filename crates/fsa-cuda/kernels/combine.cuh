// WHAT   Stage combine: out = sum over the branches of gate * branch, in f32 and rounded once, and its gradients: grad_branch = gate * grad_out,
//        grad_gate = branch . grad_out, summed over the heads where they share a gate. Memory-bound. Without gates, all are 1, and a branch may
//        be absent: so gradients of branches are added up, too.
// GRID   (groups of 4 rows).
// ROLES  64 threads a row: a thread has a 16-byte piece of every few heads.
// SMEM   combine_backward: sums of the row's threads, where heads share a gate.
// SYNC   combine: none; each element is read and written by one thread, so out may be one of the branches. combine_backward: sums within a
//        head by shuffles; over the heads each thread in their order, then one barrier and the threads in theirs.
#include "tile/pieces.cuh"

constexpr int CTA_THREADS = 256, CTA_ROWS = 4, ROW_THREADS = CTA_THREADS / CTA_ROWS, BRANCHES = 3;
// Threads side by side on a head's row: a power of two, so that they can shuffle. At 96 and 192 a quarter of them has nothing to do.
constexpr int LANES = PIECES_PER_ROW <= 8 ? 8 : PIECES_PER_ROW <= 16 ? 16 : 32, PHASES = ROW_THREADS / LANES;

// Gates of a row and head.
struct Gates {
    f32 of[BRANCHES];

    FSA_DEVICE Gates(const CombineParams& p, i64 row, int head) {
        const i64 at = row * p.gate_row_stride + head * p.gate_head_stride;
        FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) of[b] = p.gates == nullptr ? 1.0f : widen_element(p.gates, at + b);
    }
};

// A piece of AHEAD heads of each of the tensors, zeros where there is none: the loads are under way together.
template <int AHEAD, int TENSORS>
FSA_DEVICE void load_heads(Vec4 (&v)[AHEAD][TENSORS], const Tensor (&tensors)[TENSORS], i64 row, int head, int heads, int piece) {
    FSA_UNROLL for (int a = 0; a < AHEAD; ++a)
        FSA_UNROLL for (int b = 0; b < TENSORS; ++b) {
            const bool present = head + a * PHASES < heads && tensors[b].data != nullptr;
            v[a][b] = present ? load_global_once(tensor_row(tensors[b], row, head + a * PHASES) + piece * 16) : Vec4{0, 0, 0, 0};
        }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) combine(const __grid_constant__ CombineParams p) {
    constexpr int AHEAD = 2;
    const i64 row = (i64)blockIdx.x * CTA_ROWS + threadIdx.x / ROW_THREADS;
    const int phase = threadIdx.x % ROW_THREADS / LANES, piece = threadIdx.x % LANES;
    if (row >= p.rows || piece >= PIECES_PER_ROW) return;
    FSA_NO_UNROLL for (int head = phase; head < p.heads; head += AHEAD * PHASES) {
        Vec4 v[AHEAD][BRANCHES];
        load_heads(v, p.branches, row, head, p.heads, piece);
        FSA_UNROLL for (int a = 0; a < AHEAD; ++a) {
            if (head + a * PHASES >= p.heads) break;
            const Gates gates(p, row, head + a * PHASES);
            Eight sum, x;
            fill(sum, 0.0f);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
                if (p.branches[b].data == nullptr) continue;
                widen(x, v[a][b]);
                add_scaled(sum, gates.of[b], x);
            }
            store_global((char*)tensor_row(p.out, row, head + a * PHASES) + piece * 16, narrow(sum));
        }
    }
}

FSA_DEVICE void store_gates(void* grad_gates, i64 index, const f32 (&grads)[BRANCHES]) {
    FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) store_element(grad_gates, index * BRANCHES + b, grads[b]);
}
// Sum over the threads of a head.
FSA_DEVICE f32 sum_lanes(f32 x) {
    FSA_UNROLL for (int delta = LANES / 2; delta > 0; delta /= 2) x += __shfl_xor_sync(0xffffffffu, x, delta);
    return x;
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 4) combine_backward(const __grid_constant__ CombineBackwardParams p) {
    __shared__ f32 all[CTA_ROWS][PHASES][BRANCHES];
    const CombineParams& f = p.forward;
    const int local = threadIdx.x / ROW_THREADS, phase = threadIdx.x % ROW_THREADS / LANES, lane = threadIdx.x % LANES;
    const i64 row = (i64)blockIdx.x * CTA_ROWS + local;
    const bool present = row < f.rows && lane < PIECES_PER_ROW, per_head = f.gate_head_stride != 0, any_gates = p.grad_gates != nullptr;
    f32 sums[BRANCHES] = {0.0f, 0.0f, 0.0f};
    // All threads of a warp go round equally often, because they shuffle.
    FSA_NO_UNROLL for (int first = 0; first < f.heads; first += PHASES) {
        const int head = first + phase;
        const bool mine = present && head < f.heads;
        if (mine) {
            Vec4 v[BRANCHES], grad_words = load_global_once(tensor_row(p.grad_out, row, head) + lane * 16);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b)
                if (any_gates) v[b] = load_global_once(tensor_row(f.branches[b], row, head) + lane * 16);
            const Gates gates(f, row, head);
            Eight grad;
            widen(grad, grad_words);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
                Eight x;
                if (any_gates) {
                    widen(x, v[b]);
                    sums[b] = dot(sums[b], x, grad);
                }
                if (p.grad_branches[b].data == nullptr) continue;
                FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] = gates.of[b] * grad[e];
                store_global((char*)tensor_row(p.grad_branches[b], row, head) + lane * 16, narrow(x));
            }
        }
        if (any_gates && per_head) {
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) sums[b] = sum_lanes(sums[b]);
            if (mine && lane == 0) store_gates(p.grad_gates, row * f.heads + head, sums);
            FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) sums[b] = 0.0f;
        }
    }
    if (!any_gates || per_head) return;
    FSA_UNROLL for (int b = 0; b < BRANCHES; ++b) {
        sums[b] = sum_lanes(sums[b]);
        if (lane == 0) all[local][phase][b] = sums[b];
    }
    __syncthreads();
    if (threadIdx.x % ROW_THREADS == 0 && row < f.rows) {
        FSA_UNROLL for (int b = 0; b < BRANCHES; ++b)
            FSA_UNROLL for (int other = 1; other < PHASES; ++other) sums[b] += all[local][other][b];
        store_gates(p.grad_gates, row, sums);
    }
}
