//! Query-major attention of the stages whose rows see a contiguous span of keys: dense, window, compressed.
//!
//! A work item packs the rows of some tokens and all heads of a group, then meets the tiles of keys in
//! order: scores of a strip of rows, online softmax, values. Accumulators stay with the item, so nothing
//! is merged afterwards and no score leaves the strip.

use crate::rows::{Sink, scratch};
use crate::score::BlockScores;
use crate::simd::{Left, Online, Product, SoftmaxStrip, scale, softmax_strip};
use crate::tile::{KeyValueTile, Operands, Span, WorkItem, strip_columns};
use fsa_core::plan::{KEYS_PER_TILE, STRIP_ROWS};
use std::ops::Range;

/// Scratch memory of a worker.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    tile: KeyValueTile,
    pub(crate) state: RowState,
    scores: Vec<f32>,
}

/// Packed query rows of a work item and what has been accumulated for them.
#[derive(Debug, Default)]
pub(crate) struct RowState {
    /// `[rows, padded head_dim]`, with the sign of the scale.
    pub query: Vec<f32>,
    /// `[rows, padded value_dim]`, unnormalised.
    pub sums: Vec<f32>,
    /// Running maximum of every row, an exponent of 2.
    pub max: Vec<f32>,
    /// Running denominator of every row.
    pub denominator: Vec<f32>,
}

impl RowState {
    /// Loads the query rows of `item` and forgets what was accumulated.
    pub(crate) fn start(&mut self, operands: &Operands<'_>, item: &WorkItem<'_>) {
        let rows = item.tokens.len() * operands.group();
        let (d, dv) = operands.strides();
        operands.load_query(item.query_rows(), item.kv_head, scratch(&mut self.query, rows * d));
        scratch(&mut self.sums, rows * dv).fill(0.0);
        scratch(&mut self.max, rows).fill(f32::NEG_INFINITY);
        scratch(&mut self.denominator, rows).fill(0.0);
    }

    /// Normalises and writes `out` and `lse`. A row that saw no key gives 0 and `-inf`.
    pub(crate) fn finish(&mut self, operands: &Operands<'_>, item: &WorkItem<'_>, out: &Sink<'_>, lse: &Sink<'_>) {
        let (group, dv) = (operands.group(), operands.strides().1);
        let rows = item.tokens.len() * group;
        for (row, sums) in self.sums.chunks_exact_mut(dv).take(rows).enumerate() {
            let denominator = self.denominator[row];
            scale(operands.isa, sums, if denominator == 0.0 { 0.0 } else { 1.0 / denominator });
            // In f64, with the factor that `exponent` stands for: an f32 product would round a large
            // log-sum-exp again, and the backward has nothing to cancel that with.
            let largest = f64::from(self.max[row]) * operands.natural;
            let lse = (largest + f64::from(denominator).ln()) as f32;
            self.max[row] = if denominator == 0.0 { f32::NEG_INFINITY } else { lse };
        }
        let first = item.query_rows().start;
        let place = |row: usize| (first + row / group, item.kv_head * group + row % group);
        let mut out = out.lock();
        for (row, sums) in self.sums.chunks_exact(dv).take(rows).enumerate() {
            let (token, head) = place(row);
            out.store(&[token, head], sums);
        }
        drop(out);
        let mut lse = lse.lock();
        for row in 0..rows {
            let (token, head) = place(row);
            lse.set(&[head, token], self.max[row]);
        }
    }
}

/// `target[r] += probabilities[r] . value` for the columns `columns` of a tile. Where a value is not finite
/// and some row does not see it, the sum runs over the visible columns only: 0 * NaN is not 0.
pub(crate) fn add_values(
    operands: &Operands<'_>,
    tile: &KeyValueTile,
    columns: &Range<usize>,
    visible: &[(u32, u32)],
    probabilities: &[f32],
    target: &mut [f32],
    accumulate: bool,
) {
    let dv = operands.strides().1;
    let width = columns.len();
    if tile.finite() || visible.iter().all(|v| *v == (0, width as u32)) {
        Product {
            left: Left::Rows { data: probabilities, stride: width },
            right: (&tile.value()[columns.start * dv..], dv),
            out: (target, dv),
            size: [visible.len(), width, dv],
            accumulate,
        }
        .run(operands.isa);
        return;
    }
    for (r, (first, end)) in visible.iter().enumerate() {
        let row = &mut target[r * dv..(r + 1) * dv];
        if !accumulate {
            row.fill(0.0);
        }
        for c in *first as usize..*end as usize {
            let value = &tile.value()[(columns.start + c) * dv..][..dv];
            crate::simd::add(operands.isa, row, value, probabilities[r * width + c]);
        }
    }
}

/// Scores of `rows` packed query rows with the columns `columns` of a tile.
pub(crate) fn score_strip(
    operands: &Operands<'_>,
    tile: &KeyValueTile,
    columns: &Range<usize>,
    query: &[f32],
    rows: usize,
    scores: &mut [f32],
) {
    Product {
        left: Left::Rows { data: query, stride: operands.strides().0 },
        right: (&tile.key_t()[columns.start..], tile.columns()),
        out: (scores, columns.len()),
        size: [rows, operands.shape.head_dim, columns.len()],
        accumulate: false,
    }
    .run(operands.isa);
}

/// Attends one work item; block scores are gathered on the way if asked for.
pub(crate) fn attend_item(
    operands: &Operands<'_>,
    span: Span,
    item: &WorkItem<'_>,
    worker: &mut Worker,
    mut block_scores: Option<&mut BlockScores>,
) {
    let group = operands.group();
    let (first, count) = (item.first_position(), item.tokens.len());
    worker.state.start(operands, item);
    let keys = span.keys(first).start..span.keys(first + count - 1).end.min(item.keys.len());
    for start in (keys.start / KEYS_PER_TILE * KEYS_PER_TILE..keys.end).step_by(KEYS_PER_TILE) {
        let tile_keys = start..(start + KEYS_PER_TILE).min(item.keys.len());
        let tokens = span.rows(first, count, &tile_keys);
        if tokens.is_empty() {
            continue;
        }
        let rows = item.keys.start + tile_keys.start..item.keys.start + tile_keys.end;
        worker.tile.pack(operands, rows, item.kv_head, false);
        for row in (tokens.start * group..tokens.end * group).step_by(STRIP_ROWS) {
            let rows = row..(row + STRIP_ROWS).min(tokens.end * group);
            let mut visible = [(0u32, 0u32); STRIP_ROWS];
            let visible = &mut visible[..rows.len()];
            for (v, row) in visible.iter_mut().zip(rows.clone()) {
                let seen = span.keys(first + row / group);
                let clip = |key: usize| (key.clamp(tile_keys.start, tile_keys.end) - tile_keys.start) as u32;
                *v = (clip(seen.start), clip(seen.end));
            }
            attend_strip(operands, worker, rows, visible, start, block_scores.as_deref_mut());
        }
    }
}

/// One strip of rows against the packed tile that starts at key `start`.
fn attend_strip(
    operands: &Operands<'_>,
    worker: &mut Worker,
    rows: Range<usize>,
    visible: &mut [(u32, u32)],
    start: usize,
    block_scores: Option<&mut BlockScores>,
) {
    let Worker { tile, state, scores } = worker;
    let (d, dv) = operands.strides();
    let columns = strip_columns(visible);
    let scores = scratch(scores, rows.len() * columns.len());
    score_strip(operands, tile, &columns, &state.query[rows.start * d..], rows.len(), scores);
    let mut correction = [0.0f32; STRIP_ROWS];
    let online = Online {
        max: &mut state.max[rows.clone()],
        sum: &mut state.denominator[rows.clone()],
        correction: &mut correction,
    };
    softmax_strip(
        operands.isa,
        SoftmaxStrip { scores, exponent: operands.exponent, columns: columns.len(), visible, state: online },
    );
    let sums = &mut state.sums[rows.start * dv..rows.end * dv];
    for (row, factor) in sums.chunks_exact_mut(dv).zip(&correction) {
        if *factor != 1.0 {
            scale(operands.isa, row, *factor);
        }
    }
    add_values(operands, tile, &columns, visible, scores, sums, true);
    if let Some(block_scores) = block_scores {
        block_scores.add_strip(operands.isa, rows, &correction, scores, start + columns.start, columns.len());
    }
}
