//! Device memory: addresses, spans whose size is known, and owned buffers.

use super::device::OutsideCaptures;
use super::{Device, Stream, check, ignore};
use crate::error::{CudaError, Result};
use bytemuck::Pod;
use cudarc::driver::sys;
use std::marker::PhantomData;
use std::sync::Arc;

/// An address in device memory, as a kernel's parameter struct holds it. 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Address(pub(crate) u64);

impl Address {
    /// The address `bytes` further on.
    pub(crate) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Device memory of known size that somebody else owns.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSpan<'a> {
    address: Address,
    bytes: usize,
    owner: PhantomData<&'a ()>,
}

impl DeviceSpan<'_> {
    /// No memory.
    pub(crate) fn none() -> Self {
        Self { address: Address::default(), bytes: 0, owner: PhantomData }
    }

    /// Memory of another owner, such as a tensor of PyTorch.
    ///
    /// # Safety
    /// `bytes` bytes from `address` on are memory of the device on which the span will be used, and stay it until
    /// all work that was launched on the span is done. Kernels may write a span that is an output or workspace;
    /// nothing else may write or, for those, read it meanwhile.
    pub unsafe fn from_raw(address: u64, bytes: usize) -> Self {
        Self { address: Address(address), bytes, owner: PhantomData }
    }

    /// `bytes` bytes from `offset` on.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn part(&self, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= self.bytes, "{bytes} bytes at {offset} of {}", self.bytes);
        Self { address: self.address.offset(offset), bytes, owner: PhantomData }
    }

    /// Where it starts.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub fn size_bytes(&self) -> usize {
        self.bytes
    }

    /// Sets every byte, in the order of the stream.
    pub fn fill(&self, byte: u8, stream: &Stream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        if let Some(recording) = stream.recording() {
            // SAFETY: a span is memory of the device, of this size.
            return unsafe { recording.fill(self.address.0, byte, self.bytes) };
        }
        // SAFETY: a span is memory of the device, of this size, until the stream is done with it.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(self.address.0, byte, self.bytes, stream.raw()) })
    }
}

/// Device memory, freed on drop after the device is done with it.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: Address,
    bytes: usize,
}

impl DeviceBuffer {
    /// Allocates uninitialised memory; `what` names it in an error.
    pub fn new(device: &Arc<Device>, what: &str, bytes: usize) -> Result<Self> {
        let mut address = 0;
        if bytes > 0 {
            let _bound = device.bind()?;
            let _outside = OutsideCaptures::enter();
            // SAFETY: the context is current, `bytes` is not 0, and `address` outlives the call.
            match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    return Err(CudaError::OutOfMemory { what: what.into(), bytes });
                }
                status => check("cuMemAlloc", status)?,
            }
        }
        Ok(Self { device: Arc::clone(device), address: Address(address), bytes })
    }

    /// The whole buffer.
    pub fn span(&self) -> DeviceSpan<'_> {
        DeviceSpan { address: self.address, bytes: self.bytes, owner: PhantomData }
    }

    /// Copies `source` to the front of the buffer and waits for it.
    ///
    /// # Panics
    /// If `source` is larger than the buffer.
    pub fn upload<T: Pod>(&self, source: &[T], stream: &Stream) -> Result<()> {
        let source: &[u8] = bytemuck::cast_slice(source);
        assert!(source.len() <= self.bytes, "{} bytes into a buffer of {}", source.len(), self.bytes);
        if source.is_empty() {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        let (from, bytes) = (source.as_ptr().cast(), source.len());
        // SAFETY: both sides hold `bytes` bytes, and the copy ends before the borrow of `source` does.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(self.address.0, from, bytes, stream.raw()) };
        check("cuMemcpyHtoDAsync", status)?;
        stream.synchronize()
    }

    /// Copies the front of the buffer to `target` and waits for it.
    ///
    /// # Panics
    /// If `target` is larger than the buffer.
    pub fn download<T: Pod>(&self, target: &mut [T], stream: &Stream) -> Result<()> {
        let target: &mut [u8] = bytemuck::cast_slice_mut(target);
        assert!(target.len() <= self.bytes, "{} bytes out of a buffer of {}", target.len(), self.bytes);
        if target.is_empty() {
            return Ok(());
        }
        let _bound = self.device.bind()?;
        let (to, bytes) = (target.as_mut_ptr().cast(), target.len());
        // SAFETY: both sides hold `bytes` bytes, and the copy ends before the borrow of `target` does.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to, self.address.0, bytes, stream.raw()) };
        check("cuMemcpyDtoHAsync", status)?;
        stream.synchronize()
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        // A span of this buffer may have been launched on and dropped before the launch is done: to free waits for all that runs.
        // Nothing else does here, because to wait for the context would break off captures of other threads.
        let Ok(_bound) = self.device.bind() else { return };
        let _outside = OutsideCaptures::enter();
        // SAFETY: the context is current, `new` allocated this, and the driver frees it when the device is done with it.
        ignore(unsafe { sys::cuMemFree_v2(self.address.0) });
    }
}
