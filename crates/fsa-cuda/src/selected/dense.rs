//! Stage `selected` as attention to all earlier keys, with a mask of the blocks that a row lists.

use super::{BackwardTensors, ForwardTensors, WholeGrads};
use crate::arch::KernelSet;
use crate::block_mask::BlockMaskKernel;
use crate::driver::{DeviceBatch, DeviceSpan};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, check_batch, check_scale};
use crate::params::{Band, BatchTables, BlockMask, BlockMaskParams, Branch, Tensor};
use crate::plan::{BandProblem, DenseBackwardPlan, DensePlan, MaskPlan, Problem, RowTiles, Tables};
use crate::prepare::PrepareKernel;
use crate::source::Kernel;
use crate::stages::{
    AttentionGradTensors, AttentionTensors, BandBackwardStep, BandStep, BranchGrads, SharedSums, band,
};
use fsa_core::{Error, Result};
use std::sync::Arc;

/// What makes masks; nothing where every row lists all its blocks.
#[derive(Debug)]
pub(crate) struct MaskStep {
    kernel: Option<(Arc<BlockMaskKernel>, MaskPlan)>,
    problem: BandProblem,
    topk: usize,
    /// Earlier keys that the kernel attends to, too; -1 if it does not.
    window: i32,
    is_portable: bool,
}

impl MaskStep {
    pub(crate) fn new(kernels: &Kernels, problem: &Problem, band: BandProblem, mask: Option<MaskPlan>) -> Result<Self> {
        let specialisation = problem.sizes().specialisation(Kernel::BlockMask, kernels.set(), problem.block_size);
        let kernel = match mask {
            None => None,
            Some(mask) => Some((kernels.one(&specialisation)?, mask)),
        };
        let is_portable = kernels.set() == KernelSet::Sm80;
        Ok(Self { kernel, problem: band, topk: problem.topk, window: -1, is_portable })
    }

    /// The same for a kernel that attends to a window, too.
    pub(crate) fn with_window(self, window: i32) -> Self {
        Self { window, ..self }
    }

    /// The mask in its workspace.
    pub(crate) fn mask(&self, workspace: &DeviceSpan<'_>) -> BlockMask {
        self.kernel.as_ref().map_or_else(BlockMask::default, |(_, plan)| plan.device(workspace))
    }

    /// Fills the mask; `follows` as [`BlockMaskKernel::launch`] has it.
    pub(crate) fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tiles, tables, follows): (&RowTiles, &Tables, bool),
        tensors: &ForwardTensors<'_>,
    ) -> Result<BlockMask> {
        let mask = self.mask(&context.workspace);
        let Some((kernel, plan)) = &self.kernel else { return Ok(mask) };
        // The portable kernels find out by themselves.
        let value = if self.is_portable { Tensor::default() } else { tensors.value.device() };
        let params = BlockMaskParams {
            band: Band { mask, ..band(&self.problem, tiles, batch, tables) },
            value,
            topk_indices: tensors.topk_indices.address(),
            topk: self.topk as i32,
            step_keys: plan.step_keys as i32,
            window: self.window,
        };
        kernel.launch(context.stream, self.problem.sizes.num_kv_heads, follows, &params)?;
        Ok(mask)
    }
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub(super) struct DenseForward {
    kernels: Arc<Kernels>,
    plan: DensePlan,
    prepare: Arc<PrepareKernel>,
    mask: MaskStep,
    step: BandStep,
}

impl DenseForward {
    /// Makes the kernels of a plan ready; compiles those that this process and the cache lack.
    pub(super) fn new(kernels: &Arc<Kernels>, plan: DensePlan) -> Result<Self> {
        let (problem, set) = (&plan.problem, kernels.set());
        let used = plan.kernels(set);
        problem.check(kernels.device().facts(), &used)?;
        kernels.get(&used)?;
        let masked = plan.mask.map(|_| problem.block_size);
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&used[0])?,
            mask: MaskStep::new(kernels, problem, plan.band(), plan.mask)?,
            step: BandStep::masked(kernels, &plan.band(), plan.tiles, masked)?,
            plan,
        })
    }

    /// Gives the forward to the stream.
    pub(super) fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        work: (&ForwardTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(context, batch, work.0, softmax_scale)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        self.prepare.launch(context.stream, &self.plan.tables.params(batch, &context.workspace))?;
        self.launch_attention(context, batch, &self.plan.tables.tables(&context.workspace), work, softmax_scale)
    }

    /// The same with the tables of the plan's tiles.
    pub(super) fn launch_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        work: (&ForwardTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(context, batch, work.0, softmax_scale)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        self.launch_attention(context, batch, tables, work, softmax_scale)
    }

    fn check(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &ForwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes())?;
        tensors.check(problem)?;
        self.plan.workspace.check(&context.workspace)
    }

    fn launch_attention(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        (tensors, branch): (&ForwardTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        if self.plan.problem.total_q == 0 {
            return Ok(());
        }
        let mask = self.mask.launch(context, batch, (&self.plan.tiles, tables, false), tensors)?;
        let work = (&attention(tensors), branch);
        self.step.launch_masked(context.stream, batch, (tables, mask), work, softmax_scale)
    }
}

/// The tensors that stage `dense` has too.
fn attention<'a>(tensors: &ForwardTensors<'a>) -> AttentionTensors<'a> {
    let ForwardTensors { query, key, value, out, lse, .. } = *tensors;
    AttentionTensors { query, key, value, out, lse }
}

/// A planned backward with its kernels. Equal bits for equal input, unless the window is done, too.
#[derive(Debug)]
pub(super) struct DenseBackward {
    kernels: Arc<Kernels>,
    plan: DenseBackwardPlan,
    prepare: Arc<PrepareKernel>,
    mask: MaskStep,
    step: BandBackwardStep,
}

impl DenseBackward {
    /// Makes the kernels of a plan ready; compiles those that this process and the cache lack.
    pub(super) fn new(kernels: &Arc<Kernels>, plan: DenseBackwardPlan) -> Result<Self> {
        let (problem, set) = (&plan.problem, kernels.set());
        let used = plan.kernels(set);
        problem.check(kernels.device().facts(), &used)?;
        kernels.get(&used)?;
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&used[0])?,
            mask: MaskStep::new(kernels, problem, plan.attention.problem, plan.mask)?,
            step: BandBackwardStep::with(kernels, plan.attention.clone(), plan.specialisation(set))?,
            plan,
        })
    }

    /// Gives the backward to the stream.
    pub(super) fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, whole): (&BackwardTensors<'_>, &WholeGrads<'_>),
        softmax_scale: f32,
    ) -> Result<()> {
        let (problem, attention_plan) = (&self.plan.problem, &self.plan.attention);
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes())?;
        tensors.check(problem)?;
        self.plan.workspace.check(&context.workspace)?;
        if problem.total_kv == 0 {
            return Ok(());
        }
        // The pass reads tables before it waits for what is ahead of it, if it shares sums.
        debug_assert!(whole.is_prepared || whole.sums.is_none(), "tables are older than what is ahead");
        if !whole.is_prepared {
            let _bound = self.kernels.device().bind().map_err(Error::from)?;
            self.prepare.launch(context.stream, &self.tables(context, batch))?;
            self.prepare(context, batch, tensors)?;
        }
        let (stream, scratch) = (context.stream, self.plan.scratch.span(&context.workspace));
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = attention_plan.tables.tables(&scratch);
        let (window, sums) = (self.plan.window_size.zip(whole.window_stats), whole.sums);
        let BackwardTensors { row_stats, accumulate, .. } = *tensors;
        let mask = self.mask.mask(&context.workspace);
        let merges_later = whole.merges_later;
        let of_keys = BranchGrads { accumulate_keys: accumulate, merges_later, ..BranchGrads::default() };
        let branch = BranchGrads { row_stats, accumulate, sums, mask, window, ..of_keys };
        self.step.launch(stream, batch, (&tables, &scratch), (&attention_grads(tensors), &branch), softmax_scale)
    }

    /// The tables of the plan's tiles, to be filled.
    pub(super) fn tables(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> BatchTables {
        self.plan.attention.tables.params(batch, &self.plan.scratch.span(&context.workspace))
    }

    /// Adds what splits left to gradients of keys and values, and makes gradients of the sums of those of queries.
    pub(super) fn finish(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, sums): (&BackwardTensors<'_>, &SharedSums),
        softmax_scale: f32,
    ) -> Result<()> {
        if self.plan.problem.total_kv == 0 {
            return Ok(());
        }
        let scratch = self.plan.scratch.span(&context.workspace);
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = self.plan.attention.tables.tables(&scratch);
        let work = (&attention_grads(tensors), sums, true);
        self.step.finish(context.stream, batch, (&tables, &scratch), work, softmax_scale)
    }

    /// Fills the mask.
    pub(super) fn prepare(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &BackwardTensors<'_>,
    ) -> Result<()> {
        if self.plan.problem.total_kv == 0 {
            return Ok(());
        }
        let (plan, scratch) = (&self.plan.attention, self.plan.scratch.span(&context.workspace));
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = plan.tables.tables(&scratch);
        self.mask.launch(context, batch, (&plan.tiles, &tables, false), &tensors.forward)?;
        Ok(())
    }

    /// The mask, to be filled.
    pub(super) fn mask(&self, context: &LaunchContext<'_>) -> BlockMask {
        self.mask.mask(&context.workspace)
    }
}

/// The tensors that the backward of stage `dense` has too.
fn attention_grads<'a>(tensors: &BackwardTensors<'a>) -> AttentionGradTensors<'a> {
    let BackwardTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value, .. } = *tensors;
    AttentionGradTensors { forward: attention(&forward), grad_out, grad_lse, grad_query, grad_key, grad_value }
}
