// Copies of boxes of tensors by the bulk copy engine: one thread starts them, and they lie swizzled in shared memory as wgmma reads them. sm_90 and later.
#pragma once
#include "base/params.cuh"

FSA_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box whose first element is (column, head, row), to shared memory; elements outside of the tensor become zero. All bytes of the box count on
// the barrier.
FSA_DEVICE void load_box(u32 shared, const TensorMap* map, u32 barrier, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(shared), "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row) : "memory");
}
// Stores a box of shared memory; what lies outside of the tensor is left out. Passes groups as in ptx/bulk.cuh.
FSA_DEVICE void store_box(const TensorMap* map, u32 shared, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
                 ::"l"(map), "r"(shared), "r"(column), "r"(head), "r"(row) : "memory");
}
// Adds a box of shared memory to the elements of the tensor in L2, in any order; f16 keeps subnormals. The rest as store_box.
FSA_DEVICE void add_box(const TensorMap* map, u32 shared, int column, int head, int row) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
                 ::"l"(map), "r"(shared), "r"(column), "r"(head), "r"(row) : "memory");
}
