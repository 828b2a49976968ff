// Copies of boxes of tensors by the bulk copy engine: one thread starts them, and they land swizzled as wgmma reads them. sm_90 and later.
#pragma once
#include "base/params.cuh"

FSA_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box whose first element is (column, head, row), to shared memory; elements outside of the tensor become zero. All bytes of the box count on
// the barrier.
FSA_DEVICE void load_box(u32 shared, const TensorMap* map, u32 barrier, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(shared), "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row) : "memory");
}
