//! Stage `combine` over host tensors.

use super::host::{Rows, Transfer, store};
use super::{CudaBackend, padded_dim, span};
use crate::driver::DeviceBuffer;
use crate::plan::Sizes;
use crate::stages::{CombineBackward, CombineBackwardTensors, CombineForward, CombineTensors, Gates};
use fsa_core::ops::{BRANCHES, GateLayout};
use fsa_core::{CombineArgs, CombineGrads, Result, TensorView, TensorViewMut};

/// Gates as they lie packed on the device.
pub(super) fn gates(buffer: &DeviceBuffer, layout: GateLayout, heads: usize) -> Gates<'_> {
    match layout {
        GateLayout::PerRow => Gates::per_row(buffer.span()),
        GateLayout::PerHead => Gates::per_head(buffer.span(), heads),
    }
}

/// Sizes of a call.
fn sizes(args: &CombineArgs<'_>, [rows, heads, dim]: [usize; 3]) -> Result<Sizes> {
    Ok(Sizes {
        total_q: rows,
        total_kv: rows,
        sequences: 1,
        num_q_heads: heads,
        num_kv_heads: heads,
        head_dim: padded_dim(dim)?,
        dtype: args.branches[0].dtype(),
    })
}

fn upload(args: &CombineArgs<'_>, sizes: &Sizes, transfer: &Transfer<'_>) -> Result<([DeviceBuffer; 3], DeviceBuffer)> {
    let branch = |b: usize| transfer.upload(BRANCHES[b], &args.branches[b], sizes.head_dim, 1.0);
    Ok(([branch(0)?, branch(1)?, branch(2)?], transfer.upload_plain("gates", &args.gates)?))
}

/// The gated sum.
pub(super) fn forward(backend: &CudaBackend, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
    let (shape, layout) = args.shape_with_output(out)?;
    let sizes = sizes(args, shape)?;
    backend.check_dtype(sizes.dtype)?;
    if shape.contains(&0) {
        return Ok(());
    }
    let planned = CombineForward::plan(backend.kernels(), &sizes)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let (branches, weights) = upload(args, &sizes, &transfer)?;
    let result = transfer.like("out", &branches[0])?;
    let heads = sizes.num_q_heads;
    let tensors = CombineTensors {
        branches: branches.each_ref().map(|branch| span(branch, heads, &sizes)),
        gates: gates(&weights, layout, heads),
        out: span(&result, heads, &sizes),
    };
    planned.launch(&stream, &tensors)?;
    store(&transfer.fetch("out", &result, sizes.dtype)?, Rows::padded(sizes.head_dim), out, 1.0)
}

/// The gradients of branches and gates.
pub(super) fn backward(
    backend: &CudaBackend,
    args: &CombineArgs<'_>,
    grad_out: &TensorView<'_>,
    grads: &mut CombineGrads<'_>,
) -> Result<()> {
    let (shape, layout) = grads.validate(args, grad_out)?;
    let sizes = sizes(args, shape)?;
    backend.check_dtype(sizes.dtype)?;
    let planned = CombineBackward::plan(backend.kernels(), &sizes)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let (branches, weights) = upload(args, &sizes, &transfer)?;
    let grad_out = transfer.upload("grad_out", grad_out, sizes.head_dim, 1.0)?;
    let like = |b: usize| transfer.like(BRANCHES[b], &branches[b]);
    let (grad_branches, grad_gates) = ([like(0)?, like(1)?, like(2)?], transfer.like("grad_gates", &weights)?);
    let heads = sizes.num_q_heads;
    let of = |buffer| span(buffer, heads, &sizes);
    let tensors = CombineBackwardTensors {
        branches: branches.each_ref().map(of),
        gates: gates(&weights, layout, heads),
        grad_out: of(&grad_out),
        grad_branches: grad_branches.each_ref().map(of),
        grad_gates: grad_gates.span(),
    };
    planned.launch(&stream, &tensors)?;
    let fetched: Result<Vec<_>> =
        grad_branches.iter().map(|buffer| transfer.fetch("grad_branch", buffer, sizes.dtype)).collect();
    let gates = transfer.fetch("grad_gates", &grad_gates, sizes.dtype)?;
    store(&gates, Rows::plain(3), &mut grads.grad_gates, 1.0)?;
    let targets = fetched?.into_iter().zip(&mut grads.grad_branches);
    targets.into_iter().try_for_each(|(data, target)| store(&data, Rows::padded(sizes.head_dim), target, 1.0))
}
