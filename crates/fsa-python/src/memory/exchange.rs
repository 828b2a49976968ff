//! The table of functions that PyTorch 2.11 and later has for other extensions (DLPack 1.3): one call of it says what five
//! attributes of a tensor say, in a tenth of the time, while the device waits for its first kernel.
//!
//! Who guarantees what:
//!
//! - DLPack: the layout of the table and of a description, for one major version; a table lives as long as the process.
//! - PyTorch: a description names axes that live while the tensor does, who holds the interpreter lock.
//! - [`Exchange::describe`]: asks about objects of the two types only whose layout PyTorch's functions take for granted.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyCapsule;
use std::ffi::{c_int, c_void};

/// The version of DLPack that is understood here.
const MAJOR: u32 = 1;
/// DLPack's number of CUDA devices.
const CUDA: i32 = 2;

/// `DLTensor`.
#[repr(C)]
struct Description {
    data: *mut c_void,
    device_type: i32,
    device: i32,
    axes: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type Describe = unsafe extern "C" fn(*mut c_void, *mut Description) -> c_int;
type CurrentStream = unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int;

/// `DLPackExchangeAPI`.
#[repr(C)]
struct Table {
    major: u32,
    _minor: u32,
    _older: *const c_void,
    _allocate: *const c_void,
    _take: *const c_void,
    _give: *const c_void,
    describe: Option<Describe>,
    current_stream: Option<CurrentStream>,
}

/// What PyTorch says of a tensor on a CUDA device.
pub struct Described {
    pub address: u64,
    pub device: i64,
    /// As PyTorch names it.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// The functions of a table, and the types of the objects that may be given to them.
pub struct Exchange {
    types: [Py<PyAny>; 2],
    describe: Describe,
    current_stream: CurrentStream,
}

impl Exchange {
    /// That of PyTorch; none if it is too old to have one.
    pub fn get(py: Python<'_>) -> Option<&'static Self> {
        static FOUND: PyOnceLock<Option<Exchange>> = PyOnceLock::new();
        FOUND.get_or_init(py, || Self::find(py).ok().flatten()).as_ref()
    }

    fn find(py: Python<'_>) -> PyResult<Option<Self>> {
        let torch = py.import("torch")?;
        let types = [torch.getattr("Tensor")?, torch.getattr("nn")?.getattr("Parameter")?];
        let Some(capsule) = types[0].getattr_opt("__dlpack_c_exchange_api__")? else { return Ok(None) };
        let table = capsule.cast::<PyCapsule>()?.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<Table>();
        // SAFETY: a capsule of this name holds such a table, which lives as long as the process; every version begins so.
        if unsafe { (&raw const (*table.as_ptr()).major).read() } != MAJOR {
            return Ok(None);
        }
        // SAFETY: as above; in this major version all of these are there.
        let Table { describe, current_stream, .. } = unsafe { table.as_ref() };
        let functions = describe.zip(*current_stream);
        Ok(functions.map(|(describe, current_stream)| Self {
            types: types.map(Bound::unbind),
            describe,
            current_stream,
        }))
    }

    /// What it says of an object; `None` if that is no plain tensor on a CUDA device, or holds what no stage knows.
    pub fn describe(&self, object: Borrowed<'_, '_, PyAny>) -> Option<Described> {
        let kind = object.get_type();
        if !self.types.iter().any(|known| known.is(&kind)) {
            return None;
        }
        let mut about = std::mem::MaybeUninit::<Description>::uninit();
        // SAFETY: the object is a tensor of PyTorch, referenced while the interpreter lock is held; the function writes a
        // description, or says that it did not.
        if unsafe { (self.describe)(object.as_ptr().cast(), about.as_mut_ptr()) } != 0 {
            drop(PyErr::take(object.py()));
            return None;
        }
        // SAFETY: 0 says that it was written.
        let about = unsafe { about.assume_init() };
        let dtype = match (about.code, about.bits, about.lanes) {
            (4, 16, 1) => "bfloat16",
            (2, 16, 1) => "float16",
            (2, 32, 1) => "float32",
            (0, 32, 1) => "int32",
            (1, 8, 1) => "uint8",
            _ => return None,
        };
        let axes = usize::try_from(about.axes).ok()?;
        if about.device_type != CUDA || (axes > 0 && (about.shape.is_null() || about.strides.is_null())) {
            return None;
        }
        let list = |numbers: *const i64| -> Option<Vec<usize>> {
            // SAFETY: as many numbers as the description says, in the tensor, which is referenced.
            (0..axes).map(|axis| usize::try_from(unsafe { numbers.add(axis).read() }).ok()).collect()
        };
        Some(Described {
            address: about.data as u64 + about.byte_offset,
            device: about.device.into(),
            dtype,
            shape: list(about.shape)?,
            strides: list(about.strides)?,
        })
    }

    /// PyTorch's current stream on a device.
    pub fn current_stream(&self, py: Python<'_>, device: i64) -> Option<u64> {
        let (device, mut stream) = (i32::try_from(device).ok()?, std::ptr::null_mut());
        // SAFETY: the interpreter lock is held, and `stream` outlives the call.
        if unsafe { (self.current_stream)(CUDA, device, &mut stream) } != 0 {
            drop(PyErr::take(py));
            return None;
        }
        Some(stream as u64)
    }
}
