// Where the rows of an attention's tile go (band_sm90.cuh): out and log-sum-exp, and as a branch of the whole the sum of the branches.
#pragma once
#include "block/band_pipeline.cuh"
#include "block/branch_rows.cuh"

// Where an attention's rows go.
struct Results {
    const Tensor& out;
    const Branch& branch;
    f32* lse;

    FSA_DEVICE static Results of(const BandParams& p) { return {p.out, p.branch, p.lse}; }
};

// Whether what is read for a tile's results is on its way while the last product runs: not where registers or L1 are short.
constexpr bool OPENS_EARLY = HEAD_DIM <= 128 && !BLOCK_SCORES;

// Where a thread's two rows go, and what is there already.
struct StoredRows {
    BranchRow low, high;
    HeldGroups held;

    FSA_DEVICE static BranchRow row_of(const Results& to, const BandTile& t, int row) {
        if constexpr (BLOCK_SCORES) return t.exists(row) ? open_branch_row(to.out, to.branch, t.token + t.token_of(row), t.first_head + t.head_of(row)) : no_row();
        // Those of the tile's first row instead of none, without a branch, so that loads for two rows are under way together; no faster where blocks are chosen.
        const bool exists = t.exists(row);
        BranchRow r = open_branch_row(to.out, to.branch, t.token + (exists ? t.token_of(row) : 0), t.first_head + (exists ? t.head_of(row) : 0));
        r.exists = exists;
        return r;
    }
    FSA_DEVICE void open(const Results& to, const BandTile& t, int row) {
        low = row_of(to, t, row);
        high = row_of(to, t, row + 8);
        load_held(held, to.branch, low.sum, high.sum, low.exists, high.exists, 0);
    }
};
