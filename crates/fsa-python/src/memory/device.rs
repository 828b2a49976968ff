//! Tensors of PyTorch on a CUDA device, as the Python half of the package describes them.
//!
//! The device's memory is never read or written from here: a description becomes a span, and the kernels of
//! `fsa::cuda` check spans against the sizes of the call. Who guarantees what:
//!
//! - `_torch_cuda.py` and `_torch_cuda_nsa.py`, the only callers: take address, shape and strides from tensors that
//!   they hold until the call returns; outputs and workspace are new tensors, allocated for the stream of the call.
//! - PyTorch's allocator: memory that was allocated for a stream is not given to other work before that stream has
//!   done what it was given.
//! - The user, as in every library for the GPU: inputs are ready in the order of the current stream, and the prefix
//!   sums are what the documentation asks for, since nobody can look at them without waiting for the device.

use fsa::cuda::driver::{Device, DeviceBatch, DeviceSpan, Stream};
use fsa::cuda::plan::Sizes;
use fsa::cuda::stages::{Gates, TensorSpan};
use fsa::{DType, Error, Result};
use pyo3::FromPyObject;
use std::sync::Arc;

/// `(data_ptr, device, dtype, shape, strides)`; `device` is -1 for the CPU.
#[derive(Debug, FromPyObject)]
pub struct DeviceTensor(u64, i64, String, Vec<usize>, Vec<usize>);

impl DeviceTensor {
    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.3
    }

    /// As PyTorch names it: `cpu`, `cuda:0`.
    pub fn device(&self) -> String {
        usize::try_from(self.1).map_or_else(|_| "cpu".into(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// Number of its CUDA device.
    pub fn ordinal(&self) -> Option<usize> {
        usize::try_from(self.1).ok()
    }

    /// As PyTorch names it: `bfloat16`, `int32`.
    pub fn dtype_name(&self) -> &str {
        &self.2
    }

    /// The dtype, if a stage knows it.
    pub fn dtype(&self) -> Option<DType> {
        match self.dtype_name() {
            "float32" => Some(DType::F32),
            "bfloat16" => Some(DType::Bf16),
            "float16" => Some(DType::F16),
            "int32" => Some(DType::I32),
            _ => None,
        }
    }

    /// A `[rows, heads, dim]` tensor whose last axis has no gaps; `dim` is that of the kernels.
    ///
    /// # Errors
    /// [`Error::Input`] if it is another tensor than the plan is for.
    pub fn vectors(&self, name: &str, place: &Place, [rows, heads]: [usize; 2]) -> Result<TensorSpan<'_>> {
        self.expect(name, place, place.sizes.dtype, &[rows, heads, place.sizes.head_dim])?;
        self.adjacent(name)?;
        Ok(TensorSpan { span: self.span(name)?, row_stride: self.4[0], head_stride: self.4[1] })
    }

    /// Weights of the three branches, `[rows, 3]` or `[rows, heads, 3]`, the three adjacent.
    ///
    /// # Errors
    /// [`Error::Input`] if it is another tensor than the plan is for.
    pub fn gates(&self, name: &str, place: &Place) -> Result<Gates<'_>> {
        let Sizes { total_q, num_q_heads, dtype, .. } = place.sizes;
        let per_head = self.3.len() == 3;
        let shape: &[usize] = if per_head { &[total_q, num_q_heads, 3] } else { &[total_q, 3] };
        self.expect(name, place, dtype, shape)?;
        self.adjacent(name)?;
        let head_stride = if per_head { self.4[1] } else { 0 };
        Ok(Gates { span: self.span(name)?, row_stride: self.4[0], head_stride })
    }

    fn adjacent(&self, name: &str) -> Result<()> {
        if self.4.last() == Some(&1) || self.is_empty() {
            return Ok(());
        }
        Err(Error::input(name, "a last axis without gaps", format!("strides {:?}", self.4)))
    }

    /// A tensor without gaps.
    ///
    /// # Errors
    /// [`Error::Input`] if it is another tensor than the plan is for.
    pub fn plain(&self, name: &str, place: &Place, dtype: DType, shape: &[usize]) -> Result<DeviceSpan<'_>> {
        self.expect(name, place, dtype, shape)?;
        let mut step = 1;
        for (size, stride) in self.3.iter().zip(&self.4).rev() {
            if *size > 1 && *stride != step && !self.is_empty() {
                return Err(Error::input(name, "a tensor without gaps", format!("strides {:?}", self.4)));
            }
            step *= size;
        }
        self.span(name)
    }

    /// Scratch memory: bytes without gaps, as many as there are.
    ///
    /// # Errors
    /// [`Error::Input`] if it is no tensor of bytes on the device.
    pub fn bytes(&self, name: &str, place: &Place) -> Result<DeviceSpan<'_>> {
        if self.2 != "uint8" || self.3.len() != 1 || self.ordinal() != Some(place.ordinal) {
            return Err(Error::input(name, "uint8 [bytes] on the device of the call", self.described()));
        }
        self.span(name)
    }

    fn expect(&self, name: &str, place: &Place, dtype: DType, shape: &[usize]) -> Result<()> {
        if self.ordinal() == Some(place.ordinal)
            && self.dtype() == Some(dtype)
            && self.3 == shape
            && self.4.len() == shape.len()
        {
            return Ok(());
        }
        let expected = format!("{dtype} {shape:?} on cuda:{}", place.ordinal);
        Err(Error::input(name, expected, self.described()))
    }

    /// Strides of a tensor without elements mean nothing.
    fn is_empty(&self) -> bool {
        self.3.contains(&0)
    }

    fn described(&self) -> String {
        format!("{} {:?} on {}", self.2, self.3, self.device())
    }

    /// From the first to the last element that the strides reach.
    fn span(&self, name: &str) -> Result<DeviceSpan<'_>> {
        let element = self.dtype().map_or(1, |dtype| dtype.size_bytes());
        let axes = self.3.iter().zip(&self.4).map(|(size, stride)| size.saturating_sub(1).checked_mul(*stride));
        let elements =
            if self.is_empty() { Some(0) } else { axes.sum::<Option<usize>>().and_then(|n| n.checked_add(1)) };
        let bytes = elements.and_then(|elements| elements.checked_mul(element));
        let bytes = bytes.ok_or_else(|| Error::input(name, "a shape that fits in memory", self.described()))?;
        // SAFETY: the description is that of a tensor on this device (`ordinal` was compared), so its strides reach
        // memory of its storage only; the module's documentation says why it stays that until the work is done.
        Ok(unsafe { DeviceSpan::from_raw(self.0, bytes) })
    }
}

/// Where a call runs, and its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number of the device.
    pub ordinal: usize,
    /// Sizes as the kernels see them: vectors are padded.
    pub sizes: Sizes,
}

/// The prefix sums of a call.
///
/// # Errors
/// [`Error::Input`] if they have another shape, dtype or device.
pub fn batch<'a>(q: &'a DeviceTensor, k: &'a DeviceTensor, place: &Place) -> Result<DeviceBatch<'a>> {
    let Sizes { sequences, total_q, total_kv, .. } = place.sizes;
    let sums = [("cu_seqlens_q", q), ("cu_seqlens_k", k)];
    let [q, k] = sums.map(|(name, tensor)| tensor.plain(name, place, DType::I32, &[sequences + 1]));
    // SAFETY: both hold `sequences + 1` i32. That they are prefix sums of these totals, and that no sequence has more
    // query rows than keys, is the user's promise, which `validate=True` checks. Over compressed keys `total_kv` is a
    // bound that follows from their number: the tokens themselves are not in memory, and nothing is read by them.
    Ok(unsafe { DeviceBatch::from_raw(q?, k?, (sequences, total_q, total_kv)) })
}

/// The stream that PyTorch gave to the call.
pub fn stream(device: &Arc<Device>, handle: u64) -> Stream {
    // SAFETY: `_torch_cuda.py` passes the handle of PyTorch's current stream on the device of the call. PyTorch uses
    // the primary context, as `Device` does, and keeps its streams for the life of the process.
    unsafe { Stream::from_raw(device, handle) }
}
