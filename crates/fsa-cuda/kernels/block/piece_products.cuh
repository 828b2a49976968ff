// Products by mma.sync whose result is a piece: 16 rows of the columns that are stored together.
#pragma once
#include "block/rows.cuh"
#include "tile/fragments.cuh"

// out += A [16, 16] x 16 rows of a tile of ROWS rows, columns of `piece`; `rows` is a tall address of the rows.
template <int ROWS>
FSA_DEVICE void multiply_piece(Piece& out, const u32 (&a)[4], u32 rows, int piece) {
    FSA_UNROLL for (int unit = 0; unit < PIECE_COLUMNS / 16; ++unit)
        multiply_unit(out, 8 * unit, a, unit_address<ROWS>(rows, piece * (PIECE_COLUMNS / 16) + unit));
}
