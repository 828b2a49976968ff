//! Strided borrowed views over host memory, and owned contiguous tensors.
//!
//! A view is checked once, when it is made: every index that its shape admits lies inside its
//! slice, and two indices of a mutable view never name the same element.

use crate::dtype::{DType, Element};
use crate::error::{Error, Result, ensure};
use half::{bf16, f16};
use std::fmt;
use std::ops::Range;

mod owned;
mod strided;

pub use owned::{Storage, Tensor};
pub use strided::{Strided, StridedMut};

/// Largest rank of a tensor of the project.
pub const MAX_RANK: usize = 4;

/// Shape and strides (in elements) of a tensor of rank up to [`MAX_RANK`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    shape: [usize; MAX_RANK],
    strides: [usize; MAX_RANK],
    rank: usize,
}

impl Layout {
    /// Row-major layout. `argument` names the tensor in an error.
    pub fn contiguous(argument: &str, shape: &[usize]) -> Result<Self> {
        ensure(
            shape.len() <= MAX_RANK,
            argument,
            || format!("rank at most {MAX_RANK}"),
            || format!("shape {shape:?}"),
        )?;
        let mut layout = Self { shape: [1; MAX_RANK], strides: [0; MAX_RANK], rank: shape.len() };
        let mut stride = 1usize;
        for axis in (0..shape.len()).rev() {
            layout.shape[axis] = shape[axis];
            layout.strides[axis] = stride;
            stride = stride
                .checked_mul(shape[axis].max(1))
                .ok_or_else(|| Error::input(argument, "a shape whose size fits in memory", format!("{shape:?}")))?;
        }
        Ok(layout)
    }

    /// Layout with strides in elements, first axis first.
    pub fn strided(argument: &str, shape: &[usize], strides: &[usize]) -> Result<Self> {
        let mut layout = Self::contiguous(argument, shape)?;
        ensure(
            strides.len() == shape.len(),
            argument,
            || format!("{} strides, one per axis", shape.len()),
            || format!("{strides:?}"),
        )?;
        layout.strides[..strides.len()].copy_from_slice(strides);
        Ok(layout)
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Strides of the axes in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.rank]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// True if there is no element.
    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Elements between the first and one past the last that the layout reaches; `None` on overflow.
    fn extent(&self) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let mut last = 0usize;
        for (size, stride) in self.shape().iter().zip(self.strides()) {
            last = last.checked_add((size - 1).checked_mul(*stride)?)?;
        }
        last.checked_add(1)
    }

    /// True if two different indices may name one element. Exact for nested layouts (every axis
    /// steps over all of the axes with smaller strides), which are the ones that occur.
    fn overlaps(&self) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut axes: Vec<(usize, usize)> =
            self.strides().iter().copied().zip(self.shape().iter().copied()).filter(|(_, size)| *size > 1).collect();
        axes.sort_unstable();
        let mut reach = 0usize;
        for (stride, size) in axes {
            if stride <= reach {
                return true;
            }
            reach += (size - 1) * stride;
        }
        false
    }

    /// The layout of the indices `range` of `axis`, and the offset of its first element.
    fn slice(&self, argument: &str, axis: usize, range: &Range<usize>) -> Result<(Self, usize)> {
        ensure(
            axis < self.rank && range.start <= range.end && range.end <= self.shape[axis],
            argument,
            || format!("a range within axis {axis} of shape {:?}", self.shape()),
            || format!("{range:?}"),
        )?;
        let offset = range.start * self.strides[axis];
        let mut layout = *self;
        layout.shape[axis] = range.len();
        Ok((layout, if layout.is_empty() { 0 } else { offset }))
    }

    fn check_bounds(&self, argument: &str, len: usize) -> Result<()> {
        ensure(
            self.extent().is_some_and(|extent| extent <= len),
            argument,
            || format!("a slice that holds shape {:?} with strides {:?}", self.shape(), self.strides()),
            || format!("{len} elements"),
        )
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} strides {:?}", self.shape(), self.strides())
    }
}

macro_rules! variants {
    ($value:expr, $enum:ident, $data:ident => $body:expr) => {
        match $value {
            $enum::F32($data) => $body,
            $enum::Bf16($data) => $body,
            $enum::F16($data) => $body,
            $enum::I32($data) => $body,
        }
    };
}
use variants;

/// A borrowed slice of any element type.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Slice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    I32(&'a [i32]),
}

/// A mutably borrowed slice of any element type.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum SliceMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    I32(&'a mut [i32]),
}

impl Slice<'_> {
    fn dtype(&self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::Bf16(_) => DType::Bf16,
            Slice::F16(_) => DType::F16,
            Slice::I32(_) => DType::I32,
        }
    }
}

/// A strided, read-only view of host memory with a run-time element type.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    data: Slice<'a>,
    layout: Layout,
}

impl<'a> TensorView<'a> {
    /// Row-major view of `data`. `argument` names the tensor in an error.
    pub fn new<T: Element>(argument: &str, data: &'a [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(argument, shape)?;
        ensure(
            layout.len() == data.len(),
            argument,
            || format!("{} elements for shape {shape:?}", layout.len()),
            || format!("{} elements", data.len()),
        )?;
        Ok(Self { data: T::slice(data), layout })
    }

    /// View with strides in elements (0 repeats an axis).
    pub fn strided<T: Element>(argument: &str, data: &'a [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let layout = Layout::strided(argument, shape, strides)?;
        layout.check_bounds(argument, data.len())?;
        Ok(Self { data: T::slice(data), layout })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Shape and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The underlying slice; element `[i, j, ..]` lies at the sum of index times stride.
    pub fn slice(&self) -> Slice<'a> {
        self.data
    }

    /// Typed access, or an error that names the argument.
    pub fn typed<T: Element>(&self, argument: &str) -> Result<Strided<'a, T>> {
        match T::unslice(&self.data) {
            Some(data) => Ok(Strided { data, layout: self.layout }),
            None => Err(Error::input(argument, format!("dtype {}", T::DTYPE), format!("dtype {}", self.dtype()))),
        }
    }

    /// The indices `range` of `axis`. `argument` names the tensor in an error.
    pub fn slice_axis(&self, argument: &str, axis: usize, range: Range<usize>) -> Result<Self> {
        let (layout, offset) = self.layout.slice(argument, axis, &range)?;
        let data = variants!(&self.data, Slice, data => Element::slice(&data[offset..]));
        Ok(Self { data, layout })
    }

    /// A contiguous owned copy.
    pub fn to_tensor(&self) -> Tensor {
        fn copy<T: Element>(data: &[T], layout: &Layout) -> Vec<T> {
            let mut out = Vec::with_capacity(layout.len());
            for_each_offset(layout, |offset| out.push(data[offset]));
            out
        }
        let layout = &self.layout;
        let storage = match self.data {
            Slice::F32(data) => Storage::F32(copy(data, layout)),
            Slice::Bf16(data) => Storage::Bf16(copy(data, layout)),
            Slice::F16(data) => Storage::F16(copy(data, layout)),
            Slice::I32(data) => Storage::I32(copy(data, layout)),
        };
        Tensor { storage, shape: self.shape().to_vec() }
    }

    /// All elements in row-major order, widened to f64.
    pub fn to_f64(&self) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.layout.len());
        match self.data {
            Slice::I32(data) => for_each_offset(&self.layout, |offset| out.push(f64::from(data[offset]))),
            Slice::F32(data) => for_each_offset(&self.layout, |offset| out.push(f64::from(data[offset]))),
            Slice::Bf16(data) => for_each_offset(&self.layout, |offset| out.push(data[offset].to_f64())),
            Slice::F16(data) => for_each_offset(&self.layout, |offset| out.push(data[offset].to_f64())),
        }
        out
    }
}

/// Calls `visit` with the offset of every element in row-major order.
fn for_each_offset(layout: &Layout, mut visit: impl FnMut(usize)) {
    if layout.is_empty() {
        return;
    }
    let rank = layout.rank;
    let mut index = [0usize; MAX_RANK];
    let mut offset = 0usize;
    loop {
        visit(offset);
        let mut axis = rank;
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            offset += layout.strides[axis];
            if index[axis] < layout.shape[axis] {
                break;
            }
            offset -= layout.strides[axis] * layout.shape[axis];
            index[axis] = 0;
        }
    }
}

/// A strided, writable view of host memory with a run-time element type. No two indices name one element.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    data: SliceMut<'a>,
    layout: Layout,
}

impl<'a> TensorViewMut<'a> {
    /// Row-major view of `data`. `argument` names the tensor in an error.
    pub fn new<T: Element>(argument: &str, data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = *TensorView::new(argument, data, shape)?.layout();
        Ok(Self { data: T::slice_mut(data), layout })
    }

    /// View with strides in elements. Strides that let two indices share an element are an error.
    pub fn strided<T: Element>(argument: &str, data: &'a mut [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let layout = Layout::strided(argument, shape, strides)?;
        layout.check_bounds(argument, data.len())?;
        ensure(
            !layout.overlaps(),
            argument,
            || "strides under which no two elements overlap".into(),
            || format!("shape {shape:?} with strides {strides:?}"),
        )?;
        Ok(Self { data: T::slice_mut(data), layout })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        variants!(&self.data, SliceMut, data => dtype_of(data))
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// A shorter borrow of the same view.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        let layout = self.layout;
        TensorViewMut { data: variants!(&mut self.data, SliceMut, data => Element::slice_mut(data)), layout }
    }

    /// The indices `range` of `axis`. `argument` names the tensor in an error.
    pub fn slice_axis(&mut self, argument: &str, axis: usize, range: Range<usize>) -> Result<TensorViewMut<'_>> {
        let (layout, offset) = self.layout.slice(argument, axis, &range)?;
        let data = variants!(&mut self.data, SliceMut, data => Element::slice_mut(&mut data[offset..]));
        Ok(TensorViewMut { data, layout })
    }

    /// Read-only view of the same elements.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { data: variants!(&self.data, SliceMut, data => Element::slice(data)), layout: self.layout }
    }

    /// Typed access, or an error that names the argument.
    pub fn typed<T: Element>(&mut self, argument: &str) -> Result<StridedMut<'_, T>> {
        let (got, layout) = (self.dtype(), self.layout);
        match T::unslice_mut(&mut self.data) {
            Some(data) => Ok(StridedMut { data, layout }),
            None => Err(Error::input(argument, format!("dtype {}", T::DTYPE), format!("dtype {got}"))),
        }
    }
}

fn dtype_of<T: Element>(_: &[T]) -> DType {
    T::DTYPE
}

#[cfg(test)]
mod tests;
