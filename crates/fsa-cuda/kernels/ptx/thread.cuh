// Numbers of this thread.
#pragma once
#include "base/types.cuh"

// threadIdx.x, read again at every call: what follows from it is not kept in registers over loops that need them all.
FSA_DEVICE int thread_number() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// The same number, of which the compiler knows nothing: what follows from it is computed where it is asked for.
FSA_DEVICE int unknown(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// Keeps a pointer in its registers. From parts that it knows the compiler makes an address of its own for every load, and the registers of one are
// needed for the next: loads then wait for each other.
FSA_DEVICE void keep(const char*& pointer) { asm volatile("" : "+l"(pointer)); }
FSA_DEVICE int lane_number() { return thread_number() & 31; }
