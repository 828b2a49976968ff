// The weights of the branches of a row and head.
#pragma once
#include "base/params.cuh"
#include "tile/pieces.cuh"

FSA_DEVICE f32 gate_of(const Gates& gates, i64 row, int head, int branch) {
    return widen_element(gates.data, row * gates.row_stride + head * gates.head_stride + branch);
}
