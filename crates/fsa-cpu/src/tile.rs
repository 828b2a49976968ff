//! Packed tiles of keys and values, and the query rows that meet them.

use crate::rows::{Rows, scratch};
use crate::simd::{Isa, all_finite, transpose};
use fsa_core::plan::{VECTOR, padded};
use fsa_core::{AttentionArgs, AttentionShape, AttentionStage, Result, Sequence};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Query, key and value of a checked call.
pub(crate) struct Operands<'a> {
    pub query: Rows<'a>,
    pub key: Rows<'a>,
    pub value: Rows<'a>,
    pub shape: AttentionShape,
    /// Factor of the logits.
    pub scale: f32,
    /// `|scale| * log2(e)`: scores times this are exponents of 2. Never 0, so that `-inf` stays `-inf`.
    pub exponent: f32,
    /// Exponents of 2 times this are logits.
    pub natural: f64,
    pub isa: Isa,
}

impl<'a> Operands<'a> {
    pub(crate) fn new(args: &AttentionArgs<'a>, shape: AttentionShape, isa: Isa) -> Result<Self> {
        let scale = args.scale();
        let exponent = (scale.abs() * LOG2_E).max(f32::MIN_POSITIVE);
        Ok(Self {
            query: Rows::new("query", &args.query)?,
            key: Rows::new("key", &args.key)?,
            value: Rows::new("value", &args.value)?,
            shape,
            scale,
            exponent,
            natural: f64::from(scale.abs()) / f64::from(exponent),
            isa,
        })
    }

    /// Query heads of a kv head.
    pub(crate) fn group(&self) -> usize {
        self.shape.gqa_group_size()
    }

    /// Padded lengths of a query or key row and of a value row.
    pub(crate) fn strides(&self) -> (usize, usize) {
        (padded(self.shape.head_dim), padded(self.shape.value_dim))
    }

    /// Loads the query rows of `tokens` (rows of the tensor) of one kv head, token by token and head
    /// by head, with the sign of the scale. Its magnitude is applied to differences of scores, not here:
    /// rounding every element would cost as many bits as the scores are large.
    pub(crate) fn load_query(&self, tokens: Range<usize>, kv_head: usize, target: &mut [f32]) {
        self.load_group(&self.query, tokens, kv_head, self.strides().0, target);
        if self.scale < 0.0 {
            target.iter_mut().for_each(|v| *v = -*v);
        }
    }

    /// Loads the rows of `tokens` of every query head of `kv_head` from a tensor shaped like query or out.
    pub(crate) fn load_group(
        &self,
        source: &Rows<'_>,
        tokens: Range<usize>,
        kv_head: usize,
        stride: usize,
        target: &mut [f32],
    ) {
        let group = self.group();
        for (i, row) in target.chunks_exact_mut(stride).take(tokens.len() * group).enumerate() {
            source.load(&[tokens.start + i / group, kv_head * group + i % group], row);
            row[source.shape()[2]..].fill(0.0);
        }
    }
}

/// Keys and values of one tile of one head, widened and laid out for the products.
#[derive(Debug, Default)]
pub(crate) struct KeyValueTile {
    /// `[keys, padded head_dim]`.
    key: Vec<f32>,
    /// `[head_dim, columns]`.
    key_t: Vec<f32>,
    /// `[keys, padded value_dim]`.
    value: Vec<f32>,
    /// `[value_dim, columns]`; only packed for a backward.
    value_t: Vec<f32>,
    /// Keys after padding to whole vectors.
    columns: usize,
    /// No key and no value is NaN or infinite, so that a probability of 0 erases it.
    finite: bool,
}

impl KeyValueTile {
    /// Packs `rows` of `kv_head`. Columns past the last row are zero.
    pub(crate) fn pack(&mut self, operands: &Operands<'_>, rows: Range<usize>, kv_head: usize, backward: bool) {
        let (isa, shape) = (operands.isa, &operands.shape);
        let (d, dv) = operands.strides();
        let (count, columns) = (rows.len(), padded(rows.len()));
        self.columns = columns;
        let key = scratch(&mut self.key, columns * d);
        operands.key.load_rows(rows.start, 1, count, kv_head, key);
        key[count * d..].fill(0.0);
        transpose(isa, scratch(&mut self.key_t, shape.head_dim * columns), columns, key, d, columns, shape.head_dim);
        let value = scratch(&mut self.value, columns * dv);
        operands.value.load_rows(rows.start, 1, count, kv_head, value);
        value[count * dv..].fill(0.0);
        self.finite = all_finite(isa, value);
        if backward {
            self.finite &= all_finite(isa, key);
            let target = scratch(&mut self.value_t, shape.value_dim * columns);
            transpose(isa, target, columns, value, dv, columns, shape.value_dim);
        }
    }

    pub(crate) fn key(&self) -> &[f32] {
        &self.key
    }

    pub(crate) fn key_t(&self) -> &[f32] {
        &self.key_t
    }

    pub(crate) fn value(&self) -> &[f32] {
        &self.value
    }

    pub(crate) fn value_t(&self) -> &[f32] {
        &self.value_t
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn finite(&self) -> bool {
        self.finite
    }
}

/// The keys that a position sees, as a range of keys local to the sequence. Both ends grow with the
/// position, which is what lets a tile of keys meet a contiguous range of rows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Span {
    Dense,
    Window { window_size: usize },
    Compressed { kernel_size: usize, kernel_stride: usize },
}

impl Span {
    /// The span of a stage; `None` for `selected`, whose rows see sets of blocks.
    pub(crate) fn of(stage: &AttentionStage<'_>) -> Option<Self> {
        match *stage {
            AttentionStage::Dense => Some(Self::Dense),
            AttentionStage::Window { window_size } => Some(Self::Window { window_size }),
            AttentionStage::Compressed { kernel_size, kernel_stride } => {
                Some(Self::Compressed { kernel_size, kernel_stride })
            }
            AttentionStage::Selected { .. } => None,
        }
    }

    /// Keys that `position` sees.
    #[inline]
    pub(crate) fn keys(&self, position: usize) -> Range<usize> {
        match *self {
            Span::Dense => crate::dense::visible(position),
            Span::Window { window_size } => crate::window::visible(position, window_size),
            Span::Compressed { kernel_size, kernel_stride } => {
                crate::compressed::visible(position, kernel_size, kernel_stride)
            }
        }
    }

    /// Of the positions `first .. first + count`, those that see any of the keys `keys`, relative to `first`.
    pub(crate) fn rows(&self, first: usize, count: usize, keys: &Range<usize>) -> Range<usize> {
        let start = partition_point(count, |t| self.keys(first + t).end <= keys.start);
        let end = partition_point(count, |t| self.keys(first + t).start < keys.end);
        start..end.max(start)
    }
}

/// First index below `count` for which `holds` is false, for a predicate that turns false once.
fn partition_point(count: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if holds(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// Rows of `key` of every sequence for a stage.
pub(crate) fn key_rows(stage: &AttentionStage<'_>, batch: &fsa_core::Batch) -> Vec<Range<usize>> {
    match *stage {
        AttentionStage::Compressed { kernel_size, kernel_stride } => {
            batch.compressed_offsets(kernel_size, kernel_stride).windows(2).map(|pair| pair[0]..pair[1]).collect()
        }
        _ => batch.sequences().iter().map(|sequence| sequence.kv_rows.clone()).collect(),
    }
}

/// One independent piece of a forward: some tokens of one sequence and one kv head.
#[derive(Debug, Clone)]
pub(crate) struct WorkItem<'a> {
    pub sequence: &'a Sequence,
    /// Rows of `key` of the sequence.
    pub keys: Range<usize>,
    pub kv_head: usize,
    /// Tokens, local to the sequence.
    pub tokens: Range<usize>,
}

impl WorkItem<'_> {
    /// Rows of `query`.
    pub(crate) fn query_rows(&self) -> Range<usize> {
        let start = self.sequence.query_rows.start;
        start + self.tokens.start..start + self.tokens.end
    }

    /// Position of the first token.
    pub(crate) fn first_position(&self) -> usize {
        self.sequence.first_position + self.tokens.start
    }
}

/// Cuts a batch into work items of `tokens` tokens, later tokens first: they see more keys, and
/// threads balance best when the longest work starts first.
pub(crate) fn work_items<'a>(
    stage: &AttentionStage<'_>,
    batch: &'a fsa_core::Batch,
    num_kv_heads: usize,
    tokens: usize,
) -> Vec<WorkItem<'a>> {
    let mut items = Vec::new();
    for (sequence, keys) in batch.sequences().iter().zip(key_rows(stage, batch)) {
        for start in (0..sequence.query_len()).step_by(tokens).rev() {
            for kv_head in 0..num_kv_heads {
                let tokens = start..(start + tokens).min(sequence.query_len());
                items.push(WorkItem { sequence, keys: keys.clone(), kv_head, tokens });
            }
        }
    }
    items
}

/// The columns of a tile that any row of a strip sees, widened to whole vectors, and what each row
/// sees of them.
pub(crate) fn strip_columns(visible: &mut [(u32, u32)]) -> Range<usize> {
    let seen = || visible.iter().filter(|(first, end)| first < end);
    let first = seen().map(|v| v.0).min().unwrap_or(0) as usize / VECTOR * VECTOR;
    let end = padded(seen().map(|v| v.1).max().unwrap_or(0) as usize).max(first);
    for v in visible.iter_mut() {
        *v = if v.0 < v.1 { (v.0 - first as u32, v.1 - first as u32) } else { (0, 0) };
    }
    first..end
}
