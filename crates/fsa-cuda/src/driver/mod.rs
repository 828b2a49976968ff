//! The boundary to the CUDA driver and to NVRTC: the only place of the crate with unsafe code.
//!
//! Both libraries are loaded at run time, so a binary starts without them and can say what is missing.
//! Holding a type is the proof that its check was made: a [`Device`] has a current driver and a usable
//! architecture, a [`Module`] is loaded, a `Function` takes the parameter struct of its type, a
//! [`DeviceSpan`] is memory of the device. There is one launch, in `module.rs`.

mod batch;
mod device;
mod graph;
mod memory;
mod module;
mod nvrtc;
mod recording;
mod replay;
mod stream;
mod tensor_map;

pub use batch::{DeviceBatch, UploadedBatch};
pub use device::{Device, DeviceFacts};
pub use graph::Graph;
pub use memory::{Address, DeviceBuffer, DeviceSpan};
pub use module::Module;
pub(crate) use module::{Function, KernelParams, LaunchDims};
pub use nvrtc::{Compiled, Nvrtc};
pub(crate) use replay::{Call, Replays};
pub use stream::{Event, Stream};
pub(crate) use tensor_map::{Boxes, MapWords};

use crate::error::{CudaError, Result};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

/// Oldest CUDA version of a driver that has every function called here: 12.0.
const OLDEST_DRIVER: i32 = 12_000;

fn version(number: i32) -> (u32, u32) {
    let number = number.unsigned_abs();
    (number / 1000, number % 1000 / 10)
}

/// Loads and initialises the driver, once; its newest supported CUDA version.
fn driver() -> Result<(u32, u32)> {
    static DRIVER: OnceLock<Result<(u32, u32)>> = OnceLock::new();
    DRIVER.get_or_init(initialise).clone()
}

fn initialise() -> Result<(u32, u32)> {
    // SAFETY: loading the driver's library runs its initialisers, which is what they are for.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut number = 0;
    // SAFETY: the library is present, and `number` outlives the call.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut number) })?;
    if number < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found: version(number), needed: version(OLDEST_DRIVER), release: 525 });
    }
    // SAFETY: the library is present; 0 is the only flag.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Err(CudaError::NoDevice { ordinal: 0, count: 0 }),
        status => check("cuInit", status).map(|()| version(number)),
    }
}

/// A status as a result that names the call and carries what the driver says.
fn check(call: &'static str, status: sys::CUresult) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(sys::CUresult, *mut *const c_char) -> sys::CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: `status` came from the driver; on success `text` is a static string of the driver.
        let known = unsafe { get(status, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: not null, so a static, terminated string.
        if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { format!("{status:?}") }
    };
    Err(CudaError::Driver { call, name: text(sys::cuGetErrorName), text: text(sys::cuGetErrorString) })
}

/// Errors in `drop` have nowhere to go, and after a device fault every call fails: they are ignored.
fn ignore(_: sys::CUresult) {}
