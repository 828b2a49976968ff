//! Tensors of PyTorch on a CUDA device: address, shape and strides as the tensor itself gives them.
//!
//! The device's memory is never read or written from here: a description becomes a span, and the kernels of
//! `fsa::cuda` check spans against the sizes of the call. Who guarantees what:
//!
//! - `crate::cuda`, the only user: holds the tensors until the call returns; outputs and workspace are new tensors,
//!   allocated for the stream of the call.
//! - `_torch_state.py`: describes a part of a tensor as it lies in it.
//! - PyTorch's allocator: memory that was allocated for a stream is not given to other work before that stream has
//!   done what it was given.
//! - The user, as in every library for the GPU: inputs are ready in the order of the current stream, and the prefix
//!   sums are what the documentation asks for, since nobody can look at them without waiting for the device.

use super::exchange::{Described, Exchange};
use fsa::cuda::driver::{Device, DeviceBatch, DeviceSpan, Stream};
use fsa::cuda::plan::Sizes;
use fsa::cuda::stages::{Gates, TensorSpan};
use fsa::{DType, Error, Result};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use std::borrow::Cow;
use std::sync::Arc;

/// A tensor, or a part of one as `(data_ptr, device, dtype, shape, strides)`.
#[derive(Debug)]
pub struct DeviceTensor {
    address: u64,
    /// -1 for the CPU.
    device: i64,
    /// As PyTorch names it: `bfloat16`, `int32`.
    dtype: Cow<'static, str>,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'py> FromPyObject<'_, 'py> for DeviceTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        if let Ok(part) = object.cast::<PyTuple>() {
            let (address, device, dtype, shape, strides): (_, _, String, _, _) = part.extract()?;
            return Ok(Self { address, device, dtype: dtype.into(), shape, strides });
        }
        if let Some(about) = Exchange::get(py).and_then(|exchange| exchange.describe(object)) {
            let Described { address, device, dtype, shape, strides } = about;
            return Ok(Self { address, device, dtype: Cow::Borrowed(dtype), shape, strides });
        }
        Ok(Self {
            address: object.call_method0(intern!(py, "data_ptr"))?.extract()?,
            device: object.call_method0(intern!(py, "get_device"))?.extract()?,
            dtype: dtype_name(&object.getattr(intern!(py, "dtype"))?)?,
            shape: object.getattr(intern!(py, "shape"))?.extract()?,
            strides: object.call_method0(intern!(py, "stride"))?.extract()?,
        })
    }
}

/// The dtypes of the stages and of scratch memory.
const NAMES: [&str; 5] = ["bfloat16", "float16", "float32", "int32", "uint8"];

/// PyTorch's objects of these dtypes, of which there is one each.
fn dtypes(py: Python<'_>) -> PyResult<&'static [Py<PyAny>]> {
    static OBJECTS: PyOnceLock<Vec<Py<PyAny>>> = PyOnceLock::new();
    let objects = OBJECTS.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        NAMES.into_iter().map(|name| Ok(torch.getattr(name)?.unbind())).collect::<PyResult<_>>()
    });
    objects.map(Vec::as_slice)
}

/// `torch.bfloat16` of `bfloat16`.
pub fn dtype_object<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    match NAMES.iter().position(|known| *known == name) {
        Some(at) => Ok(dtypes(py)?[at].bind(py).clone()),
        None => py.import("torch")?.getattr(name),
    }
}

/// `bfloat16` of `torch.bfloat16`.
fn dtype_name(dtype: &Bound<'_, PyAny>) -> PyResult<Cow<'static, str>> {
    match dtypes(dtype.py())?.iter().position(|object| object.is(dtype)) {
        Some(at) => Ok(Cow::Borrowed(NAMES[at])),
        None => Ok(dtype.str()?.to_str()?.trim_start_matches("torch.").to_string().into()),
    }
}

/// Strides of a new tensor without gaps.
fn plain_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    strides
}

impl DeviceTensor {
    /// A new tensor without gaps.
    pub fn contiguous(address: u64, device: i64, dtype: Cow<'static, str>, shape: &[usize]) -> Self {
        Self { address, device, dtype, shape: shape.to_vec(), strides: plain_strides(shape) }
    }

    /// Whether its strides are those of a new tensor without gaps.
    pub fn has_plain_strides(&self) -> bool {
        self.strides == plain_strides(&self.shape)
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements from one index of an axis to the next.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Number of its device, -1 for the CPU.
    pub fn device_index(&self) -> i64 {
        self.device
    }

    /// Whether it begins with a piece of 16 bytes, as kernels read memory.
    pub fn is_aligned(&self) -> bool {
        self.address.is_multiple_of(16)
    }

    /// Whether it has no gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut step = 1;
        self.is_empty()
            || self.shape.iter().zip(&self.strides).rev().all(|(size, stride)| {
                let adjacent = *size == 1 || *stride == step;
                step *= size;
                adjacent
            })
    }

    /// As PyTorch names it: `cpu`, `cuda:0`.
    pub fn device(&self) -> String {
        usize::try_from(self.device).map_or_else(|_| "cpu".into(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// Number of its CUDA device.
    pub fn ordinal(&self) -> Option<usize> {
        usize::try_from(self.device).ok()
    }

    /// As PyTorch names it: `bfloat16`, `int32`.
    pub fn dtype_name(&self) -> &Cow<'static, str> {
        &self.dtype
    }

    /// The dtype, if a stage knows it.
    pub fn dtype(&self) -> Option<DType> {
        match &*self.dtype {
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
        Ok(TensorSpan { span: self.span(name)?, row_stride: self.strides[0], head_stride: self.strides[1] })
    }

    /// Weights of the three branches, `[rows, 3]` or `[rows, heads, 3]`, the three adjacent.
    ///
    /// # Errors
    /// [`Error::Input`] if it is another tensor than the plan is for.
    pub fn gates(&self, name: &str, place: &Place) -> Result<Gates<'_>> {
        let Sizes { total_q, num_q_heads, dtype, .. } = place.sizes;
        let per_head = self.shape.len() == 3;
        let shape: &[usize] = if per_head { &[total_q, num_q_heads, 3] } else { &[total_q, 3] };
        self.expect(name, place, dtype, shape)?;
        self.adjacent(name)?;
        let head_stride = if per_head { self.strides[1] } else { 0 };
        Ok(Gates { span: self.span(name)?, row_stride: self.strides[0], head_stride })
    }

    fn adjacent(&self, name: &str) -> Result<()> {
        if self.strides.last() == Some(&1) || self.is_empty() {
            return Ok(());
        }
        Err(Error::input(name, "a last axis without gaps", format!("strides {:?}", self.strides)))
    }

    /// A tensor without gaps.
    ///
    /// # Errors
    /// [`Error::Input`] if it is another tensor than the plan is for.
    pub fn plain(&self, name: &str, place: &Place, dtype: DType, shape: &[usize]) -> Result<DeviceSpan<'_>> {
        self.expect(name, place, dtype, shape)?;
        if !self.is_contiguous() {
            return Err(Error::input(name, "a tensor without gaps", format!("strides {:?}", self.strides)));
        }
        self.span(name)
    }

    /// Scratch memory: bytes without gaps, as many as there are.
    ///
    /// # Errors
    /// [`Error::Input`] if it is no tensor of bytes on the device.
    pub fn bytes(&self, name: &str, place: &Place) -> Result<DeviceSpan<'_>> {
        if self.dtype != "uint8" || self.shape.len() != 1 || self.ordinal() != Some(place.ordinal) {
            return Err(Error::input(name, "uint8 [bytes] on the device of the call", self.described()));
        }
        self.span(name)
    }

    fn expect(&self, name: &str, place: &Place, dtype: DType, shape: &[usize]) -> Result<()> {
        if self.ordinal() == Some(place.ordinal)
            && self.dtype() == Some(dtype)
            && self.shape == shape
            && self.strides.len() == shape.len()
        {
            return Ok(());
        }
        let expected = format!("{dtype} {shape:?} on cuda:{}", place.ordinal);
        Err(Error::input(name, expected, self.described()))
    }

    /// Strides of a tensor without elements mean nothing.
    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    fn described(&self) -> String {
        format!("{} {:?} on {}", self.dtype, self.shape, self.device())
    }

    /// From the first to the last element that the strides reach.
    fn span(&self, name: &str) -> Result<DeviceSpan<'_>> {
        let element = self.dtype().map_or(1, |dtype| dtype.size_bytes());
        let axes =
            self.shape.iter().zip(&self.strides).map(|(size, stride)| size.saturating_sub(1).checked_mul(*stride));
        let elements =
            if self.is_empty() { Some(0) } else { axes.sum::<Option<usize>>().and_then(|n| n.checked_add(1)) };
        let bytes = elements.and_then(|elements| elements.checked_mul(element));
        let bytes = bytes.ok_or_else(|| Error::input(name, "a shape that fits in memory", self.described()))?;
        // SAFETY: the description is that of a tensor on this device (`ordinal` was compared), so its strides reach
        // memory of its storage only; the module's documentation says why it stays that until the work is done.
        Ok(unsafe { DeviceSpan::from_raw(self.address, bytes) })
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
    // SAFETY: `cuda::tensors` passes the handle of PyTorch's current stream on the device of the call. PyTorch uses
    // the primary context, as `Device` does, and keeps its streams for the life of the process.
    unsafe { Stream::from_raw(device, handle) }
}
