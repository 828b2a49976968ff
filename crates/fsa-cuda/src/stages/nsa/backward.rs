//! Backward of the whole: statistics of the rows of each branch, with which the attentions read the gradient of the output as it is,
//! through each branch to query, keys and values, where one adds to the other, and back through rotation and compression.

use super::parts::{call, check_rope};
use super::tensors::NsaBackwardTensors;
use crate::driver::{Address, DeviceBatch, DeviceSpan, Replays, Stream};
use crate::kernels::Kernels;
use crate::lanes::Work;
use crate::launch::{LaunchContext, TensorSpan, check_batch, check_scale};
use crate::params::{BatchTables, BlockMask, SumBounds, SumKeys, SumsOpening};
use crate::plan::{
    self, BOUNDS_BYTES, DenseBackwardPlan, NsaBackwardPlan, NsaProblem, PlanOptions, SelectedBackwardPlan, Sizes, Slot,
    Tables,
};
use crate::prepare::PrepareKernel;
use crate::selected::{BackwardTensors, SelectedBackward, WholeGrads};
use crate::source::Kernel;
use crate::stages::band::{BandBackwardStep, BranchGrads, SharedSums};
use crate::stages::combine::CombineStep;
use crate::stages::compress::{CompressStep, GradientPart};
use crate::stages::tensors::{absent, passes};
use crate::stages::{
    AttentionGradTensors, AttentionTensors, CompressBackwardTensors, CompressTensors, RopeRows, RopeTurn,
};
use fsa_core::{Error, Result, Rope};
use std::sync::Arc;

/// A planned backward with its kernels.
#[derive(Debug)]
pub struct NsaBackward {
    kernels: Arc<Kernels>,
    plan: NsaBackwardPlan,
    prepare: Arc<PrepareKernel>,
    combine: CombineStep,
    compressed: BandBackwardStep,
    selected: SelectedBackward,
    window: Option<BandBackwardStep>,
    rope: Option<RopeTurn>,
    compress: [CompressStep; 2],
    replays: Replays,
}

/// What the stages of one pass share.
struct Pass<'a> {
    stream: &'a Stream,
    workspace: DeviceSpan<'a>,
    batch: &'a DeviceBatch<'a>,
    /// Of the compressed keys.
    tables: Tables,
    softmax_scale: f32,
    sizes: Sizes,
}

/// The attentions of a pass.
struct Branches<'a> {
    compressed: AttentionGradTensors<'a>,
    selected: BackwardTensors<'a>,
    window: AttentionGradTensors<'a>,
    /// Of these, in this order.
    row_stats: [DeviceSpan<'a>; 3],
    /// The scaled sums of gradients of queries, where they are shared.
    shared: Option<SharedSums>,
}

/// Gradients of compressed keys and values.
type CompressedGrads<'a> = [TensorSpan<'a>; 2];

impl NsaBackward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack, side by side. `rope` comes
    /// with the elements of a vector that it rotates, those of the call.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had; `rope` is not there as the problem says, or not valid.
    pub fn plan(
        kernels: &Arc<Kernels>,
        problem: &NsaProblem,
        rope: Option<(&Rope, usize)>,
        options: &PlanOptions,
    ) -> Result<Self> {
        let (facts, set) = (kernels.device().facts(), kernels.set());
        check_rope(problem, rope.is_some())?;
        problem.check(facts)?;
        let selected = problem.selected();
        let takes_window = DenseBackwardPlan::takes_window(&selected, set, &kernels.query_sums(options));
        // Measurements are of the stage by itself.
        let options = if takes_window {
            kernels.asked(&selected, options)
        } else {
            kernels.routed(&selected, plan::Pass::Backward, options)
        };
        let plan = NsaBackwardPlan::new(problem, set, facts, &options);
        let pass = plan.pass();
        let options = PlanOptions { budget_bytes: plan.stage_budget_bytes, ..options };
        let selected = SelectedBackwardPlan::of_branch(&pass.selected(), (set, facts), &options, pass.window_size);
        let mut all = pass.kernels(set, &[Kernel::Combine]);
        all.extend([&plan.compressed].into_iter().chain(&plan.window).map(|plan| plan.specialisation(set)));
        all.extend(selected.kernels(set));
        kernels.get(&all)?;
        let [key, value] = pass.compress();
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&pass.specialisation(Kernel::Prepare, set))?,
            combine: CombineStep::new(kernels, &problem.sizes)?,
            compressed: BandBackwardStep::new(kernels, plan.compressed.clone())?,
            selected: SelectedBackward::of(kernels, selected)?,
            window: plan.window.clone().map(|window| BandBackwardStep::new(kernels, window)).transpose()?,
            rope: rope.map(|(rope, dim)| RopeTurn::plan(kernels, &pass.sizes, rope, dim)).transpose()?,
            compress: [
                CompressStep::new(kernels, &key, plan.compress[0])?,
                CompressStep::new(kernels, &value, plan.compress[1])?,
            ],
            replays: Replays::default(),
            plan,
        })
    }

    /// Passes and workspace.
    pub fn plan_value(&self) -> &NsaBackwardPlan {
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
        tensors: &NsaBackwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes)?;
        tensors.check(problem)?;
        self.plan.workspace.check(&context.workspace)?;
        let call = call(tensors.numbers(), context, batch, softmax_scale);
        self.replays.run(context.stream, call, |stream| {
            self.launch_all(&LaunchContext { stream, ..*context }, batch, tensors, softmax_scale)
        })
    }

    fn launch_all(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &NsaBackwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let (plan, stream, workspace) = (&self.plan, context.stream, context.workspace);
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = plan.tables.tables(&workspace);
        let sizes = &plan.problem.sizes;
        let one_pass = plan.kv_heads == sizes.num_kv_heads;
        if !one_pass {
            // A gate may belong to the heads of all passes.
            let wanted = (None, Some(&tensors.grad_gates));
            self.statistics(stream, tensors, wanted, (sizes.num_q_heads, SumsOpening::default()))?;
        }
        let pass = Pass { stream, workspace, batch, tables, softmax_scale, sizes: plan.pass().sizes };
        passes(sizes.num_kv_heads, plan.kv_heads).try_for_each(|heads| {
            let grad_gates = one_pass.then_some(&tensors.grad_gates);
            self.launch_pass(&pass, &tensors.heads_from(heads.start, &plan.problem), grad_gates)
        })
    }

    /// The tables of all attentions, and zeros in all bounds.
    fn begin(&self, pass: &Pass<'_>, row_stats: &[DeviceSpan<'_>; 3]) -> Result<()> {
        let Pass { stream, workspace, batch, .. } = *pass;
        let [of_compressed, of_selected, of_window] = row_stats.each_ref().map(|stats| pass.sizes.row_bounds(stats));
        let [of_compressed_keys, of_keys, clearing] = self.words(pass);
        let cleared = [of_compressed, of_selected, of_window, of_compressed_keys, of_keys, clearing];
        let of_compressed = BatchTables { cleared, ..self.plan.tables.params(batch, &workspace) };
        let scratch = LaunchContext { stream, workspace: self.plan.scratch.span(&workspace) };
        let of_window = self.plan.window_tables.as_ref().map(|tables| tables.params(batch, &workspace));
        match of_window.or_else(|| self.selected.tables(&scratch, batch)) {
            Some(others) => self.prepare.launch_two(stream, [of_compressed, others])?,
            None => self.prepare.launch(stream, &of_compressed)?,
        }
        Ok(())
    }

    /// Bounds of compressed keys, then of keys, and what those share who clear sums.
    fn words(&self, pass: &Pass<'_>) -> [Address; 3] {
        let bounds = self.plan.temporaries.key_bounds.address(&pass.workspace);
        [0, 1, 2].map(|n| n * BOUNDS_BYTES).map(|offset| bounds.offset(offset))
    }

    /// The heads of a pass. `grad_gates` are there in a call of one pass.
    fn launch_pass<'a>(
        &self,
        pass: &Pass<'a>,
        tensors: &NsaBackwardTensors<'a>,
        grad_gates: Option<&DeviceSpan<'a>>,
    ) -> Result<()> {
        let Sizes { num_q_heads, num_kv_heads, head_dim, .. } = pass.sizes;
        let slots = &self.plan.temporaries;
        let row_stats = slots.row_stats.each_ref().map(|slot| slot.span(&pass.workspace));
        let tensor = |slot: &Slot| TensorSpan::contiguous(slot.span(&pass.workspace), num_kv_heads, head_dim);
        let compressed = slots.compressed.each_ref().map(tensor);
        let branches = self.branches(pass, tensors, &row_stats, &compressed);
        let opening = branches.shared.as_ref().map(|sums| self.opening(pass, &branches, sums)).unwrap_or_default();
        let statistics =
            |stream: &Stream| self.statistics(stream, tensors, (Some(&row_stats), grad_gates), (num_q_heads, opening));
        let mask = |stream: &Stream| {
            let context = LaunchContext { stream, workspace: self.plan.scratch.span(&pass.workspace) };
            self.selected.prepare_branch(&context, pass.batch, &branches.selected)
        };
        self.begin(pass, &row_stats)?;
        let works: [Work<'_, Error>; 2] = [&statistics, &mask];
        let apart = self.window.is_none() && branches.shared.is_none();
        self.kernels.sides().take(pass.stream)?.side_by_side(pass.stream, &works[..1 + usize::from(apart)])?;
        self.launch_branches(pass, tensors, &branches, &compressed)?;
        self.leave_rows(pass, tensors, &branches, &compressed)
    }

    /// What is wanted of the statistics of the rows of each branch and of the gradients of the gates.
    fn statistics(
        &self,
        stream: &Stream,
        NsaBackwardTensors { saved, gates, grad_out, .. }: &NsaBackwardTensors<'_>,
        wanted: (Option<&[DeviceSpan<'_>; 3]>, Option<&DeviceSpan<'_>>),
        (heads, opening): (usize, SumsOpening),
    ) -> Result<()> {
        self.combine.statistics(stream, (&saved.branches, &saved.lse, gates), grad_out, wanted, (heads, opening))
    }

    /// What the attentions of a pass read and write.
    fn branches<'a>(
        &self,
        pass: &Pass<'a>,
        tensors: &NsaBackwardTensors<'a>,
        row_stats: &[DeviceSpan<'a>; 3],
        compressed: &CompressedGrads<'a>,
    ) -> Branches<'a> {
        let saved = &tensors.saved;
        let [query, key] = saved.rotated.unwrap_or([tensors.query, tensors.key]);
        let through = |b: usize, [key, value]: [TensorSpan<'a>; 2], [grad_key, grad_value]: [TensorSpan<'a>; 2]| {
            let forward = AttentionTensors { query, key, value, out: saved.branches[b], lse: saved.lse[b] };
            let NsaBackwardTensors { grad_out, grad_query, .. } = *tensors;
            AttentionGradTensors { forward, grad_out, grad_lse: None, grad_query, grad_key, grad_value }
        };
        let (keys, grads) = ([key, tensors.value], [tensors.grad_key, tensors.grad_value]);
        Branches {
            compressed: through(0, saved.compressed, *compressed),
            selected: through(1, keys, grads).selected(tensors.topk_indices),
            window: through(2, keys, grads),
            row_stats: *row_stats,
            shared: self.plan.shares_query_sums.then(|| self.shared_sums(pass, &saved.compressed, row_stats)),
        }
    }

    /// What the statistics' launch does besides where branches share sums: these become zero, if not later, with bounds of keys, and lists become
    /// a mask where selected blocks and window are done together.
    fn opening(&self, pass: &Pass<'_>, branches: &Branches<'_>, sums: &SharedSums) -> SumsOpening {
        let Pass { stream, workspace, batch, sizes, .. } = *pass;
        let [cu_seqlens_q, cu_keys] = batch.spans().map(|span| span.address());
        let AttentionGradTensors { forward: AttentionTensors { key, value, .. }, grad_query, .. } = &branches.window;
        let tokens = SumKeys { key: key.device(), value: value.device(), cu_keys, bounds: sums.key_bounds };
        let context = LaunchContext { stream, workspace: self.plan.scratch.span(&workspace) };
        let opening = SumsOpening {
            grad_query: if self.clears_later() { absent() } else { grad_query.device() },
            keys: [tokens, sums.other],
            mask: if self.window.is_none() { self.selected.mask(&context) } else { BlockMask::default() },
            topk_indices: branches.selected.forward.topk_indices.address(),
            cu_seqlens_q,
            batch: sizes.sequences as i32,
            num_kv_heads: sizes.num_kv_heads as i32,
            topk: self.plan.problem.topk as i32,
            block_size: self.plan.problem.block_size as i32,
            total_q: sizes.total_q as i32,
            ..SumsOpening::default()
        };
        opening.with_ctas(sizes.total_kv, self.kernels.device().facts().multiprocessors)
    }

    /// The gradients of query, key and value through every branch. Those of queries: the window, which may have the selected blocks with
    /// it, and compressed attention add to scaled sums; selected blocks by themselves, which come last, make gradients of them, else
    /// [`leave_rows`](Self::leave_rows) does. Where the plan shares no sums, compressed attention writes them, or selected blocks and window
    /// in one pass, and the others add. Those of keys and values: the window writes them, or it and the selected blocks in one pass, or the
    /// compression, see [`compression_first`](Self::compression_first).
    fn launch_branches<'a>(
        &self,
        pass: &Pass<'_>,
        tensors: &NsaBackwardTensors<'a>,
        branches: &Branches<'_>,
        compressed_grads: &CompressedGrads<'a>,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, .. } = *pass;
        let scratch = self.plan.scratch.span(&workspace);
        let beside = self.plan.compressed_scratch.span(&workspace);
        let Branches { compressed, selected, window, row_stats, shared } = branches;
        let [of_compressed, of_selected, of_window] = row_stats.map(Some);
        let sums = *shared;
        let ahead = self.runs_beside();
        let through_compressed = |stream: &Stream, accumulate| {
            let branch = BranchGrads { row_stats: of_compressed, accumulate, sums, ahead, ..BranchGrads::default() };
            self.compressed.launch(stream, batch, (tables, &beside), (compressed, &branch), softmax_scale)
        };
        let through_selected = |stream: &Stream, accumulate| {
            let selected = BackwardTensors { row_stats: of_selected, accumulate, ..*selected };
            let context = LaunchContext { stream, workspace: scratch };
            let is_prepared = self.window.is_none();
            let merges_later = self.compression_first();
            let whole = WholeGrads { window_stats: of_window, sums, is_prepared, merges_later };
            self.selected.launch_branch(&context, batch, (&selected, &whole), softmax_scale)
        };
        let Some((step, tables)) = self.window.as_ref().zip(self.plan.window_tables) else {
            if !self.runs_beside() {
                through_selected(stream, false)?;
                return through_compressed(stream, true);
            }
            let of_compressed = |stream: &Stream| {
                through_compressed(stream, false)?;
                if !self.compression_first() {
                    return Ok(());
                }
                let memory = (tables, &workspace);
                [0, 1].into_iter().try_for_each(|c| {
                    let grads = of_compression(c, tensors, compressed_grads, false);
                    let mut parts = [GradientPart::Input, GradientPart::Parameters].into_iter();
                    parts.try_for_each(|part| self.compress[c].backward(part, stream, batch, memory, &grads))
                })
            };
            let works: [Work<'_, Error>; 2] = [&of_compressed, &|stream| through_selected(stream, false)];
            return self.kernels.sides().take(stream)?.side_by_side(stream, &works);
        };
        let through_window = |accumulate| {
            let branch = BranchGrads { row_stats: of_window, accumulate, sums, ..BranchGrads::default() };
            let tables = tables.tables(&workspace);
            step.launch(stream, batch, (&tables, &scratch), (window, &branch), softmax_scale)
        };
        if shared.is_some() {
            through_window(false)?;
            through_compressed(stream, false)?;
        } else {
            through_compressed(stream, false)?;
            through_window(true)?;
        }
        through_selected(stream, true)
    }

    /// Whether compressed attention runs beside selected blocks and window in one pass: these have work for the whole device, and the few
    /// CTAs of that go ahead of them.
    fn runs_beside(&self) -> bool {
        self.window.is_none() && self.plan.shares_query_sums
    }

    /// Whether attentions that run beside each other clear the sums of gradients of queries, under their first loads.
    fn clears_later(&self) -> bool {
        self.runs_beside() && self.plan.problem.sizes.total_kv > 0
    }

    /// Whether gradients of keys and values go back through compression beside selected blocks and window, whose splits are added to them
    /// later: not where there are no splits, nor where keys are rotated, whose gradient has to be complete.
    fn compression_first(&self) -> bool {
        let splits = self.selected.plan_value().attention().map_or(1, |plan| plan.splits);
        self.runs_beside() && self.rope.is_none() && splits > 1
    }

    /// The scaled sums of gradients of queries of compressed attention, of the window, and of selected blocks that are done together
    /// with it.
    fn shared_sums(
        &self,
        pass: &Pass<'_>,
        [key, value]: &[TensorSpan<'_>; 2],
        row_stats: &[DeviceSpan<'_>; 3],
    ) -> SharedSums {
        let [of_compressed, of_keys, clearing] = self.words(pass);
        let [compressed, selected, window] = row_stats;
        let bounds = |stats, keys| SumBounds { rows: pass.sizes.row_bounds(stats), keys };
        let selected = if self.window.is_none() { bounds(selected, of_keys) } else { SumBounds::default() };
        SharedSums {
            bounds: [bounds(compressed, of_compressed), bounds(window, of_keys), selected],
            key_bounds: of_keys,
            clearing: if self.clears_later() { clearing } else { Address::default() },
            other: SumKeys {
                key: key.device(),
                value: value.device(),
                cu_keys: pass.tables.cu_compressed,
                bounds: of_compressed,
            },
        }
    }

    /// Back through rotation and compression: what reached compressed keys and values goes on to keys, values and parameters. Beside it
    /// gradients of queries are made of sums that nobody did it for.
    fn leave_rows(
        &self,
        pass: &Pass<'_>,
        tensors: &NsaBackwardTensors<'_>,
        branches: &Branches<'_>,
        compressed: &CompressedGrads<'_>,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, sizes } = *pass;
        let Sizes { num_q_heads, num_kv_heads, .. } = sizes;
        let sums = branches.shared.as_ref().filter(|_| self.runs_beside());
        if let (Some(sums), true) = (sums, self.compression_first()) {
            let context = LaunchContext { stream, workspace: self.plan.scratch.span(&workspace) };
            return self.selected.finish_branch(&context, batch, (&branches.selected, sums), softmax_scale);
        }
        let of_query = |stream: &Stream| {
            if let Some(sums) = sums {
                let memory = (tables, &self.plan.compressed_scratch.span(&workspace));
                self.compressed.finish(stream, batch, memory, (&branches.compressed, sums, false), softmax_scale)?;
            }
            self.rotate_back(pass, stream, &RopeRows::Query, (&tensors.grad_query, num_q_heads))
        };
        let windows = self.plan.problem.windows;
        let rows = RopeRows::Compressed { windows, cu_compressed: self.plan.tables.compressed(&workspace) };
        self.rotate_back(pass, stream, &rows, (&compressed[0], num_kv_heads))?;
        let [keys, values] = [0, 1].map(|c| of_compression(c, tensors, compressed, true));
        let memory = (tables, &workspace);
        let of_key = |stream: &Stream| {
            self.rotate_back(pass, stream, &RopeRows::Key, (&tensors.grad_key, num_kv_heads))?;
            self.compress[0].backward(GradientPart::Input, stream, batch, memory, &keys)
        };
        let of_value = |stream: &Stream| {
            let parts = [GradientPart::Input, GradientPart::Parameters];
            parts.into_iter().try_for_each(|part| self.compress[1].backward(part, stream, batch, memory, &values))
        };
        let of_parameters =
            |stream: &Stream| self.compress[0].backward(GradientPart::Parameters, stream, batch, memory, &keys);
        let mut works: Vec<Work<'_, Error>> = vec![&of_key, &of_value];
        if keys.grad_weight.is_some() || keys.grad_position.is_some() {
            works.push(&of_parameters);
        }
        if self.rope.is_some() || sums.is_some() {
            works.push(&of_query);
        }
        self.kernels.sides().take(stream)?.side_by_side(stream, &works)
    }

    /// The gradient of rotated rows, in place.
    fn rotate_back(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        rows: &RopeRows<'_>,
        (grad, heads): (&TensorSpan<'_>, usize),
    ) -> Result<()> {
        let Some(rope) = &self.rope else { return Ok(()) };
        rope.launch_on(stream, pass.batch, rows, (grad, grad, heads), true)
    }
}

/// What the compression of keys, or of values, takes; gradients of the input are added to, or written.
fn of_compression<'a>(
    c: usize,
    tensors: &NsaBackwardTensors<'a>,
    compressed: &CompressedGrads<'a>,
    accumulate: bool,
) -> CompressBackwardTensors<'a> {
    let (input, grad_input) = [(tensors.key, tensors.grad_key), (tensors.value, tensors.grad_value)][c];
    let (parameters, gradients) = (tensors.parameters[c], tensors.grad_parameters[c]);
    let grad_out = compressed[c];
    let (weight, position) = (parameters.weight, parameters.position);
    CompressBackwardTensors {
        forward: CompressTensors { input, out: grad_out, weight, position },
        grad_out,
        grad_input,
        grad_weight: gradients.weight,
        grad_position: gradients.position,
        accumulate,
    }
}
