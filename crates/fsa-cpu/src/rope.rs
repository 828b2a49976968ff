//! Stage `rope`: rotary embedding of query, key and compressed key; its backward is the inverse rotation.

use crate::rows::{Rows, Sink};
use fsa_core::{Result, RopeArgs, TensorViewMut};
use rayon::prelude::*;

/// Rows of a work item.
const ROWS: usize = 128;

/// Rotates every row at its position.
pub(crate) fn rope(args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
    let [_, heads, dim] = args.shape(out)?;
    let input = Rows::new("input", &args.input)?;
    let sink = Sink::new("out", out)?;
    let frequencies = args.rope.frequencies(dim);
    let sign = if args.inverse { -1.0 } else { 1.0 };
    args.positions.par_chunks(ROWS).enumerate().for_each(|(chunk, positions)| {
        let mut rotated = vec![0.0f32; positions.len() * heads * dim];
        for (i, (position, vectors)) in positions.iter().zip(rotated.chunks_exact_mut(heads * dim)).enumerate() {
            // Angles in f64: at position 65,536 an f32 angle is wrong in the third digit.
            let turn = |frequency: &f64| {
                let (sin, cos) = (*position as f64 * frequency).sin_cos();
                ((sign * sin) as f32, cos as f32)
            };
            let turns: Vec<(f32, f32)> = frequencies.iter().map(turn).collect();
            for (head, vector) in vectors.chunks_exact_mut(dim).enumerate() {
                input.load(&[chunk * ROWS + i, head], vector);
                let (low, high) = vector.split_at_mut(dim / 2);
                for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(&turns) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
        let mut sink = sink.lock();
        for (i, vector) in rotated.chunks_exact(dim).enumerate() {
            sink.store(&[chunk * ROWS + i / heads, i % heads], vector);
        }
    });
    Ok(())
}
