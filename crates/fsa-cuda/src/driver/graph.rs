//! CUDA graphs: a sequence of launches given to the device as one.

use super::recording::INSTANTIATE_FLAGS;
use super::{Device, Stream, check, ignore};
use crate::error::{CudaError, Result};
use cudarc::driver::sys;
use std::marker::PhantomData;
use std::sync::Arc;

/// An instantiated graph. It borrows what its launches name: kernels and buffers outlive it.
#[derive(Debug)]
pub struct Graph<'a> {
    device: Arc<Device>,
    raw: sys::CUgraphExec,
    named: PhantomData<&'a ()>,
}

// SAFETY: the handle names an object that lives until drop; launches of one graph are ordered by the driver.
unsafe impl Send for Graph<'_> {}
// SAFETY: as above; nothing here is mutable.
unsafe impl Sync for Graph<'_> {}

impl<'a> Graph<'a> {
    /// Records what `work` gives to `stream`, which nothing else may use meanwhile.
    pub fn capture<E: From<CudaError>>(stream: &Stream, work: impl FnOnce() -> Result<(), E> + 'a) -> Result<Self, E> {
        let _bound = stream.device().bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the context is current, and the stream lives while the borrow does.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) })?;
        let result = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends the capture begun above; `graph` outlives the call.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.raw(), &mut graph) });
        let mut raw = std::ptr::null_mut();
        let mut instantiated = Ok(());
        if !graph.is_null() {
            // SAFETY: `graph` was just captured.
            let status = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, graph, INSTANTIATE_FLAGS) };
            instantiated = check("cuGraphInstantiate", status);
            // SAFETY: the instance keeps what it needs, and nothing else names the graph.
            ignore(unsafe { sys::cuGraphDestroy(graph) });
        }
        let captured = Self { device: Arc::clone(stream.device()), raw, named: PhantomData };
        result?;
        ended?;
        instantiated?;
        Ok(captured)
    }

    /// An instance of a graph that was written down.
    pub(super) fn from_raw(device: &Arc<Device>, raw: sys::CUgraphExec) -> Graph<'static> {
        Graph { device: Arc::clone(device), raw, named: PhantomData }
    }

    /// Runs the recorded work, in the order of the stream.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        let _bound = self.device.bind()?;
        // SAFETY: graph and stream live while the borrows do, and what the graph names as long as the graph.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.raw, stream.raw()) })
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        if let Ok(_bound) = self.device.bind() {
            // SAFETY: `capture` made it; work in flight still completes.
            ignore(unsafe { sys::cuGraphExecDestroy(self.raw) });
        }
    }
}
