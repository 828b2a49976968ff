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
use std::cell::Cell;

/// How the plain loops add, multiply and keep their results.
pub trait Arithmetic {
    /// The result of one operation.
    fn op(&self, value: f64) -> f64;

    /// An element of a tensor that the naive evaluation keeps in memory.
    fn store(&self, value: f64) -> f64;

    /// The inner product of two vectors.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64;

    /// `target += factor * source`.
    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]);
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

    // Eight sums side by side: the order of an f64 sum is far below what is compared, and this one vectorises.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        let mut sums = [0.0f64; 8];
        let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
        let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
        for (x, y) in a_chunks.zip(b_chunks) {
            for lane in 0..8 {
                sums[lane] += x[lane] * y[lane];
            }
        }
        sums.iter().sum::<f64>() + rest
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
    /// Factors `1 + r / 2^24`, r uniform in [-1, 1): read at a random place, they vectorise.
    factors: Vec<f64>,
    next: Cell<usize>,
    store_unit: f64,
}

/// Half the distance from 1 to the next f32: the largest relative error of one rounding.
const F32_UNIT: f64 = 1.0 / (1u64 << 24) as f64;

/// Longest vector (`MAX_HEAD_DIM`) plus room for the starting place.
const FACTORS: usize = 4096;

impl Noisy {
    /// Errors of the size that rounding to `dtype` has, drawn from `seed`.
    pub fn new(dtype: DType, seed: u64) -> Self {
        let mut random = Random::new(&[seed]);
        let factors = (0..FACTORS).map(|_| 1.0 + (2.0 * random.uniform() - 1.0) * F32_UNIT).collect();
        Self { factors, next: Cell::new(random.below(FACTORS)), store_unit: dtype.epsilon() / 2.0 }
    }

    /// A number in [-1, 1).
    fn draw(&self) -> f64 {
        (self.factors[self.advance(1)] - 1.0) / F32_UNIT
    }

    /// A place from which `len` factors can be read.
    fn advance(&self, len: usize) -> usize {
        // 1103 is prime: the places of successive calls do not line up with the length of a vector.
        let next = (self.next.get() + 1103 + len) % (FACTORS - len.min(FACTORS - 1));
        self.next.set(next);
        next
    }
}

impl Arithmetic for Noisy {
    fn op(&self, value: f64) -> f64 {
        value * self.factors[self.advance(1)]
    }

    fn store(&self, value: f64) -> f64 {
        value * (1.0 + self.store_unit * self.draw())
    }

    // The rounding error of a sum is relative to its partial sums, for which the sum of magnitudes stands.
    fn dot(&self, a: &[f64], b: &[f64]) -> f64 {
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for (x, y) in a.iter().zip(b) {
            let product = x * y;
            sum += product;
            magnitude += product.abs();
        }
        sum + F32_UNIT * magnitude * self.draw()
    }

    fn add_scaled(&self, target: &mut [f64], factor: f64, source: &[f64]) {
        for (targets, sources) in target.chunks_mut(FACTORS / 4).zip(source.chunks(FACTORS / 4)) {
            let place = self.advance(targets.len());
            for ((t, s), noise) in targets.iter_mut().zip(sources).zip(&self.factors[place..]) {
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
        let errors: Vec<f64> = (0..1000).map(|_| (noisy.store(1.0) - 1.0).abs()).collect();
        let largest = errors.iter().copied().fold(0.0, f64::max);
        assert!((0.9..=1.0).contains(&(largest / (DType::Bf16.epsilon() / 2.0))), "{largest}");
        assert_eq!(noisy.store(0.0), 0.0);
        assert_eq!(noisy.op(f64::NEG_INFINITY), f64::NEG_INFINITY);
    }
}
