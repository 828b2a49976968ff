// Sums of grad_query in f16, scaled by a power of two so that none can overflow: memory adds bytes at one rate whatever they hold, and f16 has three bits
// more than the bf16 that becomes of the sums. docs/numerics.md says why one scale does for many rows.
//
// The bound: probabilities sum to at most 1, so an element of a row's grad_query before the softmax scale, and every partial sum of it, is at most
// |gate| (sum |grad_out| max |value| + |delta|) max |key|. The maxima are taken over rows that see keys and over keys beforehand, as bits of floats.
// What is not finite is left out: a row that sees it becomes NaN or infinite in f16, too, and no other row meets it.
#pragma once
#include "block/rows.cuh"
#include "ptx/thread.cuh"
#include "tile/swizzled_tile.cuh"

struct RowBounds {
    u32 grad, delta;        // |gate| sum |grad_out| and |gate delta|
};
struct KeyBounds {
    u32 key, value;         // an element
};

// What a number adds to a bound.
FSA_DEVICE u32 bound_bits(f32 x) {
    const u32 bits = __float_as_uint(x) & 0x7fffffffu;
    return bits < 0x7f800000u ? bits : 0;
}
// Raises a bound to the largest of a warp; few of them have to touch it.
FSA_DEVICE void raise_bound(u32* bound, u32 bits) {
    bits = __reduce_max_sync(0xffffffffu, bits);
    if ((threadIdx.x & 31) == 0 && bits > load_relaxed(bound)) max_global(bound, bits);
}
// The largest of a cta of two bounds: thread 0 gets that of the first, thread 1 that of the second. Of each of HEADS heads, which warps take in turn, the
// next two threads.
template <int THREADS, int HEADS = 1>
FSA_DEVICE u32 cta_bound(u32 first, u32 second) {
    __shared__ u32 most[2][THREADS / 32];
    first = __reduce_max_sync(0xffffffffu, first), second = __reduce_max_sync(0xffffffffu, second);
    if ((threadIdx.x & 31) == 0) most[0][threadIdx.x / 32] = first, most[1][threadIdx.x / 32] = second;
    __syncthreads();
    u32 bits = 0;
    if (threadIdx.x < 2 * HEADS)
        FSA_UNROLL for (int warp = 0; warp < THREADS / 32; warp += HEADS) bits = max_u(bits, most[threadIdx.x % 2][warp + threadIdx.x / 2]);
    return bits;
}
// Raises two bounds that lie side by side, of every head, to the largest of a cta, once: additions to one word follow one another, and every cta has them.
template <int THREADS, int HEADS = 1>
FSA_DEVICE void raise_bounds(u32* bounds, u32 first, u32 second) {
    const u32 bits = cta_bound<THREADS, HEADS>(first, second);
    if (threadIdx.x < 2 * HEADS && bits > load_relaxed(bounds + threadIdx.x)) max_global(bounds + threadIdx.x, bits);
}

// Sum of the sizes of the elements of a piece.
FSA_DEVICE f32 sum_sizes(Vec4 v) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    f32 sum = 0.0f;
    FSA_UNROLL for (int j = 0; j < 4; ++j) sum += fabsf(unpack_lo(word[j])) + fabsf(unpack_hi(word[j]));
    return sum;
}

// Largest finite element of what `add` was given.
struct LargestElement {
    u32 low = 0, high = 0;      // the half that counts is the upper one of both
    u32 tainted = 0;            // by what is not finite
    FSA_DEVICE void add(u32 word) {
        tainted = taint(tainted, word);
        word = finite_or_zero(word) & 0x7fff7fffu;
        low = max_u(low, word << 16);
        high = max_u(high, word);
    }
    FSA_DEVICE void add(Vec4 v) { add(v.x), add(v.y), add(v.z), add(v.w); }
    FSA_DEVICE u32 bits() const { return __float_as_uint(unpack_hi(max_u(low, high))); }
};
// The same of keys and values.
struct LargestElements {
    LargestElement key, value;
    FSA_DEVICE KeyBounds bounds() const { return {key.bits(), value.bits()}; }
};

// Of what this thread of a cta of THREADS has of `rows` rows of key and value from `first` on.
template <int THREADS>
FSA_DEVICE LargestElements thread_largest(const Tensor& key, const Tensor& value, int head, i64 first, int rows) {
    constexpr int PIECES_OF_ROW = HEAD_DIM / 8, AHEAD = 4;      // loads of each that are under way together
    LargestElements all;
    for (int n = thread_number(); n < rows * PIECES_OF_ROW; n += AHEAD * THREADS) {
        Vec4 k[AHEAD], v[AHEAD];
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) {
            const int piece = n + i * THREADS, at = piece % PIECES_OF_ROW * 16;
            const i64 row = first + piece / PIECES_OF_ROW;
            const bool exists = piece < rows * PIECES_OF_ROW;
            k[i] = v[i] = Vec4{0, 0, 0, 0};
            if (exists) k[i] = load_global_once(tensor_row(key, row, head) + at);
            if (exists) v[i] = load_global_once(tensor_row(value, row, head) + at);
        }
        FSA_UNROLL for (int i = 0; i < AHEAD; ++i) all.key.add(k[i]), all.value.add(v[i]);
    }
    return all;
}
// Raises the bounds of a head by these rows. All threads of the cta.
template <int THREADS>
FSA_DEVICE void raise_key_bounds(KeyBounds* bounds, const Tensor& key, const Tensor& value, int head, i64 first, int rows) {
    const KeyBounds most = thread_largest<THREADS>(key, value, head, first, rows).bounds();
    raise_bounds<THREADS>(&bounds->key, most.key, most.value);
}

// Factor of the sums, and what takes it back. Sums stay below 2^13 and not 2^16, because probabilities of logits in the millions sum to 1 only roughly.
struct SumScale {
    f32 scale, inverse;
};
// From the logarithm of the bound.
FSA_DEVICE SumScale sum_scale(f32 log2) {
    const int exponent = (int)fminf(fmaxf(floorf(13.0f - log2), -126.0f), 126.0f);
    return {__uint_as_float((u32)(127 + exponent) << 23), __uint_as_float((u32)(127 - exponent) << 23)};
}
// At least such that keys times the factor stay below 2^90: scores of keys that carry it are finite.
FSA_DEVICE f32 log2_bound(RowBounds rows, KeyBounds keys) {
    auto log2_of = [](u32 bits) { return log2_fast(fmaxf(__uint_as_float(bits), __uint_as_float(0x00800000u))); };
    const f32 terms = fmaxf(fmaxf(log2_of(rows.grad) + log2_of(keys.value), log2_of(rows.delta)) + 1.0f, 13.0f - 90.0f);
    return terms + log2_of(keys.key);
}
// Of sums to which several attentions add: they stay below the sum of the bounds. All kernels that meet them compute the same bits.
template <int N>
FSA_DEVICE SumScale sum_scale(const SumBounds (&all)[N]) {
    f32 bounds[N], most = neg_inf(), sum = 0.0f;
    FSA_UNROLL for (int i = 0; i < N; ++i) {
        bounds[i] = all[i].rows == nullptr ? neg_inf() : log2_bound(*all[i].rows, *all[i].keys);
        most = fmaxf(most, bounds[i]);
    }
    FSA_UNROLL for (int i = 0; i < N; ++i) sum += exp2_fast(bounds[i] - most);
    return sum_scale(most + log2_fast(sum));
}

// Two sums as f16, whatever the storage type.
FSA_DEVICE u32 pack_sums(f32 lo, f32 hi) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
    return word;
}
FSA_DEVICE void unpack_sums(u32 word, f32& lo, f32& hi) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(lo), "=f"(hi) : "r"(word));
}
// One group of a row's sums, as `pack_group`.
template <bool HIGH>
FSA_DEVICE Vec4 pack_group_sums(const Piece& acc, int group, f32 scale) { return pack_group<HIGH>(acc, group, scale, [](f32 lo, f32 hi) { return pack_sums(lo, hi); }); }
