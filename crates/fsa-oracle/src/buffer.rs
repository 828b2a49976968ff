//! Tensors with any memory layout, whose unused memory and unwritten elements can be told apart.

use crate::array::round_to;
use crate::case::ViewLayout;
use fsa_core::{DType, Element, Result, Storage, TensorView, TensorViewMut, bf16, f16};

/// Memory and a strided view of it. Elements that the view does not reach hold poison.
#[derive(Debug, Clone)]
pub struct Buffer {
    name: &'static str,
    storage: Storage,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// NaNs with a payload that no computation makes, and the least integer.
const POISON_F32: u32 = 0x7fd5_a5a5;
const POISON_16: u16 = 0x7fd5;
const POISON_I32: i32 = i32::MIN;

/// Unused elements after every vector of a padded layout. Odd, so that nothing stays aligned.
const GAP: usize = 3;

/// Strides and number of elements in memory.
fn lay_out(shape: &[usize], layout: ViewLayout) -> (Vec<usize>, usize) {
    let rank = shape.len();
    let mut order: Vec<usize> = (0..rank).collect();
    if layout == ViewLayout::HeadMajor && rank >= 2 {
        order.swap(0, 1);
    }
    let (mut step, gap) = match layout {
        ViewLayout::Contiguous | ViewLayout::HeadMajor => (1, 0),
        ViewLayout::Padded => (1, GAP),
        ViewLayout::Interleaved => (2, 1),
    };
    let mut strides = vec![0; rank];
    for axis in order.into_iter().rev() {
        strides[axis] = step;
        step = step * shape[axis].max(1) + gap;
    }
    (strides, step)
}

/// Offsets of all elements in row-major order.
fn offsets(shape: &[usize], strides: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0];
    for (size, stride) in shape.iter().zip(strides) {
        offsets = offsets.iter().flat_map(|offset| (0..*size).map(move |i| offset + i * stride)).collect();
    }
    offsets
}

macro_rules! each {
    ($storage:expr, $data:ident => $body:expr) => {
        match $storage {
            Storage::F32($data) => $body,
            Storage::Bf16($data) => $body,
            Storage::F16($data) => $body,
            Storage::I32($data) => $body,
        }
    };
}

impl Buffer {
    /// All poison: what an output is before a call.
    pub fn poisoned(name: &'static str, dtype: DType, shape: &[usize], layout: ViewLayout) -> Self {
        let (strides, len) = lay_out(shape, layout);
        let storage = match dtype {
            DType::F32 => Storage::F32(vec![f32::from_bits(POISON_F32); len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::from_bits(POISON_16); len]),
            DType::F16 => Storage::F16(vec![f16::from_bits(POISON_16); len]),
            DType::I32 => Storage::I32(vec![POISON_I32; len]),
        };
        Self { name, storage, shape: shape.to_vec(), strides }
    }

    /// Rounds `values` (row-major) to `dtype`; the memory between them is poison.
    pub fn from_f64(
        name: &'static str,
        dtype: DType,
        shape: &[usize],
        layout: ViewLayout,
        values: impl IntoIterator<Item = f64>,
    ) -> Self {
        let mut buffer = Self::poisoned(name, dtype, shape, layout);
        let offsets = offsets(&buffer.shape, &buffer.strides);
        for (offset, value) in offsets.into_iter().zip(values) {
            buffer.write(offset, value);
        }
        buffer
    }

    fn write(&mut self, offset: usize, value: f64) {
        fn put<T: Element>(data: &mut [T], offset: usize, value: f64) {
            // Already rounded to the type: passing through f32 changes nothing.
            data[offset] = T::from_f32(value as f32);
        }
        match &mut self.storage {
            Storage::I32(data) => data[offset] = value as i32,
            Storage::F32(data) => put(data, offset, value),
            Storage::Bf16(data) => put(data, offset, round_to(DType::Bf16, value)),
            Storage::F16(data) => put(data, offset, round_to(DType::F16, value)),
        }
    }

    /// Overwrites the innermost vector at `leading`.
    pub fn set_row(&mut self, leading: &[usize], value: impl Fn(usize) -> f64) {
        let start: usize = leading.iter().zip(&self.strides).map(|(i, s)| i * s).sum();
        let (Some(size), Some(stride)) = (self.shape.last().copied(), self.strides.last().copied()) else { return };
        for k in 0..size {
            self.write(start + k * stride, value(k));
        }
    }

    /// Name of the tensor.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Read-only view.
    pub fn view(&self) -> Result<TensorView<'_>> {
        each!(&self.storage, data => TensorView::strided(self.name, data, &self.shape, &self.strides))
    }

    /// Writable view.
    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        each!(&mut self.storage, data => TensorViewMut::strided(self.name, data, &self.shape, &self.strides))
    }

    /// Bits of every element of the memory, unused ones included.
    pub fn bits(&self) -> Vec<u32> {
        match &self.storage {
            Storage::F32(data) => data.iter().map(|v| v.to_bits()).collect(),
            Storage::Bf16(data) => data.iter().map(|v| u32::from(v.to_bits())).collect(),
            Storage::F16(data) => data.iter().map(|v| u32::from(v.to_bits())).collect(),
            Storage::I32(data) => data.iter().map(|v| *v as u32).collect(),
        }
    }

    fn poison(&self) -> u32 {
        match &self.storage {
            Storage::F32(_) => POISON_F32,
            Storage::Bf16(_) | Storage::F16(_) => u32::from(POISON_16),
            Storage::I32(_) => POISON_I32 as u32,
        }
    }

    /// Index of the first element of the view that still holds poison.
    pub fn first_unwritten(&self) -> Option<Vec<usize>> {
        let bits = self.bits();
        let place = offsets(&self.shape, &self.strides).into_iter().position(|offset| bits[offset] == self.poison())?;
        Some(unravel(place, &self.shape))
    }

    /// Offset of the first element outside of the view that no longer holds poison.
    pub fn first_overrun(&self) -> Option<usize> {
        let mut inside = vec![false; self.bits().len()];
        offsets(&self.shape, &self.strides).into_iter().for_each(|offset| inside[offset] = true);
        let poison = self.poison();
        self.bits().iter().zip(inside).position(|(bits, inside)| !inside && *bits != poison)
    }
}

/// Index of the element that is number `place` in row-major order.
pub fn unravel(mut place: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        index[axis] = place % shape[axis].max(1);
        place /= shape[axis].max(1);
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_holds_the_same_elements() {
        for layout in ViewLayout::ALL {
            let values: Vec<f64> = (0..24).map(f64::from).collect();
            let mut buffer = Buffer::from_f64("x", DType::Bf16, &[2, 3, 4], *layout, values.clone());
            assert_eq!(buffer.view().expect("inside").to_f64(), values, "{layout}");
            assert!(buffer.view_mut().is_ok(), "{layout}");
            assert_eq!((buffer.first_unwritten(), buffer.first_overrun()), (None, None), "{layout}");
            buffer.set_row(&[1, 2], |_| f64::from_bits(0x7ff8_0000_0000_0000));
            assert!(buffer.view().expect("inside").to_f64()[20].is_nan());
        }
    }

    #[test]
    fn unwritten_and_overrun_elements_are_found() {
        let mut buffer = Buffer::poisoned("x", DType::F16, &[2, 3], ViewLayout::Padded);
        buffer.set_row(&[0], |_| 1.0);
        assert_eq!(buffer.first_unwritten(), Some(vec![1, 0]));
        buffer.write(3, 1.0);
        assert_eq!(buffer.first_overrun(), Some(3));
    }
}
