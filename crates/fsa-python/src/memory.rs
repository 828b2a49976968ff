//! Arrays of NumPy and tensors of PyTorch as views. All `unsafe` code of the crate is here, in [`device`] and in [`exchange`].
//!
//! Who guarantees what:
//!
//! - NumPy and PyTorch: `data_ptr`, `shape`, `stride` and their equivalents describe memory that the object
//!   keeps alive. Rust asks the object itself; no address is taken from Python code.
//! - [`Memory`]: holds a reference to the object for as long as a view of it exists.
//! - [`write_views`]: memory that a call writes overlaps neither an input nor another output.
//! - The caller of a Python function: as in NumPy and PyTorch themselves, no other thread writes to or
//!   resizes an argument during the call.
#![allow(unsafe_code, reason = "this module turns addresses that Python objects report into slices")]

pub mod device;
pub mod exchange;

use fsa::{DType, Element, Error, Result, TensorView, TensorViewMut, bf16, f16};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ops::Range;

/// What the elements of an argument are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Numbers to compute with: f32, bf16 or f16.
    Number,
    /// Ids and prefix sums: i32.
    Index,
}

/// Memory of a Python array: a description, and a reference that keeps it alive.
#[derive(Debug)]
pub struct Memory<'py> {
    _owner: Bound<'py, PyAny>,
    address: usize,
    /// As NumPy and PyTorch name it: `float32`, `bfloat16`, `int32`.
    dtype: String,
    shape: Vec<usize>,
    /// In elements; 0 where an axis has at most one index.
    strides: Vec<usize>,
    /// As PyTorch names it: `cpu`, `cuda:0`.
    device: String,
    writable: bool,
}

impl<'py> FromPyObject<'_, 'py> for Memory<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let object = object.to_owned();
        if object.hasattr("data_ptr")? {
            return from_torch(object);
        }
        match object.getattr_opt("__array_interface__")? {
            Some(interface) => from_numpy(object, interface.cast_into::<PyDict>()?),
            None => {
                let got = object.get_type().fully_qualified_name()?;
                Err(PyTypeError::new_err(format!("expected numpy.ndarray or torch.Tensor, got {got}")))
            }
        }
    }
}

fn from_torch(object: Bound<'_, PyAny>) -> PyResult<Memory<'_>> {
    let dtype = object.getattr("dtype")?.str()?.to_string();
    let strides: Vec<isize> = object.call_method0("stride")?.extract()?;
    let shape: Vec<usize> = object.getattr("shape")?.extract()?;
    Ok(Memory {
        address: object.call_method0("data_ptr")?.extract()?,
        dtype: dtype.trim_start_matches("torch.").to_string(),
        strides: element_strides(&shape, &strides, 1)?,
        shape,
        device: object.getattr("device")?.str()?.to_string(),
        writable: true,
        _owner: object,
    })
}

fn from_numpy<'py>(object: Bound<'py, PyAny>, interface: Bound<'py, PyDict>) -> PyResult<Memory<'py>> {
    let missing = || PyTypeError::new_err("__array_interface__ without data");
    let (address, read_only): (usize, bool) = interface.get_item("data")?.ok_or_else(missing)?.extract()?;
    let dtype = object.getattr("dtype")?;
    let (size, native): (isize, bool) = (dtype.getattr("itemsize")?.extract()?, dtype.getattr("isnative")?.extract()?);
    if !native {
        return Err(PyTypeError::new_err(format!("expected a dtype in the machine's byte order, got {dtype}")));
    }
    let shape: Vec<usize> = object.getattr("shape")?.extract()?;
    let strides: Vec<isize> = object.getattr("strides")?.extract()?;
    Ok(Memory {
        address,
        dtype: dtype.getattr("name")?.extract()?,
        strides: element_strides(&shape, &strides, size)?,
        shape,
        device: "cpu".into(),
        writable: !read_only,
        _owner: object,
    })
}

/// Strides in elements from strides in units of `1 / size` element.
fn element_strides(shape: &[usize], strides: &[isize], size: isize) -> PyResult<Vec<usize>> {
    let convert = |(count, stride): (&usize, &isize)| match usize::try_from(*stride) {
        _ if *count <= 1 => Ok(0),
        Ok(stride) if stride.is_multiple_of(size.unsigned_abs().max(1)) => Ok(stride / size.unsigned_abs().max(1)),
        _ => Err(PyTypeError::new_err(format!("expected strides of whole elements, none negative, got {strides:?}"))),
    };
    shape.iter().zip(strides).map(convert).collect()
}

impl Memory<'_> {
    /// Sizes of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Read-only view of host memory.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for memory of another device and for a dtype that the stages do not compute
    /// with; [`Error::Input`] for an index that is no i32.
    pub fn view(&self, argument: &str, role: Role) -> Result<TensorView<'_>> {
        fn of<'a, T: Element>(memory: &'a Memory<'_>, argument: &str) -> Result<TensorView<'a>> {
            let len = memory.checked_len::<T>(argument)?;
            let data: &[T] = if len == 0 {
                &[]
            } else {
                // SAFETY: `checked_len` found the address aligned and not null and the extent below isize::MAX.
                // The object that reported address, shape and strides owns that memory and is referenced by
                // `memory`, which the slice borrows. Every bit pattern is a `T`. Nobody writes to it: this
                // call does not (`write_views`), and the caller keeps other threads from it.
                unsafe { std::slice::from_raw_parts(memory.address as *const T, len) }
            };
            TensorView::strided(argument, data, &memory.shape, &memory.strides)
        }
        match self.host_dtype(argument, role)? {
            DType::F32 => of::<f32>(self, argument),
            DType::Bf16 => of::<bf16>(self, argument),
            DType::F16 => of::<f16>(self, argument),
            DType::I32 => of::<i32>(self, argument),
        }
    }

    /// Writable view of host memory, for [`write_views`], which has checked that nothing else names it.
    fn view_mut(&mut self, argument: &str, role: Role) -> Result<TensorViewMut<'_>> {
        fn of<'a, T: Element>(memory: &'a mut Memory<'_>, argument: &str) -> Result<TensorViewMut<'a>> {
            let len = memory.checked_len::<T>(argument)?;
            let data: &mut [T] = if len == 0 {
                &mut []
            } else {
                // SAFETY: as in `view`. The slice is the only one over this memory: `write_views` found that it
                // overlaps no other argument of the call, `memory` is borrowed mutably, and the caller keeps
                // other threads from it.
                unsafe { std::slice::from_raw_parts_mut(memory.address as *mut T, len) }
            };
            TensorViewMut::strided(argument, data, &memory.shape, &memory.strides)
        }
        if !self.writable {
            return Err(Error::input(argument, "a writable array", "a read-only one"));
        }
        match self.host_dtype(argument, role)? {
            DType::F32 => of::<f32>(self, argument),
            DType::Bf16 => of::<bf16>(self, argument),
            DType::F16 => of::<f16>(self, argument),
            DType::I32 => of::<i32>(self, argument),
        }
    }

    /// Refuses memory of a device other than the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] that names the device.
    pub fn check_host(&self, argument: &str) -> Result<()> {
        if self.device == "cpu" {
            return Ok(());
        }
        let (constraint, got) = (format!("device of {argument}"), self.device.clone());
        Err(Error::Unsupported { constraint, got, supported: "cpu, cuda".into() })
    }

    fn host_dtype(&self, argument: &str, role: Role) -> Result<DType> {
        self.check_host(argument)?;
        match (role, self.dtype.as_str()) {
            (Role::Number, "float32") => Ok(DType::F32),
            (Role::Number, "bfloat16") => Ok(DType::Bf16),
            (Role::Number, "float16") => Ok(DType::F16),
            (Role::Index, "int32") => Ok(DType::I32),
            (Role::Index, got) => Err(Error::input(argument, "dtype int32", format!("dtype {got}"))),
            (Role::Number, got) => Err(Error::Unsupported {
                constraint: format!("dtype of {argument}"),
                got: got.into(),
                supported: "float32, bfloat16, float16".into(),
            }),
        }
    }

    /// Elements from the first to the last that the strides reach, if a slice of `T` may begin at the address.
    fn checked_len<T>(&self, argument: &str) -> Result<usize> {
        let len = self.extent().filter(|len| len.checked_mul(size_of::<T>()).is_some_and(|n| n <= isize::MAX as usize));
        let len = len.ok_or_else(|| Error::input(argument, "a shape that fits in memory", self.described()))?;
        if len > 0 && (self.address == 0 || !self.address.is_multiple_of(align_of::<T>())) {
            let expected = format!("memory aligned to {} bytes", align_of::<T>());
            return Err(Error::input(argument, expected, format!("address {:#x}", self.address)));
        }
        Ok(len)
    }

    fn extent(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let axes = self.shape.iter().zip(&self.strides);
        let last = axes.map(|(size, stride)| (size - 1).checked_mul(*stride));
        last.sum::<Option<usize>>()?.checked_add(1)
    }

    fn described(&self) -> String {
        format!("shape {:?} with strides {:?}", self.shape, self.strides)
    }

    /// Addresses that the strides reach, if there are any. An element has at most 4 bytes.
    fn span(&self) -> Option<Range<usize>> {
        let bytes = if matches!(self.dtype.as_str(), "bfloat16" | "float16") { 2 } else { 4 };
        let end = self.address.checked_add(self.extent()?.checked_mul(bytes)?)?;
        (end > self.address).then_some(self.address..end)
    }

    fn overlaps(&self, other: &Memory<'_>) -> bool {
        let apart = |a: Range<usize>, b: Range<usize>| a.end <= b.start || b.end <= a.start;
        self.span().zip(other.span()).is_some_and(|(a, b)| !apart(a, b))
    }
}

/// An output of a call: its name, the meaning of its elements, its memory.
pub type Output<'a, 'py> = (&'static str, Role, &'a mut Memory<'py>);

/// Writable views of all outputs of a call, required and optional, in order. `inputs` are all of its inputs.
///
/// # Errors
///
/// Those of [`Memory::view`]; [`Error::Input`] for an output that overlaps an input or another output, is
/// read-only, or has strides under which two of its elements overlap.
pub fn write_views<'a, const N: usize, const M: usize>(
    inputs: &[&Memory<'_>],
    required: [Output<'a, '_>; N],
    optional: [Option<Output<'a, '_>>; M],
) -> Result<([TensorViewMut<'a>; N], [Option<TensorViewMut<'a>>; M])> {
    let outputs: Vec<(&str, &Memory<'_>)> = {
        let required = required.iter().map(|(name, _, memory)| (*name, &**memory));
        required.chain(optional.iter().flatten().map(|(name, _, memory)| (*name, &**memory))).collect()
    };
    for (at, (name, output)) in outputs.iter().enumerate() {
        let others = outputs[..at].iter().map(|(_, other)| *other);
        if inputs.iter().copied().chain(others).any(|other| output.overlaps(other)) {
            return Err(Error::input(*name, "memory of its own", "memory that another argument uses"));
        }
    }
    drop(outputs);
    let views = required.into_iter().map(|(name, role, memory)| memory.view_mut(name, role));
    let extra = optional.into_iter().map(|output| output.map(|(name, role, memory)| memory.view_mut(name, role)));
    Ok((exactly(views.collect())?, exactly(extra.map(Option::transpose).collect())?))
}

/// A vector whose length is known as an array.
fn exactly<T, const N: usize>(items: Result<Vec<T>>) -> Result<[T; N]> {
    let items = items?;
    let got = items.len();
    items.try_into().map_err(|_| Error::input("outputs", format!("{N} views"), got))
}
