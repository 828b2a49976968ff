//! Backward of stage `selected`: index, then head by head and chunk by chunk one KV-major pass.

use super::{BackwardTensors, LOG2_E, LaunchContext, check_batch, check_scale};
use crate::backward::BackwardKernels;
use crate::driver::{Address, DeviceBatch, DeviceSpan, Stream};
use crate::index::IndexKernels;
use crate::kernels::{Kernels, Loaded};
use crate::params::{BackwardParams, ConvertParams, Index, IndexParams, Layout};
use crate::plan::{BackwardPlan, PlanOptions, Problem};
use crate::source::Kernel;
use fsa_core::{Error, Result};
use std::sync::Arc;

/// A planned backward with its kernels.
#[derive(Debug)]
pub struct SelectedBackward {
    kernels: Arc<Kernels>,
    plan: BackwardPlan,
    index: Arc<IndexKernels>,
    backward: Arc<BackwardKernels>,
}

/// What the launches of one pass share.
struct Pass<'a> {
    tensors: &'a BackwardTensors<'a>,
    workspace: DeviceSpan<'a>,
    layout: Layout,
    index: Index,
    softmax_scale: f32,
}

impl SelectedBackward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &Problem, options: &PlanOptions) -> Result<Self> {
        let specialisations =
            [Kernel::Index, Kernel::Backward].map(|kernel| problem.specialisation(kernel, kernels.set()));
        let facts = kernels.device().facts();
        problem.check(facts, &specialisations)?;
        let plan = BackwardPlan::new(problem, facts, options);
        match &kernels.get(&specialisations)?[..] {
            [Loaded::Index(index), Loaded::Backward(backward)] => Ok(Self {
                kernels: Arc::clone(kernels),
                plan,
                index: Arc::clone(index),
                backward: Arc::clone(backward),
            }),
            other => unreachable!("kernels come in the order in which they were asked for: {other:?}"),
        }
    }

    /// Chunks and workspace.
    pub fn plan_value(&self) -> &BackwardPlan {
        &self.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace.size_bytes()
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
        let (problem, workspace) = (&self.plan.problem, context.workspace);
        check_scale(softmax_scale)?;
        check_batch(batch, problem)?;
        tensors.check(problem)?;
        self.plan.workspace.check(&workspace)?;
        if problem.total_kv == 0 {
            return Ok(());
        }
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let layout = self.plan.index.layout(problem, batch, &workspace);
        let set = self.kernels.lanes().take(context.stream)?;
        for first in (0..problem.num_kv_heads).step_by(self.plan.kv_heads) {
            let kv_heads = self.plan.kv_heads.min(problem.num_kv_heads - first);
            let (built, index) = self.plan.index.index(problem, &tensors.forward.topk_indices, first, &workspace);
            let params = IndexParams { layout, index: built };
            if problem.total_q > 0 {
                self.index.launch(context.stream, &self.plan.index, kv_heads, &params)?;
            }
            let pass = Pass { tensors, workspace, layout, index, softmax_scale };
            set.fork(context.stream, self.plan.lanes)?;
            for lane in 0..self.plan.lanes {
                self.clear(lane, &pass, &set.lanes[lane].main)?;
            }
            for kv_head in first..first + kv_heads {
                let lane = (kv_head - first) % self.plan.lanes;
                self.launch_kv_head(&pass, &set.lanes[lane].main, lane, kv_head)?;
            }
            set.join(context.stream, self.plan.lanes)?;
        }
        Ok(())
    }

    /// Zeroes the sums of a lane; every conversion leaves them zero for the next.
    fn clear(&self, lane: usize, pass: &Pass<'_>, stream: &Stream) -> Result<()> {
        let sums = self.plan.sums(lane);
        let partials = BackwardPlan::has_partials(&self.plan.problem);
        let grad_query = (!partials).then_some(sums.grad_query);
        let slots = [sums.grad_key, sums.grad_value].into_iter().chain(grad_query);
        slots.into_iter().try_for_each(|slot| Ok(slot.span(&pass.workspace).fill(0, stream)?))
    }

    fn launch_kv_head(&self, pass: &Pass<'_>, stream: &Stream, lane: usize, kv_head: usize) -> Result<()> {
        let (problem, tensors) = (&self.plan.problem, pass.tensors);
        let (group, sums) = (problem.gqa_group_size(), self.plan.sums(lane));
        if problem.total_q > 0 {
            for head in kv_head * group..(kv_head + 1) * group {
                for chunk in 0..self.plan.index.num_chunks {
                    self.launch_chunk(pass, stream, lane, (head, chunk))?;
                }
            }
        }
        let targets =
            [(sums.grad_key, tensors.grad_key, pass.softmax_scale), (sums.grad_value, tensors.grad_value, 1.0)];
        for (source, target, scale) in targets {
            let params = ConvertParams {
                source: source.address(&pass.workspace),
                target: target.params(),
                first_row: Address::default(),
                end_row: Address::default(),
                rows: problem.total_kv as i32,
                head: kv_head as i32,
                scale,
            };
            self.backward.convert(stream, problem.total_kv, &params)?;
        }
        Ok(())
    }

    fn launch_chunk(&self, pass: &Pass<'_>, stream: &Stream, lane: usize, (head, chunk): (usize, usize)) -> Result<()> {
        let (plan, tensors, sums) = (&self.plan.index, pass.tensors, self.plan.sums(lane));
        let rows = plan.chunk_rows(&self.plan.problem);
        let params = BackwardParams {
            layout: pass.layout,
            index: pass.index,
            query: tensors.forward.query.params(),
            key: tensors.forward.key.params(),
            value: tensors.forward.value.params(),
            out: tensors.forward.out.params(),
            grad_out: tensors.grad_out.params(),
            lse: tensors.forward.lse.address(),
            grad_lse: tensors.grad_lse.map_or(Address::default(), |grad| grad.address()),
            row_stats: sums.row_stats.address(&pass.workspace),
            grad_query: sums.grad_query.address(&pass.workspace),
            partial: sums.grad_query.address(&pass.workspace),
            grad_query_out: tensors.grad_query.params(),
            grad_key: sums.grad_key.address(&pass.workspace),
            grad_value: sums.grad_value.address(&pass.workspace),
            scale_log2: pass.softmax_scale * LOG2_E,
            scale: pass.softmax_scale,
            group_size: self.plan.problem.gqa_group_size() as i32,
            chunk: chunk as i32,
            head: head as i32,
        };
        self.backward.launch(stream, plan, rows, &params)?;
        if BackwardPlan::has_partials(&self.plan.problem) {
            return Ok(());
        }
        let params = ConvertParams {
            source: params.grad_query,
            target: tensors.grad_query.params(),
            first_row: plan.chunk_token(chunk, &pass.workspace),
            end_row: plan.chunk_token(chunk + 1, &pass.workspace),
            rows: 0,
            head: head as i32,
            scale: pass.softmax_scale,
        };
        Ok(self.backward.convert(stream, rows, &params)?)
    }
}
