//! Backward of the whole: the gradients of the branches, through each branch to query, keys and values, their sums, and back through
//! rotation and compression.

use super::forward::{call, check_rope};
use super::tensors::NsaBackwardTensors;
use crate::driver::{DeviceBatch, DeviceSpan, Replays, Stream};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, TensorSpan, check_batch, check_scale};
use crate::plan::{NsaBackwardPlan, NsaProblem, PlanOptions, Sizes, Slot, Tables};
use crate::prepare::PrepareKernel;
use crate::selected::SelectedBackward;
use crate::source::Kernel;
use crate::stages::band::BandBackwardStep;
use crate::stages::combine::CombineStep;
use crate::stages::compress::CompressStep;
use crate::stages::tensors::passes;
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
    /// Of all heads, for the gradient of the gates.
    gates: CombineStep,
    combine: CombineStep,
    compressed: BandBackwardStep,
    selected: SelectedBackward,
    window: BandBackwardStep,
    rope: Option<RopeTurn>,
    compress: [CompressStep; 2],
    replays: Replays,
}

/// What the stages of one pass share.
struct Pass<'a> {
    stream: &'a Stream,
    workspace: DeviceSpan<'a>,
    batch: &'a DeviceBatch<'a>,
    /// Of the compressed keys, of the window.
    tables: [Tables; 2],
    softmax_scale: f32,
    sizes: Sizes,
}

impl<'a> Pass<'a> {
    fn tensor(&self, slot: &Slot, heads: usize) -> TensorSpan<'a> {
        TensorSpan::contiguous(slot.span(&self.workspace), heads, self.sizes.head_dim)
    }
}

/// Temporaries of one pass as tensors.
struct Temporaries<'a> {
    branches: [TensorSpan<'a>; 3],
    query: [TensorSpan<'a>; 2],
    window: [TensorSpan<'a>; 2],
    compressed: [TensorSpan<'a>; 2],
}

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
        let plan = NsaBackwardPlan::new(problem, set, facts, options);
        let pass = plan.pass();
        kernels.get(&pass.kernels(set, &[Kernel::BandBackward]))?;
        let [compressed, window] = plan.attention.clone();
        let [key, value] = pass.compress();
        let options = PlanOptions { budget_bytes: plan.stage_budget_bytes, ..*options };
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&pass.specialisation(Kernel::Prepare, set))?,
            gates: CombineStep::new(kernels, &problem.sizes)?,
            combine: CombineStep::new(kernels, &pass.sizes)?,
            compressed: BandBackwardStep::new(kernels, compressed)?,
            selected: SelectedBackward::plan(kernels, &pass.selected(), &options)?,
            window: BandBackwardStep::new(kernels, window)?,
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
        for tables in &plan.tables {
            self.prepare.launch(stream, &tables.params(batch, &workspace))?;
        }
        let tables = plan.tables.each_ref().map(|tables| tables.tables(&workspace));
        let all = plan.problem.sizes.num_q_heads;
        let gates = (&tensors.saved.branches, &tensors.gates);
        self.gates.backward(stream, gates, &tensors.grad_out, ([None; 3], Some(&tensors.grad_gates)), all)?;
        let pass = Pass { stream, workspace, batch, tables, softmax_scale, sizes: plan.pass().sizes };
        passes(plan.problem.sizes.num_kv_heads, plan.kv_heads)
            .try_for_each(|heads| self.launch_pass(&pass, &tensors.heads_from(heads.start, &plan.problem)))
    }

    fn launch_pass<'a>(&self, pass: &Pass<'a>, tensors: &NsaBackwardTensors<'a>) -> Result<()> {
        let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, .. } = pass.sizes;
        let plan = &self.plan.temporaries;
        let of_tokens = |slot: &Slot| pass.tensor(slot, num_kv_heads);
        let temporaries = Temporaries {
            branches: plan.branches.each_ref().map(|slot| pass.tensor(slot, num_q_heads)),
            query: plan.query.each_ref().map(|slot| pass.tensor(slot, num_q_heads)),
            window: plan.window.each_ref().map(of_tokens),
            compressed: plan.compressed.each_ref().map(of_tokens),
        };
        self.launch_branches(pass, tensors, &temporaries)?;
        let [compressed, selected] = &temporaries.query;
        let [key, value] = &temporaries.window;
        let NsaBackwardTensors { grad_query, grad_key, grad_value, .. } = tensors;
        let sums = [
            ([total_q, num_q_heads], [Some(compressed), Some(selected), Some(grad_query)], grad_query),
            ([total_kv, num_kv_heads], [Some(grad_key), Some(key), None], grad_key),
            ([total_kv, num_kv_heads], [Some(grad_value), Some(value), None], grad_value),
        ];
        for (shape, terms, out) in sums {
            self.combine.sum(pass.stream, shape, terms, out)?;
        }
        self.rotate_back(pass, tensors, &temporaries)?;
        self.launch_compressions(pass, tensors, &temporaries)
    }

    /// The gradients of query, key and value through every branch.
    fn launch_branches<'a>(
        &self,
        pass: &Pass<'a>,
        tensors: &NsaBackwardTensors<'a>,
        temporaries: &Temporaries<'a>,
    ) -> Result<()> {
        let Pass { stream, workspace, batch, ref tables, softmax_scale, .. } = *pass;
        let (saved, grad_out) = (&tensors.saved, &temporaries.branches);
        let heads = pass.sizes.num_q_heads;
        let gradient = |wanted: [bool; 3]| {
            let branches = [0, 1, 2].map(|b| wanted[b].then_some(&grad_out[b]));
            let inputs = (&saved.branches, &tensors.gates);
            self.combine.backward(stream, inputs, &tensors.grad_out, (branches, None), heads)
        };
        let only = |b: usize| [0, 1, 2].map(|branch| branch == b);
        let next = |b: usize| if self.plan.branches_at_once { Ok(()) } else { gradient(only(b)) };
        gradient(if self.plan.branches_at_once { [true; 3] } else { only(0) })?;
        let [query, key] = saved.rotated.unwrap_or([tensors.query, tensors.key]);
        let branch = |b: usize, [key, value]: [TensorSpan<'a>; 2]| AttentionTensors {
            query,
            key,
            value,
            out: saved.branches[b],
            lse: saved.lse[b],
        };
        let through = |b: usize, keys, grad_query, [grad_key, grad_value]: [TensorSpan<'a>; 2]| {
            let (forward, grad_out) = (branch(b, keys), grad_out[b]);
            AttentionGradTensors { forward, grad_out, grad_lse: None, grad_query, grad_key, grad_value }
        };
        let scratch = self.plan.scratch.span(&workspace);
        let compressed = through(0, saved.compressed, temporaries.query[0], temporaries.compressed);
        self.compressed.launch(stream, batch, (&tables[0], &scratch), &compressed, softmax_scale)?;
        next(1)?;
        let tokens = [key, tensors.value];
        let selected = through(1, tokens, temporaries.query[1], [tensors.grad_key, tensors.grad_value]);
        let context = LaunchContext { stream, workspace: scratch };
        self.selected.launch(&context, batch, &selected.selected(tensors.topk_indices), softmax_scale)?;
        next(2)?;
        let window = through(2, tokens, tensors.grad_query, temporaries.window);
        self.window.launch(stream, batch, (&tables[1], &scratch), &window, softmax_scale)
    }

    /// Gradients of query, key and compressed key, in place.
    fn rotate_back(
        &self,
        pass: &Pass<'_>,
        tensors: &NsaBackwardTensors<'_>,
        temporaries: &Temporaries<'_>,
    ) -> Result<()> {
        let Some(rope) = &self.rope else { return Ok(()) };
        let NsaProblem { sizes: Sizes { num_q_heads, num_kv_heads, .. }, windows, .. } = self.plan.pass();
        let cu_compressed = self.plan.tables[0].compressed(&pass.workspace);
        let turns = [
            (RopeRows::Query, &tensors.grad_query, num_q_heads),
            (RopeRows::Key, &tensors.grad_key, num_kv_heads),
            (RopeRows::Compressed { windows, cu_compressed }, &temporaries.compressed[0], num_kv_heads),
        ];
        turns.into_iter().try_for_each(|(rows, tensor, heads)| {
            rope.launch_on(pass.stream, pass.batch, &rows, (tensor, tensor, heads), true)
        })
    }

    /// What reached compressed keys and values goes on to keys, values and parameters.
    fn launch_compressions(
        &self,
        pass: &Pass<'_>,
        tensors: &NsaBackwardTensors<'_>,
        temporaries: &Temporaries<'_>,
    ) -> Result<()> {
        let sides = [(tensors.key, tensors.grad_key), (tensors.value, tensors.grad_value)];
        for (c, (input, grad_input)) in sides.into_iter().enumerate() {
            let (parameters, gradients) = (tensors.parameters[c], tensors.grad_parameters[c]);
            let grad_out = temporaries.compressed[c];
            let compress = CompressBackwardTensors {
                forward: CompressTensors {
                    input,
                    out: grad_out,
                    weight: parameters.weight,
                    position: parameters.position,
                },
                grad_out,
                grad_input,
                grad_weight: gradients.weight,
                grad_position: gradients.position,
                accumulate: true,
            };
            let memory = (&pass.tables[0], &pass.workspace);
            self.compress[c].backward(pass.stream, pass.batch, memory, &compress)?;
        }
        Ok(())
    }
}
