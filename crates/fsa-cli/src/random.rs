//! Random numbers that are the same on every machine (SplitMix64).

use fsa::{DType, Element, Tensor, bf16, f16};
use rayon::prelude::*;

/// Mixes the bits of a word: a hash of it.
pub fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// `count` numbers of mean 0 and variance 1: sums of four uniforms.
pub fn normal(seed: u64, count: usize) -> Vec<f32> {
    elements(seed, count)
}

/// A tensor of [`normal`] numbers.
pub fn normal_tensor(name: &str, seed: u64, dtype: DType, shape: &[usize]) -> fsa::Result<Tensor> {
    let count = shape.iter().product();
    match dtype {
        DType::F32 => Tensor::new(name, elements::<f32>(seed, count), shape),
        DType::Bf16 => Tensor::new(name, elements::<bf16>(seed, count), shape),
        DType::F16 => Tensor::new(name, elements::<f16>(seed, count), shape),
        DType::I32 => Err(fsa::Error::input(name, "a floating-point dtype", dtype)),
    }
}

/// Every element depends on its place alone: the threads only save time.
fn elements<T: Element>(seed: u64, count: usize) -> Vec<T> {
    let unit = |word: u64, shift: u32| f64::from((word >> shift) as u16) / 65_536.0;
    let number = |i: usize| {
        let word = mix(mix(seed).wrapping_add(i as u64));
        let sum: f64 = [0, 16, 32, 48].into_iter().map(|shift| unit(word, shift)).sum();
        T::from_f32(((sum - 2.0) * 3.0f64.sqrt()) as f32)
    };
    (0..count).into_par_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_numbers_are_normal_enough() {
        let numbers = super::normal(3, 100_000);
        let mean = numbers.iter().sum::<f32>() / 1e5;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
    }
}
