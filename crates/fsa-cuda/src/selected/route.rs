//! Stage `selected` by the route that its plan took.

use super::backward::KvOuterBackward;
use super::dense::{DenseBackward, DenseForward};
use super::forward::KvOuterForward;
use super::{BackwardTensors, ForwardTensors, WholeGrads};
use crate::driver::DeviceBatch;
use crate::kernels::Kernels;
use crate::launch::LaunchContext;
use crate::params::{BatchTables, BlockMask, Branch};
use crate::plan::{Pass, PlanOptions, Problem, SelectedBackwardPlan, SelectedPlan, Tables};
use crate::stages::SharedSums;
use fsa_core::Result;
use std::sync::Arc;

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct SelectedForward {
    plan: SelectedPlan,
    way: ForwardWay,
}

#[derive(Debug)]
enum ForwardWay {
    KvOuter(Box<KvOuterForward>),
    Dense(Box<DenseForward>),
}

impl SelectedForward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &Problem, options: &PlanOptions) -> Result<Self> {
        problem.check(kernels.device().facts(), &[])?;
        let options = kernels.routed(problem, Pass::Forward, options);
        let make = || SelectedPlan::new(problem, kernels.set(), kernels.device().facts(), &options);
        let plan = kernels.selected_calls().forward_plans.get(&(*problem, options), make);
        Self::of(kernels, (*plan).clone())
    }

    /// Makes the kernels of a plan ready.
    pub(crate) fn of(kernels: &Arc<Kernels>, plan: SelectedPlan) -> Result<Self> {
        let way = match &plan {
            SelectedPlan::KvOuter(plan) => ForwardWay::KvOuter(Box::new(KvOuterForward::new(kernels, plan.clone())?)),
            SelectedPlan::DenseMasked(plan) => ForwardWay::Dense(Box::new(DenseForward::new(kernels, plan.clone())?)),
        };
        Ok(Self { plan, way })
    }

    /// Route, chunks or tiles, and workspace.
    pub fn plan_value(&self) -> &SelectedPlan {
        &self.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace().size_bytes()
    }

    /// Gives the forward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &ForwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let work = (tensors, Branch::default());
        match &self.way {
            ForwardWay::KvOuter(forward) => forward.launch_branch(context, batch, work, softmax_scale),
            ForwardWay::Dense(forward) => forward.launch(context, batch, work, softmax_scale),
        }
    }

    /// The same as a branch of the whole, which has tables of tiles of as many rows as those of attention to an interval of keys.
    pub(crate) fn launch_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, branch, tables): (&ForwardTensors<'_>, Branch, &Tables),
        softmax_scale: f32,
    ) -> Result<()> {
        let work = (tensors, branch);
        match &self.way {
            ForwardWay::KvOuter(forward) => forward.launch_branch(context, batch, work, softmax_scale),
            ForwardWay::Dense(forward) => forward.launch_branch(context, batch, tables, work, softmax_scale),
        }
    }
}

/// A planned backward with its kernels.
#[derive(Debug)]
pub struct SelectedBackward {
    plan: SelectedBackwardPlan,
    way: BackwardWay,
}

#[derive(Debug)]
enum BackwardWay {
    KvOuter(Box<KvOuterBackward>),
    Dense(Box<DenseBackward>),
}

impl SelectedBackward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &Problem, options: &PlanOptions) -> Result<Self> {
        problem.check(kernels.device().facts(), &[])?;
        let options = kernels.routed(problem, Pass::Backward, options);
        let make = || SelectedBackwardPlan::new(problem, kernels.set(), kernels.device().facts(), &options);
        let plan = kernels.selected_calls().backward_plans.get(&(*problem, options), make);
        Self::of(kernels, (*plan).clone())
    }

    /// Makes the kernels of a plan ready.
    pub(crate) fn of(kernels: &Arc<Kernels>, plan: SelectedBackwardPlan) -> Result<Self> {
        let way = match &plan {
            SelectedBackwardPlan::KvOuter(plan) => {
                BackwardWay::KvOuter(Box::new(KvOuterBackward::new(kernels, plan.clone())?))
            }
            SelectedBackwardPlan::DenseMasked(plan) => {
                BackwardWay::Dense(Box::new(DenseBackward::new(kernels, plan.clone())?))
            }
        };
        Ok(Self { plan, way })
    }

    /// Route, chunks or tiles, and workspace.
    pub fn plan_value(&self) -> &SelectedBackwardPlan {
        &self.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace().size_bytes()
    }

    /// Gives the backward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &BackwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.launch_branch(context, batch, (tensors, &WholeGrads::default()), softmax_scale)
    }

    /// The same as a branch of the whole.
    pub(crate) fn launch_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, whole): (&BackwardTensors<'_>, &WholeGrads<'_>),
        softmax_scale: f32,
    ) -> Result<()> {
        match &self.way {
            BackwardWay::KvOuter(backward) => {
                let sums = whole.sums.map_or(Default::default(), |sums| sums.bounds);
                backward.launch(context, batch, (tensors, sums), softmax_scale)
            }
            BackwardWay::Dense(backward) => backward.launch(context, batch, (tensors, whole), softmax_scale),
        }
    }

    /// The tables that the dense route needs, for who fills them before [`prepare_branch`](Self::prepare_branch).
    pub(crate) fn tables(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Option<BatchTables> {
        match &self.way {
            BackwardWay::KvOuter(_) => None,
            BackwardWay::Dense(backward) => Some(backward.tables(context, batch)),
        }
    }

    /// What the dense route needs besides tables and statistics of rows: a mask. May run beside what makes the statistics.
    pub(crate) fn prepare_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &BackwardTensors<'_>,
    ) -> Result<()> {
        match &self.way {
            BackwardWay::KvOuter(_) => Ok(()),
            BackwardWay::Dense(backward) => backward.prepare(context, batch, tensors),
        }
    }

    /// The mask of the dense route, for who fills it instead: of the steps of tiles nothing is read where the window is done, too.
    pub(crate) fn mask(&self, context: &LaunchContext<'_>) -> BlockMask {
        match &self.way {
            BackwardWay::KvOuter(_) => BlockMask::default(),
            BackwardWay::Dense(backward) => backward.mask(context),
        }
    }

    /// What `merges_later`, and the gradients of queries of shared sums.
    pub(crate) fn finish_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        work: (&BackwardTensors<'_>, &SharedSums),
        softmax_scale: f32,
    ) -> Result<()> {
        match &self.way {
            BackwardWay::KvOuter(_) => Ok(()),
            BackwardWay::Dense(backward) => backward.finish(context, batch, work, softmax_scale),
        }
    }
}
