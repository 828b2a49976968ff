//! Check of stage `rope`. Its backward is the inverse rotation of a gradient.

use super::check::Check;
use crate::array::Array;
use crate::buffer::Buffer;
use crate::case::{Case, Hostile, Pass};
use crate::inputs::{Stream, magnitudes, normal};
use crate::rope;
use fsa_core::ops::query_positions;
use fsa_core::{Backend, Result, RopeArgs};

pub(super) fn rotate(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let batch = case.batch()?;
    let shape = [batch.total_q(), case.num_q_heads, case.head_dim];
    let (qk, _, grad) = magnitudes(case);
    let inverse = case.pass == Pass::Backward;
    let input = match inverse {
        false => normal(case, "input", Stream::Query, &shape, qk),
        true => normal(case, "grad_out", Stream::GradOut, &shape, grad),
    };
    let far = if case.hostile == Hostile::FarPositions { 1_000_000 } else { 0 };
    let positions: Vec<usize> = query_positions(&batch).into_iter().map(|position| far + position).collect();
    let rope = case.rope.rope().unwrap_or_default();
    let outputs = check.run(|| {
        let mut out = Buffer::poisoned("out", case.dtype, &shape, case.layout);
        let args = RopeArgs { input: input.view()?, positions: &positions, rope: &rope, inverse };
        backend.rope(&args, &mut out.view_mut()?)?;
        Ok(vec![out])
    })?;
    let input = Array::from_view(&input.view()?);
    check.compare(&outputs, |a| vec![rope::rotate(a, &input, &positions, &rope, inverse)])
}
