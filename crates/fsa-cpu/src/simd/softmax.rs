//! Softmax of a strip of scores, and its gradient.
//!
//! With `exponent = |softmax_scale| * log2(e)`, a strip keeps, per row, the running maximum `max` of
//! `score * exponent` and the running sum of `2^(score * exponent - max)`, one fused multiply-add and one `exp2`
//! a score. `max` is rounded once and that value is used everywhere, so its rounding cancels.

use super::Isa;
use super::exp::exp2;
use fsa_core::plan::STRIP_ROWS;
use pulp::{Simd, WithSimd};
use std::f32::consts::LOG2_E;

/// Running softmax state of the rows of a strip.
pub(crate) struct Online<'a> {
    /// Running maximum of the base-2 exponents, `-inf` before the first visible key.
    pub max: &'a mut [f32],
    /// Running sum.
    pub sum: &'a mut [f32],
    /// Set to `2^(old max - new max)`, by which everything accumulated so far must be multiplied.
    pub correction: &'a mut [f32],
}

/// Scores `[rows, columns]` and what of them is visible.
pub(crate) struct SoftmaxStrip<'a> {
    /// Scores on entry, `2^(score * exponent - max)` on exit; exactly 0 where not visible.
    pub scores: &'a mut [f32],
    /// Positive factor from scores to exponents of 2.
    pub exponent: f32,
    /// Columns, a multiple of the vector length; also the distance between rows.
    pub columns: usize,
    /// First visible column and one past the last of every row.
    pub visible: &'a [(u32, u32)],
    pub state: Online<'a>,
}

/// Replaces scores by unnormalised probabilities and advances the running state.
pub(crate) fn softmax_strip(isa: Isa, strip: SoftmaxStrip<'_>) {
    isa.run(strip);
}

/// Overwrites the columns that a row does not see.
#[inline(always)]
fn mask_row(row: &mut [f32], visible: (u32, u32), value: f32) {
    let (first, end) = (visible.0 as usize, visible.1 as usize);
    if end <= first {
        row.fill(value);
        return;
    }
    row[..first].fill(value);
    row[end..].fill(value);
}

impl WithSimd for SoftmaxStrip<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scores, exponent, columns, visible, state } = self;
        let factor = simd.splat_f32s(exponent);
        let rows = visible.len();
        let mut references = [0.0f32; STRIP_ROWS];
        for (r, row) in scores.chunks_exact_mut(columns).take(rows).enumerate() {
            if visible[r] != (0, columns as u32) {
                mask_row(row, visible[r], f32::NEG_INFINITY);
            }
            let max = state.max[r].max(row_max(simd, row) * exponent);
            // A row that has seen no key yet has no maximum; any finite reference gives 2^-inf = 0.
            let reference = if max == f32::NEG_INFINITY { 0.0 } else { max };
            state.correction[r] = state.max[r] - reference;
            state.max[r] = max;
            references[r] = reference;
        }
        let (corrections, tail) = S::as_mut_simd_f32s(&mut state.correction[..rows.next_multiple_of(S::F32_LANES)]);
        debug_assert!(tail.is_empty());
        for c in corrections {
            *c = exp2(simd, *c);
        }
        for (r, row) in scores.chunks_exact_mut(columns).take(rows).enumerate() {
            let reference = simd.splat_f32s(-references[r]);
            let (vectors, _) = S::as_mut_simd_f32s(row);
            let mut sum = simd.splat_f32s(0.0);
            for v in vectors {
                *v = exp2(simd, simd.mul_add_f32s(*v, factor, reference));
                sum = simd.add_f32s(sum, *v);
            }
            state.sum[r] = state.sum[r] * state.correction[r] + simd.reduce_sum_f32s(sum);
        }
    }
}

/// Largest element. A NaN may be passed over here: it comes back when its own exponential is taken.
#[inline(always)]
fn row_max<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (vectors, _) = S::as_simd_f32s(row);
    let mut max = simd.splat_f32s(f32::NEG_INFINITY);
    for v in vectors {
        max = simd.max_f32s(max, *v);
    }
    simd.reduce_max_f32s(max)
}

/// Inputs of the gradient of a strip: scores and `grad_out . value` of the same rows and columns.
pub(crate) struct GradientStrip<'a> {
    /// Scores on entry, probabilities on exit; exactly 0 where not visible.
    pub scores: &'a mut [f32],
    /// `grad_out . value` on entry, gradient of the natural logits on exit; 0 where not visible.
    pub grads: &'a mut [f32],
    /// Columns, a multiple of the vector length; also the distance between rows.
    pub columns: usize,
    /// First visible column and one past the last of every row.
    pub visible: &'a [(u32, u32)],
    /// Magnitude of the softmax scale.
    pub scale: f32,
    /// Natural log-sum-exp of every row.
    pub lse: &'a [f32],
    /// `grad_out . out - grad_lse` of every row.
    pub delta: &'a [f32],
}

/// Turns scores into probabilities and `grad_out . value` into the gradient of the logits.
pub(crate) fn gradient_strip(isa: Isa, strip: GradientStrip<'_>) {
    isa.run(strip);
}

impl WithSimd for GradientStrip<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { scores, grads, columns, visible, scale, lse, delta } = self;
        let (scale, log2_e) = (simd.splat_f32s(scale), simd.splat_f32s(LOG2_E));
        let rows = scores.chunks_exact_mut(columns).zip(grads.chunks_exact_mut(columns));
        for (r, (scores, grads)) in rows.take(visible.len()).enumerate() {
            // The logit minus the log-sum-exp is taken in natural units: converting a large log-sum-exp to
            // base 2 would round it a second time, and nothing cancels that here.
            let (lse, delta) = (simd.splat_f32s(-lse[r]), simd.splat_f32s(delta[r]));
            let (p, _) = S::as_mut_simd_f32s(&mut *scores);
            let (g, _) = S::as_mut_simd_f32s(&mut *grads);
            for (p, g) in p.iter_mut().zip(g) {
                *p = exp2(simd, simd.mul_f32s(simd.mul_add_f32s(*p, scale, lse), log2_e));
                *g = simd.mul_f32s(*p, simd.sub_f32s(*g, delta));
            }
            if visible[r] != (0, columns as u32) {
                mask_row(scores, visible[r], 0.0);
                mask_row(grads, visible[r], 0.0);
            }
        }
    }
}
