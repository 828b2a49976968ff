// Where the rows of two attentions at once go (band_pair_sm90.cuh): their weights, factors and log-sum-exps, the sum of the branches, of which compressed attention has left
// rows without their gates, and the branches' own rows. Accumulator layout of block/rows.cuh.
#pragma once
#include "block/band_pipeline.cuh"
#include "block/branch_rows.cuh"
#include "tile/fragments.cuh"

// Weights of one of a thread's rows in the three branches, as they are in memory.
struct PairGates {
    u16 compressed, listed, near;

    // Of a row that does not exist those of the tile's first, without a branch, so that all loads are under way together.
    FSA_DEVICE static PairGates of(const BandPairParams& all, const BandTile& t, int row) {
        const Gates& gates = all.branch.gates;
        const int r = t.exists(row) ? row : 0;
        const u16* of_row = (const u16*)gates.data + (i64)(t.token + t.token_of(r)) * gates.row_stride + (t.first_head + t.head_of(r)) * gates.head_stride;
        return {__ldg(of_row), __ldg(of_row + all.attention.branch.number), __ldg(of_row + all.branch.number)};
    }
};

// Where one of a thread's rows goes, and its factors there.
struct PairRow {
    const char* compressed;         // first bytes of the row of the branch that is done,
    char *sum, *listed, *near;      // in the sum of the branches, which may be the same, and of the other branches' own rows
    f32 listed_scale, near_scale;   // of the thread's sums
    f32 listed_gate, near_gate;     // the same times the weights
    f32 compressed_gate;
    bool exists;

    // Where it is read alone. One that does not exist has the place of the tile's first, without a branch, so that all loads are under way together.
    FSA_DEVICE void open(const BandPairParams& all, const BandTile& t, int row) {
        compressed = (const char*)t.row_of(all.compressed, t.exists(row) ? row : 0);
    }
    // Both branches are done: the sums of their probabilities become factors, their log-sum-exps are written.
    FSA_DEVICE void close(const BandPairParams& all, const BandTile& t, int row, const f32* maxima, const f32* sums, const PairGates& gates) {
        const f32 listed = quad_sum(sums[0]), near = quad_sum(sums[1]);
        exists = t.exists(row);
        if ((threadIdx.x & 3) == 0 && exists) {
            const i64 place = t.plane_index(row, all.attention.band.total_q);
            if (all.attention.lse != nullptr) all.attention.lse[place] = log_sum_exp(maxima[0], listed);
            if (all.lse != nullptr) all.lse[place] = log_sum_exp(maxima[1], near);
        }
        sum = (char*)t.row_of(all.branch.sum, exists ? row : 0);
        this->listed = (char*)t.row_of(all.attention.out, exists ? row : 0);
        this->near = (char*)t.row_of(all.out, exists ? row : 0);
        listed_scale = listed == 0.0f ? 0.0f : reciprocal_fast(listed);
        near_scale = near == 0.0f ? 0.0f : reciprocal_fast(near);
        listed_gate = listed_scale * unpack_lo(gates.listed);
        near_gate = near_scale * unpack_lo(gates.near);
        compressed_gate = unpack_lo(gates.compressed);
    }

  private:
    FSA_DEVICE static f32 log_sum_exp(f32 max, f32 sum) { return ((max == neg_inf() ? 0.0f : max) + log2_fast(sum)) * LN_2; }
};

// Rows of a warp in shared memory, 64 columns at a time: fragments go in as matrices of eight rows and come out as pieces of 16 bytes in natural order, and the other way round.
struct StagedRows {
    u32 matrices, pieces;       // the lane's place for matrices; for pieces of its first row

    static constexpr int COLUMNS = 64, ROW_BYTES = 2 * COLUMNS;

    // Which piece of a row lies first: eight rows of a matrix, and two rows of which a quad each reads four pieces, are in different banks.
    FSA_DEVICE static u32 first_piece(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

    FSA_DEVICE static StagedRows at(u32 rows) {
        const int lane = lane_number(), row = lane & 15;
        return {rows + row * ROW_BYTES + (first_piece(row) ^ lane >> 4) * 16, rows + lane / 4 * ROW_BYTES + (first_piece(lane / 4) ^ (lane & 3)) * 16};
    }
    FSA_DEVICE u32 matrix(int i) const { return matrices ^ i * 32; }                                        // columns 16 i .. 16 i + 15
    FSA_DEVICE u32 piece(int group, int row) const { return (pieces ^ group * 64) + row * 8 * ROW_BYTES; }  // of 32 columns of either row
};

// Both rows of a thread, of FIRST and the next columns.
template <int FIRST>
struct StoredColumns {
    static constexpr int GROUPS = (HEAD_DIM - FIRST < StagedRows::COLUMNS ? HEAD_DIM - FIRST : StagedRows::COLUMNS) / 32;
    const StagedRows& staged;
    const PairRow &low, &high;

    // To memory, from the warp's rows.
    FSA_DEVICE void write(char* to_low, char* to_high) const {
        const int at = FIRST * 2 + (threadIdx.x & 3) * 16;
        __syncwarp();
        FSA_UNROLL for (int group = 0; group < GROUPS; ++group) {
            const Vec4 first = load_shared(staged.piece(group, 0)), second = load_shared(staged.piece(group, 1));
            if (low.exists) store_global(to_low + at + group * 64, first);
            if (high.exists) store_global(to_high + at + group * 64, second);
        }
        __syncwarp();
    }
    // Of one branch.
    FSA_DEVICE void store(const Columns& acc, f32 of_low, f32 of_high, char* to_low, char* to_high) const {
        FSA_UNROLL for (int i = 0; i < 2 * GROUPS; ++i) {
            u32 v[4];
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                const int e = FIRST / 2 + 8 * i + 2 * j;    // low, high of eight columns, then of the next
                const f32 by = j & 1 ? of_high : of_low;
                v[j] = pack2(acc[e] * by, acc[e + 1] * by);
            }
            store_matrices(staged.matrix(i), v);
        }
        write(to_low, to_high);
    }
    // Of both, and of the rows of the branch that is done, which are held, rounded once. A thread holds just what it writes: it may lie there.
    FSA_DEVICE void store_sum(const Columns& listed, const Columns& near, const HeldGroups& held) const {
        FSA_UNROLL for (int group = 0; group < GROUPS; ++group)
            FSA_UNROLL for (int row = 0; row < 2; ++row) store_shared(staged.piece(group, row), held[row][FIRST / 32 + group]);
        __syncwarp();
        FSA_UNROLL for (int i = 0; i < 2 * GROUPS; ++i) {
            u32 v[4];
            load_matrices(v, staged.matrix(i));
            FSA_UNROLL for (int j = 0; j < 4; ++j) {
                const int e = FIRST / 2 + 8 * i + 2 * j;
                const PairRow& row = j & 1 ? high : low;
                const f32 lo = fmaf(near[e], row.near_gate, unpack_lo(v[j]) * row.compressed_gate), hi = fmaf(near[e + 1], row.near_gate, unpack_hi(v[j]) * row.compressed_gate);
                v[j] = pack2(fmaf(listed[e], row.listed_gate, lo), fmaf(listed[e + 1], row.listed_gate, hi));
            }
            store_matrices(staged.matrix(i), v);
        }
        write(low.sum, high.sum);
    }
};
// The sum's rows, and those of the branches where they are kept; the columns from FIRST on.
template <int FIRST>
FSA_DEVICE void store_pair(const BandPairParams& all, const StagedRows& staged, const PairRow& low, const PairRow& high, const Columns& listed, const Columns& near, const HeldGroups& held) {
    const StoredColumns<FIRST> columns = {staged, low, high};
    columns.store_sum(listed, near, held);
    if (!all.attention.branch.discards) columns.store(listed, low.listed_scale, high.listed_scale, low.listed, high.listed);
    if (!all.branch.discards) columns.store(near, low.near_scale, high.near_scale, low.near, high.near);
    if constexpr (FIRST + StagedRows::COLUMNS < HEAD_DIM) store_pair<FIRST + StagedRows::COLUMNS>(all, staged, low, high, listed, near, held);
}
