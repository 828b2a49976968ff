//! Stage `combine` on device tensors: the gated sum of the branches, and the gradients.

use super::tensors::{Gates, absent};
use crate::combine::CombineKernels;
use crate::driver::{Address, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{TensorSpan, check_aligned};
use crate::params::{self, CombineBackwardParams, CombineParams};
use crate::plan::Sizes;
use crate::source::Kernel;
use fsa_core::{Error, Result};
use std::sync::Arc;

/// Names of the branches, for errors.
const BRANCHES: [&str; 3] = fsa_core::ops::BRANCHES;

/// Tensors of a forward.
#[derive(Debug, Clone, Copy)]
pub struct CombineTensors<'a> {
    /// Outputs of the compressed, selected and window branch, each `[total_q, num_q_heads, head_dim]`.
    pub branches: [TensorSpan<'a>; 3],
    /// Their weights.
    pub gates: Gates<'a>,
    /// Shape of a branch, written; may be one of them.
    pub out: TensorSpan<'a>,
}

/// Tensors of a backward; `out` of the forward is not used.
#[derive(Debug, Clone, Copy)]
pub struct CombineBackwardTensors<'a> {
    /// Outputs of the branches.
    pub branches: [TensorSpan<'a>; 3],
    /// Their weights.
    pub gates: Gates<'a>,
    /// Shape of a branch.
    pub grad_out: TensorSpan<'a>,
    /// Shape of a branch, written.
    pub grad_branches: [TensorSpan<'a>; 3],
    /// `[total_q, 3]`, or `[total_q, num_q_heads, 3]` if every head has gates of its own; without gaps, written.
    pub grad_gates: DeviceSpan<'a>,
}

/// The kernels, for the steps of a call whose tensors are known to be right, with the context bound.
#[derive(Debug, Clone)]
pub(super) struct CombineStep {
    sizes: Sizes,
    kernels: Arc<CombineKernels>,
}

impl CombineStep {
    pub(super) fn new(kernels: &Kernels, sizes: &Sizes) -> Result<Self> {
        let specialisation = sizes.specialisation(Kernel::Combine, kernels.set(), 64);
        sizes.check(kernels.device().facts(), &[specialisation])?;
        Ok(Self { sizes: *sizes, kernels: kernels.one(&specialisation)? })
    }

    fn params(&self, branches: [params::Tensor; 3], gates: Option<&Gates<'_>>, heads: usize) -> CombineParams {
        CombineParams {
            branches,
            out: absent(),
            gates: gates.map_or(Address::default(), |gates| gates.span.address()),
            gate_row_stride: gates.map_or(0, |gates| gates.row_stride as i64),
            gate_head_stride: gates.map_or(0, |gates| gates.head_stride as i64),
            rows: self.sizes.total_q as i32,
            heads: heads as i32,
        }
    }

    /// The gated sum of `heads` heads.
    pub(super) fn forward(&self, stream: &Stream, tensors: &CombineTensors<'_>, heads: usize) -> Result<()> {
        let branches = tensors.branches.each_ref().map(TensorSpan::device);
        let params = CombineParams { out: tensors.out.device(), ..self.params(branches, Some(&tensors.gates), heads) };
        Ok(self.kernels.combine(stream, &params)?)
    }

    /// The sum of up to three tensors `[rows, heads, head_dim]`, in f32, rounded once. `out` may be one of them.
    pub(super) fn sum(
        &self,
        stream: &Stream,
        [rows, heads]: [usize; 2],
        terms: [Option<&TensorSpan<'_>>; 3],
        out: &TensorSpan<'_>,
    ) -> Result<()> {
        let branches = terms.map(|term| term.map_or(absent(), TensorSpan::device));
        let sum = self.params(branches, None, heads);
        Ok(self.kernels.combine(stream, &CombineParams { out: out.device(), rows: rows as i32, ..sum })?)
    }

    /// The gradients of the branches, those of them that are wanted, and of the gates, where they are.
    pub(super) fn backward(
        &self,
        stream: &Stream,
        (branches, gates): (&[TensorSpan<'_>; 3], &Gates<'_>),
        grad_out: &TensorSpan<'_>,
        (grad_branches, grad_gates): ([Option<&TensorSpan<'_>>; 3], Option<&DeviceSpan<'_>>),
        heads: usize,
    ) -> Result<()> {
        let params = CombineBackwardParams {
            forward: self.params(branches.each_ref().map(TensorSpan::device), Some(gates), heads),
            grad_out: grad_out.device(),
            grad_branches: grad_branches.map(|grad| grad.map_or(absent(), TensorSpan::device)),
            grad_gates: grad_gates.map_or(Address::default(), DeviceSpan::address),
        };
        Ok(self.kernels.backward(stream, &params)?)
    }
}

/// Size of the gradient of gates without gaps.
pub(super) fn grad_gates_bytes(sizes: &Sizes, gates: &Gates<'_>) -> usize {
    let heads = if gates.head_stride == 0 { 1 } else { sizes.num_q_heads };
    3 * sizes.total_q * heads * sizes.dtype.size_bytes()
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct CombineForward {
    kernels: Arc<Kernels>,
    step: CombineStep,
}

impl CombineForward {
    /// Makes the kernels for a call of some sizes ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the sizes, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, sizes: &Sizes) -> Result<Self> {
        Ok(Self { kernels: Arc::clone(kernels), step: CombineStep::new(kernels, sizes)? })
    }

    /// Gives the forward to the stream.
    ///
    /// # Errors
    /// A tensor is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(&self, stream: &Stream, tensors: &CombineTensors<'_>) -> Result<()> {
        let sizes = &self.step.sizes;
        let shape = [sizes.total_q, sizes.num_q_heads];
        for (name, branch) in BRANCHES.iter().zip(&tensors.branches) {
            branch.require(name, shape, sizes)?;
        }
        tensors.gates.check("gates", shape, sizes.dtype)?;
        tensors.out.require("out", shape, sizes)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        self.step.forward(stream, tensors, sizes.num_q_heads)
    }
}

/// A planned backward with its kernels. Equal bits for equal input.
#[derive(Debug)]
pub struct CombineBackward(CombineForward);

impl CombineBackward {
    /// Makes the kernels for a call of some sizes ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the sizes, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, sizes: &Sizes) -> Result<Self> {
        Ok(Self(CombineForward::plan(kernels, sizes)?))
    }

    /// Gives the backward to the stream.
    ///
    /// # Errors
    /// A tensor is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(&self, stream: &Stream, tensors: &CombineBackwardTensors<'_>) -> Result<()> {
        let (step, sizes) = (&self.0.step, &self.0.step.sizes);
        let shape = [sizes.total_q, sizes.num_q_heads];
        let CombineBackwardTensors { branches, gates, grad_out, grad_branches, grad_gates } = tensors;
        for (name, (branch, grad)) in BRANCHES.iter().zip(branches.iter().zip(grad_branches)) {
            branch.require(name, shape, sizes)?;
            grad.require(&format!("grad_{name}"), shape, sizes)?;
        }
        gates.check("gates", shape, sizes.dtype)?;
        grad_out.require("grad_out", shape, sizes)?;
        check_aligned("grad_gates", grad_gates, grad_gates_bytes(sizes, gates), sizes.dtype.size_bytes())?;
        let _bound = self.0.kernels.device().bind().map_err(Error::from)?;
        let wanted = (grad_branches.each_ref().map(Some), Some(grad_gates));
        step.backward(stream, (branches, gates), grad_out, wanted, sizes.num_q_heads)
    }
}
