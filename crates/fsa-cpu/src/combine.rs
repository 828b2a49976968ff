//! Stage `combine`: the gated sum of the three branches, and its backward.

use crate::rows::{Rows, Sink};
use crate::simd::{Isa, add, dot};
use fsa_core::ops::{BRANCHES, GateLayout};
use fsa_core::plan::padded;
use fsa_core::{AttentionShape, CombineArgs, CombineGrads, Result, TensorView, TensorViewMut};
use rayon::prelude::*;

/// Rows of a work item.
const ROWS: usize = 64;

/// Gates of a checked call.
pub(crate) struct Gates<'a> {
    rows: Rows<'a>,
    layout: GateLayout,
}

impl<'a> Gates<'a> {
    pub(crate) fn new(gates: &TensorView<'a>, shape: &AttentionShape) -> Result<Self> {
        Ok(Self { rows: Rows::new("gates", gates)?, layout: GateLayout::of(gates, shape.dtype, shape.out())? })
    }

    /// The three gates of a row and head.
    pub(crate) fn get(&self, row: usize, head: usize) -> [f32; 3] {
        let mut gate = [0.0; 3];
        self.rows.load(self.layout.leading(&[row, head]), &mut gate);
        gate
    }
}

struct Inputs<'a> {
    gates: Gates<'a>,
    branches: [Rows<'a>; 3],
    shape: [usize; 3],
}

impl<'a> Inputs<'a> {
    fn new(args: &CombineArgs<'a>, shape: [usize; 3], layout: GateLayout) -> Result<Self> {
        let branch = |i: usize| Rows::new(BRANCHES[i], &args.branches[i]);
        let branches = [branch(0)?, branch(1)?, branch(2)?];
        Ok(Self { gates: Gates { rows: Rows::new("gates", &args.gates)?, layout }, branches, shape })
    }

    /// Calls `work` with ranges of rows, in parallel.
    fn for_each_rows(&self, work: impl Fn(std::ops::Range<usize>) + Sync + Send) {
        let total = self.shape[0];
        (0..total.div_ceil(ROWS)).into_par_iter().for_each(|i| work(i * ROWS..((i + 1) * ROWS).min(total)));
    }
}

/// Forward.
pub(crate) fn combine(args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>, isa: Isa) -> Result<()> {
    let (shape, layout) = args.shape_with_output(out)?;
    let inputs = Inputs::new(args, shape, layout)?;
    let sink = Sink::new("out", out)?;
    let [_, heads, dim] = shape;
    let stride = padded(dim);
    inputs.for_each_rows(|rows| {
        let mut sums = vec![0.0f32; rows.len() * heads * stride];
        let mut branch = vec![0.0f32; stride];
        for (i, sum) in sums.chunks_exact_mut(stride).enumerate() {
            let (row, head) = (rows.start + i / heads, i % heads);
            let gate = inputs.gates.get(row, head);
            for (source, gate) in inputs.branches.iter().zip(gate) {
                source.load(&[row, head], &mut branch);
                add(isa, sum, &branch, gate);
            }
        }
        let mut sink = sink.lock();
        for (i, sum) in sums.chunks_exact(stride).enumerate() {
            sink.store(&[rows.start + i / heads, i % heads], sum);
        }
    });
    Ok(())
}

/// Backward: `grad_branch = gate * grad_out`, `grad_gate = branch . grad_out`, summed over the heads where
/// they share a gate.
pub(crate) fn combine_backward(
    args: &CombineArgs<'_>,
    grad_out: &TensorView<'_>,
    grads: &mut CombineGrads<'_>,
    isa: Isa,
) -> Result<()> {
    let (shape, layout) = grads.validate(args, grad_out)?;
    let inputs = Inputs::new(args, shape, layout)?;
    let grad_out = Rows::new("grad_out", grad_out)?;
    let gates = Sink::new("grad_gates", &mut grads.grad_gates)?;
    let [compressed, selected, window] = &mut grads.grad_branches;
    let sinks =
        [Sink::new(BRANCHES[0], compressed)?, Sink::new(BRANCHES[1], selected)?, Sink::new(BRANCHES[2], window)?];
    inputs.for_each_rows(|rows| {
        for row in rows {
            backward_row(isa, &inputs, &grad_out, row, &gates, &sinks);
        }
    });
    Ok(())
}

/// Gradients of the branches of one row; the gradient of its gates.
fn backward_row(
    isa: Isa,
    inputs: &Inputs<'_>,
    grad_out: &Rows<'_>,
    row: usize,
    gates: &Sink<'_>,
    sinks: &[Sink<'_>; 3],
) {
    gate_row(isa, inputs, grad_out, row, gates);
    let [_, heads, dim] = inputs.shape;
    let (mut grad, mut scaled) = (vec![0.0f32; dim], vec![0.0f32; dim]);
    for head in 0..heads {
        grad_out.load(&[row, head], &mut grad);
        for (sink, gate) in sinks.iter().zip(inputs.gates.get(row, head)) {
            scaled.iter_mut().zip(&grad).for_each(|(target, grad)| *target = gate * grad);
            sink.lock().store(&[row, head], &scaled);
        }
    }
}

/// Gradient of the gates of one row.
fn gate_row(isa: Isa, inputs: &Inputs<'_>, grad_out: &Rows<'_>, row: usize, gates: &Sink<'_>) {
    let [_, heads, dim] = inputs.shape;
    let (mut grad, mut branch) = (vec![0.0f32; padded(dim)], vec![0.0f32; padded(dim)]);
    let mut grad_gate = [0.0f32; 3];
    for head in 0..heads {
        grad_out.load(&[row, head], &mut grad);
        for (sum, source) in grad_gate.iter_mut().zip(&inputs.branches) {
            source.load(&[row, head], &mut branch);
            *sum += dot(isa, &branch, &grad);
        }
        if inputs.gates.layout == GateLayout::PerHead {
            gates.lock().store(&[row, head], &grad_gate);
            grad_gate = [0.0; 3];
        }
    }
    if inputs.gates.layout == GateLayout::PerRow {
        gates.lock().store(&[row], &grad_gate);
    }
}

/// Backward of the gates alone, for a caller that passes the gates on to the branches itself.
pub(crate) fn grad_gates(
    args: &CombineArgs<'_>,
    grad_out: &TensorView<'_>,
    grad_gates: &mut TensorViewMut<'_>,
    isa: Isa,
) -> Result<()> {
    let (shape, layout) = args.shape()?;
    let inputs = Inputs::new(args, shape, layout)?;
    let grad_out = Rows::new("grad_out", grad_out)?;
    let sink = Sink::new("grad_gates", grad_gates)?;
    inputs.for_each_rows(|rows| rows.for_each(|row| gate_row(isa, &inputs, &grad_out, row, &sink)));
    Ok(())
}
