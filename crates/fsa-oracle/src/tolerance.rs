//! The tolerance rule, and the comparison that names the worst element.
//!
//! For every element of a tensor:
//!
//! ```text
//! |got - exact| <= 2 * (largest error of the naive evaluation over the tensor)
//!                  + 4 ulp of the output dtype at the largest magnitude of the exact tensor
//! ```
//!
//! NaN and infinities must lie where the oracle has them; besides, an element so large that a value within the bound
//! overflows the dtype may be infinite. The naive evaluation is made several times: once with
//! every operation rounded to nearest, and with random errors of the size of a rounding ([`crate::arithmetic`]);
//! its error is the largest of them.
//!
//! Why 4 ulp: rounding the output costs half an ulp; an output that a backend keeps once more before it adds to it
//! (branch outputs before `combine`, gradients of the branches before their sum) costs up to three halves more;
//! the rest is left for an order of summation that the naive evaluations did not try. In f32 that is 5e-7 of the
//! tensor, in bf16 3 %: a wrong key or a wrong weight moves more than that.

use crate::array::Array;
use crate::buffer::unravel;
use fsa_core::{DType, TensorView};
use std::fmt;

/// Multiples of the naive error that a backend may have.
pub const NAIVE_ERRORS: f64 = 2.0;

/// Units in the last place, at the largest magnitude of the tensor, that a backend may have besides.
pub const ULPS: f64 = 4.0;

/// The ratio reported for an element whose error no bound covers: NaN or infinity in the wrong place, or an error
/// above a bound of 0. A number, because JSON has no infinity.
pub const UNBOUNDED: f64 = 1e9;

/// Distance between neighbouring numbers of `dtype` at `magnitude`, subnormals included.
pub fn ulp(dtype: DType, magnitude: f64) -> f64 {
    let smallest = match dtype {
        DType::F32 => f64::from(f32::from_bits(1)),
        DType::Bf16 => fsa_core::bf16::from_bits(1).to_f64(),
        DType::F16 => fsa_core::f16::from_bits(1).to_f64(),
        DType::I32 => 1.0,
    };
    if magnitude > 0.0 { (dtype.epsilon() * magnitude.log2().floor().exp2()).max(smallest) } else { smallest }
}

/// Largest finite number of `dtype`.
fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::MAX),
        DType::Bf16 => fsa_core::bf16::MAX.to_f64(),
        DType::F16 => fsa_core::f16::MAX.to_f64(),
        DType::I32 => f64::from(i32::MAX),
    }
}

/// The worst element of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Worst {
    /// Name of the tensor.
    pub tensor: String,
    /// Its index.
    pub index: Vec<usize>,
    /// What the backend computed.
    pub got: f64,
    /// What the oracle computed.
    pub expected: f64,
    /// Largest error that the rule allows.
    pub bound: f64,
    /// Error over bound; at most 1 passes.
    pub ratio: f64,
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, index, got, expected, bound, ratio } = self;
        write!(f, "{tensor}{index:?}: got {got:e}, expected {expected:e}, bound {bound:e}, ratio {ratio:.3e}")
    }
}

/// Largest error of the naive evaluations. Elements in which they overflow say nothing.
pub fn naive_error<'a>(exact: &Array, naive: impl IntoIterator<Item = &'a Array>) -> f64 {
    let errors = naive.into_iter().flat_map(|naive| exact.data().iter().zip(naive.data()).map(|(e, n)| (e - n).abs()));
    errors.filter(|error| error.is_finite()).fold(0.0, f64::max)
}

/// Largest error that the rule allows for a tensor of `dtype`.
pub fn bound<'a>(dtype: DType, exact: &Array, naive: impl IntoIterator<Item = &'a Array>) -> f64 {
    NAIVE_ERRORS * naive_error(exact, naive) + ULPS * ulp(dtype, exact.magnitude())
}

/// The element with the largest error over `bound`; `None` for an empty tensor.
pub fn worst(tensor: &str, view: &TensorView<'_>, exact: &Array, bound: f64) -> Option<Worst> {
    worst_value(tensor, view.dtype(), &view.to_f64(), exact, bound)
}

/// [`worst`] of the elements of a tensor of `dtype`.
pub fn worst_value(tensor: &str, dtype: DType, values: &[f64], exact: &Array, bound: f64) -> Option<Worst> {
    let mut worst: Option<(f64, usize, f64, f64)> = None;
    for (place, (got, expected)) in values.iter().copied().zip(exact.data()).enumerate() {
        let overflows = got.is_infinite() && *expected * got.signum() + bound > largest(dtype);
        let ratio = if overflows { 0.0 } else { ratio(got, *expected, bound) };
        if worst.is_none_or(|(largest, ..)| ratio > largest) {
            worst = Some((ratio, place, got, *expected));
        }
    }
    let (ratio, place, got, expected) = worst?;
    Some(Worst { tensor: tensor.to_string(), index: unravel(place, exact.shape()), got, expected, bound, ratio })
}

fn ratio(got: f64, expected: f64, bound: f64) -> f64 {
    if got.is_nan() && expected.is_nan() || got == expected {
        return 0.0;
    }
    let ratio = (got - expected).abs() / bound;
    if ratio.is_finite() { ratio.min(UNBOUNDED) } else { UNBOUNDED }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ulp_is_the_distance_to_the_next_number() {
        assert_eq!(ulp(DType::F32, 1.0), f64::from(f32::EPSILON));
        assert_eq!(ulp(DType::F32, 1.999), f64::from(f32::EPSILON));
        assert_eq!(ulp(DType::Bf16, 2.0), 2.0 * DType::Bf16.epsilon());
        assert_eq!(ulp(DType::F16, 0.0), 2.0f64.powi(-24));
        assert_eq!(ulp(DType::F16, 1e-6), 2.0f64.powi(-24));
    }

    #[test]
    fn masks_must_be_equal_and_the_worst_element_is_named() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert_eq!(ratio(nan, nan, 1.0), 0.0);
        assert_eq!(ratio(-inf, -inf, 1.0), 0.0);
        for (got, expected) in [(nan, 1.0), (1.0, nan), (inf, -inf), (-inf, 1.0), (1.0, -inf), (nan, -inf)] {
            assert_eq!(ratio(got, expected, 1.0), UNBOUNDED, "{got} {expected}");
        }
        let got = [1.0f32, 2.0, 3.5, 4.0];
        let view = TensorView::new("out", &got, &[2, 2]).expect("shape");
        let exact = Array::new(&[2, 2], vec![1.0, 2.1, 3.0, 4.0]);
        let worst = worst("out", &view, &exact, 0.25).expect("not empty");
        assert_eq!((worst.index.clone(), worst.ratio), (vec![1, 0], 2.0));
        assert_eq!(worst.to_string(), "out[1, 0]: got 3.5e0, expected 3e0, bound 2.5e-1, ratio 2.000e0");
    }
}
