// 16-byte pieces of rows, as eight f32.
#pragma once
#include "tile/swizzled_tile.cuh"

typedef f32 Eight[8];

FSA_DEVICE void widen(Eight& x, Vec4 v) {
    x[0] = unpack_lo(v.x); x[1] = unpack_hi(v.x); x[2] = unpack_lo(v.y); x[3] = unpack_hi(v.y);
    x[4] = unpack_lo(v.z); x[5] = unpack_hi(v.z); x[6] = unpack_lo(v.w); x[7] = unpack_hi(v.w);
}
FSA_DEVICE Vec4 narrow(const Eight& x) { return {pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7])}; }
FSA_DEVICE void fill(Eight& x, f32 value) {
    FSA_UNROLL for (int e = 0; e < 8; ++e) x[e] = value;
}
FSA_DEVICE void add_scaled(Eight& sum, f32 factor, const Eight& x) {
    FSA_UNROLL for (int e = 0; e < 8; ++e) sum[e] += factor * x[e];
}
FSA_DEVICE f32 dot(f32 sum, const Eight& a, const Eight& b) {
    FSA_UNROLL for (int e = 0; e < 8; ++e) sum += a[e] * b[e];
    return sum;
}
// One element.
FSA_DEVICE f32 widen_element(const void* data, i64 element) { return unpack_lo(__ldg((const u16*)data + element)); }
FSA_DEVICE void store_element(void* data, i64 element, f32 x) { ((u16*)data)[element] = (u16)pack2(x, 0.0f); }
