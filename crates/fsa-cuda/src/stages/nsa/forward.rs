//! Forward of the whole: compression, rotation, and the three branches, each of which adds its rows, times their gates, to the output. Where
//! selected blocks and window are attended to in one walk, that adds those of compressed attention, too.

use super::parts::{attention, call, check_rope, compress_tensors, compressed, local_attention};
use super::tensors::{NsaForwardTensors, NsaSavedTensors};
use crate::driver::{DeviceBatch, DeviceSpan, Replays, Stream};
use crate::kernels::Kernels;
use crate::lanes::Work;
use crate::launch::{LaunchContext, TensorSpan, check_batch, check_scale};
use crate::params::Branch;
use crate::plan::{
    self, ForwardTemporaries, Lists, NsaForwardPlan, NsaProblem, PlanOptions, SelectedPlan, Sizes, Tables,
};
use crate::prepare::PrepareKernel;
use crate::selected::SelectedForward;
use crate::source::Kernel;
use crate::stages::band::BandStep;
use crate::stages::band_both::BandBothStep;
use crate::stages::band_pair::BandPairStep;
use crate::stages::compress::CompressStep;
use crate::stages::select::{ChosenMask, SelectMemory, SelectStep};
use crate::stages::tensors::passes;
use crate::stages::{RopeRows, RopeTurn};
use fsa_core::{Error, Result, Rope};
use std::sync::Arc;

/// What a backward needs of the state and the forward did not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// Query and keys after their rotary embedding.
    Rotated,
    /// Everything but the lists of blocks.
    All,
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct NsaForward {
    kernels: Arc<Kernels>,
    plan: NsaForwardPlan,
    prepare: Arc<PrepareKernel>,
    compress: [CompressStep; 2],
    rope: Option<RopeTurn>,
    /// None where the other branches come with it.
    select: Option<SelectStep>,
    local: Local,
    replays: Replays,
}

/// Attention to the selected blocks and to the window.
#[derive(Debug)]
enum Local {
    /// In one walk of all keys, and to the compressed keys, too.
    Both(BandBothStep),
    /// In one walk of the blocks that some row lists and the window; of rows that list all blocks that they see as in the first way.
    Pair(Box<BandPairStep>, Option<BandBothStep>),
    Apart(Box<SelectedForward>, BandStep),
}

/// What the stages of one pass share.
struct Pass<'a> {
    stream: &'a Stream,
    workspace: DeviceSpan<'a>,
    batch: &'a DeviceBatch<'a>,
    tables: Tables,
    softmax_scale: f32,
    recompute: Option<Recompute>,
}

impl NsaForward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack, side by side. With `saves`
    /// a launch writes what the backward needs. `rope` comes with the elements of a vector that it rotates, those of the call.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had; `rope` is not there as the problem says, or not valid.
    pub fn plan(
        kernels: &Arc<Kernels>,
        problem: &NsaProblem,
        rope: Option<(&Rope, usize)>,
        options: &PlanOptions,
        saves: bool,
    ) -> Result<Self> {
        let (facts, set) = (kernels.device().facts(), kernels.set());
        check_rope(problem, rope.is_some())?;
        problem.check(facts)?;
        let options = kernels.routed(&problem.selected(), plan::Pass::Forward, options);
        let plan = NsaForwardPlan::new(problem, set, facts, &options, saves)?;
        let pass = plan.pass();
        let options = PlanOptions { budget_bytes: plan.stage_budget_bytes, ..options };
        let selected = SelectedPlan::with_lists(&plan.part().selected(), set, facts, &options, Lists::Selected);
        let mut all = pass.kernels(set, &[]);
        if plan.window_goes_on {
            all.push(pass.window_too_kernel(set));
        } else {
            all.extend(pass.select().kernels(set, &plan.lists));
            all.extend(plan.early.map(|_| pass.window_too_kernel(set)));
            if plan.window_beside {
                all.extend([Kernel::BlockMask, Kernel::BandPair].map(|kernel| pass.specialisation(kernel, set)));
            } else {
                all.push(plan.part().window().kernel(set, &plan.attention));
                all.extend(selected.kernels(set));
            }
        }
        kernels.get(&all)?;
        let [key, value] = problem.with_kv_heads(plan.compress_heads).compress();
        let select = || SelectStep::new(kernels, &pass.select(), plan.attention, &plan.lists);
        let (select, local) = if plan.window_goes_on {
            (None, Local::Both(BandBothStep::new(kernels, &plan)?))
        } else if let (true, Some(dense)) = (plan.window_beside, selected.masked()) {
            let (dense, kernel) = (dense.clone(), pass.specialisation(Kernel::BandPair, set));
            let pair = BandPairStep::new(kernels, dense, pass.window_size, kernel, plan.early.as_ref())?;
            let both = |early| BandBothStep::new(kernels, &plan).map(|both| both.of(early));
            (Some(select()?), Local::Pair(Box::new(pair), plan.early.as_ref().map(both).transpose()?))
        } else {
            let mut window = BandStep::new(kernels, &plan.part().window(), plan.attention)?;
            if let (true, Some(multiprocessors)) = (plan.is_halved(), plan.window_multiprocessors) {
                window.multiprocessors = multiprocessors;
            }
            (Some(select()?), Local::Apart(Box::new(SelectedForward::of(kernels, selected)?), window))
        };
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&pass.specialisation(Kernel::Prepare, set))?,
            compress: [
                CompressStep::new(kernels, &key, plan.compress[0])?,
                CompressStep::new(kernels, &value, plan.compress[1])?,
            ],
            rope: rope.map(|(rope, dim)| RopeTurn::plan(kernels, &pass.sizes, rope, dim)).transpose()?,
            select,
            local,
            replays: Replays::default(),
            plan,
        })
    }

    /// Passes and workspace.
    pub fn plan_value(&self) -> &NsaForwardPlan {
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
        tensors: &NsaForwardTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.launch_or_repeat(context, batch, tensors, softmax_scale, None)
    }

    /// Writes what a forward did not keep of the state, from its lists of blocks, which are read; the plan is of a call that saves.
    /// With [`Recompute::All`] the sum of the branches goes to `out` once more. The other tensors of the state are not looked at
    /// with [`Recompute::Rotated`].
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_again(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &NsaForwardTensors<'_>,
        softmax_scale: f32,
        recompute: Recompute,
    ) -> Result<()> {
        self.launch_or_repeat(context, batch, tensors, softmax_scale, Some(recompute))
    }

    fn launch_or_repeat(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &NsaForwardTensors<'_>,
        softmax_scale: f32,
        recompute: Option<Recompute>,
    ) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes)?;
        tensors.check(problem, self.plan.saves)?;
        self.plan.workspace.check(&context.workspace)?;
        let mut call = call(tensors.numbers(), context, batch, softmax_scale);
        call.push(recompute.map_or(0, |recompute| 1 + recompute as u64));
        self.replays.run(context.stream, call, |stream| {
            let workspace = context.workspace;
            let tables = self.plan.tables.tables(&workspace);
            self.launch_all(&Pass { stream, workspace, batch, tables, softmax_scale, recompute }, tensors)
        })
    }

    fn launch_all(&self, pass: &Pass<'_>, tensors: &NsaForwardTensors<'_>) -> Result<()> {
        let (plan, &Pass { stream, workspace, batch, .. }) = (&self.plan, pass);
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        if let (Some(Recompute::Rotated), Some(state)) = (pass.recompute, &tensors.saved) {
            return self.make_rows(pass, tensors, None, state.rotated.as_ref());
        }
        let of_attention = plan.tables.params(batch, &workspace);
        // Those of rows that choose are written again, by who chooses.
        if (plan.lists.is_all_blocks() || plan.early.is_some()) && pass.recompute.is_none() {
            let lists = plan.problem.select().all_blocks(batch, &tensors.topk_indices);
            self.prepare.launch_with_lists(stream, &of_attention, lists)?;
        } else if let Some(own) = plan.lists.tables() {
            self.prepare.launch_two(stream, [of_attention, own.params(batch, &workspace)])?;
        } else {
            self.prepare.launch(stream, &of_attention)?;
        }
        let first = self.compresses_first();
        if let (true, Some(temporaries)) = (first, &plan.temporaries) {
            let compressed = compressed(temporaries, &plan.problem.sizes, &workspace);
            self.make_rows(pass, tensors, Some((&compressed, plan.problem.sizes.num_kv_heads, true)), None)?;
        }
        passes(plan.problem.sizes.num_kv_heads, plan.kv_heads).try_for_each(|heads| {
            let own = tensors.heads_from(heads.start, &plan.problem);
            let state = match (&own.saved, &plan.temporaries) {
                (Some(saved), _) => *saved,
                (None, Some(temporaries)) => {
                    let mut state = self.state(temporaries, &own.out, &workspace);
                    if first {
                        let dtype = plan.problem.sizes.dtype;
                        state.compressed = state.compressed.map(|rows| rows.heads_from(heads.start, dtype));
                    }
                    state
                }
                (None, None) => unreachable!("checked to be as planned"),
            };
            let compressed = (!first).then_some((&state.compressed, plan.kv_heads, heads.start == 0));
            self.make_rows(pass, &own, compressed, state.rotated.as_ref())?;
            self.launch_pass(pass, heads.start, &own, &state)
        })
    }

    /// Whether the kernel ahead of a pass's attention makes compressed keys and values and waits for the tables, and nothing else that attention
    /// reads is made behind these.
    fn follows_compression(&self) -> bool {
        let [key, value] = &self.compress;
        self.rope.is_none()
            && !self.compresses_first()
            && self.plan.problem.total_compressed() > 0
            && key.goes_with(value)
    }

    /// Whether all heads are compressed before the first of several passes.
    fn compresses_first(&self) -> bool {
        self.plan.compress_heads > self.plan.kv_heads
    }

    /// What attention reads besides the tensors of the call, side by side: compressed keys and values of some heads, and query and key
    /// rotated, where they are asked for. Of compressed rows comes their number of heads, and whether the tables were just launched.
    fn make_rows(
        &self,
        pass: &Pass<'_>,
        tensors: &NsaForwardTensors<'_>,
        compressed: Option<(&[TensorSpan<'_>; 2], usize, bool)>,
        rotated: Option<&[TensorSpan<'_>; 2]>,
    ) -> Result<()> {
        let compress = |c: usize| {
            move |stream: &Stream| {
                compressed.map_or(Ok(()), |(rows, heads, _)| self.compress(pass, stream, tensors, c, (&rows[c], heads)))
            }
        };
        let both = |stream: &Stream| {
            let Some((rows, heads, follows)) = compressed else { return Ok(()) };
            let Pass { batch, ref tables, .. } = *pass;
            let inputs = [0, 1].map(|c| compress_tensors(tensors, c, &rows[c]));
            let [key, value] = &self.compress;
            CompressStep::forward_two([key, value], stream, batch, tables, (inputs.each_ref(), follows))?;
            self.rotate_compressed(pass, stream, (&rows[0], heads))
        };
        let Sizes { num_q_heads, num_kv_heads, .. } = self.plan.pass().sizes;
        let rotate = |c: usize, rows: RopeRows<'static>, input, heads| {
            move |stream: &Stream| match (&self.rope, rotated) {
                (Some(rope), Some(out)) => rope.launch_on(stream, pass.batch, &rows, (input, &out[c], heads), false),
                _ => Ok(()),
            }
        };
        let (keys, values) = (compress(0), compress(1));
        let query = rotate(0, RopeRows::Query, &tensors.query, num_q_heads);
        let key = rotate(1, RopeRows::Key, &tensors.key, num_kv_heads);
        let mut works: Vec<Work<'_, Error>> = Vec::new();
        if compressed.is_some() && self.compress[0].goes_with(&self.compress[1]) {
            works.push(&both);
        } else if compressed.is_some() {
            works.extend([&keys as Work<'_, Error>, &values]);
        }
        if rotated.is_some() {
            works.extend([&query as Work<'_, Error>, &key]);
        }
        self.kernels.sides().take(pass.stream)?.side_by_side(pass.stream, &works)
    }

    /// Compressed keys, rotated if the others are, or values.
    fn compress(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        tensors: &NsaForwardTensors<'_>,
        c: usize,
        (out, heads): (&TensorSpan<'_>, usize),
    ) -> Result<()> {
        let Pass { workspace, batch, ref tables, .. } = *pass;
        self.compress[c].forward(stream, batch, (tables, &workspace), &compress_tensors(tensors, c, out))?;
        if c == 0 { self.rotate_compressed(pass, stream, (out, heads)) } else { Ok(()) }
    }

    /// Compressed keys, where the others are rotated.
    fn rotate_compressed(
        &self,
        pass: &Pass<'_>,
        stream: &Stream,
        (rows, heads): (&TensorSpan<'_>, usize),
    ) -> Result<()> {
        let Some(rope) = &self.rope else { return Ok(()) };
        let cu_compressed = self.plan.tables.compressed(&pass.workspace);
        let which = RopeRows::Compressed { windows: self.plan.problem.windows, cu_compressed };
        rope.launch_on(stream, pass.batch, &which, (rows, rows, heads), false)
    }

    /// All stages after compression and rotation for the kv heads from `first` on, of which tensors and state are.
    fn launch_pass(
        &self,
        pass: &Pass<'_>,
        first: usize,
        tensors: &NsaForwardTensors<'_>,
        state: &NsaSavedTensors<'_>,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, recompute } = *pass;
        let [key, value] = state.compressed;
        let compressed = attention(0, [key, value], tensors, state);
        // A state that is computed again has its lists.
        let lists = recompute.is_none().then_some(&tensors.topk_indices);
        let mask = lists.and_then(|_| self.chosen_mask(&workspace, &tensors.value));
        let (scratch, follows) = (&self.plan.scratch.span(&workspace), self.follows_compression());
        let memory = SelectMemory { tables, workspace: &workspace, scratch, mask, follows, split: self.plan.split() };
        let select = || match &self.select {
            Some(select) => {
                let work = (&compressed, self.compressed_branch(tensors), lists);
                select.launch(stream, batch, memory, work, softmax_scale)
            }
            None => Ok(()),
        };
        let local = |number| (local_attention(number, tensors, state), self.branch(number as i32, tensors));
        let all = || [(compressed, self.branch(0, tensors)), local(1), local(2)];
        if let Local::Pair(pair, Some(early)) = &self.local {
            // Behind what chooses, for which the walk waits. Ctas of both take what places it leaves.
            let sides = self.kernels.sides().take(stream)?;
            sides.fork(stream, 1)?;
            select()?;
            early.launch((&sides.lanes[0], false), batch, tables, all(), softmax_scale)?;
            self.launch_pair(pass, pair, tensors, state, mask.is_some())?;
            return Ok(sides.join(stream, 1)?);
        }
        select()?;
        match &self.local {
            Local::Both(both) => both.launch((stream, follows), batch, tables, all(), softmax_scale),
            Local::Pair(pair, _) => self.launch_pair(pass, pair, tensors, state, mask.is_some()),
            Local::Apart(selected, window) => self.launch_apart(pass, (selected, window), first, tensors, state),
        }
    }

    /// Attention to the selected blocks and to the window, each of which adds to what is in `out`.
    fn launch_apart(
        &self,
        pass: &Pass<'_>,
        (selected, window): (&SelectedForward, &BandStep),
        first: usize,
        tensors: &NsaForwardTensors<'_>,
        state: &NsaSavedTensors<'_>,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, .. } = *pass;
        let launch_selected = |stream: &Stream, tensors: &NsaForwardTensors<'_>, state: &NsaSavedTensors<'_>| {
            let attention = local_attention(1, tensors, state);
            let work = (&attention.selected(tensors.topk_indices), self.branch(1, tensors));
            let context = LaunchContext { stream, workspace: self.plan.scratch.span(&workspace) };
            selected.launch_branch(&context, batch, (work.0, work.1, tables), softmax_scale)
        };
        let launch_window = |stream: &Stream, tensors: &NsaForwardTensors<'_>, state: &NsaSavedTensors<'_>| {
            let work = (&local_attention(2, tensors, state), self.branch(2, tensors));
            window.launch(stream, batch, tables, work, softmax_scale)
        };
        if !self.plan.is_halved() {
            if self.plan.window_first(first) {
                launch_window(stream, tensors, state)?;
                return launch_selected(stream, tensors, state);
            }
            launch_selected(stream, tensors, state)?;
            return launch_window(stream, tensors, state);
        }
        let part = self.plan.part().sizes.num_kv_heads;
        let halves = [0, part].map(|first| {
            let problem = &self.plan.problem;
            (tensors.heads_from(first, problem), state.heads_from(first, &problem.sizes))
        });
        let sides = self.kernels.sides().take(stream)?;
        for half in 0..2 {
            let ((tensors, state), (others, state_of_others)) = (&halves[half], &halves[1 - half]);
            sides.fork(stream, 1)?;
            // First, because each of its CTAs needs a whole multiprocessor.
            launch_window(&sides.lanes[0], others, state_of_others)?;
            launch_selected(stream, tensors, state)?;
            sides.join(stream, 1)?;
        }
        Ok(())
    }

    /// The walk of selected blocks and window, behind the rows of compressed attention; `has_mask`: those who chose have made it.
    fn launch_pair(
        &self,
        pass: &Pass<'_>,
        pair: &BandPairStep,
        tensors: &NsaForwardTensors<'_>,
        state: &NsaSavedTensors<'_>,
        has_mask: bool,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, .. } = *pass;
        let works = [1, 2].map(|branch| (local_attention(branch, tensors, state), branch));
        let works = works.each_ref().map(|(work, branch)| (work, self.branch(*branch as i32, tensors)));
        let memory = self.plan.mask.unwrap_or(self.plan.scratch).span(&workspace);
        let context = LaunchContext { stream, workspace: memory };
        let lists = (!has_mask).then_some(tensors.topk_indices);
        pair.launch(&context, batch, (tables, lists), (works, &state.branches[0]), softmax_scale)
    }

    /// The mask of blocks, where those who choose these make it.
    fn chosen_mask(&self, workspace: &DeviceSpan<'_>, value: &TensorSpan<'_>) -> Option<ChosenMask> {
        match (&self.local, self.plan.mask) {
            (Local::Pair(pair, _), Some(slot)) => Some(pair.mask(&slot.span(workspace), value)),
            _ => None,
        }
    }

    /// What becomes of compressed attention. Where one walk follows, which multiplies by the gates and adds up, rows are written as they are: to the state or,
    /// without one, to `out`.
    fn compressed_branch(&self, tensors: &NsaForwardTensors<'_>) -> Branch {
        if matches!(self.local, Local::Pair(..)) { Branch::default() } else { self.branch(0, tensors) }
    }

    fn branch(&self, number: i32, tensors: &NsaForwardTensors<'_>) -> Branch {
        Branch {
            sum: tensors.out.device(),
            gates: tensors.gates.device(),
            number,
            accumulate: (number > 0).into(),
            discards: (!self.plan.saves).into(),
        }
    }

    /// What a pass keeps of the state, in the workspace. The rows of the branches are not written: any tensor of their shape stands for them.
    fn state<'a>(
        &self,
        temporaries: &ForwardTemporaries,
        out: &TensorSpan<'a>,
        workspace: &DeviceSpan<'a>,
    ) -> NsaSavedTensors<'a> {
        let Sizes { num_q_heads, num_kv_heads, head_dim, .. } = self.plan.pass().sizes;
        let scratch = self.plan.scratch.span(workspace);
        let rotated = temporaries.rotated.as_ref();
        NsaSavedTensors {
            rotated: rotated.map(|[query, key]| {
                [(query, num_q_heads), (key, num_kv_heads)]
                    .map(|(slot, heads)| TensorSpan::contiguous(slot.span(workspace), heads, head_dim))
            }),
            compressed: if self.compresses_first() {
                compressed(temporaries, &self.plan.problem.sizes, workspace)
            } else {
                compressed(temporaries, &self.plan.pass().sizes, &scratch)
            },
            branches: [*out; 3],
            lse: [temporaries.lse.span(&scratch); 3],
        }
    }
}
