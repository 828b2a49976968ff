// The rows of an attention, written out. Where it is a branch of the whole, they are multiplied by their gates and added to what the branches before
// left of the sum, in f32 and rounded once, so that no kernel has to read the branches to add them up, and they need not exist where nobody wants
// them for a backward. Accumulator layout of block/rows.cuh.
#pragma once
#include "block/gates.cuh"
#include "block/rows.cuh"

// One of the thread's two rows.
struct BranchRow {
    char *out, *sum;            // first bytes
    f32 scale, gated_scale;     // of the thread's sums
    bool exists;
};
// A row that exists; `sum` is that of its weights.
FSA_DEVICE BranchRow branch_row(const Tensor& out, const Branch& branch, i64 row, int head, f32 sum) {
    const f32 scale = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
    if (branch.sum.data == nullptr) return {(char*)tensor_row(out, row, head), nullptr, scale, 0.0f, true};
    const f32 gate = gate_of(branch.gates, row, head, branch.number);
    return {(char*)tensor_row(out, row, head), (char*)tensor_row(branch.sum, row, head), scale, scale * gate, true};
}
FSA_DEVICE BranchRow no_row() { return {nullptr, nullptr, 0.0f, 0.0f, false}; }

// Element i of a thread's accumulators of all columns, in either of their shapes.
FSA_DEVICE f32 element_of(const f32 (&acc)[HEAD_DIM / 2], int i) { return acc[i]; }
FSA_DEVICE f32 element_of(const Piece (&acc)[PIECES], int i) { return acc[i / (PIECE_COLUMNS / 2)][i % (PIECE_COLUMNS / 2)]; }

// One group (32 columns) of a row: acc * scale, and the pairs of `held`.
template <bool HIGH, typename Sums>
FSA_DEVICE void store_group(char* row, int group, const Sums& acc, f32 scale, Vec4 held, bool exists) {
    const u32 old[4] = {held.x, held.y, held.z, held.w};
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) {
        const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
        w[j] = pack2(fmaf(element_of(acc, e), scale, unpack_lo(old[j])), fmaf(element_of(acc, e + 1), scale, unpack_hi(old[j])));
    }
    const Vec4 v = transpose_quad(Vec4{w[0], w[1], w[2], w[3]});
    if (exists) store_global(row + group * 64 + (threadIdx.x & 3) * 16, v);
}

// Both rows of a thread. All lanes of a warp take part.
template <typename Sums>
FSA_DEVICE void store_branch(const Branch& branch, const BranchRow& low, const BranchRow& high, const Sums& acc) {
    constexpr int AHEAD = HEAD_DIM <= 128 ? HEAD_DIM / 32 : 2;      // groups whose loads are under way together: as many as there are registers for
    const Vec4 nothing = {0, 0, 0, 0};
    if (!branch.discards) {
        FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
            store_group<false>(low.out, group, acc, low.scale, nothing, low.exists);
            store_group<true>(high.out, group, acc, high.scale, nothing, high.exists);
        }
    }
    if (branch.sum.data == nullptr) return;
    FSA_UNROLL for (int first = 0; first < HEAD_DIM / 32; first += AHEAD) {
        Vec4 held[2][AHEAD];
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) {
            held[0][i] = load_group(low.sum, first + i, branch.accumulate && low.exists);
            held[1][i] = load_group(high.sum, first + i, branch.accumulate && high.exists);
        }
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) {
            store_group<false>(low.sum, first + i, acc, low.gated_scale, transpose_quad(held[0][i]), low.exists);
            store_group<true>(high.sum, first + i, acc, high.gated_scale, transpose_quad(held[1][i]), high.exists);
        }
    }
}
