//! Stage `dense`, Stage `window` and Stage `compressed` on device tensors: attention whose rows see an interval of keys.

use super::tensors::passes;
use super::{AttentionGradTensors, AttentionTensors};
use crate::arch::KernelSet;
use crate::band::{BandKernel, step_keys};
use crate::band_backward::BandBackwardKernels;
use crate::driver::{Address, DeviceBatch, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{part, scale_log2};
use crate::params::{Band, BandBackwardParams, BandParams, BlockMask, Branch, SumBounds, SumKeys};
use crate::plan::{BOUNDS_BYTES, BandBackwardPlan, BandProblem, BandScratch, RowTiles, Sizes, Tables};
use crate::source::{Kernel, Specialisation};
use fsa_core::{DType, Result};
use std::sync::Arc;

/// Keys of a box that Hopper's kernels copy.
pub(super) fn box_keys(sizes: &Sizes) -> usize {
    if sizes.head_dim <= 128 { 128 } else { 64 }
}

/// The kernels' view of sequences, tiles and visible keys.
pub(crate) fn band(problem: &BandProblem, tiles: &RowTiles, batch: &DeviceBatch<'_>, tables: &Tables) -> Band {
    let [cu_seqlens_q, cu_seqlens_kv] = batch.spans().map(|span| span.address());
    let Tables { cu_compressed, tile_base, key_tile_base } = *tables;
    let mut band = Band {
        cu_seqlens_q,
        cu_seqlens_kv,
        cu_keys: if problem.keys.windows().is_some() { cu_compressed } else { cu_seqlens_kv },
        tile_base,
        key_tile_base,
        batch: problem.sizes.sequences as i32,
        total_q: problem.sizes.total_q as i32,
        total_keys: problem.total_keys() as i32,
        kernel_size: 0,
        kernel_stride: 0,
        window: 0,
        group_size: problem.sizes.gqa_group_size() as i32,
        tile_heads: tiles.tile_heads as i32,
        tile_tokens: tiles.tile_tokens as i32,
        head_tiles: tiles.head_tiles as i32,
        split: 0,
        mask: BlockMask::default(),
    };
    problem.keys.describe(&mut band);
    band
}

/// What an attention takes. A box of keys, or of values, holds `box_keys`, the first of every `key_step`.
pub(super) fn attention_params(
    (problem, tiles, set): (&BandProblem, &RowTiles, KernelSet),
    (batch, tables): (&DeviceBatch<'_>, &Tables),
    (tensors, branch): (&AttentionTensors<'_>, Branch),
    (box_keys, key_step): (usize, usize),
    softmax_scale: f32,
) -> Result<BandParams> {
    let sizes = &problem.sizes;
    let (rows, row_boxes) = ([sizes.total_q, sizes.num_q_heads], [tiles.tile_tokens, tiles.tile_heads]);
    let keys = ([problem.total_keys(), sizes.num_kv_heads], [box_keys, 1]);
    Ok(BandParams {
        band: band(problem, tiles, batch, tables),
        query: tensors.query.device(),
        key: tensors.key.device(),
        value: tensors.value.device(),
        out: tensors.out.device(),
        lse: branch.lse(tensors.lse.address()),
        branch,
        scale_log2: scale_log2(softmax_scale),
        num_tiles: tiles.num_tiles as i32,
        num_kv_heads: sizes.num_kv_heads as i32,
        query_map: tensors.query.map(set, rows, row_boxes, sizes)?,
        key_map: tensors.key.map_of_every(key_step, set, keys, sizes)?,
        value_map: tensors.value.map_of_every(key_step, set, keys, sizes)?,
    })
}

/// The attention alone, for calls that fill the tables themselves.
#[derive(Debug)]
pub(crate) struct BandStep {
    pub problem: BandProblem,
    pub tiles: RowTiles,
    kernel: Arc<BandKernel>,
    specialisation: Specialisation,
    /// Those that it may use.
    pub multiprocessors: usize,
}

impl BandStep {
    pub(super) fn new(kernels: &Kernels, problem: &BandProblem, tiles: RowTiles) -> Result<Self> {
        Self::masked(kernels, problem, tiles, None)
    }

    /// The same with a mask of blocks of that size.
    pub(crate) fn masked(
        kernels: &Kernels,
        problem: &BandProblem,
        tiles: RowTiles,
        block_size: Option<usize>,
    ) -> Result<Self> {
        let unmasked = || problem.kernel(kernels.set(), &tiles);
        let masked = |size| problem.sizes.specialisation(Kernel::Band, kernels.set(), size).with_block_mask(size);
        let specialisation = block_size.map_or_else(unmasked, masked);
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        Ok(Self { problem: *problem, tiles, kernel, specialisation, multiprocessors })
    }

    pub(super) fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        work: (&AttentionTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        self.launch_masked(stream, batch, (tables, BlockMask::default()), work, softmax_scale)
    }

    /// The same where the kernel takes a mask.
    pub(crate) fn launch_masked(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        (tables, mask): (&Tables, BlockMask),
        (tensors, branch): (&AttentionTensors<'_>, Branch),
        softmax_scale: f32,
    ) -> Result<()> {
        if self.problem.sizes.total_q == 0 {
            return Ok(());
        }
        let call = (&self.problem, &self.tiles, self.specialisation.set);
        let boxes = (step_keys(&self.specialisation), 1);
        let mut params = attention_params(call, (batch, tables), (tensors, branch), boxes, softmax_scale)?;
        params.band.mask = mask;
        Ok(self.kernel.launch(stream, &self.tiles, self.multiprocessors, &params)?)
    }
}

/// Scaled sums of gradients of queries to which several attentions add, in the place of the gradients, in any order or side by side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedSums {
    /// Of all of them: those of rows are given, those of keys zero before the first, which raises them.
    pub bounds: [SumBounds; 3],
    /// Those of the keys of the first.
    pub key_bounds: Address,
    /// The keys of another one.
    pub other: SumKeys,
    /// Two words, zero before the first, where the sums are not: who adds to them makes them so.
    pub clearing: Address,
}

/// How the gradients of a branch become those of a call; by default the attention is the call.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct BranchGrads<'a> {
    /// Statistics of all rows, with the gates, and their bounds behind them: `out`, `lse` and `grad_lse` are not read then.
    pub row_stats: Option<DeviceSpan<'a>>,
    /// [`BandBackwardStep::prepare`] went before.
    pub is_prepared: bool,
    /// `grad_query` is added to; not by a plan that adds it up in memory.
    pub accumulate: bool,
    /// What else adds to `grad_query` in memory, which is open (`SumsOpening`) and of which [`BandBackwardStep::finish`] makes gradients;
    /// else a launch opens and finishes its own sums.
    pub sums: Option<SharedSums>,
    /// `grad_key` and `grad_value` are added to.
    pub accumulate_keys: bool,
    /// What splits leave of these stays for [`BandBackwardStep::finish`].
    pub merges_later: bool,
    /// Its CTAs go ahead of those of another attention that runs beside it.
    pub ahead: bool,
    /// Which blocks the rows see, where the kernels take a mask.
    pub mask: BlockMask,
    /// Where the kernels do the window, too: its earlier keys, and the same statistics of the rows' attention to it.
    pub window: Option<(usize, DeviceSpan<'a>)>,
}

/// The gradients alone, for calls that fill the tables themselves.
#[derive(Debug)]
pub(crate) struct BandBackwardStep {
    pub plan: BandBackwardPlan,
    kernels: Arc<BandBackwardKernels>,
    specialisation: Specialisation,
    multiprocessors: usize,
}

impl BandBackwardStep {
    pub(super) fn new(kernels: &Kernels, plan: BandBackwardPlan) -> Result<Self> {
        let specialisation = plan.specialisation(kernels.set());
        Self::with(kernels, plan, specialisation)
    }

    /// The same with the kernels of a specialisation: with a mask, or with the window, too.
    pub(crate) fn with(kernels: &Kernels, plan: BandBackwardPlan, specialisation: Specialisation) -> Result<Self> {
        let multiprocessors = kernels.device().facts().multiprocessors;
        Ok(Self { plan, kernels: kernels.one(&specialisation)?, specialisation, multiprocessors })
    }

    /// Makes gradients of queries of sums to which all have added. With `merges` what splits left for it is added to `grad_key` and
    /// `grad_value`; all heads were done at once then.
    pub(crate) fn finish(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        memory: (&Tables, &DeviceSpan<'_>),
        (tensors, sums, merges): (&AttentionGradTensors<'_>, &SharedSums, bool),
        softmax_scale: f32,
    ) -> Result<()> {
        let sizes = &self.plan.problem.sizes;
        let params = self.params(batch, memory, tensors, sizes.num_kv_heads, softmax_scale)?;
        let params = BandBackwardParams { sums: sums.bounds, accumulate_keys: true.into(), ..params };
        Ok(self.kernels.finish(stream, merges, &params)?)
    }

    /// Whether all heads are done at once, so that their statistics have room beside each other.
    fn is_one_pass(&self) -> bool {
        self.plan.kv_heads >= self.plan.problem.sizes.num_kv_heads
    }

    fn clear_bounds(&self, stream: &Stream, workspace: &DeviceSpan<'_>) -> Result<()> {
        let bounds = &self.plan.scratch.bounds;
        Ok(bounds.iter().try_for_each(|bounds| bounds.span(workspace).fill(0, stream))?)
    }

    /// What a launch with sums of its own and without statistics can do before there are gradients to write: the statistics of the rows,
    /// if all heads are done at once.
    pub(super) fn prepare(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        (tables, workspace): (&Tables, &DeviceSpan<'_>),
        tensors: &AttentionGradTensors<'_>,
        softmax_scale: f32,
    ) -> Result<()> {
        if !self.is_one_pass() {
            return Ok(());
        }
        self.clear_bounds(stream, workspace)?;
        let kv_heads = self.plan.problem.sizes.num_kv_heads;
        let params = self.params(batch, (tables, workspace), tensors, kv_heads, softmax_scale)?;
        Ok(self.kernels.statistics(stream, &params)?)
    }

    /// `workspace` is what the plan's scratch lies in.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        (tables, workspace): (&Tables, &DeviceSpan<'_>),
        (tensors, branch): (&AttentionGradTensors<'_>, &BranchGrads<'_>),
        softmax_scale: f32,
    ) -> Result<()> {
        let sizes = &self.plan.problem.sizes;
        let prepared = branch.is_prepared && self.is_one_pass();
        if !prepared && branch.sums.is_none() {
            self.clear_bounds(stream, workspace)?;
        }
        passes(sizes.num_kv_heads, self.plan.kv_heads).try_for_each(|heads| {
            let own = tensors.kv_heads_from(heads.start, sizes);
            let mut params = self.params(batch, (tables, workspace), &own, heads.len(), softmax_scale)?;
            params.accumulate = branch.accumulate.into();
            params.accumulate_keys = branch.accumulate_keys.into();
            params.band.mask = branch.mask.kv_heads_from(heads.start, sizes.total_q);
            // Statistics of these heads, and the bounds behind those of all.
            let given = |stats: &DeviceSpan<'_>| {
                let skipped = heads.start * sizes.gqa_group_size();
                let row_stats = part(stats, skipped * sizes.row_stats_bytes() / sizes.num_q_heads);
                (row_stats.address(), sizes.row_bounds(stats))
            };
            match &branch.row_stats {
                Some(stats) => (params.row_stats, params.row_bounds) = given(stats),
                None if prepared => {}
                None => self.kernels.statistics(stream, &params)?,
            }
            let bounds = |rows| SumBounds { rows, keys: params.key_bounds };
            params.sums[0] = bounds(params.row_bounds);
            if let Some((window_size, stats)) = &branch.window {
                let (window_stats, rows) = given(stats);
                params.sums[1] = bounds(rows);
                params.window_stats = window_stats;
                params.window_size = i32::try_from(*window_size).unwrap_or(i32::MAX);
            }
            match &branch.sums {
                Some(shared) => {
                    (params.sums, params.key_bounds, params.other) = (shared.bounds, shared.key_bounds, shared.other);
                    params.clearing = shared.clearing;
                }
                None => self.kernels.open(stream, &params)?,
            }
            // Ahead is what makes statistics and opens shared sums, or another attention that adds to these; where there are no tokens, what fills the tables.
            let overlaps = branch.sums.is_some() && sizes.total_kv > 0;
            let turn = (&self.plan.tiles, branch.ahead, overlaps);
            self.kernels.launch(stream, turn, self.multiprocessors, &params)?;
            match (&branch.sums, branch.merges_later) {
                (None, merges_later) => self.kernels.finish(stream, !merges_later, &params)?,
                (Some(_), false) => self.kernels.merge(stream, branch.ahead, &params)?,
                (Some(_), true) => {}
            }
            Ok(())
        })
    }

    fn params(
        &self,
        batch: &DeviceBatch<'_>,
        (tables, workspace): (&Tables, &DeviceSpan<'_>),
        tensors: &AttentionGradTensors<'_>,
        kv_heads: usize,
        softmax_scale: f32,
    ) -> Result<BandBackwardParams> {
        let BandBackwardPlan { problem, tiles, num_key_tiles, splits, scratch, .. } = &self.plan;
        let (sizes, set) = (problem.sizes.with_kv_heads(kv_heads), self.specialisation.set);
        let BandScratch { row_stats, bounds, partial_keys } = scratch;
        let key_bounds = bounds.map_or(Address::default(), |slot| slot.address(workspace));
        let as_f16 = Sizes { dtype: DType::F16, ..sizes };
        let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [problem.total_keys(), kv_heads]);
        let (row_boxes, key_boxes) = ([tiles.tile_tokens, tiles.tile_heads], [box_keys(&sizes), 1]);
        let AttentionTensors { query, key, value, out, lse } = &tensors.forward;
        Ok(BandBackwardParams {
            band: band(problem, tiles, batch, tables),
            query: query.device(),
            key: key.device(),
            value: value.device(),
            out: out.device(),
            grad_out: tensors.grad_out.device(),
            lse: lse.address(),
            grad_lse: tensors.grad_lse.map_or(Address::default(), |grad| grad.address()),
            row_stats: row_stats.map_or(Address::default(), |slot| slot.address(workspace)),
            row_bounds: if bounds.is_some() { key_bounds.offset(BOUNDS_BYTES) } else { key_bounds },
            key_bounds,
            sums: [SumBounds::default(); 3],
            other: SumKeys::default(),
            clearing: Address::default(),
            window_stats: Address::default(),
            grad_query: tensors.grad_query.device(),
            grad_key: tensors.grad_key.device(),
            grad_value: tensors.grad_value.device(),
            partial_keys: partial_keys.map_or(Address::default(), |slot| slot.address(workspace)),
            scale_log2: scale_log2(softmax_scale),
            scale: softmax_scale,
            num_kv_heads: kv_heads as i32,
            num_tiles: tiles.num_tiles as i32,
            num_key_tiles: *num_key_tiles as i32,
            splits: *splits as i32,
            resident: self.multiprocessors as i32,
            accumulate: 0,
            accumulate_keys: 0,
            window_size: 0,
            query_map: query.map(set, rows, row_boxes, &sizes)?,
            grad_out_map: tensors.grad_out.map(set, rows, row_boxes, &sizes)?,
            key_map: key.map(set, keys, key_boxes, &sizes)?,
            value_map: value.map(set, keys, key_boxes, &sizes)?,
            sums_map: tensors.grad_query.map(set, rows, row_boxes, &as_f16)?,
        })
    }
}
