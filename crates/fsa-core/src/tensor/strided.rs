//! Typed access to the elements and innermost vectors of a view.

use super::{Layout, for_each_offset};
use crate::dtype::Element;

/// Typed strided view; element `[i, j, k]` lies at `i * s0 + j * s1 + k * s2`.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a, T> {
    pub(super) data: &'a [T],
    pub(super) layout: Layout,
}

impl<'a, T: Element> Strided<'a, T> {
    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Offset of the vector that the leading indices name.
    #[inline]
    fn offset(&self, leading: &[usize]) -> usize {
        leading.iter().zip(self.layout.strides()).map(|(index, stride)| index * stride).sum()
    }

    /// Element at a full index.
    #[inline]
    pub fn at(&self, index: &[usize]) -> T {
        debug_assert!(index.iter().zip(self.shape()).all(|(i, n)| i < n));
        self.data[self.offset(index)]
    }

    /// The innermost vector as a slice, if its elements are adjacent.
    #[inline]
    pub fn row(&self, leading: &[usize]) -> Option<&'a [T]> {
        let last = self.layout.rank - 1;
        if self.layout.strides[last] != 1 && self.layout.shape[last] > 1 {
            return None;
        }
        let start = self.offset(leading);
        Some(&self.data[start..start + self.layout.shape[last]])
    }

    /// Copies the innermost vector, widened to f32, into the front of `target`.
    #[inline]
    pub fn load_row(&self, leading: &[usize], target: &mut [f32]) {
        if let Some(row) = self.row(leading) {
            T::widen(row, &mut target[..row.len()]);
            return;
        }
        let last = self.layout.rank - 1;
        let (start, stride) = (self.offset(leading), self.layout.strides[last]);
        for (k, t) in target[..self.layout.shape[last]].iter_mut().enumerate() {
            *t = self.data[start + k * stride].to_f32();
        }
    }
}

/// Typed strided view for writing.
#[derive(Debug)]
pub struct StridedMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) layout: Layout,
}

impl<T: Element> StridedMut<'_, T> {
    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Writes one element.
    #[inline]
    pub fn set(&mut self, index: &[usize], value: T) {
        let offset: usize = index.iter().zip(self.layout.strides()).map(|(i, s)| i * s).sum();
        self.data[offset] = value;
    }

    /// Rounds `source` into the innermost vector.
    #[inline]
    pub fn store_row(&mut self, leading: &[usize], source: &[f32]) {
        let last = self.layout.rank - 1;
        let (size, stride) = (self.layout.shape[last], self.layout.strides[last]);
        let start: usize = leading.iter().zip(self.layout.strides()).map(|(i, s)| i * s).sum();
        if stride == 1 || size <= 1 {
            T::narrow(&source[..size], &mut self.data[start..start + size]);
            return;
        }
        for (k, s) in source[..size].iter().enumerate() {
            self.data[start + k * stride] = T::from_f32(*s);
        }
    }

    /// Adds `source` to the innermost vector.
    #[inline]
    pub fn add_row(&mut self, leading: &[usize], source: &[f32]) {
        let last = self.layout.rank - 1;
        let (size, stride) = (self.layout.shape[last], self.layout.strides[last]);
        let start: usize = leading.iter().zip(self.layout.strides()).map(|(i, s)| i * s).sum();
        for (k, s) in source[..size].iter().enumerate() {
            let element = &mut self.data[start + k * stride];
            *element = T::from_f32(element.to_f32() + s);
        }
    }

    /// Sets every element.
    pub fn fill(&mut self, value: T) {
        let layout = self.layout;
        for_each_offset(&layout, |offset| self.data[offset] = value);
    }
}
