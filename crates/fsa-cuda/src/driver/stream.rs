//! Streams and events.

use super::recording::{Node, Recording};
use super::{Device, Graph, check, ignore};
use crate::error::{CudaError, Result};
use cudarc::driver::sys;
use std::sync::{Arc, Mutex, PoisonError};

/// Oldest CUDA version of a driver that has the function which reads times (`cuEventElapsedTime_v2`): 12.8, first in
/// release 570. Nothing but measuring needs it.
const OLDEST_TIMING_DRIVER: (u32, u32) = (12, 8);

/// A stream: one of the crate's own, a caller's, or one that is only written down.
#[derive(Debug)]
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
    owned: bool,
    /// What it is given is written down instead of run; `raw` is null.
    recording: Option<Recording>,
}

// SAFETY: the driver's functions may be called from any thread with a stream of any.
unsafe impl Send for Stream {}
// SAFETY: as above; what is mutable is behind a lock.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new stream that does not wait for the default stream.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        let _bound = device.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the stream is destroyed in `drop`.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut raw, flags) })?;
        Ok(Self { device: Arc::clone(device), raw, owned: true, recording: None })
    }

    /// A stream of somebody else, such as PyTorch's current stream; 0 is the default stream.
    ///
    /// # Safety
    /// `handle` is a `CUstream` of the device's primary context, or 0, and outlives this value.
    pub unsafe fn from_raw(device: &Arc<Device>, handle: u64) -> Self {
        Self { device: Arc::clone(device), raw: handle as usize as sys::CUstream, owned: false, recording: None }
    }

    fn written(device: &Arc<Device>, recording: Recording) -> Self {
        Self { device: Arc::clone(device), raw: std::ptr::null_mut(), owned: false, recording: Some(recording) }
    }

    /// A stream that writes down the kernels and fills it is given, for [`Stream::into_graph`]. It runs nothing and waits for nothing.
    pub(crate) fn recorder(device: &Arc<Device>) -> Result<Self> {
        Ok(Self::written(device, Recording::new(device)?))
    }

    /// Another stream whose work is written down into the same graph, if this one's is.
    pub(crate) fn branch(&self) -> Option<Self> {
        self.recording.as_ref().map(|recording| Self::written(&self.device, recording.branch()))
    }

    /// What was written down, ready to run. It names memory and kernels without holding them: who launches it does.
    pub(crate) fn into_graph(self) -> Result<Option<Graph<'static>>> {
        let instance = self.recording.as_ref().map(Recording::instantiate).transpose()?;
        Ok(instance.map(|raw| Graph::from_raw(&self.device, raw)))
    }

    /// Where its work is written down, if it is.
    pub(super) fn recording(&self) -> Option<&Recording> {
        self.recording.as_ref()
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Waits until everything given to it is done.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        // SAFETY: the context is current, and the stream lives while `self` does.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    /// True while what it is given is recorded into a graph instead of run.
    pub fn is_capturing(&self) -> Result<bool> {
        let _bound = self.device.bind()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives while `self` does, and `status` outlives the call.
        check("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(self.raw, &mut status) })?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// What follows on this stream waits for what `event` recorded.
    pub fn wait(&self, event: &Event) -> Result<()> {
        if let Some(recording) = &self.recording {
            recording.wait(&event.mark.lock().unwrap_or_else(PoisonError::into_inner));
            return Ok(());
        }
        // SAFETY: stream and event live while the borrows do; 0 is the only flag.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Ok(_bound) = self.device.bind() {
            // SAFETY: `new` made it; work in flight still completes.
            ignore(unsafe { sys::cuStreamDestroy_v2(self.raw) });
        }
    }
}

fn check_timing(device: &Device) -> Result<()> {
    let found = device.facts().driver;
    if found >= OLDEST_TIMING_DRIVER {
        return Ok(());
    }
    Err(CudaError::DriverTooOld { found, needed: OLDEST_TIMING_DRIVER, release: 570 })
}

/// A point in a stream's work. Waiting takes the record of that moment, so an event can be used again.
#[derive(Debug)]
pub struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
    /// What was last on a stream that is written down.
    mark: Mutex<Vec<Node>>,
}

// SAFETY: the driver's functions may be called from any thread with an event of any.
unsafe impl Send for Event {}
// SAFETY: as above; what is mutable is behind a lock.
unsafe impl Sync for Event {}

impl Event {
    /// A new event without a time stamp.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Self::create(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// A new event whose record carries the device's time. Costs more than one without.
    ///
    /// # Errors
    /// The driver is older than CUDA 12.8, which the function that reads times came with. Or it fails.
    pub fn timed(device: &Arc<Device>) -> Result<Self> {
        check_timing(device)?;
        Self::create(device, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn create(device: &Arc<Device>, flags: sys::CUevent_flags) -> Result<Self> {
        let _bound = device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is current; the event is destroyed in `drop`.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags as u32) })?;
        Ok(Self { device: Arc::clone(device), raw, mark: Mutex::default() })
    }

    /// Records what `stream` was given so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        if let Some(recording) = stream.recording() {
            *self.mark.lock().unwrap_or_else(PoisonError::into_inner) = recording.mark();
            return Ok(());
        }
        // SAFETY: stream and event live while the borrows do.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, stream.raw()) })
    }

    /// Waits until the device has done what was recorded.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.device.bind()?;
        // SAFETY: the context is current, and the event lives while `self` does.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    /// Milliseconds of the device from the record of `start` to the record of this event, which it waits for. Both are
    /// [`Event::timed`] and were recorded; the driver refuses others.
    pub fn elapsed_ms(&self, start: &Event) -> Result<f32> {
        self.synchronize()?;
        let _bound = self.device.bind()?;
        let mut elapsed_ms = 0.0;
        check_timing(&self.device)?;
        // SAFETY: both events live while the borrows do, the number outlives the call, and the driver is new enough.
        let status = unsafe { sys::cuEventElapsedTime_v2(&mut elapsed_ms, start.raw, self.raw) };
        check("cuEventElapsedTime", status)?;
        Ok(elapsed_ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_bound) = self.device.bind() {
            // SAFETY: `new` made it; the driver keeps what waits for it.
            ignore(unsafe { sys::cuEventDestroy_v2(self.raw) });
        }
    }
}
