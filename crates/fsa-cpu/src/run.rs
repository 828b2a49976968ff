//! Cuts checked calls into work items and hands them to the worker threads.

use crate::attend::{self, attend_item};
use crate::gradient::{GradInputs, GradSinks, Pattern, gradient_unit};
use crate::rows::{Rows, Sink};
use crate::score::BlockScores;
use crate::select::TopBlocks;
use crate::selected::{self, Selection, selected_item};
use crate::simd::Isa;
use crate::tile::{Operands, Span, WorkItem, work_items};
use fsa_core::plan::{BACKWARD_PARTS, KEYS_PER_TILE, backward_tile, query_tile, select_tile, selected_tile};
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Batch, Result, SelectArgs,
    StridedMut, TensorViewMut, selection,
};
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Forward of any attention stage.
pub(crate) fn attention(
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    output: &mut AttentionOutput<'_>,
    isa: Isa,
) -> Result<()> {
    let shape = args.shape(stage)?;
    output.validate(&shape)?;
    let operands = Operands::new(args, shape, isa)?;
    let group = operands.group();
    let (out, lse) = (Sink::new("out", &mut output.out)?, Sink::new("lse", &mut output.lse)?);
    match pattern(stage, &operands)? {
        Pattern::Span(span) => {
            let items = work_items(stage, args.batch, shape.num_kv_heads, query_tile(group).tokens);
            items.par_iter().for_each_init(attend::Worker::default, |worker, item| {
                attend_item(&operands, span, item, worker, None);
                worker.state.finish(&operands, item, &out, &lse);
            });
        }
        Pattern::Selected(selection) => {
            let topk = selection.topk_indices.shape()[2];
            let blocks = args.batch.max_kv_len().div_ceil(selection.block_size);
            let tile = selected_tile(group, blocks, topk, selection.block_size);
            let items = work_items(stage, args.batch, shape.num_kv_heads, tile.tokens);
            items.par_iter().for_each_init(selected::Worker::default, |worker, item| {
                selected_item(&operands, &selection, item, worker);
                worker.state.finish(&operands, item, &out, &lse);
            });
        }
    }
    Ok(())
}

/// What the rows of a stage see, with typed access to its indices.
fn pattern<'a>(stage: &AttentionStage<'a>, operands: &Operands<'_>) -> Result<Pattern<'a>> {
    if let AttentionStage::Selected { topk_indices, block_size, .. } = stage {
        let topk_indices = selection::check(topk_indices, operands.shape.num_kv_heads, operands.shape.total_q)?;
        return Ok(Pattern::Selected(Selection { topk_indices, block_size: *block_size }));
    }
    Ok(Pattern::Span(Span::of(stage).unwrap_or(Span::Dense)))
}

/// Compressed attention with block scores and top-k.
pub(crate) fn select(
    args: &SelectArgs<'_>,
    output: &mut AttentionOutput<'_>,
    topk_indices: &mut TensorViewMut<'_>,
    isa: Isa,
) -> Result<()> {
    let shape = args.shape(topk_indices)?;
    output.validate(&shape)?;
    let (stage, config) = (args.stage(), args.config);
    let operands = Operands::new(&args.attention, shape, isa)?;
    let (group, batch) = (operands.group(), args.attention.batch);
    let blocks = batch.max_kv_len().div_ceil(config.block_size);
    let span = Span::Compressed { kernel_size: config.kernel_size, kernel_stride: config.kernel_stride };
    let (out, lse) = (Sink::new("out", &mut output.out)?, Sink::new("lse", &mut output.lse)?);
    let indices = Mutex::new(topk_indices.typed::<i32>("topk_indices")?);
    let items = work_items(&stage, batch, shape.num_kv_heads, select_tile(group, blocks).tokens);
    items.par_iter().for_each_init(SelectWorker::default, |worker, item| {
        let tokens = item.tokens.len();
        worker.scores.start(config, tokens * group, item.first_position() + tokens - 1);
        attend_item(&operands, span, item, &mut worker.attend, Some(&mut worker.scores));
        worker.rows.resize(tokens * config.topk, 0);
        for (t, row) in worker.rows.chunks_exact_mut(config.topk).enumerate() {
            let scores = worker.scores.token(isa, &worker.attend.state, t, group, config.score_heads);
            worker.top.list(scores, (item.first_position() + t) / config.block_size, config, row);
        }
        store_indices(&indices, item, config.topk, &worker.rows);
        worker.attend.state.finish(&operands, item, &out, &lse);
    });
    Ok(())
}

#[derive(Debug, Default)]
struct SelectWorker {
    attend: attend::Worker,
    scores: BlockScores,
    top: TopBlocks,
    rows: Vec<i32>,
}

fn store_indices(indices: &Mutex<StridedMut<'_, i32>>, item: &WorkItem<'_>, topk: usize, rows: &[i32]) {
    let mut indices = indices.lock().unwrap_or_else(PoisonError::into_inner);
    for (token, row) in item.query_rows().zip(rows.chunks_exact(topk)) {
        for (slot, id) in row.iter().enumerate() {
            indices.set(&[item.kv_head, token, slot], *id);
        }
    }
}

/// Backward of any attention stage.
pub(crate) fn attention_backward(
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    grad: &AttentionGradArgs<'_>,
    grads: &mut AttentionGrads<'_>,
    isa: Isa,
) -> Result<()> {
    let shape = args.shape(stage)?;
    grad.validate(&shape)?;
    grads.validate(&shape)?;
    let operands = Operands::new(args, shape, isa)?;
    let inputs = GradInputs {
        out: Rows::new("out", &grad.out)?,
        lse: Rows::new("lse", &grad.lse)?,
        grad_out: Rows::new("grad_out", &grad.grad_out)?,
        grad_lse: grad.grad_lse.as_ref().map(|view| Rows::new("grad_lse", view)).transpose()?,
        gate: None,
    };
    let sinks = GradSinks {
        query: &Sink::new("grad_query", &mut grads.grad_query)?,
        key: &Sink::new("grad_key", &mut grads.grad_key)?,
        value: &Sink::new("grad_value", &mut grads.grad_value)?,
        accumulate: false,
    };
    gradients(stage, &operands, args.batch, &inputs, &sinks)
}

/// Runs the units of a backward. Some run at a time, so that the gradients of few heads are in memory
/// together; the parts of each run in parallel as well.
pub(crate) fn gradients(
    stage: &AttentionStage<'_>,
    operands: &Operands<'_>,
    batch: &Batch,
    inputs: &GradInputs<'_>,
    sinks: &GradSinks<'_, '_>,
) -> Result<()> {
    let pattern = pattern(stage, operands)?;
    let keys = match &pattern {
        Pattern::Span(_) => KEYS_PER_TILE,
        Pattern::Selected(selection) => selection.block_size,
    };
    let tile = backward_tile(operands.group(), keys);
    let units = whole_sequences(stage, batch, operands.shape.num_kv_heads);
    let together = units_together(&units);
    for units in units.chunks(together) {
        units.par_iter().for_each(|unit| gradient_unit(operands, &pattern, inputs, unit, &tile, sinks));
    }
    Ok(())
}

/// Every sequence and kv head, sequences without query rows included: their keys have gradients of zero.
fn whole_sequences<'a>(stage: &AttentionStage<'_>, batch: &'a Batch, num_kv_heads: usize) -> Vec<WorkItem<'a>> {
    let keys = crate::tile::key_rows(stage, batch);
    let units = batch.sequences().iter().zip(keys).flat_map(|(sequence, keys)| {
        let tokens = 0..sequence.query_len();
        (0..num_kv_heads).map(move |kv_head| WorkItem { sequence, keys: keys.clone(), kv_head, tokens: tokens.clone() })
    });
    units.collect()
}

/// Units that run at a time: two, so that one fills the threads while the other is between chunks, and
/// more where threads outnumber parts or where sequences are short.
fn units_together(units: &[WorkItem<'_>]) -> usize {
    const KEYS_IN_FLIGHT: usize = 1 << 17;
    let longest = units.iter().map(|unit| unit.keys.len()).max().unwrap_or(0);
    let by_threads = 2 * rayon::current_num_threads().div_ceil(BACKWARD_PARTS);
    by_threads.max(KEYS_IN_FLIGHT / longest.max(1))
}
