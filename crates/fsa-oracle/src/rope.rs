//! Stage `rope`: rotary position embedding of the pairs `(x[k], x[k + head_dim / 2])`.

use crate::arithmetic::{Arithmetic, Exact};
use crate::array::Array;
use fsa_core::{Rope, RopeArgs, RopeScaling};
use std::f64::consts::TAU;

/// Angular frequency of pair `k`, by the definition of each scaling (written again here, so that the frequencies
/// of the vocabulary are under test too).
pub fn frequency(rope: &Rope, k: usize, head_dim: usize) -> f64 {
    let frequency = 1.0 / rope.theta.powf((2 * k) as f64 / head_dim as f64);
    match rope.scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let (wavelength, context) = (TAU / frequency, original_max_position as f64);
            if wavelength < context / high_freq_factor {
                frequency
            } else if wavelength > context / low_freq_factor {
                frequency / factor
            } else {
                let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

/// Rotates row `r` of `[rows, heads, head_dim]` by `positions[r]`, or back. The naive evaluation takes sine and
/// cosine of the exact angle, rounded to f32: that is what the vocabulary promises.
pub fn rotate(a: &dyn Arithmetic, input: &Array, positions: &[usize], rope: &Rope, inverse: bool) -> Array {
    let (heads, head_dim) = (input.shape()[1], input.shape()[2]);
    let half = head_dim / 2;
    let frequencies: Vec<f64> = (0..half).map(|k| frequency(rope, k, head_dim)).collect();
    let mut out = Array::zeros(input.shape());
    for (row, position) in positions.iter().enumerate() {
        for (k, frequency) in frequencies.iter().enumerate() {
            let angle = *position as f64 * frequency;
            let (cos, sin) = (a.op(angle.cos()), a.op(if inverse { -angle.sin() } else { angle.sin() }));
            for head in 0..heads {
                let (x, y) = (input.at(&[row, head, k]), input.at(&[row, head, k + half]));
                *out.at_mut(&[row, head, k]) = a.op(a.op(x * cos) - a.op(y * sin));
                *out.at_mut(&[row, head, k + half]) = a.op(a.op(x * sin) + a.op(y * cos));
            }
        }
    }
    a.store_all(out.data_mut());
    out
}

/// The rotation of a call, in f64.
pub fn rope(args: &RopeArgs<'_>) -> Array {
    rotate(&Exact, &Array::from_view(&args.input), args.positions, args.rope, args.inverse)
}

/// Gradient of the input of a call: a rotation is orthogonal, so its transpose rotates back.
pub fn rope_backward(args: &RopeArgs<'_>, grad_out: &Array) -> Array {
    rotate(&Exact, grad_out, args.positions, args.rope, !args.inverse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_by_hand() {
        // Frequency 1 of the first pair, 1/100 of the second; position 1 turns the first by one radian.
        let input = Array::new(&[1, 1, 4], vec![1.0, 2.0, 0.0, 0.0]);
        let out = rotate(&Exact, &input, &[1], &Rope::default(), false);
        let expected = [1.0f64.cos(), 2.0 * 0.01f64.cos(), 1.0f64.sin(), 2.0 * 0.01f64.sin()];
        let near = out.data().iter().zip(expected).all(|(got, expected)| (got - expected).abs() < 1e-15);
        assert!(near, "{out:?}");
    }

    #[test]
    fn frequencies_are_those_of_the_vocabulary() {
        let llama3 = crate::case::RopeKind::Llama3.rope().expect("has parameters");
        for rope in [Rope::default(), llama3] {
            for head_dim in [8, 64, 128, 256] {
                for (k, expected) in rope.frequencies(head_dim).into_iter().enumerate() {
                    let got = frequency(&rope, k, head_dim);
                    assert!((got / expected - 1.0).abs() < 1e-13, "{k} of {head_dim}: {got} {expected}");
                }
            }
        }
    }
}
