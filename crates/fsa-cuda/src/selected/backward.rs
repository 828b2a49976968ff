//! Backward of stage `selected`: index, then head by head and chunk by chunk one KV-major pass.

use super::{BackwardTensors, MANY_LAUNCHES};
use crate::backward::{BackwardKernels, Turn};
use crate::driver::{Address, DeviceBatch, DeviceSpan, Replays, Stream};
use crate::index::IndexKernels;
use crate::kernels::{Kernels, Loaded};
use crate::launch::{LaunchContext, check_batch, check_scale, scale_log2};
use crate::params::{BackwardParams, Index, IndexParams, Layout, SumBounds, TILE_ROWS};
use crate::plan::{BOUNDS_BYTES, BackwardPlan, LaneSums, QuerySums, Slot};

use fsa_core::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// A planned backward with its kernels.
#[derive(Debug)]
pub(super) struct KvOuterBackward {
    kernels: Arc<Kernels>,
    plan: BackwardPlan,
    index: Arc<IndexKernels>,
    backward: Arc<BackwardKernels>,
    replays: Arc<Replays>,
}

/// What the launches of one pass share.
struct Pass<'a> {
    tensors: &'a BackwardTensors<'a>,
    workspace: DeviceSpan<'a>,
    layout: Layout,
    index: Index,
    sums: [SumBounds; 3],
    first_kv_head: usize,
    softmax_scale: f32,
}

/// What one chunk's launches do.
struct Work {
    heads: Range<usize>,
    chunk: usize,
    /// Rows of the keys whose blocks take part.
    keys: Range<usize>,
}

impl KvOuterBackward {
    /// Makes the kernels of a plan ready; compiles those that this process and the cache lack.
    pub(super) fn new(kernels: &Arc<Kernels>, plan: BackwardPlan) -> Result<Self> {
        let specialisations = plan.kernels(kernels.set());
        plan.problem.check(kernels.device().facts(), &specialisations)?;
        match &kernels.get(&specialisations)?[..] {
            [Loaded::Index(index), Loaded::Backward(backward)] => Ok(Self {
                kernels: Arc::clone(kernels),
                replays: kernels.selected_calls().backward.get(&plan, Replays::default),
                plan,
                index: Arc::clone(index),
                backward: Arc::clone(backward),
            }),
            other => unreachable!("kernels come in the order in which they were asked for: {other:?}"),
        }
    }

    /// Gives the backward to the stream. Where `sums` are not null, gradients of queries are added to scaled sums with these bounds.
    pub(super) fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, sums): (&BackwardTensors<'_>, [SumBounds; 3]),
        softmax_scale: f32,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes())?;
        tensors.check(problem)?;
        if self.plan.lanes_in_place > 0
            && (tensors.accumulate || sums.iter().any(|bounds| bounds.rows != Address::default()))
        {
            let (got, planned) =
                ("gradients that are added to", "gradients that are written: PlanOptions::adds_to_grads");
            return Err(Error::input("accumulate", planned, got));
        }
        self.plan.workspace.check(&context.workspace)?;
        if problem.total_kv == 0 {
            return Ok(());
        }
        let work = |stream: &Stream| self.launch_all(&context.on(stream), batch, (tensors, sums), softmax_scale);
        if self.plan.launches() < MANY_LAUNCHES {
            return work(context.stream);
        }
        let mut call = tensors.call();
        call.extend(sums.iter().flat_map(|bounds| [bounds.rows.0, bounds.keys.0]));
        self.replays.run(context.stream, context.call(call, batch, softmax_scale), work)
    }

    fn launch_all(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tensors, sums): (&BackwardTensors<'_>, [SumBounds; 3]),
        softmax_scale: f32,
    ) -> Result<()> {
        let (problem, workspace) = (&self.plan.problem, context.workspace);
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let layout = self.plan.index.layout(problem, batch, &workspace);
        let set = self.kernels.lanes().take(context.stream)?;
        let is_scaled = self.plan.query_sums == QuerySums::Scaled;
        if is_scaled {
            self.plan.bounds.span(&workspace).fill(0, context.stream)?;
        }
        for first in (0..problem.num_kv_heads).step_by(self.plan.kv_heads) {
            let end = (first + self.plan.kv_heads).min(problem.num_kv_heads);
            let index = self.plan.index.index(problem, &tensors.forward.topk_indices, first, &workspace);
            let staged = self.plan.index.staged.into();
            let params = IndexParams { layout, index, first_kv_head: first as i32, staged };
            let pass = Pass { tensors, workspace, layout, index, sums, first_kv_head: first, softmax_scale };
            // These wait for memory, the index does not.
            let bounds = || {
                set.fork(context.stream, 1)?;
                let heads = first * problem.gqa_group_size()..end * problem.gqa_group_size();
                let work = Work { heads, chunk: 0, keys: 0..problem.total_kv };
                let params = self.params(&pass, self.plan.sums(0), &work);
                self.backward.launch_bounds(&set.lanes[0], &self.plan.index, end - first, &params)
            };
            let bounds = is_scaled.then_some(bounds);
            self.index.launch_beside(context.stream, &self.plan.index, end - first, &params, bounds)?;
            if is_scaled {
                set.join(context.stream, 1)?;
            }
            set.fork(context.stream, self.plan.lanes)?;
            for (turn, kv_head) in (first..end).step_by(self.plan.kv_heads_per_launch).enumerate() {
                let lane = turn % self.plan.lanes;
                let kv_heads = kv_head..(kv_head + self.plan.kv_heads_per_launch).min(end);
                self.plan.key_ranges().try_for_each(|keys| {
                    self.launch_kv_heads(&pass, &set.lanes[lane], self.plan.sums(lane), kv_heads.clone(), keys)
                })?;
            }
            set.join(context.stream, self.plan.lanes)?;
        }
        Ok(())
    }

    /// All gradients of some kv heads and their query heads that a range of keys has part in.
    fn launch_kv_heads(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        sums: &LaneSums,
        kv_heads: Range<usize>,
        keys: Range<usize>,
    ) -> Result<()> {
        let (problem, plan) = (&self.plan.problem, &self.plan.index);
        let group = problem.gqa_group_size();
        let all_heads = kv_heads.start * group..kv_heads.end * group;
        let first_chunk = self.first_chunk(&keys);
        for head in all_heads.clone().step_by(self.plan.heads) {
            let heads = head..(head + self.plan.heads).min(all_heads.end);
            for chunk in first_chunk..plan.num_chunks {
                let is_first = head == all_heads.start && chunk == first_chunk;
                let is_last = heads.end == all_heads.end && chunk + 1 == plan.num_chunks;
                let work = Work { heads: heads.clone(), chunk, keys: keys.clone() };
                let params = self.params(pass, sums, &work);
                self.backward.launch(stream, plan, heads.len(), Turn { is_first, is_last }, &params)?;
            }
        }
        Ok(())
    }

    /// First chunk of which a row may see a key of the range, as far as shapes say.
    fn first_chunk(&self, keys: &Range<usize>) -> usize {
        let (problem, plan) = (&self.plan.problem, &self.plan.index);
        if keys.start == 0 || problem.sequences > 1 {
            return 0;
        }
        let first_row = (keys.start + problem.total_q).saturating_sub(problem.total_kv);
        (first_row / (plan.chunk_tiles * TILE_ROWS)).min(plan.num_chunks - 1)
    }

    /// From row to row and from head to head, in rows, of what a launch of `heads` heads has of its own, and of its statistics, which may be given.
    fn row_strides(&self, heads: usize, is_given: bool) -> ([usize; 2], [usize; 2]) {
        let problem = &self.plan.problem;
        let own = if self.plan.unit_heads > 1 { [heads, 1] } else { [1, self.plan.index.chunk_rows(problem)] };
        (own, if is_given { [1, problem.total_q] } else { own })
    }

    fn params(&self, pass: &Pass<'_>, sums: &LaneSums, Work { heads, chunk, keys }: &Work) -> BackwardParams {
        let (problem, tensors, chunk) = (&self.plan.problem, pass.tensors, *chunk);
        let (group, first_head) = (problem.gqa_group_size(), heads.start);
        // Launches of a lane follow one another: the first has its kv heads' sums to itself, unless query heads share them.
        let first_sums = chunk == 0 && first_head.is_multiple_of(group) && self.plan.owns_sums;
        let key_bounds = self.plan.bounds.address(&pass.workspace);
        // The kernels number kv heads from 0, the bounds are those of the pass.
        let skipped = pass.first_kv_head * self.plan.index.max_blocks * BOUNDS_BYTES;
        let block_bounds = Address(self.plan.block_bounds.address(&pass.workspace).0.wrapping_sub(skipped as u64));
        let (own, [stats_row, stats_head]) = self.row_strides(heads.len(), tensors.row_stats.is_some());
        // Scaled sums have 16 bits, like the gradients.
        let (grad_query_out, word) = (tensors.grad_query.device(), size_of::<u16>() as i64);
        let (grad_query, [query_row_bytes, query_head_bytes]) = if sums.in_place {
            let strides = [grad_query_out.row_stride, grad_query_out.head_stride].map(|stride| stride * word);
            (grad_query_out.data.offset(first_head * strides[1] as usize), strides)
        } else {
            (sums.grad_query.address(&pass.workspace), own.map(|rows| (rows * problem.head_dim) as i64 * word))
        };
        // The kernels number key rows from 0, the sums hold those of the range; no address before them is ever used.
        let skipped = keys.start * problem.head_dim * size_of::<f32>();
        let of_keys = |slot: Slot| Address(slot.address(&pass.workspace).0.wrapping_sub(skipped as u64));
        BackwardParams {
            layout: pass.layout,
            index: pass.index,
            query: tensors.forward.query.device(),
            key: tensors.forward.key.device(),
            value: tensors.forward.value.device(),
            out: tensors.forward.out.device(),
            grad_out: tensors.grad_out.device(),
            lse: tensors.forward.lse.address(),
            grad_lse: tensors.grad_lse.map_or(Address::default(), |grad| grad.address()),
            row_stats: tensors.row_stats.map_or(sums.row_stats.address(&pass.workspace), |stats| stats.address()),
            grad_query,
            partial: grad_query,
            grad_query_out,
            grad_key_out: tensors.grad_key.device(),
            grad_value_out: tensors.grad_value.device(),
            grad_key: of_keys(sums.grad_key),
            grad_value: of_keys(sums.grad_value),
            row_bounds: tensors.row_stats.map_or(key_bounds.offset(problem.num_kv_heads * BOUNDS_BYTES), |stats| {
                problem.sizes().row_bounds(&stats)
            }),
            key_bounds,
            block_bounds,
            // Ranges of keys but the first add to what that one rounded.
            sums: if keys.start == 0 { pass.sums } else { Default::default() },
            sum_rows: self.plan.sum_rows as i64,
            query_row_bytes,
            query_head_bytes,
            scale_log2: scale_log2(pass.softmax_scale),
            scale: pass.softmax_scale,
            group_size: group as i32,
            chunk: chunk as i32,
            first_head: first_head as i32,
            stats_row: stats_row as i32,
            stats_head: stats_head as i32,
            rows: self.plan.index.chunk_rows(problem) as i32,
            first_sums: first_sums.into(),
            finish_sums: (self.plan.finishes_sums && heads.end.is_multiple_of(group)).into(),
            first_key: keys.start as i32,
            end_key: keys.end as i32,
            given_stats: tensors.row_stats.is_some().into(),
            accumulate: (tensors.accumulate || keys.start > 0).into(),
            accumulate_keys: tensors.accumulate.into(),
            in_place: sums.in_place.into(),
        }
    }
}
