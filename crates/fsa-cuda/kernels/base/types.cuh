// Fixed-width names and small value types. Freestanding: NVRTC compiles this tree without a single header.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
typedef float f32;

static_assert(sizeof(u32) == 4 && sizeof(u64) == 8 && sizeof(i64) == 8, "widths");

#define FSA_DEVICE __device__ __forceinline__
#define FSA_UNROLL _Pragma("unroll")
#define FSA_NO_UNROLL _Pragma("unroll 1")

// Every constant below comes from the host as -D; the cache key holds these and no sequence length.
#ifndef FSA_HEAD_DIM
#error "the host defines FSA_HEAD_DIM (64, 96, 128, 192, 256)"
#endif
#ifndef FSA_BLOCK_SIZE
#error "the host defines FSA_BLOCK_SIZE (16, 32, 64, 128, 256)"
#endif
#ifndef FSA_IS_BF16
#error "the host defines FSA_IS_BF16 (1: bf16, 0: f16)"
#endif

constexpr int HEAD_DIM = FSA_HEAD_DIM;
constexpr int BLOCK_SIZE = FSA_BLOCK_SIZE;
constexpr bool IS_BF16 = FSA_IS_BF16 != 0;
constexpr int ELEMENT_BYTES = 2;
constexpr int ROW_BYTES = HEAD_DIM * ELEMENT_BYTES;
constexpr int TILE_ROWS = 64;       // query rows of a tile: M of one warpgroup's product
constexpr int WARPGROUP = 128;      // threads
constexpr f32 LOG2_E = 1.4426950408889634f;
constexpr f32 LN_2 = 0.6931471805599453f;

static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "the pair transpose works on groups of 32 columns");
static_assert(BLOCK_SIZE >= 16 && BLOCK_SIZE <= 256 && (BLOCK_SIZE & (BLOCK_SIZE - 1)) == 0, "block size");
