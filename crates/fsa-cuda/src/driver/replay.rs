//! Calls that come again with the same memory, replayed as CUDA graphs: one launch where the call gives a hundred kernels to
//! the device, so that the host takes microseconds.

use super::{Device, Graph, Stream};
use crate::error::CudaError;
use std::sync::{Arc, Mutex, PoisonError};

/// Calls of one plan that are kept; of more, the one that was not used for longest is forgotten.
const KEPT: usize = 16;

/// A call: every address, stride and number that it gives to the device.
pub(crate) type Call = Vec<u64>;

#[derive(Debug)]
struct Known {
    call: Call,
    /// From the second time on.
    graph: Option<Graph<'static>>,
    used: u64,
}

#[derive(Debug, Default)]
struct State {
    known: Vec<Known>,
    clock: u64,
    /// Nothing but recording happens on it.
    recorder: Option<Stream>,
}

/// The calls of a plan, whose kernels outlive it.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    state: Mutex<State>,
}

impl Replays {
    /// Gives `work` to `stream`: as it is when `call` is new or the stream is itself recorded, else as a graph that was recorded
    /// the second time. `work` must follow from `call` alone. The memory that `call` names is that of the present caller,
    /// who holds spans of it, so a graph touches nothing that a launch would not.
    pub(crate) fn run<E: From<CudaError>>(
        &self,
        stream: &Stream,
        call: Call,
        work: impl Fn(&Stream) -> Result<(), E>,
    ) -> Result<(), E> {
        if stream.is_capturing()? {
            return work(stream);
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let Some(at) = state.known.iter().position(|known| known.call == call) else {
            state.remember(Known { call, graph: None, used: clock });
            drop(state);
            return work(stream);
        };
        state.known[at].used = clock;
        if state.known[at].graph.is_none() {
            let graph = state.record(stream.device(), work)?;
            state.known[at].graph = Some(graph);
        }
        match &state.known[at].graph {
            Some(graph) => Ok(graph.launch(stream)?),
            None => unreachable!("recorded above"),
        }
    }
}

impl State {
    fn remember(&mut self, known: Known) {
        if self.known.len() < KEPT {
            self.known.push(known);
        } else if let Some(oldest) = self.known.iter_mut().min_by_key(|known| known.used) {
            *oldest = known;
        }
    }

    fn record<E: From<CudaError>>(
        &mut self,
        device: &Arc<Device>,
        work: impl Fn(&Stream) -> Result<(), E>,
    ) -> Result<Graph<'static>, E> {
        if self.recorder.is_none() {
            self.recorder = Some(Stream::new(device)?);
        }
        match &self.recorder {
            Some(recorder) => Graph::capture_for_ever(recorder, || work(recorder)),
            None => unreachable!("made above"),
        }
    }
}
