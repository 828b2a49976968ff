// wgmma: one specialisation per N. The only place that knows how the instruction is spelled.
// Accumulator of m64nN: element 4 i + e of a thread is column 8 i + 2 (lane % 4) + (e & 1) of row
// 16 warp + lane / 4 + 8 (e >> 1).
#pragma once
#include "base/types.cuh"

FSA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FSA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FSA_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Pins an accumulator in its registers across the asynchronous part, as the instruction needs.
template <int COUNT>
FSA_DEVICE void wgmma_pin(f32 (&d)[COUNT]) {
    FSA_UNROLL for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#if FSA_IS_BF16
#define FSA_WGMMA_TYPE ".f32.bf16.bf16 "
#else
#define FSA_WGMMA_TYPE ".f32.f16.f16 "
#endif

#define FSA_REGS_8 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
#define FSA_REGS_16 \
    FSA_REGS_8 \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FSA_REGS_32 \
    FSA_REGS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FSA_REGS_40 \
    FSA_REGS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FSA_REGS_48 \
    FSA_REGS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FSA_REGS_64 \
    FSA_REGS_48 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FSA_REGS_56 \
    FSA_REGS_48 \
    ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FSA_REGS_72 \
    FSA_REGS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FSA_REGS_96 \
    FSA_REGS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FSA_REGS_128 \
    FSA_REGS_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FSA_OUTS_8 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FSA_OUTS_16 \
    FSA_OUTS_8, \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FSA_OUTS_32 \
    FSA_OUTS_16, \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FSA_OUTS_40 \
    FSA_OUTS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FSA_OUTS_48 \
    FSA_OUTS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FSA_OUTS_64 \
    FSA_OUTS_48, \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FSA_OUTS_56 \
    FSA_OUTS_48, \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FSA_OUTS_72 \
    FSA_OUTS_64, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FSA_OUTS_96 \
    FSA_OUTS_64, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FSA_OUTS_128 \
    FSA_OUTS_96, \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// A from registers, B from shared memory. TRANSPOSE_B: B is stored with N contiguous.
// A and B from shared memory. TRANSPOSE_A: A is stored with M contiguous.
template <int N>
struct Wgmma;

template <>
struct Wgmma<16> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[8], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_8 "}, {%8, %9, %10, %11}, %12, p, 1, 1, %14; }"
                     : FSA_OUTS_8
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[8], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %10, 0; wgmma.mma_async.sync.aligned.m64n16k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_8 "}, %8, %9, p, 1, 1, %11, %12; }"
                     : FSA_OUTS_8
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<32> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[16], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_16 "}, {%16, %17, %18, %19}, %20, p, 1, 1, %22; }"
                     : FSA_OUTS_16
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[16], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_16 "}, %16, %17, p, 1, 1, %19, %20; }"
                     : FSA_OUTS_16
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<64> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[32], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
                     : FSA_OUTS_32
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[32], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_32 "}, %32, %33, p, 1, 1, %35, %36; }"
                     : FSA_OUTS_32
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<80> {
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[40], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %42, 0; wgmma.mma_async.sync.aligned.m64n80k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_40 "}, %40, %41, p, 1, 1, %43, %44; }"
                     : FSA_OUTS_40
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<96> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[48], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %53, 0; wgmma.mma_async.sync.aligned.m64n96k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_48 "}, {%48, %49, %50, %51}, %52, p, 1, 1, %54; }"
                     : FSA_OUTS_48
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[48], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %50, 0; wgmma.mma_async.sync.aligned.m64n96k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_48 "}, %48, %49, p, 1, 1, %51, %52; }"
                     : FSA_OUTS_48
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<128> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[64], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
                     : FSA_OUTS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[64], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_64 "}, %64, %65, p, 1, 1, %67, %68; }"
                     : FSA_OUTS_64
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<112> {
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[56], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %58, 0; wgmma.mma_async.sync.aligned.m64n112k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_56 "}, %56, %57, p, 1, 1, %59, %60; }"
                     : FSA_OUTS_56
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<144> {
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[72], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %74, 0; wgmma.mma_async.sync.aligned.m64n144k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_72 "}, %72, %73, p, 1, 1, %75, %76; }"
                     : FSA_OUTS_72
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<192> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[96], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %101, 0; wgmma.mma_async.sync.aligned.m64n192k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_96 "}, {%96, %97, %98, %99}, %100, p, 1, 1, %102; }"
                     : FSA_OUTS_96
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[96], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_96 "}, %96, %97, p, 1, 1, %99, %100; }"
                     : FSA_OUTS_96
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

template <>
struct Wgmma<256> {
    template <int TRANSPOSE_B>
    static FSA_DEVICE void registers_shared(f32 (&d)[128], const u32 (&a)[4], u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_128 "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134; }"
                     : FSA_OUTS_128
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
    }
    template <int TRANSPOSE_A, int TRANSPOSE_B>
    static FSA_DEVICE void shared_shared(f32 (&d)[128], u64 a, u64 b, int accumulate) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16" FSA_WGMMA_TYPE
                     "{" FSA_REGS_128 "}, %128, %129, p, 1, 1, %131, %132; }"
                     : FSA_OUTS_128
                     : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
    }
};

