//! Stage `select` on device tensors, together with Stage `compressed`: attention to the compressed keys, then the blocks of every
//! row from its probabilities.

use super::AttentionTensors;
use super::band::{BandStep, band, box_keys};
use crate::driver::{DeviceBatch, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, check_batch, check_scale, check_words, scale_log2};
use crate::params::{Branch, SelectParams};
use crate::plan::{ScorePlan, SelectPlan, SelectProblem, Tables};
use crate::prepare::PrepareKernel;
use crate::select::{GROUP_KEYS, SelectKernel};
use crate::source::{Kernel, Specialisation};
use fsa_core::{Error, Result};
use std::sync::Arc;

/// The lists alone, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) struct SelectStep {
    pub problem: SelectProblem,
    pub plan: ScorePlan,
    kernel: Arc<SelectKernel>,
    specialisation: Specialisation,
    multiprocessors: usize,
}

impl SelectStep {
    pub(super) fn new(kernels: &Kernels, problem: &SelectProblem, plan: ScorePlan) -> Result<Self> {
        let specialisation = problem.kernel(kernels.set());
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        Ok(Self { problem: *problem, plan, kernel, specialisation, multiprocessors })
    }

    /// `tables` are those of the scores' tiles. `lse` is that of compressed attention.
    pub(super) fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
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
            band: band(&attention, tiles, batch, tables),
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
pub(super) fn score_tables(plan: &ScorePlan, attention: &Tables, workspace: &DeviceSpan<'_>) -> Tables {
    let own = plan.tables.as_ref().map(|tables| tables.tables(workspace).tile_base);
    Tables { tile_base: own.unwrap_or(attention.tile_base), ..*attention }
}

/// The specialisations of a call: tables, attention, lists.
pub(super) fn specialisations(kernels: &Kernels, problem: &SelectProblem) -> [Specialisation; 3] {
    let of = |kernel| problem.sizes.specialisation(kernel, kernels.set(), 64);
    [of(Kernel::Prepare), of(Kernel::Band), problem.kernel(kernels.set())]
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct Select {
    kernels: Arc<Kernels>,
    plan: SelectPlan,
    prepare: Arc<PrepareKernel>,
    attention: BandStep,
    lists: SelectStep,
}

impl Select {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &SelectProblem) -> Result<Self> {
        let used = specialisations(kernels, problem);
        let facts = kernels.device().facts();
        problem.check(facts, &used[..2])?;
        let plan = SelectPlan::new(problem, [&used[1], &used[2]], facts)?;
        kernels.get(&used)?;
        Ok(Self {
            kernels: Arc::clone(kernels),
            prepare: kernels.one(&used[0])?,
            attention: BandStep::new(kernels, &problem.attention(), plan.attention)?,
            lists: SelectStep::new(kernels, problem, plan.scores)?,
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
        let (problem, workspace) = (&self.plan.problem, &context.workspace);
        check_scale(softmax_scale)?;
        check_batch(batch, &problem.sizes)?;
        tensors.check(&problem.sizes, problem.attention().total_keys())?;
        check_words("topk_indices", topk_indices, problem.topk_indices_bytes())?;
        self.plan.workspace.check(workspace)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        let tables = self.plan.tables.tables(workspace);
        self.prepare.launch(context.stream, &self.plan.tables.params(batch, workspace))?;
        if let Some(own) = &self.plan.scores.tables {
            self.prepare.launch(context.stream, &own.params(batch, workspace))?;
        }
        self.attention.launch(context.stream, batch, &tables, (tensors, Branch::default()), softmax_scale)?;
        let tables = score_tables(&self.plan.scores, &tables, workspace);
        self.lists.launch(context.stream, batch, &tables, (tensors, topk_indices), softmax_scale)
    }
}
