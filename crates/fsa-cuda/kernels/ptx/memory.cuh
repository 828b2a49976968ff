// Loads, stores and shared-memory addresses: one function per instruction.
#pragma once
#include "base/types.cuh"

struct __align__(16) Vec4 { u32 x, y, z, w; };

FSA_DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Read-only data that other CTAs will want soon (queries, keys, values): keep it in L2, skip L1.
FSA_DEVICE Vec4 load_global(const void* pointer) {
    Vec4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}
// Data that is read once: partials. Coherent, because another kernel of the same stream wrote it.
FSA_DEVICE Vec4 load_global_once(const void* pointer) {
    Vec4 v;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}
// Data that this launch wrote.
FSA_DEVICE Vec4 load_global_written(const void* pointer) {
    Vec4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer) : "memory");
    return v;
}
// Where `keep` is not 0, without a branch.
FSA_DEVICE void store_global_if(u32 keep, i32* pointer, i32 word) {
    asm volatile("{ .reg .pred k; setp.ne.u32 k, %0, 0; @k st.global.u32 [%1], %2; }" ::"r"(keep), "l"(pointer), "r"(word) : "memory");
}
FSA_DEVICE void store_global(void* pointer, Vec4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
FSA_DEVICE void store_global8(void* pointer, u32 x, u32 y) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(pointer), "r"(x), "r"(y) : "memory"); }
// A word, or two, that stands alone in its sector and that a kernel after this one reads: kept in L2, because a sector that leaves it half written costs
// memory a read and two writes.
FSA_DEVICE void store_kept(f32* pointer, f32 v) {
    asm volatile("{ .reg .b64 keep; createpolicy.fractional.L2::evict_last.b64 keep, 1.0; st.global.L2::cache_hint.f32 [%0], %1, keep; }" ::"l"(pointer), "f"(v)
                 : "memory");
}
FSA_DEVICE void store_kept(f32* pointer, f32 x, f32 y) {
    asm volatile("{ .reg .b64 keep; createpolicy.fractional.L2::evict_last.b64 keep, 1.0; st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, keep; }"
                 ::"l"(pointer), "f"(x), "f"(y)
                 : "memory");
}
FSA_DEVICE Vec4 as_words(f32 x, f32 y, f32 z, f32 w) { return {__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)}; }
FSA_DEVICE void store_shared(u32 address, u32 word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory"); }
FSA_DEVICE void store_shared8(u32 address, u32 x, u32 y) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory"); }
FSA_DEVICE void store_shared_if(bool keep, u32 address, u32 word) {
    asm volatile("{ .reg .pred k; setp.ne.u32 k, %0, 0; @k st.shared.u32 [%1], %2; }" ::"r"((u32)keep), "r"(address), "r"(word) : "memory");
}
FSA_DEVICE u32 load_shared_word(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}
// A counter goes up by one; returns what it was.
FSA_DEVICE u32 count_shared(u32 address) {
    u32 before;
    asm volatile("atom.shared.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(address) : "memory");
    return before;
}
FSA_DEVICE void store_shared(u32 address, Vec4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Four 8 x 8 matrices of 16-bit elements from their fragments; lane i holds the address of row i % 8 of matrix i / 8. sm_90 and later.
FSA_DEVICE void store_matrices(u32 address, const u32 (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
}
// The same, each matrix transposed: lane i holds the address of column i % 8 of matrix i / 8.
FSA_DEVICE void store_transposed_matrices(u32 address, const u32 (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
}
FSA_DEVICE Vec4 load_shared(u32 address) {
    Vec4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}
// Orders this thread's accesses to memory, whatever their kind, with its bulk copies.
FSA_DEVICE void fence_proxies() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Makes this thread's generic stores to shared memory visible to wgmma and to bulk copies.
FSA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 16 bytes from global to shared without a register; `bytes` = 0 writes zeros and reads nothing.
FSA_DEVICE void copy_async(u32 shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
FSA_DEVICE void copy_async(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// The same, and keeps it in L1 for the next ctas of the SM.
FSA_DEVICE void copy_async_cached(u32 shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
FSA_DEVICE void copy_async4(u32 shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
FSA_DEVICE void copy_async8(u32 shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(global) : "memory");
}
FSA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FSA_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Adds four floats in L2 at `pointer` + OFFSET bytes; relaxed, because nothing in the same launch reads the sums.
template <int OFFSET>
FSA_DEVICE void add_global(f32* pointer, f32 a, f32 b, f32 c, f32 d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0 + %5], {%1, %2, %3, %4};" ::"l"(pointer), "f"(a), "f"(b), "f"(c), "f"(d), "n"(OFFSET) : "memory");
}
// The same for four pairs of f16. Tiny ones stay what they are.
template <int OFFSET>
FSA_DEVICE void add_global_f16(void* pointer, Vec4 v) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0 + %5], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "n"(OFFSET) : "memory");
}
// A word that other ctas of the launch raise.
FSA_DEVICE u32 load_relaxed(const u32* pointer) {
    u32 word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(pointer) : "memory");
    return word;
}
// The same word, with all that whoever wrote it did before.
FSA_DEVICE u32 load_acquire(const u32* pointer) {
    u32 word;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(pointer) : "memory");
    return word;
}
FSA_DEVICE void add_release(u32* pointer, u32 word) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(word) : "memory"); }
FSA_DEVICE void max_global(u32* pointer, u32 word) { asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(pointer), "r"(word) : "memory"); }

// Programmatic dependent launch. The next kernel of the stream may start once all ctas of this one have said so or are done; what
// it does before `wait_for_previous` overlaps this one. After that, everything of the kernels before is done and visible. A cta
// that leaves without waiting would let the order of the kernels after the next one slip. Before Hopper kernels follow one another.
FSA_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FSA_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
