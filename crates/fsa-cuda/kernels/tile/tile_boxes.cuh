// Tiles that the bulk copy engine fills. sm_90 and later.
#pragma once
#include "ptx/tensor_map.cuh"
#include "tile/swizzled_tile.cuh"

// Loads ROWS rows of a tile, 64 columns at a time: boxes of the map, as many heads and tokens as it says.
template <int ROWS>
FSA_DEVICE void load_tile(u32 tile, const TensorMap* map, u32 barrier, int head, int row) {
    FSA_UNROLL for (int half = 0; half < SwizzledTile<ROWS>::HALVES; ++half)
        load_box(tile + half * SwizzledTile<ROWS>::HALF_BYTES, map, barrier, half * 64, head, row);
}
