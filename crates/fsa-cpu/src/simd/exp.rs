//! Base-2 exponential of f32 vectors.

use super::Isa;
use pulp::{Simd, WithSimd};

/// 1.5 * 2^23: adding it rounds to the nearest integer and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `2^x`, within 2 ulps for x in [-126, 127]; 0 below -126.5; NaN stays NaN; x above 127 is out of contract
/// (callers subtract the row maximum, so x <= 0 up to rounding).
///
/// x = n + f with |f| <= 1/2; 2^f by the degree-6 polynomial of Cephes' `exp2f`, 2^n by its bits.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let floor = simd.splat_f32s(-127.0);
    let x = if S::IS_SCALAR {
        simd.select_f32s(simd.less_than_f32s(x, floor), floor, x)
    } else {
        // One instruction less than a selection. The order of the operands matters: x86 returns the second
        // one if either is NaN.
        simd.max_f32s(floor, x)
    };
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let f = simd.sub_f32s(x, n);
    let mut p = simd.splat_f32s(1.535_336_2e-4);
    for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, std::f32::consts::LN_2, 1.0] {
        p = simd.mul_add_e_f32s(p, f, simd.splat_f32s(c));
    }
    // For n = -127 the bits are those of 0, so far-off scores vanish instead of lingering as 2^-127.
    let bits = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let power = simd.transmute_f32s_u32s(simd.add_u32s(bits, simd.splat_u32s(127 << 23)));
    // A product, not an addition of exponents, so that NaN survives.
    simd.mul_f32s(p, power)
}

struct Exp2InPlace<'a>(&'a mut [f32]);

impl WithSimd for Exp2InPlace<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, tail) = S::as_mut_simd_f32s(self.0);
        for v in vectors {
            *v = exp2(simd, *v);
        }
        if !tail.is_empty() {
            let v = exp2(simd, simd.partial_load_f32s(tail));
            simd.partial_store_f32s(tail, v);
        }
    }
}

/// Replaces every element by its base-2 exponential.
pub(crate) fn exp2_in_place(isa: Isa, values: &mut [f32]) {
    isa.run(Exp2InPlace(values));
}
