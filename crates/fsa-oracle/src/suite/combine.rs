//! Check of stage `combine`, and the gates of a case.

use super::check::{Check, gradient};
use crate::array::Array;
use crate::buffer::Buffer;
use crate::case::{Case, Hostile};
use crate::combine::{self, CombineInputs};
use crate::inputs::{Stream, magnitudes, normal, random};
use crate::random::Random;
use fsa_core::ops::GateLayout;
use fsa_core::{Backend, CombineArgs, CombineGrads, Result};

/// Gates in (0, 1), as a sigmoid gives, or of any sign if the case is about that.
pub(super) fn gates(case: &Case, total_q: usize) -> Buffer {
    let mut random = random(case, Stream::Gates);
    let sign = |random: &mut Random| match (case.hostile, case.seed % 3) {
        (Hostile::SignedGates, 0) => -1.0,
        (Hostile::SignedGates, 1) => [-1.0, 1.0][random.below(2)],
        (Hostile::SignedGates, _) => [-1.0, 0.0, 1.0, 1.0][random.below(4)],
        _ => 1.0,
    };
    let values = std::iter::repeat_with(move || random.uniform() * sign(&mut random));
    match case.gates {
        GateLayout::PerRow => Buffer::from_f64("gates", case.dtype, &[total_q, 3], case.layout, values),
        GateLayout::PerHead => {
            Buffer::from_f64("gates", case.dtype, &[total_q, case.num_q_heads, 3], case.layout, values)
        }
    }
}

struct CombineData {
    gates: Buffer,
    branches: [Buffer; 3],
    shape: [usize; 3],
}

impl CombineData {
    fn new(case: &Case) -> Result<Self> {
        let total_q = case.batch()?.total_q();
        let shape = [total_q, case.num_q_heads, case.value_dim];
        let factor = magnitudes(case).1;
        let branch = |name, stream| normal(case, name, stream, &shape, factor);
        let branches = [
            branch("out_compressed", Stream::Query),
            branch("out_selected", Stream::Key),
            branch("out_window", Stream::Value),
        ];
        Ok(Self { gates: gates(case, total_q), branches, shape })
    }

    fn args(&self) -> Result<CombineArgs<'_>> {
        let [compressed, selected, window] = &self.branches;
        let branches = [compressed.view()?, selected.view()?, window.view()?];
        Ok(CombineArgs { gates: self.gates.view()?, branches })
    }
}

pub(super) fn forward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = CombineData::new(case)?;
    let outputs = check.run(|| {
        let mut out = Buffer::poisoned("out", case.dtype, &data.shape, case.layout);
        backend.combine(&data.args()?, &mut out.view_mut()?)?;
        Ok(vec![out])
    })?;
    let inputs = CombineInputs::new(&data.args()?);
    check.compare(&outputs, |a| vec![combine::forward(a, &inputs)])
}

pub(super) fn backward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = CombineData::new(case)?;
    let grad_out = normal(case, "grad_out", Stream::GradOut, &data.shape, magnitudes(case).2);
    let outputs = check.run(|| {
        let mut gates = gradient(case, "grad_gates", &data.gates);
        let names = ["grad_out_compressed", "grad_out_selected", "grad_out_window"];
        let mut branches = names.map(|name| gradient(case, name, &data.branches[0]));
        let [compressed, selected, window] = &mut branches;
        let grad_branches = [compressed.view_mut()?, selected.view_mut()?, window.view_mut()?];
        let mut grads = CombineGrads { grad_gates: gates.view_mut()?, grad_branches };
        backend.combine_backward(&data.args()?, &grad_out.view()?, &mut grads)?;
        Ok([gates].into_iter().chain(branches).collect())
    })?;
    let inputs = CombineInputs::new(&data.args()?);
    let grad_out = Array::from_view(&grad_out.view()?);
    check.compare(&outputs, |a| {
        let grads = combine::backward(a, &inputs, &grad_out);
        [grads.gates].into_iter().chain(grads.branches).collect()
    })
}
