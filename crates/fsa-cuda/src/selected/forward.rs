//! Forward of stage `selected`: index, then per chunk the gathered blocks and the merge.

use super::{ForwardTensors, MANY_LAUNCHES};
use crate::arch::KernelSet;
use crate::attend::AttendKernel;
use crate::driver::{DeviceBatch, Replays, Stream};
use crate::index::IndexKernels;
use crate::kernels::{Kernels, Loaded};
use crate::launch::{LaunchContext, TensorSpan, check_batch, check_scale, scale_log2};
use crate::params::{AttendParams, Branch, Index, IndexParams, Layout, ReduceParams, TensorMap};
use crate::plan::ForwardPlan;
use crate::reduce::ReduceKernel;
use fsa_core::{Error, Result};
use std::sync::Arc;

/// A planned forward with its kernels.
#[derive(Debug)]
pub(super) struct KvOuterForward {
    kernels: Arc<Kernels>,
    set: KernelSet,
    plan: ForwardPlan,
    index: Arc<IndexKernels>,
    attend: Arc<AttendKernel>,
    reduce: Arc<ReduceKernel>,
    replays: Arc<Replays>,
}

/// What the launches of one pass share.
struct Pass<'a> {
    tensors: &'a ForwardTensors<'a>,
    context: &'a LaunchContext<'a>,
    branch: Branch,
    layout: Layout,
    index: Index,
    /// Keys and values as Hopper's kernels copy them.
    maps: [TensorMap; 2],
    scale_log2: f32,
}

impl KvOuterForward {
    /// Makes the kernels of a plan ready; compiles those that this process and the cache lack.
    pub(super) fn new(kernels: &Arc<Kernels>, plan: ForwardPlan) -> Result<Self> {
        let problem = &plan.problem;
        let specialisations = problem.forward_kernels(kernels.set());
        problem.check(kernels.device().facts(), &specialisations)?;
        match &kernels.get(&specialisations)?[..] {
            [Loaded::Index(index), Loaded::Attend(attend), Loaded::Reduce(reduce)] => Ok(Self {
                kernels: Arc::clone(kernels),
                set: specialisations[1].set,
                replays: kernels.selected_calls().forward.get(&plan, Replays::default),
                plan,
                index: Arc::clone(index),
                attend: Arc::clone(attend),
                reduce: Arc::clone(reduce),
            }),
            other => unreachable!("kernels come in the order in which they were asked for: {other:?}"),
        }
    }

    /// Gives the forward to the stream.
    pub(super) fn launch_branch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, branch): (&ForwardTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes())?;
        tensors.check(problem)?;
        self.plan.workspace.check(&context.workspace)?;
        if problem.total_q == 0 {
            return Ok(());
        }
        let work = |stream: &Stream| self.launch_all(&context.on(stream), batch, (tensors, branch), softmax_scale);
        if self.plan.launches() < MANY_LAUNCHES {
            return work(context.stream);
        }
        self.replays.run(context.stream, context.call(tensors.call(&branch), batch, softmax_scale), work)
    }

    fn launch_all(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, branch): (&ForwardTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let layout = self.plan.index.layout(problem, batch, &context.workspace);
        let (sizes, boxes) = (problem.sizes(), self.reduce.key_boxes());
        let map = |keys: &TensorSpan<'_>| keys.map(self.set, [problem.total_kv, problem.num_kv_heads], boxes, &sizes);
        let maps = [map(&tensors.key)?, map(&tensors.value)?];
        for first in (0..problem.num_kv_heads).step_by(self.plan.kv_heads) {
            let (kv_heads, heads) = self.plan.pass(first);
            let indices = &tensors.topk_indices;
            let index = self.plan.index.index(problem, indices, first, &context.workspace);
            let staged = self.plan.index.staged.into();
            let params = IndexParams { layout, index, first_kv_head: first as i32, staged };
            self.index.launch(context.stream, &self.plan.index, kv_heads, &params)?;
            let pass = Pass { tensors, context, branch, layout, index, maps, scale_log2: scale_log2(softmax_scale) };
            self.launch_pass(&pass, heads)?;
        }
        Ok(())
    }

    /// Attends and reduces all chunks of some heads, two chunks under way at a time if there are as many.
    fn launch_pass(&self, pass: &Pass<'_>, heads: std::ops::Range<usize>) -> Result<()> {
        let chunks = self.plan.index.num_chunks;
        let starts = heads.clone().step_by(self.plan.heads);
        let steps = starts.flat_map(|head| (0..chunks).map(move |chunk| (head, chunk)));
        let stream = pass.context.stream;
        let buffers = self.plan.buffers;
        if self.plan.steps(heads.len()) == 1 {
            // Nothing overlaps: the side streams would only cost their events.
            return steps.into_iter().try_for_each(|step| {
                let count = (heads.end - step.0).min(self.plan.heads);
                self.attend(pass, stream, step, count, (0, false))?;
                self.reduce(pass, stream, step, count, 0)
            });
        }
        let set = self.kernels.lanes().take(stream)?;
        set.fork(stream, buffers)?;
        for (number, step) in steps.enumerate() {
            let count = (heads.end - step.0).min(self.plan.heads);
            let buffer = number % buffers;
            // The first waits for the index, which did not say when the next may start.
            let follows = number >= buffers;
            self.attend(pass, &set.lanes[buffer], step, count, (buffer, follows))?;
            self.reduce(pass, &set.lanes[buffer], step, count, buffer)?;
        }
        Ok(set.join(stream, buffers)?)
    }

    fn attend(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        (head, chunk): (usize, usize),
        heads: usize,
        (buffer, follows): (usize, bool),
    ) -> Result<()> {
        let (partial, partial_lse) = self.plan.buffer(buffer);
        let params = AttendParams {
            layout: pass.layout,
            index: pass.index,
            query: pass.tensors.query.device(),
            key: pass.tensors.key.device(),
            value: pass.tensors.value.device(),
            partial: partial.address(&pass.context.workspace),
            partial_lse: partial_lse.address(&pass.context.workspace),
            scale_log2: pass.scale_log2,
            group_size: self.plan.problem.gqa_group_size() as i32,
            chunk: chunk as i32,
            first_head: head as i32,
        };
        let units = self.plan.index.units_of(&self.plan.problem, chunk);
        Ok(self.attend.launch(stream, units, heads, follows && self.overlaps(), &params)?)
    }

    fn reduce(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        (head, chunk): (usize, usize),
        heads: usize,
        buffer: usize,
    ) -> Result<()> {
        let (partial, partial_lse) = self.plan.buffer(buffer);
        let params = ReduceParams {
            layout: pass.layout,
            index: pass.index,
            query: pass.tensors.query.device(),
            key: pass.tensors.key.device(),
            value: pass.tensors.value.device(),
            out: pass.tensors.out.device(),
            partial: partial.address(&pass.context.workspace),
            partial_lse: partial_lse.address(&pass.context.workspace),
            lse: pass.branch.lse(pass.tensors.lse.address()),
            scale_log2: pass.scale_log2,
            group_size: self.plan.problem.gqa_group_size() as i32,
            chunk: chunk as i32,
            first_head: head as i32,
            branch: pass.branch,
            key_map: pass.maps[0],
            value_map: pass.maps[1],
        };
        Ok(self.reduce.launch(stream, &self.plan.index, heads, self.overlaps(), &params)?)
    }

    /// The kernels for Hopper order themselves: each starts under the last CTAs of the one before.
    fn overlaps(&self) -> bool {
        self.set == KernelSet::Sm90
    }
}
