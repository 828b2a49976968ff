// Bulk copies from shared to global memory: one thread starts them, no register and no slot of the load/store unit carries the data.
// They pass groups of their thread; addresses and sizes are multiples of 16 bytes. What generic stores wrote to the source needs
// fence_async_proxy first.
#pragma once
#include "base/types.cuh"

FSA_DEVICE void bulk_store(void* global, u32 shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}
// Adds floats in L2, in any order.
FSA_DEVICE void bulk_add(f32* global, u32 shared, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}
FSA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// This thread's copies are done.
FSA_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// The sources of this thread's copies may be written again.
FSA_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
