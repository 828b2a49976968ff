//! Stage `selected`, in FSA's loop order: the KV block outside, the rows that chose it gathered.
//!
//! A work item is a chunk of tokens of one kv head. Its inverse index lists, for every block, the rows
//! that chose it. Each block is packed once; its rows are gathered strip by strip, attend to the block
//! alone (local softmax), and the partial result is merged into the row's accumulators by log-sum-exp.
//! A row so meets its blocks in ascending order whatever the order of its list.

use crate::attend::{RowState, add_values, score_strip};
use crate::rows::scratch;
use crate::simd::{Online, SoftmaxStrip, exp2_in_place, merge_row, softmax_strip};
use crate::tile::{KeyValueTile, Operands, WorkItem, strip_columns};
use fsa_core::plan::STRIP_ROWS;
use fsa_core::{InverseIndex, Strided};

/// Scratch memory of a worker.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    tile: KeyValueTile,
    pub(crate) state: RowState,
    index: InverseIndex,
    strip: Strip,
}

/// Gathered rows of one block.
#[derive(Debug, Default)]
struct Strip {
    query: Vec<f32>,
    scores: Vec<f32>,
    partial: Vec<f32>,
}

/// The selection of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Selection<'a> {
    pub topk_indices: Strided<'a, i32>,
    pub block_size: usize,
}

/// Columns of a block that a row at `position` sees.
#[inline]
pub(crate) fn visible(position: usize, block: usize, block_size: usize, keys: usize) -> (u32, u32) {
    let start = block * block_size;
    (0, (position + 1 - start).min(keys) as u32)
}

/// Attends one work item.
pub(crate) fn selected_item(
    operands: &Operands<'_>,
    selection: &Selection<'_>,
    item: &WorkItem<'_>,
    worker: &mut Worker,
) {
    let Selection { topk_indices, block_size } = selection;
    let (group, first) = (operands.group(), item.first_position());
    worker.state.start(operands, item);
    worker.index.build(topk_indices, item.kv_head, item.sequence, item.tokens.clone(), *block_size);
    for block in 0..worker.index.num_blocks() {
        let tokens = worker.index.rows(block);
        if tokens.is_empty() {
            continue;
        }
        let start = block * block_size;
        let keys = (item.keys.len() - start).min(*block_size);
        let rows = item.keys.start + start..item.keys.start + start + keys;
        worker.tile.pack(operands, rows, item.kv_head, false);
        // A row is a token and a head of the group.
        let count = tokens.len() * group;
        let row_of = |i: usize| tokens[i / group] as usize * group + i % group;
        for i in (0..count).step_by(STRIP_ROWS) {
            let mut rows = [0usize; STRIP_ROWS];
            let mut seen = [(0u32, 0u32); STRIP_ROWS];
            let height = STRIP_ROWS.min(count - i);
            for r in 0..height {
                rows[r] = row_of(i + r);
                seen[r] = visible(first + rows[r] / group, block, *block_size, keys);
            }
            attend_strip(
                operands,
                &worker.tile,
                &mut worker.state,
                &mut worker.strip,
                &rows[..height],
                &mut seen[..height],
            );
        }
    }
}

/// Local softmax of gathered rows over one block, merged into their accumulators.
fn attend_strip(
    operands: &Operands<'_>,
    tile: &KeyValueTile,
    state: &mut RowState,
    strip: &mut Strip,
    rows: &[usize],
    seen: &mut [(u32, u32)],
) {
    let (d, dv) = operands.strides();
    let columns = strip_columns(seen);
    let query = scratch(&mut strip.query, rows.len() * d);
    for (target, row) in query.chunks_exact_mut(d).zip(rows) {
        target.copy_from_slice(&state.query[row * d..(row + 1) * d]);
    }
    let scores = scratch(&mut strip.scores, rows.len() * columns.len());
    score_strip(operands, tile, &columns, query, rows.len(), scores);
    let (mut max, mut sum) = ([f32::NEG_INFINITY; STRIP_ROWS], [0.0f32; STRIP_ROWS]);
    let mut correction = [0.0f32; STRIP_ROWS];
    let local = Online { max: &mut max, sum: &mut sum, correction: &mut correction };
    softmax_strip(
        operands.isa,
        SoftmaxStrip { scores, exponent: operands.exponent, columns: columns.len(), visible: seen, state: local },
    );
    let partial = scratch(&mut strip.partial, rows.len() * dv);
    add_values(operands, tile, &columns, seen, scores, partial, false);
    merge(operands, state, rows, partial, (&max, &sum));
}

/// Merges partial results with local maximum `max` and denominator `sum` by log-sum-exp: both sides are
/// brought to the larger maximum.
fn merge(
    operands: &Operands<'_>,
    state: &mut RowState,
    rows: &[usize],
    partial: &[f32],
    (max, sum): (&[f32; STRIP_ROWS], &[f32; STRIP_ROWS]),
) {
    let dv = operands.strides().1;
    // Exponents of the factor of what was there (first half) and of what comes (second half).
    let mut factors = [f32::NEG_INFINITY; 2 * STRIP_ROWS];
    for (r, row) in rows.iter().enumerate() {
        let merged = state.max[*row].max(max[r]);
        let reference = if merged == f32::NEG_INFINITY { 0.0 } else { merged };
        factors[r] = state.max[*row] - reference;
        factors[STRIP_ROWS + r] = max[r] - reference;
        state.max[*row] = merged;
    }
    exp2_in_place(operands.isa, &mut factors);
    for (r, row) in rows.iter().enumerate() {
        let (keep, take) = (factors[r], factors[STRIP_ROWS + r]);
        state.denominator[*row] = state.denominator[*row] * keep + sum[r] * take;
        let target = &mut state.sums[row * dv..(row + 1) * dv];
        merge_row(operands.isa, target, &partial[r * dv..(r + 1) * dv], keep, take);
    }
}
