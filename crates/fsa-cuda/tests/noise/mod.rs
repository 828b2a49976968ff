//! Inputs of tests that make their own.

use half::bf16;

/// Pseudo-random numbers between -1 and 1, the same in every run.
pub fn noise(count: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(count).collect()
}
