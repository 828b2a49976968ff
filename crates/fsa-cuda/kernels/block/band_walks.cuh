// A tile of rows whose keys are walked three times, for three branches of the whole (band_sm90.cuh with FSA_WINDOW_TOO): the window; the keys before it, with
// the sums of the window, so that both are all keys; and, afresh, the compressed keys, last because they are made while the others are attended to.
#pragma once
#include "block/band_pipeline.cuh"
#include "block/gates.cuh"
#include "ptx/mma.cuh"

constexpr int WINDOW = 0, BEFORE = 1, COMPRESSED = 2;   // walks

struct Walks {
    const BandBothParams& p;

    // The keys of a walk. Those before a window are what a compression of as many tokens and two more makes complete.
    FSA_DEVICE Band band_of(int walk) const {
        Band band = p.attention.band;
        if (walk == BEFORE) band.kernel_size = (int)min((u32)band.window + 2, 0x7fffffffu);
        if (walk == COMPRESSED) {
            band.kernel_size = p.compressed.band.kernel_size;
            band.kernel_stride = p.compressed.band.kernel_stride;
        }
        if (walk != WINDOW) band.window = 0x7fffffff;
        return band;
    }
    FSA_DEVICE const BandParams& source_of(int walk) const { return walk == COMPRESSED ? p.compressed : p.attention; }

    FSA_DEVICE BandWork find(int number) const {
        BandWork w = BandWork::find(p.attention.band, number, p.attention.num_kv_heads);
        const i32* rows = p.compressed.band.cu_keys + w.tile.sequence;
        w.last_row = rows[0];
        w.last_keys = rows[1] - rows[0];
        return w;
    }
    // Takes the next walk of a tile, if there is one.
    FSA_DEVICE bool go_on(BandWork& w) const {
        if (w.walk == COMPRESSED) return false;
        ++w.walk;
        if (w.walk == COMPRESSED) {
            w.tile.key_row = w.last_row;
            w.tile.keys = w.last_keys;
        }
        w.meet(band_of(w.walk));
        return true;
    }
    // Whether what a tile's rows see through the window is all that they see.
    FSA_DEVICE bool sees_all(const BandWork& w) const { return end_key(band_of(BEFORE), w.tile.last_position(), w.tile.keys) == 0; }
};

// Where a tile's rows go. They pass through shared memory, where matrices of eight rows become whole pieces of a row. The sum of the branches so far stays
// there, rounded after each; the last walk writes it.
struct StoredRows {
    u32 matrices, pieces;       // the lane's place in its warp's rows, where it stores matrices and where it reads what it writes
    i32 tokens[2], heads[2];    // of the thread's two rows; token -1: there is no such row
    u16 gates[2][3];            // by branch

    // Bytes of a tile of rows, of the rows of one branch and then of the sum.
    static constexpr int ROW_BYTES = RowTile::HALVES * 128, BYTES = RowTile::BYTES;

    // Which piece of 16 bytes of a row lies first: eight rows of a matrix, and two rows that a quad each reads four pieces of, are in different banks.
    FSA_DEVICE static u32 first_piece(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

    FSA_DEVICE void open(u32 staged) {
        const int lane = lane_number(), row = lane & 15;
        const u32 rows = staged + thread_number() / 32 * 16 * ROW_BYTES;
        matrices = rows + row * ROW_BYTES + (first_piece(row) ^ lane >> 4) * 16;
        pieces = rows + lane / 4 * ROW_BYTES + (first_piece(lane / 4) ^ (lane & 3)) * 16;
    }
    // Finds the rows of a tile, and starts to load their gates; rows that do not exist have those of the first.
    FSA_DEVICE void find(const Branch& branch, const BandTile& t) {
        FSA_UNROLL for (int i = 0; i < 2; ++i) {
            const int row = first_row_of_thread() + 8 * i;
            const bool exists = t.exists(row);
            heads[i] = t.first_head + (exists ? t.head_of(row) : 0);
            const i32 token = t.token + (exists ? t.token_of(row) : 0);
            tokens[i] = exists ? token : -1;
            const u16* from = (const u16*)branch.gates.data + token * branch.gates.row_stride + heads[i] * branch.gates.head_stride;
            FSA_UNROLL for (int j = 0; j < 3; ++j) gates[i][j] = __ldg(from + j);
        }
    }
    FSA_DEVICE f32 gate(int i, int branch) const { return unpack_lo(branch == 0 ? gates[i][0] : branch == 1 ? gates[i][1] : gates[i][2]); }

    // Writes the thread's pieces of its rows; `rows` is 0 or BYTES.
    FSA_DEVICE void write(const Tensor& to, int rows) const {
        FSA_UNROLL for (int i = 0; i < 2; ++i) {
            char* target = (char*)tensor_row(to, tokens[i], heads[i]) + (threadIdx.x & 3) * 16;
            FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) {
                const Vec4 v = load_shared((pieces ^ group * 64) + rows + i * 8 * ROW_BYTES);
                if (tokens[i] >= 0) store_global(target + group * 64, v);
            }
        }
    }
    // The thread's pairs of columns 16 i .. 16 i + 15: acc times factors, added to `held`.
    FSA_DEVICE static void add_columns(u32 (&held)[4], const Columns& acc, int i, f32 low, f32 high) {
        FSA_UNROLL for (int j = 0; j < 4; ++j) {
            const int e = 8 * i + 2 * j;    // low, high of eight columns, then of the next
            const f32 by = j & 1 ? high : low;
            held[j] = pack2(fmaf(acc[e], by, unpack_lo(held[j])), fmaf(acc[e + 1], by, unpack_hi(held[j])));
        }
    }
    // Results of a walk, and with `twice` of the next one, which adds no keys. `low`, `high`: one over the sums of the thread's rows.
    FSA_DEVICE void store(const BandBothParams& p, int walk, bool twice, const Columns& acc, f32 low, f32 high) const {
        const Branch& branch = p.attention.branch;
        const int number = walk == WINDOW ? branch.number : walk == BEFORE ? p.branch.number : p.compressed.branch.number;
        const f32 low_gated = low * gate(0, number), high_gated = high * gate(1, number);
        const f32 low_too = low * gate(0, p.branch.number), high_too = high * gate(1, p.branch.number);
        __syncwarp();       // the rows before were read
        if (!branch.discards)
            FSA_UNROLL for (int i = 0; i < HEAD_DIM / 16; ++i) {
                u32 v[4] = {0, 0, 0, 0};
                add_columns(v, acc, i, low, high);
                store_matrices(matrices ^ i * 32, v);
            }
        FSA_UNROLL for (int i = 0; i < HEAD_DIM / 16; ++i) {
            const u32 at = (matrices ^ i * 32) + BYTES;
            u32 v[4] = {0, 0, 0, 0};
            if (walk != WINDOW) load_matrices(v, at);
            add_columns(v, acc, i, low_gated, high_gated);
            if (twice) add_columns(v, acc, i, low_too, high_too);
            store_matrices(at, v);
        }
        __syncwarp();
        if (!branch.discards) {
            write(walk == WINDOW ? p.attention.out : walk == BEFORE ? p.out : p.compressed.out, 0);
            if (twice) write(p.out, 0);
        }
        if (walk == COMPRESSED) write(branch.sum, BYTES);
    }
};
