// Barriers between the warps of a cta: mbarriers in shared memory, which also count the bytes of bulk copies, named barriers, and the hand-over of
// registers between warpgroups. sm_90 and later.
#pragma once
#include "base/types.cuh"

// One thread initialises; the others must see it before they use it (barriers_ready, then __syncthreads).
FSA_DEVICE void barrier_init(u32 barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); }
FSA_DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FSA_DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// Arrives, and makes the phase wait for `bytes` bytes of copies as well.
FSA_DEVICE void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Makes the phase wait for `bytes` bytes of copies as well, without an arrival, which has to come behind it.
FSA_DEVICE void barrier_expect_more(u32 barrier, int bytes) { asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"); }
// Waits until the phase of this parity is over; phases are numbered from 0, and parity 1 of a fresh barrier is.
FSA_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait; }" ::"r"(barrier), "r"(parity) : "memory");
}

// Named barriers 1 .. 15 (0 is __syncthreads): `threads` threads, those that only arrive included.
FSA_DEVICE void named_sync(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
FSA_DEVICE void named_arrive(int name, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
FSA_DEVICE bool named_sync_or(int name, int threads, bool value) {
    int any;
    asm volatile("{ .reg .pred p, q; setp.ne.s32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.s32 %0, 1, 0, q; }"
                 : "=r"(any) : "r"(name), "r"(threads), "r"((int)value) : "memory");
    return any != 0;
}

// Registers per thread of this warpgroup from here on, a multiple of 8. All its warps execute it.
template <int COUNT>
FSA_DEVICE void registers_shrink() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
FSA_DEVICE void registers_grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
