//! The three arithmetics in which the plain loops of this crate run.
//!
//! - [`Exact`]: f64. The oracle.
//! - [`Rounded`]: the naive evaluation in a dtype. Every operation is rounded to f32 and every element of a
//!   materialised tensor (logits, probabilities, outputs of a stage, gradients of any of them) to the dtype.
//!   An f32 operation carried out in f64 and then rounded is bit for bit the f32 operation, because
//!   53 >= 2 * 24 + 2 (Figueroa 1995).
//! - [`Noisy`]: the same evaluation with every rounding replaced by a random error of the same size
//!   (Monte Carlo arithmetic, Parker 1997). One evaluation may be lucky: for a row with one key, `dP - delta`
//!   is exactly 0 in a plain loop, while any backend that takes the two sums in another order has the rounding
//!   error of both. The tolerance must not depend on such luck, above all for tensors of one row.

use crate::array::round_to;
use crate::random::Random;
use fsa_core::DType;
use std::cell::RefCell;

/// How the plain loops add, multiply and keep their results.
pub trait Arithmetic {
    /// The result of one operation.
    fn op(&self, value: f64) -> f64;

    /// An element of a tensor that the naive evaluation keeps in memory.
    fn store(&self, value: f64) -> f64;

    /// [`Arithmetic::store`] for every element of a tensor.
    fn store_all(&self, values: &mut [f64]);

    /// The inner product of two vectors.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64;

    /// `target += factor * source`.
    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]);
}

/// The sum of `term` over two vectors. Eight sums side by side: the order of an f64 sum is far below what is compared,
/// and this one vectorises.
fn sum_in_lanes(a: &[f64], b: &[f64], term: impl Fn(f64, f64) -> f64) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| term(*x, *y)).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..8 {
            sums[lane] += term(x[lane], y[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// f64, the oracle.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exact;

impl Arithmetic for Exact {
    fn op(&self, value: f64) -> f64 {
        value
    }

    fn store(&self, value: f64) -> f64 {
        value
    }

    fn store_all(&self, _: &mut [f64]) {}

    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        sum_in_lanes(a, b, |x, y| x * y)
    }

    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]) {
        for (t, s) in target.iter_mut().zip(source) {
            *t += factor * s;
        }
    }
}

/// f32 sums, tensors in the dtype: the naive evaluation.
#[derive(Debug, Clone, Copy)]
pub struct Rounded(pub DType);

impl Arithmetic for Rounded {
    fn op(&self, value: f64) -> f64 {
        f64::from(value as f32)
    }

    fn store(&self, value: f64) -> f64 {
        round_to(self.0, value)
    }

    fn store_all(&self, values: &mut [f64]) {
        values.iter_mut().for_each(|value| *value = round_to(self.0, *value));
    }

    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        let mut sum = 0.0f32;
        for (x, y) in a.iter().zip(b) {
            sum += *x as f32 * *y as f32;
        }
        f64::from(sum)
    }

    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]) {
        let factor = factor as f32;
        for (t, s) in target.iter_mut().zip(source) {
            *t = f64::from(*t as f32 + factor * *s as f32);
        }
    }
}

/// Random errors in place of the roundings of [`Rounded`].
#[derive(Debug, Clone)]
pub struct Noisy {
    /// Factors 1 + u and 1 - u: read at a random place, they vectorise. Of a random size, the errors
    /// of a row that depends on one or two of them would be small by chance.
    factors: Vec<f64>,
    places: RefCell<Random>,
    op_unit: f64,
    store_unit: f64,
}

/// Half the distance from 1 to the next f32: the largest relative error of one rounding.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;

/// Many more than the longest vector (256) has elements.
const FACTORS: usize = 4096;

impl Noisy {
    /// Errors of the size that rounding to `dtype` has, drawn from `seed`.
    pub fn new(dtype: DType, seed: u64) -> Self {
        Self::with_size(dtype, seed, 1.0)
    }

    /// Errors of `size` times that.
    pub fn with_size(dtype: DType, seed: u64, size: f64) -> Self {
        let mut random = Random::new(&[seed]);
        let op_unit = F32_UNIT * size;
        let factors = (0..FACTORS).map(|_| if random.once_in(2) { 1.0 + op_unit } else { 1.0 - op_unit }).collect();
        Self { factors, places: RefCell::new(random), op_unit, store_unit: dtype.epsilon() / 2.0 * size }
    }

    /// 1 or -1.
    fn draw(&self) -> f64 {
        if self.places.borrow_mut().next_u64() & 1 == 0 { 1.0 } else { -1.0 }
    }

    /// `len` factors from a random place. (From places at a fixed distance, a long sum would read the whole table in
    /// every component, and all of its components would err alike.)
    fn factors(&self, len: usize) -> &[f64] {
        &self.factors[self.places.borrow_mut().below(FACTORS - len)..][..len]
    }
}

impl Arithmetic for Noisy {
    fn op(&self, value: f64) -> f64 {
        value * (1.0 + self.op_unit * self.draw())
    }

    fn store(&self, value: f64) -> f64 {
        value * (1.0 + self.store_unit * self.draw())
    }

    fn store_all(&self, values: &mut [f64]) {
        let unit = self.store_unit / self.op_unit;
        for chunk in values.chunks_mut(FACTORS / 4) {
            let factors = self.factors(chunk.len());
            chunk.iter_mut().zip(factors).for_each(|(value, factor)| *value *= 1.0 + unit * (factor - 1.0));
        }
    }

    // The rounding error of a sum is relative to its partial sums, for which the sum of magnitudes stands.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        let magnitude = sum_in_lanes(a, b, |x, y| (x * y).abs());
        sum_in_lanes(a, b, |x, y| x * y) + self.op_unit * magnitude * self.draw()
    }

    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]) {
        for (targets, sources) in target.chunks_mut(FACTORS / 4).zip(source.chunks(FACTORS / 4)) {
            let factors = self.factors(targets.len());
            for ((t, s), noise) in targets.iter_mut().zip(sources).zip(factors) {
                *t = (*t + factor * s) * noise;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_operations_are_the_f32_operations() {
        let mut random = Random::new(&[3]);
        for _ in 0..10_000 {
            let (a, b) = (random.normal() as f32, (random.normal() * 1e-3) as f32);
            let (x, y) = (f64::from(a), f64::from(b));
            assert_eq!(Rounded(DType::F32).op(x * y), f64::from(a * b));
            assert_eq!(Rounded(DType::F32).op(x + y), f64::from(a + b));
            assert_eq!(Rounded(DType::F32).op(x / y), f64::from(a / b));
        }
    }

    #[test]
    fn noise_is_as_large_as_rounding_and_leaves_zero_and_infinity() {
        let noisy = Noisy::new(DType::Bf16, 7);
        let errors: Vec<f64> = (0..1000).map(|_| (noisy.store(1.0) - 1.0) / (DType::Bf16.epsilon() / 2.0)).collect();
        assert!(errors.iter().all(|error| (error.abs() - 1.0).abs() < 1e-9), "{errors:?}");
        let up = errors.iter().filter(|error| **error > 0.0).count();
        assert!((400..600).contains(&up), "{up} of 1000 up");
        assert_eq!(noisy.store(0.0), 0.0);
        assert_eq!(noisy.op(f64::NEG_INFINITY), f64::NEG_INFINITY);
    }
}
