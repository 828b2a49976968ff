//! PyTorch's tensors as the kernels read them, and new ones for what they write.

use super::plans::{Key, Planned, Work};
use super::{check_scale, plans, python_path};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place, dtype_object, stream};
use crate::memory::exchange::Exchange;
use crate::run::detached;
use fsa::cuda::driver::Stream;
use fsa::cuda::stages::LaunchContext;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyTuple};
use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

/// A tensor, and what it says of itself.
pub struct Held<'py> {
    pub object: Bound<'py, PyAny>,
    about: DeviceTensor,
}

impl<'py> FromPyObject<'_, 'py> for Held<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self { about: object.extract()?, object: object.to_owned() })
    }
}

impl Deref for Held<'_> {
    type Target = DeviceTensor;

    fn deref(&self) -> &DeviceTensor {
        &self.about
    }
}

/// Three results.
pub type Triple<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);

/// What kernels read. A copy is dropped when the call was given to the stream: then PyTorch may give its memory to later
/// work of the same stream.
pub enum Read<'a, 'py> {
    AsItLies(&'a DeviceTensor),
    Copy(Held<'py>),
}

impl Deref for Read<'_, '_> {
    type Target = DeviceTensor;

    fn deref(&self) -> &DeviceTensor {
        match self {
            Read::AsItLies(tensor) => tensor,
            Read::Copy(tensor) => tensor,
        }
    }
}

impl<'a, 'py> Read<'a, 'py> {
    fn copy(object: PyResult<Bound<'py, PyAny>>) -> PyResult<Self> {
        Ok(Read::Copy(object?.extract()?))
    }
}

impl<'py> Held<'py> {
    /// Elements of the last axis.
    pub fn dim(&self) -> usize {
        self.shape().last().copied().unwrap_or(0)
    }

    /// `[rows, heads, dim]` as it lies, or a copy where kernels cannot read it: padded, in pieces of 16 bytes.
    pub fn read_vectors(&self, dim: usize) -> PyResult<Read<'_, 'py>> {
        let (&[_, _, own], &[row, head, element]) = (self.shape(), self.strides()) else {
            return Ok(Read::AsItLies(self)); // which is refused
        };
        if own < dim {
            return Read::copy(self.padded(&[0, dim - own]));
        }
        if element == 1 && self.is_aligned() && row.is_multiple_of(8) && head.is_multiple_of(8) {
            return Ok(Read::AsItLies(self));
        }
        self.moved()
    }

    /// A tensor as it lies, or a copy where it has gaps or begins between pieces of 16 bytes.
    pub fn read_plain(&self) -> PyResult<Read<'_, 'py>> {
        if self.is_aligned() && self.is_contiguous() { Ok(Read::AsItLies(self)) } else { self.moved() }
    }

    /// With zeros behind the last elements of the last axes, as `torch.nn.functional.pad` has them.
    pub fn padded(&self, zeros: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = self.object.py();
        py.import("torch")?.call_method1("constant_pad_nd", (&self.object, PyTuple::new(py, zeros)?))
    }

    /// A copy without gaps.
    fn moved<'a>(&self) -> PyResult<Read<'a, 'py>> {
        let py = self.object.py();
        let options = [("memory_format", py.import("torch")?.getattr("contiguous_format")?)].into_py_dict(py)?;
        Read::copy(self.object.call_method("clone", (), Some(&options)))
    }

    /// A new tensor of the same dtype on the same device.
    pub fn empty(&self, shape: &[usize]) -> PyResult<Self> {
        let py = self.object.py();
        let object = self.object.call_method1(intern!(py, "new_empty"), (PyTuple::new(py, shape)?,))?;
        self.described(object, self.dtype_name().clone(), shape)
    }

    /// The same of its own shape. PyTorch takes half as long for it where that has no gaps, and gives the same.
    fn empty_like(&self) -> PyResult<Self> {
        static EMPTY_LIKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let (py, shape) = (self.object.py(), self.shape());
        if !self.has_plain_strides() {
            return self.empty(shape);
        }
        let function = EMPTY_LIKE
            .get_or_try_init(py, || -> PyResult<_> { Ok(py.import("torch")?.getattr("empty_like")?.unbind()) })?;
        let object = function.bind(py).call1((&self.object,))?;
        self.described(object, self.dtype_name().clone(), shape)
    }

    /// The same of another dtype.
    pub fn empty_of(&self, dtype: &'static str, shape: &[usize]) -> PyResult<Self> {
        let py = self.object.py();
        let options = [(intern!(py, "dtype"), dtype_object(py, dtype)?)].into_py_dict(py)?;
        let shape_object = (PyTuple::new(py, shape)?,);
        let object = self.object.call_method(intern!(py, "new_empty"), shape_object, Some(&options))?;
        self.described(object, Cow::Borrowed(dtype), shape)
    }

    fn described(&self, object: Bound<'py, PyAny>, dtype: Cow<'static, str>, shape: &[usize]) -> PyResult<Self> {
        let address = object.call_method0(intern!(object.py(), "data_ptr"))?.extract()?;
        Ok(Self { about: DeviceTensor::contiguous(address, self.device_index(), dtype, shape), object })
    }

    /// The first elements of the last axis, without gaps.
    pub fn cut(self, dim: usize) -> PyResult<Bound<'py, PyAny>> {
        if self.dim() == dim {
            return Ok(self.object);
        }
        self.object.call_method1("narrow", (-1, 0, dim))?.call_method0("contiguous")
    }
}

/// A planned call.
pub struct Call {
    pub planned: Arc<Planned>,
    /// Factor of the logits. The kernels take no negative one: its sign goes into the query.
    pub scale: f32,
    negative: bool,
}

impl Call {
    /// Finds the plan, or makes it; the first call for given sizes may compile kernels.
    pub fn plan(py: Python<'_>, place: Place, work: Work, scale: f32) -> Result<Self, Failure> {
        let key = Key { place, work };
        let planned = match plans::find(&key) {
            Some(planned) => planned,
            None => {
                let path = python_path(py);
                detached(py, || plans::make(&key, &path))?
            }
        };
        check_scale(scale)?;
        Ok(Self { planned, scale: scale.abs(), negative: scale < 0.0 })
    }

    /// Elements that the kernels' vectors have.
    pub fn dim(&self) -> usize {
        self.planned.place().sizes.head_dim
    }

    /// Vectors as the kernels read them.
    pub fn vectors<'a, 'py>(&self, x: &'a Held<'py>) -> PyResult<Read<'a, 'py>> {
        x.read_vectors(self.dim())
    }

    /// The query, with the sign of the factor of its logits.
    pub fn query<'a, 'py>(&self, q: &'a Held<'py>) -> PyResult<Read<'a, 'py>> {
        if !self.negative {
            return self.vectors(q);
        }
        let negated: Held<'py> = q.object.call_method0("neg")?.extract()?;
        match self.vectors(&negated)? {
            Read::Copy(copy) => Ok(Read::Copy(copy)),
            Read::AsItLies(_) => Ok(Read::Copy(negated)),
        }
    }

    /// The gradient of the query as the user gave it, from that of the negated one.
    pub fn grad_query<'py>(&self, grad: Held<'py>, dim: usize) -> PyResult<Bound<'py, PyAny>> {
        if self.negative {
            grad.object.call_method0("neg_")?;
        }
        grad.cut(dim)
    }

    /// Room for a result of the shape of `x`, with padded vectors.
    pub fn like<'py>(&self, x: &Held<'py>) -> PyResult<Held<'py>> {
        let [rows, heads, own] = *x.shape() else { return x.empty(x.shape()) };
        if own == self.dim() { x.empty_like() } else { x.empty(&[rows, heads, self.dim()]) }
    }

    /// Scratch memory, and PyTorch's current stream.
    pub fn scratch<'py>(&self, x: &Held<'py>) -> Result<Scratch<'py>, Failure> {
        let workspace = x.empty_of("uint8", &[self.planned.workspace_bytes()])?;
        let handle = current_stream(x.object.py(), x.device_index())?;
        Ok(Scratch { stream: stream(self.planned.kernels.device(), handle), workspace })
    }
}

/// PyTorch's current stream on a device.
fn current_stream(py: Python<'_>, device: i64) -> PyResult<u64> {
    static CURRENT_STREAM: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    if let Some(handle) = Exchange::get(py).and_then(|exchange| exchange.current_stream(py, device)) {
        return Ok(handle);
    }
    let current = CURRENT_STREAM.get_or_try_init(py, || -> PyResult<_> {
        Ok(py.import("torch")?.getattr("_C")?.getattr("_cuda_getCurrentRawStream")?.unbind())
    })?;
    current.bind(py).call1((device,))?.extract()
}

/// What a launch takes besides its tensors.
pub struct Scratch<'py> {
    pub stream: Stream,
    pub workspace: Held<'py>,
}

impl Scratch<'_> {
    /// As a launch takes it.
    pub fn context(&self, planned: &Planned) -> fsa::Result<LaunchContext<'_>> {
        Ok(LaunchContext { stream: &self.stream, workspace: self.workspace.bytes("workspace", planned.place())? })
    }
}
