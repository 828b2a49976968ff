//! Planned calls of Stage `dense`, Stage `window` and Stage `compressed` on device tensors: in one go, or in two where the caller has
//! outputs to allocate while the device is at work.

use super::band::{BandBackwardStep, BandStep, BranchGrads};
use super::{AttentionGradInputs, AttentionGradTensors, AttentionTensors};
use crate::driver::DeviceBatch;
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, check_batch, check_scale};
use crate::params::Branch;
use crate::plan::{BandBackwardPlan, BandPlan, BandProblem, PlanOptions};
use crate::prepare::PrepareKernel;
use crate::source::Kernel;
use fsa_core::{Error, Result};
use std::sync::Arc;

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct BandForward {
    kernels: Arc<Kernels>,
    plan: BandPlan,
    prepare: Arc<PrepareKernel>,
    step: BandStep,
}

impl BandForward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &BandProblem) -> Result<Self> {
        let set = kernels.set();
        let [prepare, any] = [Kernel::Prepare, Kernel::Band].map(|k| problem.sizes.specialisation(k, set, 64));
        let plan = BandPlan::new(problem, &any);
        let used = [prepare, problem.kernel(set, &plan.tiles)];
        problem.check(kernels.device().facts(), &used)?;
        kernels.get(&used)?;
        let step = BandStep::new(kernels, problem, plan.tiles)?;
        Ok(Self { kernels: Arc::clone(kernels), plan, prepare: kernels.one(&prepare)?, step })
    }

    /// Tiles and workspace.
    pub fn plan_value(&self) -> &BandPlan {
        &self.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace.size_bytes()
    }

    /// Gives the forward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &AttentionTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(tensors, softmax_scale)?;
        self.prepare(context, batch)?;
        self.launch_prepared(context, batch, tensors, softmax_scale)
    }

    /// The part of a launch that needs no tensors, for callers that have them only later: [`launch_prepared`](Self::launch_prepared) does
    /// the rest, with the same workspace and on the same stream.
    ///
    /// # Errors
    /// The workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn prepare(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        check_batch(batch, &self.plan.problem.sizes)?;
        self.plan.workspace.check(&context.workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        Ok(self.prepare.launch(context.stream, &self.plan.tables.params(batch, &context.workspace))?)
    }

    /// The rest of a launch.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_prepared(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &AttentionTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(tensors, softmax_scale)?;
        check_batch(batch, &self.plan.problem.sizes)?;
        self.plan.workspace.check(&context.workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = self.plan.tables.tables(&context.workspace);
        self.step.launch(context.stream, batch, &tables, (tensors, Branch::default()), softmax_scale)
    }

    fn check(&self, tensors: &AttentionTensors<'_>, softmax_scale: f32) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        tensors.check(&problem.sizes, problem.total_keys())
    }
}

/// A planned backward with its kernels. Equal bits for equal input where the plan is deterministic or in two passes.
#[derive(Debug)]
pub struct BandBackward {
    kernels: Arc<Kernels>,
    prepare: Arc<PrepareKernel>,
    step: BandBackwardStep,
}

impl BandBackward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &BandProblem, options: &PlanOptions) -> Result<Self> {
        let [prepare, backward] =
            [Kernel::Prepare, Kernel::BandBackward].map(|k| problem.sizes.specialisation(k, kernels.set(), 64));
        let facts = kernels.device().facts();
        problem.check(facts, &[prepare, backward])?;
        let plan = BandBackwardPlan::new(problem, &backward, facts, &kernels.query_sums(options));
        kernels.get(&[prepare, plan.specialisation(kernels.set())])?;
        let step = BandBackwardStep::new(kernels, plan)?;
        Ok(Self { kernels: Arc::clone(kernels), prepare: kernels.one(&prepare)?, step })
    }

    /// Tiles, splits and workspace.
    pub fn plan_value(&self) -> &BandBackwardPlan {
        &self.step.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.step.plan.workspace.size_bytes()
    }

    /// Gives the backward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &AttentionGradTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(tensors, softmax_scale)?;
        self.prepare(context, batch, &tensors.inputs(), softmax_scale)?;
        self.launch_prepared(context, batch, tensors, softmax_scale)
    }

    /// The part of a launch that writes no gradients, for callers that have room for them only later:
    /// [`launch_prepared`](Self::launch_prepared) does the rest, with the same workspace and on the same stream.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn prepare(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        inputs: &AttentionGradInputs<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let plan = &self.step.plan;
        check_scale(softmax_scale)?;
        check_batch(batch, &plan.problem.sizes)?;
        inputs.check(&plan.problem.sizes, plan.problem.total_keys())?;
        plan.workspace.check(&context.workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let memory = (&plan.tables.tables(&context.workspace), &context.workspace);
        self.prepare.launch(context.stream, &plan.tables.params(batch, &context.workspace))?;
        self.step.prepare(context.stream, batch, memory, &inputs.without_gradients(), softmax_scale)
    }

    /// The rest of a launch.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_prepared(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &AttentionGradTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let plan = &self.step.plan;
        self.check(tensors, softmax_scale)?;
        check_batch(batch, &plan.problem.sizes)?;
        plan.workspace.check(&context.workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let memory = (&plan.tables.tables(&context.workspace), &context.workspace);
        let branch = BranchGrads { is_prepared: true, ..BranchGrads::default() };
        self.step.launch(context.stream, batch, memory, (tensors, &branch), softmax_scale)
    }

    fn check(&self, tensors: &AttentionGradTensors<'_>, softmax_scale: f32) -> Result<()> {
        let problem = &self.step.plan.problem;
        check_scale(softmax_scale)?;
        tensors.check(&problem.sizes, problem.total_keys())
    }
}
