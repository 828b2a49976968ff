//! Stage `compress`: windows of keys or values to one vector each, and its gradients.
//!
//! A linear compression and its gradients are sums over the `kernel_size` places j of a window. Each
//! summand is a product of the rows `i * kernel_stride + j` (one for every window i) with the slice j of the
//! weight, so the matrix of overlapping windows, `kernel_size / kernel_stride` times the input, never exists.

use crate::rows::{Rows, Sink, scratch};
use crate::simd::{Isa, Left, Product, add, transpose};
use fsa_core::ops::CompressShape;
use fsa_core::plan::{COMPRESS_WINDOWS as WINDOWS, padded};
use fsa_core::{Batch, CompressArgs, CompressGrads, Compression, Result, Sequence, TensorView, TensorViewMut};
use rayon::prelude::*;
use std::ops::Range;

/// Some windows of one sequence and one head.
struct Item<'a> {
    sequence: &'a Sequence,
    /// Row of the sequence's first window in the output.
    offset: usize,
    head: usize,
    windows: Range<usize>,
}

fn items<'a>(batch: &'a Batch, shape: &CompressShape, step: usize) -> Vec<Item<'a>> {
    let offsets = batch.compressed_offsets(shape.kernel_size, shape.kernel_stride);
    let mut items = Vec::new();
    for (sequence, offset) in batch.sequences().iter().zip(offsets) {
        let count = sequence.num_compressed(shape.kernel_size, shape.kernel_stride);
        for first in (0..count).step_by(step) {
            for head in 0..shape.num_kv_heads {
                items.push(Item { sequence, offset, head, windows: first..(first + step).min(count) });
            }
        }
    }
    items
}

/// Weights of a checked call, widened.
enum Weights<'a> {
    /// The same factor everywhere.
    Mean(f32),
    /// One factor per place of the window and head, `[num_kv_heads, kernel_size]`.
    Factors(Vec<f32>),
    /// `[num_kv_heads, kernel_size * dim, dim]` and the position embedding.
    Linear { weight: Rows<'a>, position: Option<Rows<'a>> },
}

impl<'a> Weights<'a> {
    fn new(compression: &Compression<'a>, shape: &CompressShape) -> Result<Self> {
        let (heads, size) = (shape.num_kv_heads, shape.kernel_size);
        Ok(match compression {
            Compression::Mean => Self::Mean(1.0 / size as f32),
            Compression::Weighted { weight } => {
                let rows = Rows::new("weight", weight)?;
                let mut factors = vec![0.0; heads * size];
                for (head, row) in factors.chunks_exact_mut(size).enumerate() {
                    rows.load(&[head], row);
                }
                Self::Factors(factors)
            }
            Compression::Linear { weight, position } => Self::Linear {
                weight: Rows::new("weight", weight)?,
                position: position.as_ref().map(|view| Rows::new("position", view)).transpose()?,
            },
        })
    }
}

impl Weights<'_> {
    /// Factor of a place of the window, for the kinds that have one.
    fn factor(&self, index: usize) -> f32 {
        match self {
            Self::Mean(factor) => *factor,
            Self::Factors(factors) => factors[index],
            Self::Linear { .. } => 1.0,
        }
    }
}

/// Slice j of a head's weight as `[dim, padded dim]`: row e holds the weights of element e of place j.
fn load_slice(weight: &Rows<'_>, head: usize, place: usize, dim: usize, target: &mut [f32]) {
    for (e, row) in target.chunks_exact_mut(padded(dim)).take(dim).enumerate() {
        weight.load(&[head, place * dim + e], row);
        row[dim..].fill(0.0);
    }
}

/// Forward.
pub(crate) fn compress(args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>, isa: Isa) -> Result<()> {
    let shape = args.shape_with_output(out)?;
    let input = Rows::new("input", &args.input)?;
    let weights = Weights::new(&args.compression, &shape)?;
    let sink = Sink::new("out", out)?;
    let items = items(args.batch, &shape, WINDOWS);
    items.par_iter().for_each_init(<[Vec<f32>; 3]>::default, |[rows, sums, weight], item| {
        let sums = scratch(sums, item.windows.len() * padded(shape.dim));
        match &weights {
            Weights::Linear { weight: source, position } => {
                linear_item(isa, &shape, &input, (source, position.as_ref()), item, (rows, weight), sums);
            }
            factors => weighted_item(isa, &shape, &input, factors, item, rows, sums),
        }
        let mut sink = sink.lock();
        for (window, row) in item.windows.clone().zip(sums.chunks_exact(padded(shape.dim))) {
            sink.store(&[item.offset + window, item.head], row);
        }
    });
    Ok(())
}

/// Weighted sums of the windows of an item.
fn weighted_item(
    isa: Isa,
    shape: &CompressShape,
    input: &Rows<'_>,
    factors: &Weights<'_>,
    item: &Item<'_>,
    rows: &mut Vec<f32>,
    sums: &mut [f32],
) {
    let (size, step, dim) = (shape.kernel_size, shape.kernel_stride, padded(shape.dim));
    let first = item.windows.start * step;
    let count = (item.windows.len() - 1) * step + size;
    let rows = scratch(rows, count * dim);
    input.load_rows(item.sequence.kv_rows.start + first, 1, count, item.head, rows);
    sums.fill(0.0);
    for (w, sum) in sums.chunks_exact_mut(dim).enumerate() {
        for (place, row) in rows[w * step * dim..].chunks_exact(dim).take(size).enumerate() {
            add(isa, sum, row, factors.factor(item.head * size + place));
        }
    }
}

/// Products of the windows of an item with the weight, one place of the window after the other.
fn linear_item(
    isa: Isa,
    shape: &CompressShape,
    input: &Rows<'_>,
    (source, position): (&Rows<'_>, Option<&Rows<'_>>),
    item: &Item<'_>,
    (rows, weight): (&mut Vec<f32>, &mut Vec<f32>),
    sums: &mut [f32],
) {
    let dim = padded(shape.dim);
    let count = item.windows.len();
    let rows = scratch(rows, count * dim);
    let weight = scratch(weight, shape.dim * dim);
    for place in 0..shape.kernel_size {
        load_place(isa, shape, input, position, item, place, rows);
        load_slice(source, item.head, place, shape.dim, weight);
        Product {
            left: Left::Rows { data: rows, stride: dim },
            right: (weight, dim),
            out: (sums, dim),
            size: [count, shape.dim, dim],
            accumulate: place > 0,
        }
        .run(isa);
    }
}

/// Rows `i * kernel_stride + place` of the windows i of an item, with the position embedding added.
fn load_place(
    isa: Isa,
    shape: &CompressShape,
    input: &Rows<'_>,
    position: Option<&Rows<'_>>,
    item: &Item<'_>,
    place: usize,
    rows: &mut [f32],
) {
    let dim = padded(shape.dim);
    let first = item.sequence.kv_rows.start + item.windows.start * shape.kernel_stride + place;
    input.load_rows(first, shape.kernel_stride, item.windows.len(), item.head, rows);
    if let Some(position) = position {
        let mut embedding = vec![0.0; dim];
        position.load(&[item.head, place], &mut embedding);
        for row in rows.chunks_exact_mut(dim).take(item.windows.len()) {
            add(isa, row, &embedding, 1.0);
        }
    }
}

/// Where the gradients of the parameters of a compression go, if anywhere.
pub(crate) struct ParameterSinks<'a> {
    weight: Option<Sink<'a>>,
    position: Option<Sink<'a>>,
}

impl<'a> ParameterSinks<'a> {
    pub(crate) fn new(
        weight: &'a mut Option<TensorViewMut<'_>>,
        position: &'a mut Option<TensorViewMut<'_>>,
    ) -> Result<Self> {
        Ok(Self {
            weight: weight.as_mut().map(|view| Sink::new("grad_weight", view)).transpose()?,
            position: position.as_mut().map(|view| Sink::new("grad_position", view)).transpose()?,
        })
    }
}

/// Backward.
pub(crate) fn compress_backward(
    args: &CompressArgs<'_>,
    grad_out: &TensorView<'_>,
    grads: &mut CompressGrads<'_>,
    isa: Isa,
) -> Result<()> {
    grads.validate(args, grad_out)?;
    let sinks = ParameterSinks::new(&mut grads.grad_weight, &mut grads.grad_position)?;
    let grad_out = Rows::new("grad_out", grad_out)?;
    gradients(args, grad_out, (&Sink::new("grad_input", &mut grads.grad_input)?, false), &sinks, isa)
}

/// Gradients of a checked call. `grad_out` may have another type than the input; the gradient of the
/// input is added to what is there if the flag beside its sink says so.
pub(crate) fn gradients(
    args: &CompressArgs<'_>,
    grad_out: Rows<'_>,
    (grad_input, accumulate): (&Sink<'_>, bool),
    sinks: &ParameterSinks<'_>,
    isa: Isa,
) -> Result<()> {
    let shape = args.shape()?;
    let input = Rows::new("input", &args.input)?;
    let weights = Weights::new(&args.compression, &shape)?;
    let call = Backward { isa, shape, batch: args.batch, input, grad_out, weights };
    call.grad_input(grad_input, accumulate);
    match &call.weights {
        Weights::Mean(_) => {}
        Weights::Factors(_) => sinks.weight.iter().for_each(|sink| call.grad_factors(sink)),
        Weights::Linear { weight, position } => {
            if sinks.weight.is_some() || sinks.position.is_some() {
                call.grad_linear(weight, position.as_ref(), sinks);
            }
        }
    }
    Ok(())
}

struct Backward<'a> {
    isa: Isa,
    shape: CompressShape,
    batch: &'a Batch,
    input: Rows<'a>,
    grad_out: Rows<'a>,
    weights: Weights<'a>,
}

impl Backward<'_> {
    /// Gradients of the tokens of every sequence and head, by residue of the token modulo the stride:
    /// token `m * s + r` is place `r + q * s` of window `m - q`.
    fn grad_input(&self, sink: &Sink<'_>, accumulate: bool) {
        let offsets = self.batch.compressed_offsets(self.shape.kernel_size, self.shape.kernel_stride);
        let mut jobs = Vec::new();
        for (sequence, offset) in self.batch.sequences().iter().zip(offsets) {
            for head in 0..self.shape.num_kv_heads {
                let residues = 0..self.shape.kernel_stride.min(sequence.kv_len());
                jobs.extend(residues.map(|residue| (sequence, offset, head, residue)));
            }
        }
        jobs.par_iter().for_each_init(<[Vec<f32>; 3]>::default, |buffers, (sequence, offset, head, residue)| {
            self.grad_residue(sequence, *offset, *head, *residue, buffers, (sink, accumulate));
        });
    }

    fn grad_residue(
        &self,
        sequence: &Sequence,
        offset: usize,
        head: usize,
        residue: usize,
        [grads, sums, weight]: &mut [Vec<f32>; 3],
        (sink, accumulate): (&Sink<'_>, bool),
    ) {
        let (size, step, dim) = (self.shape.kernel_size, self.shape.kernel_stride, padded(self.shape.dim));
        let windows = sequence.num_compressed(size, step);
        let tokens = (sequence.kv_len() - residue).div_ceil(step);
        for first in (0..tokens).step_by(WINDOWS) {
            let count = WINDOWS.min(tokens - first);
            let sums = scratch(sums, count * dim);
            sums.fill(0.0);
            for q in 0..(size / step).min(first + count) {
                // Tokens of this piece whose window `m - q` exists.
                let (start, end) = (first.max(q), (first + count).min(windows + q));
                if start < end {
                    let grads = scratch(grads, (end - start) * dim);
                    self.grad_out.load_rows(offset + start - q, 1, end - start, head, grads);
                    let target = &mut sums[(start - first) * dim..(end - first) * dim];
                    self.add_place(head, residue + q * step, grads, weight, target);
                }
            }
            let mut sink = sink.lock();
            for (m, row) in sums.chunks_exact(dim).enumerate() {
                let token = sequence.kv_rows.start + (first + m) * step + residue;
                sink.put(&[token, head], row, accumulate);
            }
        }
    }

    /// Adds what the gradients `grads` of some windows give to place `place` of each.
    fn add_place(&self, head: usize, place: usize, grads: &[f32], weight: &mut Vec<f32>, target: &mut [f32]) {
        let dim = padded(self.shape.dim);
        match &self.weights {
            Weights::Linear { weight: source, .. } => {
                let (plain, transposed) = scratch(weight, 2 * dim * dim).split_at_mut(dim * dim);
                load_slice(source, head, place, self.shape.dim, plain);
                transposed.fill(0.0);
                transpose(self.isa, transposed, dim, plain, dim, self.shape.dim, self.shape.dim);
                let size = [target.len() / dim, self.shape.dim, dim];
                Product {
                    left: Left::Rows { data: grads, stride: dim },
                    right: (transposed, dim),
                    out: (target, dim),
                    size,
                    accumulate: true,
                }
                .run(self.isa);
            }
            factors => add(self.isa, target, grads, factors.factor(head * self.shape.kernel_size + place)),
        }
    }

    /// Gradient of the factors of a weighted sum: dot products of every place with the gradients.
    fn grad_factors(&self, sink: &Sink<'_>) {
        let (heads, size, dim) = (self.shape.num_kv_heads, self.shape.kernel_size, padded(self.shape.dim));
        let items = items(self.batch, &self.shape, WINDOWS);
        (0..heads * size).into_par_iter().for_each_init(<[Vec<f32>; 2]>::default, |[rows, grads], index| {
            let (head, place) = (index / size, index % size);
            let mut sum = 0.0f32;
            for item in items.iter().filter(|item| item.head == head) {
                let count = item.windows.len();
                let (rows, grads) = (scratch(rows, count * dim), scratch(grads, count * dim));
                load_place(self.isa, &self.shape, &self.input, None, item, place, rows);
                self.grad_out.load_rows(item.offset + item.windows.start, 1, count, head, grads);
                sum += crate::simd::dot(self.isa, rows, grads);
            }
            sink.lock().set(&[head, place], sum);
        });
    }

    /// Gradients of the weight and the position embedding of a linear compression, place by place:
    /// `rows^T grads`, and the sum of the gradients times the slice of the weight.
    fn grad_linear(&self, source: &Rows<'_>, embedding: Option<&Rows<'_>>, sinks: &ParameterSinks<'_>) {
        let (heads, size) = (self.shape.num_kv_heads, self.shape.kernel_size);
        let (real, dim) = (self.shape.dim, padded(self.shape.dim));
        let items = items(self.batch, &self.shape, WINDOWS);
        (0..heads * size).into_par_iter().for_each_init(<[Vec<f32>; 4]>::default, |buffers, index| {
            let (head, place) = (index / size, index % size);
            let [rows, grads, slice, total] = buffers;
            let (slice, total) = (scratch(slice, real * dim), scratch(total, dim));
            slice.fill(0.0);
            total.fill(0.0);
            for item in items.iter().filter(|item| item.head == head) {
                let count = item.windows.len();
                let (rows, grads) = (scratch(rows, count * dim), scratch(grads, count * dim));
                load_place(self.isa, &self.shape, &self.input, embedding, item, place, rows);
                self.grad_out.load_rows(item.offset + item.windows.start, 1, count, head, grads);
                for row in grads.chunks_exact(dim) {
                    add(self.isa, total, row, 1.0);
                }
                Product {
                    left: Left::Columns { data: rows, stride: dim },
                    right: (grads, dim),
                    out: (slice, dim),
                    size: [real, count, dim],
                    accumulate: true,
                }
                .run(self.isa);
            }
            if let Some(sink) = &sinks.weight {
                let mut sink = sink.lock();
                for (e, row) in slice.chunks_exact(dim).enumerate() {
                    sink.store(&[head, place * real + e], row);
                }
            }
            if let Some(sink) = &sinks.position {
                load_slice(source, head, place, real, slice);
                let sums: Vec<f32> =
                    slice.chunks_exact(dim).map(|row| crate::simd::dot(self.isa, row, total)).collect();
                sink.lock().store(&[head, place], &sums);
            }
        });
    }
}
