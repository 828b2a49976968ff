// The rows of an attention, written out. Where it is a branch of the whole, they are multiplied by their gates and added to what the branches before
// left of the sum, in f32 and rounded once, so that no kernel has to read the branches to add them up, and they need not exist where nobody wants
// them for a backward. Accumulator layout of block/rows.cuh.
#pragma once
#include "block/gates.cuh"
#include "block/rows.cuh"

// One of the thread's two rows.
struct BranchRow {
    char *out, *sum;            // first bytes
    f32 scale, gated_scale;     // of the thread's sums; of a row that is not normalised 1 and its gate
    bool exists;

    // `sum` is that of the row's weights.
    FSA_DEVICE void normalise(f32 sum) {
        scale = sum == 0.0f ? 0.0f : reciprocal_fast(sum);
        gated_scale = scale * gated_scale;
    }
};
// A row that exists, not normalised.
FSA_DEVICE BranchRow open_branch_row(const Tensor& out, const Branch& branch, i64 row, int head) {
    char* target = (char*)tensor_row(out, row, head);
    if (branch.sum.data == nullptr) return {target, nullptr, 1.0f, 0.0f, true};
    return {target, (char*)tensor_row(branch.sum, row, head), 1.0f, gate_of(branch.gates, row, head, branch.number), true};
}
FSA_DEVICE BranchRow branch_row(const Tensor& out, const Branch& branch, i64 row, int head, f32 sum) {
    BranchRow r = open_branch_row(out, branch, row, head);
    r.normalise(sum);
    return r;
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

// Groups of the sum's rows whose loads are under way together: as many as there are registers for.
constexpr int HELD_GROUPS = HEAD_DIM <= 128 ? HEAD_DIM / 32 : 2;
typedef Vec4 HeldGroups[2][HELD_GROUPS];
// Starts to load groups of both rows of a thread from `first` on.
FSA_DEVICE void load_held(HeldGroups& held, const Branch& branch, const char* low, const char* high, bool low_exists, bool high_exists, int first) {
    const bool adds = branch.sum.data != nullptr && branch.accumulate;
    FSA_UNROLL for (int i = 0; i < HELD_GROUPS; ++i) {
        held[0][i] = load_group(low, first + i, adds && low_exists);
        held[1][i] = load_group(high, first + i, adds && high_exists);
    }
}
// Both rows of a thread, of which the first groups are on their way. All lanes of a warp take part.
template <typename Sums>
FSA_DEVICE void store_branch(const Branch& branch, const BranchRow& low, const BranchRow& high, const Sums& acc, HeldGroups& held) {
    const Vec4 nothing = {0, 0, 0, 0};
    if (!branch.discards) {
        FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
            store_group<false>(low.out, group, acc, low.scale, nothing, low.exists);
            store_group<true>(high.out, group, acc, high.scale, nothing, high.exists);
        }
    }
    if (branch.sum.data == nullptr) return;
    FSA_UNROLL for (int first = 0; first < HEAD_DIM / 32; first += HELD_GROUPS) {
        if (first > 0) load_held(held, branch, low.sum, high.sum, low.exists, high.exists, first);
        FSA_UNROLL for (int i = 0; i < HELD_GROUPS; ++i) {
            store_group<false>(low.sum, first + i, acc, low.gated_scale, transpose_quad(held[0][i]), low.exists);
            store_group<true>(high.sum, first + i, acc, high.gated_scale, transpose_quad(held[1][i]), high.exists);
        }
    }
}
template <typename Sums>
FSA_DEVICE void store_branch(const Branch& branch, const BranchRow& low, const BranchRow& high, const Sums& acc) {
    HeldGroups held;
    load_held(held, branch, low.sum, high.sum, low.exists, high.exists, 0);
    store_branch(branch, low, high, acc, held);
}
