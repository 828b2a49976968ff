//! A device, its facts and its primary context.

use super::{check, driver, ignore};
use crate::arch::Arch;
use crate::error::{CudaError, Result};
use cudarc::driver::sys;
use serde::Serialize;
use std::ffi::{CStr, c_char, c_int};
use std::marker::PhantomData;
use std::sync::Arc;
use sys::CUdevice_attribute as Attribute;

/// What plans and reports need to know about a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceFacts {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: Arch,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory that one CTA may have.
    pub smem_per_cta_bytes: usize,
    /// L2 cache.
    pub l2_bytes: usize,
    /// Device memory.
    pub memory_bytes: usize,
    /// Newest CUDA version that the driver supports.
    pub driver: (u32, u32),
}

impl DeviceFacts {
    /// An H200, for plans on machines that have none.
    pub fn h200() -> Self {
        Self {
            name: "NVIDIA H200".into(),
            arch: Arch::SM90,
            multiprocessors: 132,
            smem_per_cta_bytes: 227 << 10,
            l2_bytes: 50 << 20,
            memory_bytes: 141 << 30,
            driver: (13, 0),
        }
    }

    /// An A100, likewise.
    pub fn a100() -> Self {
        Self {
            name: "NVIDIA A100".into(),
            arch: Arch::SM80,
            multiprocessors: 108,
            smem_per_cta_bytes: 163 << 10,
            l2_bytes: 40 << 20,
            memory_bytes: 80 << 30,
            driver: (13, 0),
        }
    }
}

/// A device with its primary context, the one that PyTorch and others use too.
#[derive(Debug)]
pub struct Device {
    raw: sys::CUdevice,
    context: sys::CUcontext,
    facts: DeviceFacts,
}

// SAFETY: the driver's functions may be called from any thread; the handles name objects that live until drop.
unsafe impl Send for Device {}
// SAFETY: as above; nothing here is mutable.
unsafe impl Sync for Device {}

fn attribute(raw: sys::CUdevice, attribute: Attribute) -> Result<usize> {
    let mut value = 0;
    // SAFETY: `raw` is a device of the initialised driver, and `value` outlives the call.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, raw) })?;
    Ok(usize::try_from(value).unwrap_or(0))
}

fn name(raw: sys::CUdevice) -> Result<String> {
    let mut text = [0 as c_char; 256];
    // SAFETY: the driver writes at most 256 characters, the terminator included.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(text.as_mut_ptr(), text.len() as c_int, raw) })?;
    // SAFETY: the driver terminated the string inside the array.
    Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
}

/// The architecture of a device, if it is new enough.
fn supported(name: &str, capability: (u32, u32)) -> Result<Arch> {
    Arch::of_capability(capability).ok_or_else(|| CudaError::DeviceTooOld { name: name.into(), capability })
}

/// The driver's number of a device that exists.
fn number(ordinal: usize, count: usize) -> Result<c_int> {
    c_int::try_from(ordinal).ok().filter(|_| ordinal < count).ok_or(CudaError::NoDevice { ordinal, count })
}

fn facts(raw: sys::CUdevice, driver: (u32, u32)) -> Result<DeviceFacts> {
    let name = name(raw)?;
    let major = attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let arch = supported(&name, (major as u32, minor as u32))?;
    let mut memory_bytes = 0;
    // SAFETY: `raw` is a device, and the number outlives the call.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, raw) })?;
    Ok(DeviceFacts {
        name,
        arch,
        multiprocessors: attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        smem_per_cta_bytes: attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_bytes: attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        memory_bytes,
        driver,
    })
}

impl Device {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// No driver, a driver or device that is too old, or no such device.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let driver = driver()?;
        let mut count = 0;
        // SAFETY: the driver is initialised, and `count` outlives the call.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        let count = usize::try_from(count).unwrap_or(0);
        let number = number(ordinal, count)?;
        let (mut raw, mut context) = (0, std::ptr::null_mut());
        // SAFETY: `number` is below the number of devices.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut raw, number) })?;
        let facts = facts(raw, driver)?;
        // SAFETY: `raw` is a device; the reference taken here is given back in `drop`.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, raw) })?;
        Ok(Arc::new(Self { raw, context, facts }))
    }

    /// Its primary context.
    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// What plans and reports need to know about it.
    pub fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Makes its context current for this thread until the guard is dropped.
    pub fn bind(&self) -> Result<Bound> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the driver is initialised, and `current` outlives the call.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut current) })?;
        let pushed = current != self.context;
        if pushed {
            // SAFETY: the context is retained while `self` lives; the guard pops it again.
            check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        }
        Ok(Bound { pushed, thread: PhantomData })
    }

    /// Waits until the device has done everything that it was given. Not while a stream of the device is captured, by whatever
    /// thread: the driver refuses, and breaks off the capture.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.bind()?;
        // SAFETY: the context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Free and total device memory in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _bound = self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, and both numbers outlive the call.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: gives back the reference that `open` took.
        ignore(unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.raw) });
    }
}

/// The context of a device is current for this thread, which it cannot leave.
#[derive(Debug)]
pub struct Bound {
    pushed: bool,
    thread: PhantomData<*const ()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.pushed {
            let mut context = std::ptr::null_mut();
            // SAFETY: pops what `bind` pushed on this thread's stack.
            ignore(unsafe { sys::cuCtxPopCurrent_v2(&mut context) });
        }
    }
}

/// While it is held this thread may allocate, free, load and unload although a stream is captured, by this thread or another: that is
/// no part of what is captured.
#[derive(Debug)]
pub(super) struct OutsideCaptures {
    before: Option<sys::CUstreamCaptureMode>,
    thread: PhantomData<*const ()>,
}

impl OutsideCaptures {
    pub(super) fn enter() -> Self {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the driver is initialised, for there is a device, and `mode` outlives the call.
        let entered =
            check("cuThreadExchangeStreamCaptureMode", unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) });
        Self { before: entered.is_ok().then_some(mode), thread: PhantomData }
    }
}

impl Drop for OutsideCaptures {
    fn drop(&mut self) {
        if let Some(mut mode) = self.before {
            // SAFETY: as in `enter`, on the same thread.
            ignore(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_before_ampere_is_refused_by_name() {
        for capability in [(7, 5), (7, 0), (3, 7)] {
            let error = supported("Tesla T4", capability).expect_err("too old");
            assert_eq!(error, CudaError::DeviceTooOld { name: "Tesla T4".into(), capability });
            assert!(error.to_string().contains(&format!("{}.{}", capability.0, capability.1)), "{error}");
        }
        assert_eq!(supported("NVIDIA A100", (8, 0)), Ok(Arch::SM80));
        assert_eq!(supported("NVIDIA H200", (9, 0)), Ok(Arch::SM90));
    }

    #[test]
    fn a_number_without_a_device_is_refused_with_how_many_there_are() {
        assert_eq!(number(1, 2), Ok(1));
        for (ordinal, count) in [(0, 0), (2, 2), (usize::MAX, 8)] {
            let error = number(ordinal, count).expect_err("no such device");
            assert_eq!(error, CudaError::NoDevice { ordinal, count });
            assert!(error.to_string().contains(&format!("no CUDA device {ordinal}: the driver shows {count}")));
        }
    }
}
