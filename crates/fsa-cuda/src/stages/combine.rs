//! Stage `combine` on device tensors: the gated sum of the branches, and the gradients.

use super::tensors::{Gates, absent};
use crate::combine::CombineKernels;
use crate::driver::{Address, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{TensorSpan, check_aligned};
use crate::params::{CombineBackwardParams, CombineParams, CombineStatisticsParams, SumsOpening};
use crate::plan::{BOUNDS_BYTES, Sizes};
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

    fn params(&self, branches: &[TensorSpan<'_>; 3], gates: &Gates<'_>, heads: usize) -> CombineParams {
        CombineParams {
            branches: branches.each_ref().map(TensorSpan::device),
            out: absent(),
            gates: gates.device(),
            rows: self.sizes.total_q as i32,
            heads: heads as i32,
        }
    }

    /// The gated sum.
    fn forward(&self, stream: &Stream, tensors: &CombineTensors<'_>) -> Result<()> {
        let params = self.params(&tensors.branches, &tensors.gates, self.sizes.num_q_heads);
        Ok(self.kernels.combine(stream, &CombineParams { out: tensors.out.device(), ..params })?)
    }

    /// The gradients of branches and gates.
    fn backward(&self, stream: &Stream, tensors: &CombineBackwardTensors<'_>) -> Result<()> {
        let params = CombineBackwardParams {
            forward: self.params(&tensors.branches, &tensors.gates, self.sizes.num_q_heads),
            grad_out: tensors.grad_out.device(),
            grad_branches: tensors.grad_branches.each_ref().map(TensorSpan::device),
            grad_gates: tensors.grad_gates.address(),
        };
        Ok(self.kernels.backward(stream, &params)?)
    }

    /// What stage `nsa` takes of `grad_out` and the outputs of `heads` heads: with their log-sum-exp the statistics of the rows of
    /// each branch with their bounds behind them, which are zero before, and the gradients of the gates where they are wanted; and what
    /// is opened besides.
    pub(super) fn statistics(
        &self,
        stream: &Stream,
        (branches, lse, gates): (&[TensorSpan<'_>; 3], &[DeviceSpan<'_>; 3], &Gates<'_>),
        grad_out: &TensorSpan<'_>,
        (row_stats, grad_gates): (Option<&[DeviceSpan<'_>; 3]>, Option<&DeviceSpan<'_>>),
        (heads, opening): (usize, SumsOpening),
    ) -> Result<()> {
        let stats_bytes = 2 * heads * self.sizes.total_q * size_of::<f32>();
        let bounds = |stats: &DeviceSpan<'_>| stats.part(stats_bytes, BOUNDS_BYTES).address();
        let params = CombineStatisticsParams {
            forward: self.params(branches, gates, heads),
            grad_out: grad_out.device(),
            lse: lse.each_ref().map(DeviceSpan::address),
            row_stats: row_stats.map_or_else(Default::default, |stats| stats.each_ref().map(DeviceSpan::address)),
            row_bounds: row_stats.map_or_else(Default::default, |stats| stats.each_ref().map(bounds)),
            grad_gates: grad_gates.map_or(Address::default(), DeviceSpan::address),
            opening,
        };
        Ok(self.kernels.statistics(stream, &params)?)
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
        self.step.forward(stream, tensors)
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
        step.backward(stream, tensors)
    }
}
