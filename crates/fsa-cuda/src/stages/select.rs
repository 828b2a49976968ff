//! Stage `select` on device tensors, together with Stage `compressed`: attention to the compressed keys, then the blocks of every
//! row from its probabilities.

use super::AttentionTensors;
use super::band::{BandStep, attention_params, band, box_keys};
use crate::arch::KernelSet;
use crate::band_select::{self, BandSelectKernel};
use crate::driver::{Address, DeviceBatch, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, check_batch, check_scale, check_words, scale_log2};
use crate::params::{BandSelectParams, BlockChoice, BlockLists, BlockMask, Branch, SelectParams, Tensor};
use crate::plan::{ChoicePlan, ListPlan, PlanOptions, RowTiles, ScorePlan, SelectPlan, SelectProblem, Sizes, Tables};
use crate::prepare::PrepareKernel;
use crate::select::{GROUP_KEYS, SelectKernel};
use crate::source::{Kernel, Specialisation};
use fsa_core::{Error, Result};
use std::sync::Arc;

/// Compressed attention and the lists, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) enum SelectStep {
    OnePass(ChoiceStep),
    /// Lists of all blocks are written by another: [`SelectProblem::all_blocks`].
    OwnPass {
        attention: BandStep,
        lists: Option<Box<ListStep>>,
    },
}

/// Where a call has what a plan laid out.
#[derive(Debug, Clone, Copy)]
pub(super) struct SelectMemory<'a> {
    /// Those of the attention.
    pub tables: &'a Tables,
    pub workspace: &'a DeviceSpan<'a>,
    pub scratch: &'a DeviceSpan<'a>,
    /// The mask of what is chosen, where [`ListPlan::makes_mask`] and somebody wants it.
    pub mask: Option<ChosenMask>,
    /// Right ahead on the stream is what makes the compressed keys, which has waited for the tables, and nothing else that is read.
    pub follows: bool,
    /// Position from which on tiles of rows are attended to; 0: all are.
    pub split: i32,
}

/// A mask of blocks that those who choose make.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChosenMask {
    pub mask: BlockMask,
    /// Of the tokens.
    pub value: Tensor,
    /// Earlier keys that the kernel which reads it attends to, too.
    pub window: i32,
}

impl SelectStep {
    /// `tiles` are those of the attention.
    pub(super) fn new(kernels: &Kernels, problem: &SelectProblem, tiles: RowTiles, plan: &ListPlan) -> Result<Self> {
        let scores = match plan {
            ListPlan::OnePass(plan) => return Ok(Self::OnePass(ChoiceStep::new(kernels, problem, tiles, *plan)?)),
            ListPlan::OwnPass(plan) => Some(plan),
            ListPlan::AllBlocks => None,
        };
        let lists = scores.map(|plan| ListStep::new(kernels, problem, *plan)).transpose()?;
        Ok(Self::OwnPass {
            attention: BandStep::new(kernels, &problem.attention(), tiles)?,
            lists: lists.map(Box::new),
        })
    }

    /// The attention, and the lists where there is a place for them. Without, the attention's bits are the same.
    pub(super) fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        memory: SelectMemory<'_>,
        (tensors, branch, topk_indices): (&AttentionTensors<'_>, Branch, Option<&DeviceSpan<'_>>),
        softmax_scale: f32,
    ) -> Result<()> {
        match self {
            Self::OnePass(step) => step.launch(stream, batch, memory, (tensors, branch, topk_indices), softmax_scale),
            Self::OwnPass { attention, lists } => {
                attention.launch(stream, batch, memory.tables, (tensors, branch), softmax_scale)?;
                match (lists, topk_indices) {
                    (Some(lists), Some(ids)) => lists.launch(stream, batch, memory, (tensors, ids), softmax_scale),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl SelectProblem {
    /// Lists of all blocks, for the kernel of the tables.
    pub(super) fn all_blocks(&self, batch: &DeviceBatch<'_>, topk_indices: &DeviceSpan<'_>) -> BlockLists {
        let [cu_seqlens_q, cu_seqlens_kv] = batch.spans().map(|span| span.address());
        let Sizes { total_q, sequences, num_kv_heads, .. } = self.sizes;
        BlockLists {
            cu_seqlens_q,
            cu_seqlens_kv,
            topk_indices: topk_indices.address(),
            batch: sequences as i32,
            total_q: total_q as i32,
            num_kv_heads: num_kv_heads as i32,
            topk: self.topk as i32,
            block_size: self.block_size as i32,
            first_cta: 0,
        }
    }
}

/// Attention that chooses.
#[derive(Debug)]
pub(super) struct ChoiceStep {
    problem: SelectProblem,
    tiles: RowTiles,
    plan: ChoicePlan,
    kernel: Arc<BandSelectKernel>,
    set: KernelSet,
}

impl ChoiceStep {
    fn new(kernels: &Kernels, problem: &SelectProblem, tiles: RowTiles, plan: ChoicePlan) -> Result<Self> {
        let set = kernels.set();
        Ok(Self { problem: *problem, tiles, plan, kernel: kernels.one(&problem.choosing_kernel(set))?, set })
    }

    fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        SelectMemory { tables, scratch, mask, follows, split, .. }: SelectMemory<'_>,
        (tensors, branch, topk_indices): (&AttentionTensors<'_>, Branch, Option<&DeviceSpan<'_>>),
        softmax_scale: f32,
    ) -> Result<()> {
        let Self { problem, tiles, plan, kernel, set } = self;
        let call = (&problem.attention(), tiles, *set);
        let work = (tensors, branch);
        let boxes = (box_keys(&problem.sizes), GROUP_KEYS);
        let mut attention = attention_params(call, (batch, tables), work, boxes, softmax_scale)?;
        attention.band.split = split;
        if branch.discards != 0 {
            // No selection reads it.
            attention.lse = Address::default();
        }
        let (scores, max_steps) = (plan.scores.address(scratch), plan.max_steps as i32);
        let none = BlockChoice { scores, max_steps, ..BlockChoice::default() };
        let choice = topk_indices.map_or(none, |topk_indices| BlockChoice {
            topk_indices: topk_indices.address(),
            topk: problem.topk as i32,
            init_blocks: problem.init_blocks as i32,
            local_blocks: problem.local_blocks as i32,
            ..none
        });
        let choice = match (mask, topk_indices) {
            (Some(ChosenMask { mask, value, window }), Some(_)) => BlockChoice { window, mask, value, ..choice },
            _ => choice,
        };
        let sizes = &problem.sizes;
        let tokens = band_select::box_tokens(&problem.choosing_kernel(*set), tiles.tile_tokens);
        let rows = ([sizes.total_q, sizes.num_q_heads], [tokens, tiles.tile_heads]);
        let map = |tensor: Tensor| tensor.map_of_every(1, *set, rows, sizes);
        let (out_map, sum_map) = (map(tensors.out.device())?, map(branch.sum)?);
        Ok(kernel.launch(stream, plan.ctas, follows, &BandSelectParams { attention, choice, out_map, sum_map })?)
    }
}

/// The lists from scores of their own.
#[derive(Debug)]
pub(super) struct ListStep {
    problem: SelectProblem,
    plan: ScorePlan,
    kernel: Arc<SelectKernel>,
    specialisation: Specialisation,
    multiprocessors: usize,
}

impl ListStep {
    fn new(kernels: &Kernels, problem: &SelectProblem, plan: ScorePlan) -> Result<Self> {
        let specialisation = problem.kernel(kernels.set());
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        Ok(Self { problem: *problem, plan, kernel, specialisation, multiprocessors })
    }

    /// `lse` is that of compressed attention.
    fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        SelectMemory { tables, workspace, .. }: SelectMemory<'_>,
        (tensors, topk_indices): (&AttentionTensors<'_>, &DeviceSpan<'_>),
        softmax_scale: f32,
    ) -> Result<()> {
        let (problem, tiles, set) = (&self.problem, &self.plan.tiles, self.specialisation.set);
        let (sizes, attention) = (&problem.sizes, problem.attention());
        if sizes.total_q == 0 {
            return Ok(());
        }
        let keys = [attention.total_keys(), sizes.num_kv_heads];
        let boxes = [tiles.tile_tokens, tiles.tile_heads];
        let params = SelectParams {
            band: band(&attention, tiles, batch, &score_tables(&self.plan, tables, workspace)),
            query: tensors.query.device(),
            key: tensors.key.device(),
            lse: tensors.lse.address(),
            topk_indices: topk_indices.address(),
            scale_log2: scale_log2(softmax_scale),
            topk: problem.topk as i32,
            init_blocks: problem.init_blocks as i32,
            local_blocks: problem.local_blocks as i32,
            scored_heads: problem.scored_heads() as i32,
            num_tiles: tiles.num_tiles as i32,
            num_kv_heads: sizes.num_kv_heads as i32,
            segment_steps: self.plan.segment_steps as i32,
            direct: self.plan.direct.into(),
            query_map: tensors.query.map(set, [sizes.total_q, sizes.num_q_heads], boxes, sizes)?,
            key_map: tensors.key.map_of_every(GROUP_KEYS, set, (keys, [box_keys(sizes), 1]), sizes)?,
        };
        Ok(self.kernel.launch(stream, tiles, (self.plan.smem_bytes, self.multiprocessors), &params)?)
    }
}

/// The tables of the scores: their own, where the tiles differ from the attention's, with the compressed keys of the others.
fn score_tables(plan: &ScorePlan, attention: &Tables, workspace: &DeviceSpan<'_>) -> Tables {
    let own = plan.tables.as_ref().map(|tables| tables.tables(workspace).tile_base);
    Tables { tile_base: own.unwrap_or(attention.tile_base), ..*attention }
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct Select {
    kernels: Arc<Kernels>,
    plan: SelectPlan,
    prepare: Arc<PrepareKernel>,
    step: SelectStep,
}

impl Select {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &SelectProblem, options: &PlanOptions) -> Result<Self> {
        let (set, facts) = (kernels.set(), kernels.device().facts());
        let [prepare, attention] = [Kernel::Prepare, Kernel::Band].map(|k| problem.sizes.specialisation(k, set, 64));
        problem.check(facts, &[prepare, attention])?;
        let plan = SelectPlan::new(problem, set, facts, &kernels.one_pass(&problem.sizes, options))?;
        let mut used = problem.kernels(set, &plan.lists);
        used.push(prepare);
        kernels.get(&used)?;
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&prepare)?,
            step: SelectStep::new(kernels, problem, plan.attention, &plan.lists)?,
            plan,
        })
    }

    /// Tiles and workspace.
    pub fn plan_value(&self) -> &SelectPlan {
        &self.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace.size_bytes()
    }

    /// Gives the forward to the stream. `key` and `value` are the compressed ones; `topk_indices` `[num_kv_heads, total_q, topk]`
    /// i32 is written.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &AttentionTensors<'_>,
        topk_indices: &DeviceSpan<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        self.check(tensors, topk_indices, softmax_scale)?;
        self.prepare(context, batch)?;
        self.launch_prepared(context, batch, tensors, topk_indices, softmax_scale)
    }

    /// The part of a launch that needs no tensors, for callers that have them only later: [`launch_prepared`](Self::launch_prepared) does
    /// the rest, with the same workspace and on the same stream.
    ///
    /// # Errors
    /// The workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn prepare(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        let workspace = &context.workspace;
        check_batch(batch, &self.plan.problem.sizes)?;
        self.plan.workspace.check(workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        self.prepare.launch(context.stream, &self.plan.tables.params(batch, workspace))?;
        if let Some(own) = self.plan.lists.tables() {
            self.prepare.launch(context.stream, &own.params(batch, workspace))?;
        }
        Ok(())
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
        topk_indices: &DeviceSpan<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        let workspace = &context.workspace;
        self.check(tensors, topk_indices, softmax_scale)?;
        check_batch(batch, &self.plan.problem.sizes)?;
        self.plan.workspace.check(workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = self.plan.tables.tables(workspace);
        let scratch = &self.plan.scratch.span(workspace);
        let memory = SelectMemory { tables: &tables, workspace, scratch, mask: None, follows: false, split: 0 };
        let work = (tensors, Branch::default(), Some(topk_indices));
        self.step.launch(context.stream, batch, memory, work, softmax_scale)
    }

    fn check(&self, tensors: &AttentionTensors<'_>, topk_indices: &DeviceSpan<'_>, softmax_scale: f32) -> Result<()> {
        let problem = &self.plan.problem;
        check_scale(softmax_scale)?;
        tensors.check(&problem.sizes, problem.attention().total_keys())?;
        check_words("topk_indices", topk_indices, problem.topk_indices_bytes())
    }
}
