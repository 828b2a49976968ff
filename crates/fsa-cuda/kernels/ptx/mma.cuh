// ldmatrix and mma.sync m16n8k16: what every device from sm_80 on has.
// Accumulator of one m16n8 product: elements 0, 1 of a thread are columns 2 (lane % 4) + {0, 1} of row lane / 4, elements 2, 3 of
// row lane / 4 + 8. Side by side, products of N columns have the layout of wgmma's (ptx/wgmma.cuh).
#pragma once
#include "base/types.cuh"

#if FSA_IS_BF16
#define FSA_MMA_TYPE ".f32.bf16.bf16.f32 "
#else
#define FSA_MMA_TYPE ".f32.f16.f16.f32 "
#endif

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + j names the 16 bytes of row j of matrix i; a thread gets elements
// 2 (lane % 4) + {0, 1} of row lane / 4 of each.
FSA_DEVICE void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}
// The same of the transposed matrices.
FSA_DEVICE void load_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address));
}

// Adds A (16 x 16) times B (16 x 8) to the four elements from `first` on.
template <int COUNT>
FSA_DEVICE void multiply_add(f32 (&d)[COUNT], int first, const u32 (&a)[4], u32 b_upper, u32 b_lower) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col" FSA_MMA_TYPE "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[first]), "+f"(d[first + 1]), "+f"(d[first + 2]), "+f"(d[first + 3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
}
