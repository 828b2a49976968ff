// The two rows of a tile that a thread serves, and their accumulators. In m64nN accumulators a thread has rows
// lane / 4 and lane / 4 + 8 of its warp's 16, columns 8 i + 2 (lane % 4) + {0, 1}.
//
// Partials are private, so they are stored in *fragment order*: 16-byte piece t of group j (32 columns, 64 bytes) holds
// the pairs i = 4 j .. 4 j + 3 of the thread with lane % 4 = t. A quad writes 64 contiguous bytes per store and
// nothing is shuffled; only the last kernel of a stage puts rows into natural order.
#pragma once
#include "base/math.cuh"
#include "base/params.cuh"
#include "ptx/memory.cuh"

// Columns of one product over the columns of a tile: narrow enough that one piece is stored while the next is computed.
constexpr int PIECE_COLUMNS = HEAD_DIM % 64 == 0 ? 64 : 32;
constexpr int PIECES = HEAD_DIM / PIECE_COLUMNS;
constexpr int PIECE_GROUPS = PIECE_COLUMNS / 32;
typedef f32 Piece[PIECE_COLUMNS / 2];

// One group (32 columns) of one of the thread's two rows (HIGH: row + 8), scaled, as four pairs that `pack` makes.
template <bool HIGH, typename Pack>
FSA_DEVICE Vec4 pack_group(const Piece& acc, int group, f32 scale, Pack pack) {
    u32 w[4];
    FSA_UNROLL for (int j = 0; j < 4; ++j) {
        const int e = (group * 4 + j) * 4 + (HIGH ? 2 : 0);
        w[j] = pack(acc[e] * scale, acc[e + 1] * scale);
    }
    return Vec4{w[0], w[1], w[2], w[3]};
}
template <bool HIGH>
FSA_DEVICE Vec4 pack_group(const Piece& acc, int group, f32 scale) { return pack_group<HIGH>(acc, group, scale, [](f32 lo, f32 hi) { return pack2(lo, hi); }); }

// Where a thread stores fragments of one of its rows and of the row of the neighbouring quad (lane ^ 4). Two quads write one
// 128-byte line of one row, then of the other: whole lines cross to L2 with a sixth less traffic than halves.
struct FragmentRows {
    char *even, *odd;       // row of the quad with an even number, and of the next one; with this lane's offset
    bool keep_even, keep_odd;
};
FSA_DEVICE FragmentRows fragment_rows(char* base, u32 slot, bool keep) {
    const u32 mine = keep ? slot : 0xffffffffu, other = __shfl_xor_sync(0xffffffffu, mine, 4);
    const bool odd = threadIdx.x & 4;
    const u32 even_slot = odd ? other : mine, odd_slot = odd ? mine : other;
    const int offset = (threadIdx.x & 3) * 16 + (PIECE_GROUPS == 2 && odd ? 64 : 0);
    return {base + (i64)even_slot * ROW_BYTES + offset, base + (i64)odd_slot * ROW_BYTES + offset, even_slot != 0xffffffffu, odd_slot != 0xffffffffu};
}
FSA_DEVICE Vec4 swap_with_neighbour(Vec4 v) {
    return Vec4{__shfl_xor_sync(0xffffffffu, v.x, 4), __shfl_xor_sync(0xffffffffu, v.y, 4), __shfl_xor_sync(0xffffffffu, v.z, 4), __shfl_xor_sync(0xffffffffu, v.w, 4)};
}
template <bool HIGH>
FSA_DEVICE void store_fragment(const FragmentRows& rows, int piece, const Piece& acc, f32 scale) {
    const bool odd = threadIdx.x & 4;
    if constexpr (PIECE_GROUPS == 2) {
        const Vec4 first = pack_group<HIGH>(acc, 0, scale), second = pack_group<HIGH>(acc, 1, scale);
        const Vec4 received = swap_with_neighbour(odd ? first : second);
        if (rows.keep_even) store_global(rows.even + piece * 128, odd ? received : first);
        if (rows.keep_odd) store_global(rows.odd + piece * 128, odd ? second : received);
    } else {
        if (odd ? rows.keep_odd : rows.keep_even) store_global((odd ? rows.odd : rows.even) + piece * 64, pack_group<HIGH>(acc, 0, scale));
    }
}

// Transposes a 4 x 4 matrix of words over a quad: word j of lane t becomes word t of lane j. Both rounds swap with a
// neighbour the half that it needs.
FSA_DEVICE Vec4 transpose_quad(Vec4 v) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    u32 a = __shfl_xor_sync(0xffffffffu, odd ? v.x : v.y, 1), b = __shfl_xor_sync(0xffffffffu, odd ? v.z : v.w, 1);
    if (odd) { v.x = a; v.z = b; } else { v.y = a; v.w = b; }
    a = __shfl_xor_sync(0xffffffffu, upper ? v.x : v.z, 2);
    b = __shfl_xor_sync(0xffffffffu, upper ? v.y : v.w, 2);
    if (upper) { v.x = a; v.y = b; } else { v.z = a; v.w = b; }
    return v;
}

// Natural order: lane t ends up with columns 8 t .. 8 t + 7 of each group. All lanes of the quad take part.
template <bool HIGH>
FSA_DEVICE void store_natural(char* row, int piece, const Piece& acc, f32 scale, bool present) {
    FSA_UNROLL for (int group = 0; group < PIECE_GROUPS; ++group) {
        const Vec4 v = transpose_quad(pack_group<HIGH>(acc, group, scale));
        if (present) store_global(row + (piece * PIECE_GROUPS + group) * 64 + (threadIdx.x & 3) * 16, v);
    }
}

// The thread's piece of a group of a row that is read once, and of all groups; zeros where the row is not present.
FSA_DEVICE Vec4 load_group(const char* row, int group, bool present) {
    return present ? load_global_once(row + group * 64 + (threadIdx.x & 3) * 16) : Vec4{0, 0, 0, 0};
}
FSA_DEVICE void load_pieces(Vec4 (&v)[HEAD_DIM / 32], const char* first, bool present) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) v[group] = present ? load_global_once(first + group * 64) : Vec4{0, 0, 0, 0};
}
FSA_DEVICE void load_row(Vec4 (&v)[HEAD_DIM / 32], const char* row, bool present) {
    FSA_UNROLL for (int group = 0; group < HEAD_DIM / 32; ++group) v[group] = load_group(row, group, present);
}

FSA_DEVICE f32 quad_max(f32 x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FSA_DEVICE f32 quad_sum(f32 x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Values of a 64 x N tile as A fragments of a product over its columns: accumulator pairs are fragments.
template <int N>
FSA_DEVICE void to_fragment(u32 (&a)[4], const f32 (&p)[N / 2], int k) {
    a[0] = pack2(p[8 * k], p[8 * k + 1]);
    a[1] = pack2(p[8 * k + 2], p[8 * k + 3]);
    a[2] = pack2(p[8 * k + 4], p[8 * k + 5]);
    a[3] = pack2(p[8 * k + 6], p[8 * k + 7]);
}

// Multiplies the thread's two rows of a piece.
FSA_DEVICE void scale_piece(Piece& acc, f32 low, f32 high) {
    FSA_UNROLL for (int i = 0; i < PIECE_COLUMNS / 8; ++i) {
        acc[4 * i] *= low;      acc[4 * i + 1] *= low;
        acc[4 * i + 2] *= high; acc[4 * i + 3] *= high;
    }
}
