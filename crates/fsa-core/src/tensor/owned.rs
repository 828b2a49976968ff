//! Owned contiguous tensors.

use super::{Layout, MAX_RANK, TensorView, TensorViewMut, variants};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use half::{bf16, f16};

/// An owned vector of any element type.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Storage {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I32(Vec<i32>),
}

/// An owned, contiguous, row-major tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub(super) storage: Storage,
    pub(super) shape: Vec<usize>,
}

impl Tensor {
    /// Wraps `data`. `argument` names the tensor in an error.
    pub fn new<T: Element>(argument: &str, data: Vec<T>, shape: &[usize]) -> Result<Self> {
        TensorView::new(argument, &data, shape)?;
        Ok(Self { storage: T::storage(data), shape: shape.to_vec() })
    }

    /// Zeros, or [`Error::OutOfMemory`] that names the tensor.
    pub fn zeros(argument: &str, dtype: DType, shape: &[usize]) -> Result<Self> {
        let len = Layout::contiguous(argument, shape)?.len();
        let bytes = len.saturating_mul(dtype.size_bytes());
        // A reservation that the allocator refuses is an error, not an abort; the vector is then taken
        // from zeroed pages, which costs nothing until they are touched.
        let probe = Vec::<u8>::new().try_reserve_exact(bytes);
        probe.map_err(|_| Error::OutOfMemory { what: argument.to_string(), bytes })?;
        let storage = match dtype {
            DType::F32 => Storage::F32(vec![0.0; len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::ZERO; len]),
            DType::F16 => Storage::F16(vec![f16::ZERO; len]),
            DType::I32 => Storage::I32(vec![0; len]),
        };
        Ok(Self { storage, shape: shape.to_vec() })
    }

    /// Rounds f32 values to `dtype`.
    pub fn from_f32(argument: &str, values: &[f32], dtype: DType, shape: &[usize]) -> Result<Self> {
        fn convert<T: Element>(values: &[f32]) -> Vec<T> {
            values.iter().map(|v| T::from_f32(*v)).collect()
        }
        match dtype {
            DType::F32 => Self::new(argument, values.to_vec(), shape),
            DType::Bf16 => Self::new(argument, convert::<bf16>(values), shape),
            DType::F16 => Self::new(argument, convert::<f16>(values), shape),
            DType::I32 => Self::new(argument, convert::<i32>(values), shape),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.view().dtype()
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of the elements.
    pub fn size_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().size_bytes()
    }

    /// The elements.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    fn layout(&self) -> Layout {
        // The shape was checked when the tensor was made.
        Layout::contiguous("tensor", &self.shape).unwrap_or(Layout {
            shape: [0; MAX_RANK],
            strides: [0; MAX_RANK],
            rank: 1,
        })
    }

    /// Read-only view.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { data: variants!(&self.storage, Storage, data => Element::slice(data)), layout: self.layout() }
    }

    /// Writable view.
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        let layout = self.layout();
        TensorViewMut { data: variants!(&mut self.storage, Storage, data => Element::slice_mut(data)), layout }
    }

    /// The elements as a typed slice, or an error that names the argument.
    pub fn as_slice<T: Element>(&self, argument: &str) -> Result<&[T]> {
        let slice = variants!(&self.storage, Storage, data => Element::slice(data));
        T::unslice(&slice)
            .ok_or_else(|| Error::input(argument, format!("dtype {}", T::DTYPE), format!("dtype {}", self.dtype())))
    }
}
