//! Rows of tensors in and out of the f32 scratch of the workers.

use fsa_core::plan::padded;
use fsa_core::{DType, Error, Result, Strided, StridedMut, TensorView, TensorViewMut, bf16, f16};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs `$body` with `$typed` bound to the typed access of any floating-point variant.
macro_rules! each {
    ($value:expr, $enum:ident, $typed:ident => $body:expr) => {
        match $value {
            $enum::F32($typed) => $body,
            $enum::Bf16($typed) => $body,
            $enum::F16($typed) => $body,
        }
    };
}

/// Rows of an input tensor, widened to f32 as they are read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    F32(Strided<'a, f32>),
    Bf16(Strided<'a, bf16>),
    F16(Strided<'a, f16>),
}

fn not_a_float(argument: &str, dtype: DType) -> Error {
    Error::input(argument, "dtype f32, bf16 or f16", format!("dtype {dtype}"))
}

impl<'a> Rows<'a> {
    pub(crate) fn new(argument: &str, view: &TensorView<'a>) -> Result<Self> {
        match view.dtype() {
            DType::F32 => view.typed(argument).map(Self::F32),
            DType::Bf16 => view.typed(argument).map(Self::Bf16),
            DType::F16 => view.typed(argument).map(Self::F16),
            other => Err(not_a_float(argument, other)),
        }
    }

    /// Sizes of the axes.
    pub(crate) fn shape(&self) -> &[usize] {
        each!(self, Rows, rows => rows.shape())
    }

    /// Copies the innermost vector at `leading` to the front of `target`.
    #[inline]
    pub(crate) fn load(&self, leading: &[usize], target: &mut [f32]) {
        each!(self, Rows, rows => rows.load_row(leading, target));
    }

    /// Copies the vectors of `count` rows of one head, from `first` on in steps of `step`, to rows of
    /// `target` padded with zeros.
    pub(crate) fn load_rows(&self, first: usize, step: usize, count: usize, head: usize, target: &mut [f32]) {
        let dim = self.shape()[2];
        for (i, row) in target.chunks_exact_mut(padded(dim)).take(count).enumerate() {
            self.load(&[first + i * step, head], row);
            row[dim..].fill(0.0);
        }
    }
}

/// Rows of an output tensor, rounded from f32 as they are written.
#[derive(Debug)]
pub(crate) enum RowsMut<'a> {
    F32(StridedMut<'a, f32>),
    Bf16(StridedMut<'a, bf16>),
    F16(StridedMut<'a, f16>),
}

impl RowsMut<'_> {
    /// Rounds the front of `source` into the innermost vector at `leading`.
    #[inline]
    pub(crate) fn store(&mut self, leading: &[usize], source: &[f32]) {
        each!(self, RowsMut, rows => rows.store_row(leading, source));
    }

    /// [`RowsMut::store`], or for f32 the sum of what is there and the front of `source`. Sums of gradients
    /// are taken in f32 and rounded once, so no other type is ever added to.
    pub(crate) fn put(&mut self, leading: &[usize], source: &[f32], accumulate: bool) {
        match (self, accumulate) {
            (RowsMut::F32(rows), true) => rows.add_row(leading, source),
            (rows, _) => rows.store(leading, source),
        }
    }

    /// Rounds one value into the element at `index`.
    #[inline]
    pub(crate) fn set(&mut self, index: &[usize], value: f32) {
        each!(self, RowsMut, rows => rows.set(index, fsa_core::Element::from_f32(value)));
    }
}

/// An output that workers write under a lock. Each writes the rows of its own work item, so the
/// order of the writes does not matter; a copy takes some microseconds after milliseconds of products,
/// so the lock is free when it is asked for.
#[derive(Debug)]
pub(crate) struct Sink<'a>(Mutex<RowsMut<'a>>);

impl<'a> Sink<'a> {
    pub(crate) fn new(argument: &str, view: &'a mut TensorViewMut<'_>) -> Result<Self> {
        let rows = match view.dtype() {
            DType::F32 => RowsMut::F32(view.typed(argument)?),
            DType::Bf16 => RowsMut::Bf16(view.typed(argument)?),
            DType::F16 => RowsMut::F16(view.typed(argument)?),
            other => return Err(not_a_float(argument, other)),
        };
        Ok(Self(Mutex::new(rows)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, RowsMut<'a>> {
        // A poisoned lock means that another worker panicked; the panic is on its way to the caller.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A scratch buffer of at least `len` elements. Its content is whatever was left there.
pub(crate) fn scratch(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
