//! Backward of every attention stage: one KV-major pass with five products per pair of rows and keys.
//!
//! A unit is one sequence and one kv head. Its query rows are taken in chunks. Within a chunk the tiles of
//! keys are dealt to a fixed number of parts that run in parallel; a part owns the key and value
//! gradients of its tiles over the whole unit and sums its own query gradient of the chunk; the parts'
//! sums are then added in order. The partition depends on shapes only, so results do not depend on threads.
//!
//! With p = exp(scale * query . key - lse), dp = grad_out . value, ds = p (dp - delta) and
//! delta = grad_out . out - grad_lse: grad_value += p^T grad_out, grad_key += scale ds^T query,
//! grad_query += scale ds key.

use crate::rows::{Rows, Sink, scratch};
use crate::selected::{self, Selection};
use crate::simd::{GradientStrip, Left, Product, add, all_finite, dot, gradient_strip, scale};
use crate::tile::{KeyValueTile, Operands, Span, WorkItem, strip_columns};
use fsa_core::InverseIndex;
use fsa_core::plan::{BackwardTile, STRIP_ROWS};
use rayon::prelude::*;
use std::ops::Range;

/// Which rows of a chunk meet which keys.
#[derive(Clone, Copy)]
pub(crate) enum Pattern<'a> {
    Span(Span),
    Selected(Selection<'a>),
}

/// The forward's results and the incoming gradients.
pub(crate) struct GradInputs<'a> {
    pub out: Rows<'a>,
    pub lse: Rows<'a>,
    pub grad_out: Rows<'a>,
    pub grad_lse: Option<Rows<'a>>,
    /// Factor of `grad_out` by row and head, where the output was gated.
    pub gate: Option<&'a (dyn Fn(usize, usize) -> f32 + Sync)>,
}

/// Where the gradients go.
pub(crate) struct GradSinks<'a, 'b> {
    pub query: &'a Sink<'b>,
    pub key: &'a Sink<'b>,
    pub value: &'a Sink<'b>,
    /// Add to what is there instead of overwriting it.
    pub accumulate: bool,
}

/// Query rows of a chunk with what the backward needs of each.
#[derive(Debug, Default)]
struct Chunk {
    /// `[rows, padded head_dim]`, with the sign of the scale.
    query: Vec<f32>,
    /// `[rows, padded value_dim]`.
    grad_out: Vec<f32>,
    /// Log-sum-exp of every row.
    lse: Vec<f32>,
    /// `grad_out . out - grad_lse` of every row.
    delta: Vec<f32>,
    out: Vec<f32>,
    finite: bool,
    index: InverseIndex,
}

impl Chunk {
    fn load(&mut self, operands: &Operands<'_>, inputs: &GradInputs<'_>, item: &WorkItem<'_>) {
        let (group, (d, dv)) = (operands.group(), operands.strides());
        let rows = item.tokens.len() * group;
        let query = scratch(&mut self.query, rows * d);
        operands.load_query(item.query_rows(), item.kv_head, query);
        let grad_out = scratch(&mut self.grad_out, rows * dv);
        operands.load_group(&inputs.grad_out, item.query_rows(), item.kv_head, dv, grad_out);
        if let Some(gate) = inputs.gate {
            for (row, grad) in grad_out.chunks_exact_mut(dv).enumerate() {
                let (token, head) = (item.query_rows().start + row / group, item.kv_head * group + row % group);
                scale(operands.isa, grad, gate(token, head));
            }
        }
        self.finite = all_finite(operands.isa, query) && all_finite(operands.isa, grad_out);
        let out = scratch(&mut self.out, dv);
        let (lse, delta) = (scratch(&mut self.lse, rows), scratch(&mut self.delta, rows));
        let element = |source: &Rows<'_>, head: usize, token: usize| match source {
            Rows::F32(rows) => rows.at(&[head, token]),
            _ => 0.0,
        };
        for row in 0..rows {
            let (token, head) = (item.query_rows().start + row / group, item.kv_head * group + row % group);
            inputs.out.load(&[token, head], out);
            let grad_lse = inputs.grad_lse.as_ref().map_or(0.0, |grad| element(grad, head, token));
            lse[row] = element(&inputs.lse, head, token);
            delta[row] = dot(operands.isa, &grad_out[row * dv..(row + 1) * dv], out) - grad_lse;
        }
    }
}

/// One part of a unit: some of its tiles of keys.
#[derive(Debug, Default)]
struct Part {
    keys: PartKeys,
    gathered: Gathered,
    /// The part's sum of the query gradient of the chunk, `[rows, padded head_dim]`.
    grad_query: Vec<f32>,
    /// Rows of the chunk that the part has touched.
    touched: Range<usize>,
}

/// The key side of a part.
#[derive(Debug, Default)]
struct PartKeys {
    tile: KeyValueTile,
    scores: Vec<f32>,
    grads: Vec<f32>,
    /// Gradients of the part's tiles, `[tiles, keys, padded dim]`.
    grad_key: Vec<f32>,
    grad_value: Vec<f32>,
}

/// Rows of a chunk that chose one block, gathered.
#[derive(Debug, Default)]
struct Gathered {
    query: Vec<f32>,
    grad_out: Vec<f32>,
    grad_query: Vec<f32>,
}

/// Computes the gradients of one unit and writes them.
pub(crate) fn gradient_unit(
    operands: &Operands<'_>,
    pattern: &Pattern<'_>,
    inputs: &GradInputs<'_>,
    unit: &WorkItem<'_>,
    tile: &BackwardTile,
    sinks: &GradSinks<'_, '_>,
) {
    let (d, dv) = operands.strides();
    let tiles = unit.keys.len().div_ceil(tile.keys);
    let mut parts: Vec<Part> = (0..tile.parts.min(tiles.max(1)))
        .map(|p| {
            let own = (tiles + tile.parts - 1 - p) / tile.parts * tile.keys;
            let (grad_key, grad_value) = (vec![0.0; own * d], vec![0.0; own * dv]);
            Part { keys: PartKeys { grad_key, grad_value, ..PartKeys::default() }, ..Part::default() }
        })
        .collect();
    let mut chunk = Chunk::default();
    for start in (0..unit.tokens.len()).step_by(tile.tokens) {
        let item = WorkItem { tokens: start..(start + tile.tokens).min(unit.tokens.len()), ..unit.clone() };
        chunk.load(operands, inputs, &item);
        if let Pattern::Selected(selection) = pattern {
            let Selection { topk_indices, block_size } = selection;
            chunk.index.build(topk_indices, item.kv_head, item.sequence, item.tokens.clone(), *block_size);
        }
        let job = Job { operands, pattern, item: &item, chunk: &chunk, keys: tile.keys };
        let stride = parts.len();
        parts.par_iter_mut().enumerate().for_each(|(p, part)| job.run(part, p, stride));
        reduce_query(operands, &item, &mut parts, sinks);
    }
    write_keys(operands, unit, tile, &mut parts, sinks);
}

/// The work of all parts on one chunk.
struct Job<'a> {
    operands: &'a Operands<'a>,
    pattern: &'a Pattern<'a>,
    item: &'a WorkItem<'a>,
    chunk: &'a Chunk,
    keys: usize,
}

impl Job<'_> {
    fn run(&self, part: &mut Part, first: usize, step: usize) {
        let rows = self.item.tokens.len() * self.operands.group();
        scratch(&mut part.grad_query, rows * self.operands.strides().0).fill(0.0);
        part.touched = 0..0;
        let last = self.item.first_position() + self.item.tokens.len();
        for (slot, tile) in (first..self.item.keys.len().div_ceil(self.keys)).step_by(step).enumerate() {
            let start = tile * self.keys;
            let keys = start..(start + self.keys).min(self.item.keys.len());
            match self.pattern {
                Pattern::Span(span) => {
                    let tokens = span.rows(self.item.first_position(), self.item.tokens.len(), &keys);
                    self.meet_span(part, slot, *span, keys, tokens);
                }
                Pattern::Selected(_) if start >= last => break,
                Pattern::Selected(selection) => self.meet_block(part, slot, tile, selection, keys),
            }
        }
    }

    fn pack(&self, part: &mut Part, keys: &Range<usize>) {
        let rows = self.item.keys.start + keys.start..self.item.keys.start + keys.end;
        part.keys.tile.pack(self.operands, rows, self.item.kv_head, true);
    }

    /// A tile of keys and the adjacent rows that see some of them.
    fn meet_span(&self, part: &mut Part, slot: usize, span: Span, keys: Range<usize>, tokens: Range<usize>) {
        if tokens.is_empty() {
            return;
        }
        self.pack(part, &keys);
        let (group, (d, dv)) = (self.operands.group(), self.operands.strides());
        let all = tokens.start * group..tokens.end * group;
        part.touch(all.clone());
        for row in all.clone().step_by(STRIP_ROWS) {
            let rows = row..(row + STRIP_ROWS).min(all.end);
            let mut seen = [(0u32, 0u32); STRIP_ROWS];
            for (v, row) in seen.iter_mut().zip(rows.clone()) {
                let visible = span.keys(self.item.first_position() + row / group);
                let clip = |key: usize| (key.clamp(keys.start, keys.end) - keys.start) as u32;
                *v = (clip(visible.start), clip(visible.end));
            }
            let strip = StripRows {
                query: &self.chunk.query[rows.start * d..rows.end * d],
                grad_out: &self.chunk.grad_out[rows.start * dv..rows.end * dv],
                lse: &self.chunk.lse[rows.clone()],
                delta: &self.chunk.delta[rows.clone()],
                grad_query: &mut part.grad_query[rows.start * d..rows.end * d],
            };
            self.strip(&mut part.keys, slot, strip, &mut seen[..rows.len()]);
        }
    }

    /// A block and the rows that chose it, gathered.
    fn meet_block(&self, part: &mut Part, slot: usize, block: usize, selection: &Selection<'_>, keys: Range<usize>) {
        let tokens = self.chunk.index.rows(block);
        if tokens.is_empty() {
            return;
        }
        self.pack(part, &keys);
        let (group, (d, dv)) = (self.operands.group(), self.operands.strides());
        part.touch(tokens[0] as usize * group..(tokens[tokens.len() - 1] as usize + 1) * group);
        let count = tokens.len() * group;
        let row_of = |i: usize| tokens[i / group] as usize * group + i % group;
        for i in (0..count).step_by(STRIP_ROWS) {
            let height = STRIP_ROWS.min(count - i);
            let (mut lse, mut delta) = ([0.0; STRIP_ROWS], [0.0; STRIP_ROWS]);
            let mut seen = [(0u32, 0u32); STRIP_ROWS];
            let query = scratch(&mut part.gathered.query, height * d);
            let grad_out = scratch(&mut part.gathered.grad_out, height * dv);
            let grad_query = scratch(&mut part.gathered.grad_query, height * d);
            grad_query.fill(0.0);
            for r in 0..height {
                let row = row_of(i + r);
                query[r * d..][..d].copy_from_slice(&self.chunk.query[row * d..][..d]);
                grad_out[r * dv..][..dv].copy_from_slice(&self.chunk.grad_out[row * dv..][..dv]);
                (lse[r], delta[r]) = (self.chunk.lse[row], self.chunk.delta[row]);
                let position = self.item.first_position() + row / group;
                seen[r] = selected::visible(position, block, selection.block_size, keys.len());
            }
            let (lse, delta) = (&lse[..height], &delta[..height]);
            let strip = StripRows { query, grad_out, lse, delta, grad_query: &mut *grad_query };
            self.strip(&mut part.keys, slot, strip, &mut seen[..height]);
            for (r, source) in grad_query.chunks_exact(d).enumerate() {
                add(self.operands.isa, &mut part.grad_query[row_of(i + r) * d..][..d], source, 1.0);
            }
        }
    }

    /// The five products of one strip and the packed tile.
    fn strip(&self, part: &mut PartKeys, slot: usize, rows: StripRows<'_>, seen: &mut [(u32, u32)]) {
        let (isa, (d, dv), shape) = (self.operands.isa, self.operands.strides(), &self.operands.shape);
        let columns = strip_columns(seen);
        let (height, width, tile) = (seen.len(), columns.len(), &part.tile);
        let scores = scratch(&mut part.scores, height * width);
        let grads = scratch(&mut part.grads, height * width);
        for (left, stride, right, depth, out) in [
            (rows.query, d, tile.key_t(), shape.head_dim, &mut *scores),
            (rows.grad_out, dv, tile.value_t(), shape.value_dim, &mut *grads),
        ] {
            Product {
                left: Left::Rows { data: left, stride },
                right: (&right[columns.start..], tile.columns()),
                out: (out, width),
                size: [height, depth, width],
                accumulate: false,
            }
            .run(isa);
        }
        let (scale, lse, delta) = (self.operands.scale.abs(), rows.lse, rows.delta);
        gradient_strip(isa, GradientStrip { scores, grads, columns: width, visible: seen, scale, lse, delta });
        let first = slot * self.keys + columns.start;
        let grad_value = &mut part.grad_value[first * dv..];
        let grad_key = &mut part.grad_key[first * d..];
        let key = &tile.key()[columns.start * d..];
        let all_seen = seen.iter().all(|v| *v == (0, width as u32));
        let all_finite = tile.finite() && self.chunk.finite;
        if !(all_seen || all_finite) {
            visible_products(isa, (d, dv), seen, width, (scores, grads), key, rows, (grad_key, grad_value));
            return;
        }
        for (left, right, stride, out) in
            [(&*scores, rows.grad_out, dv, grad_value), (&*grads, rows.query, d, grad_key)]
        {
            Product {
                left: Left::Columns { data: left, stride: width },
                right: (right, stride),
                out: (out, stride),
                size: [width, height, stride],
                accumulate: true,
            }
            .run(isa);
        }
        Product {
            left: Left::Rows { data: grads, stride: width },
            right: (key, d),
            out: (rows.grad_query, d),
            size: [height, width, d],
            accumulate: true,
        }
        .run(isa);
    }
}

impl Part {
    fn touch(&mut self, rows: Range<usize>) {
        self.touched = if self.touched.is_empty() {
            rows
        } else {
            self.touched.start.min(rows.start)..self.touched.end.max(rows.end)
        };
    }
}

/// Rows of one strip and where their gradient is added.
struct StripRows<'a> {
    query: &'a [f32],
    grad_out: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
    grad_query: &'a mut [f32],
}

/// The last three products, pair by visible pair: taken where a NaN or infinity in a row or key that
/// does not see the other would come through as 0 * NaN.
#[allow(clippy::too_many_arguments)]
fn visible_products(
    isa: crate::simd::Isa,
    (d, dv): (usize, usize),
    seen: &[(u32, u32)],
    width: usize,
    (scores, grads): (&[f32], &[f32]),
    key: &[f32],
    rows: StripRows<'_>,
    (grad_key, grad_value): (&mut [f32], &mut [f32]),
) {
    for (r, (first, end)) in seen.iter().enumerate() {
        for c in *first as usize..*end as usize {
            let (p, ds) = (scores[r * width + c], grads[r * width + c]);
            add(isa, &mut grad_value[c * dv..(c + 1) * dv], &rows.grad_out[r * dv..(r + 1) * dv], p);
            add(isa, &mut grad_key[c * d..(c + 1) * d], &rows.query[r * d..(r + 1) * d], ds);
            add(isa, &mut rows.grad_query[r * d..(r + 1) * d], &key[c * d..(c + 1) * d], ds);
        }
    }
}

/// Adds the parts' query gradients of a chunk in order and writes them.
fn reduce_query(operands: &Operands<'_>, item: &WorkItem<'_>, parts: &mut [Part], sinks: &GradSinks<'_, '_>) {
    const ROWS: usize = 256;
    let (isa, group, d) = (operands.isa, operands.group(), operands.strides().0);
    let rows = item.tokens.len() * group;
    let Some((sum, others)) = parts.split_first_mut() else { return };
    sum.grad_query[..rows * d].par_chunks_mut(ROWS * d).enumerate().for_each(|(i, sum)| {
        let first = i * ROWS;
        for part in others.iter() {
            let touched = part.touched.start.max(first)..part.touched.end.min(first + sum.len() / d);
            if !touched.is_empty() {
                let target = &mut sum[(touched.start - first) * d..(touched.end - first) * d];
                add(isa, target, &part.grad_query[touched.start * d..touched.end * d], 1.0);
            }
        }
        scale(isa, sum, operands.scale);
        let mut sink = sinks.query.lock();
        for (r, values) in sum.chunks_exact(d).enumerate() {
            let row = first + r;
            let (token, head) = (item.query_rows().start + row / group, item.kv_head * group + row % group);
            sink.put(&[token, head], values, sinks.accumulate);
        }
    });
}

/// Writes the key and value gradients of a unit.
fn write_keys(
    operands: &Operands<'_>,
    unit: &WorkItem<'_>,
    tile: &BackwardTile,
    parts: &mut [Part],
    sinks: &GradSinks<'_, '_>,
) {
    let (d, dv) = operands.strides();
    let (mut grad_key, mut grad_value) = (sinks.key.lock(), sinks.value.lock());
    let step = parts.len();
    for (p, part) in parts.iter_mut().enumerate() {
        let part = &mut part.keys;
        scale(operands.isa, &mut part.grad_key, operands.scale.abs());
        for (slot, start) in (p * tile.keys..unit.keys.len()).step_by(step * tile.keys).enumerate() {
            for k in 0..tile.keys.min(unit.keys.len() - start) {
                let (row, local) = (unit.keys.start + start + k, slot * tile.keys + k);
                grad_key.put(&[row, unit.kv_head], &part.grad_key[local * d..(local + 1) * d], sinks.accumulate);
                grad_value.put(&[row, unit.kv_head], &part.grad_value[local * dv..(local + 1) * dv], sinks.accumulate);
            }
        }
    }
}
