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
    state: Seen,
    used: u64,
}

/// How often a call came, and what became of it.
#[derive(Debug)]
enum Seen {
    Once,
    Recorded(Graph<'static>),
    /// The driver makes no graph of it.
    Refused,
}

#[derive(Debug, Default)]
struct State {
    known: Vec<Known>,
    clock: u64,
}

/// The calls of a plan, whose kernels outlive it.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    state: Mutex<State>,
}

impl Replays {
    /// Gives `work` to `stream`: as it is when `call` is new or the stream is itself captured, else as a graph that was written
    /// down the second time. `work` must follow from `call` alone. The memory that `call` names is that of the present caller,
    /// who holds spans of it, so a graph touches nothing that a launch would not.
    pub(crate) fn run<E: From<CudaError>>(
        &self,
        stream: &Stream,
        call: Call,
        work: impl Fn(&Stream) -> Result<(), E>,
    ) -> Result<(), E> {
        if stream.recording().is_some() || stream.is_capturing()? {
            return work(stream);
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let Some(known) = state.known.iter_mut().find(|known| known.call == call) else {
            state.remember(Known { call, state: Seen::Once, used: clock });
            drop(state);
            return work(stream);
        };
        known.used = clock;
        if let Seen::Once = known.state {
            // What cannot be a graph is launched as it was the first time.
            known.state = record(stream.device(), &work).map_or(Seen::Refused, Seen::Recorded);
        }
        match &known.state {
            Seen::Recorded(graph) => Ok(graph.launch(stream)?),
            _ => {
                drop(state);
                work(stream)
            }
        }
    }
}

/// The graph of `work`; `None` if the driver or the work refuses.
fn record<E>(device: &Arc<Device>, work: impl Fn(&Stream) -> Result<(), E>) -> Option<Graph<'static>> {
    let recorder = Stream::recorder(device).ok()?;
    work(&recorder).ok()?;
    recorder.into_graph().ok()?
}

impl State {
    fn remember(&mut self, known: Known) {
        if self.known.len() < KEPT {
            self.known.push(known);
        } else if let Some(oldest) = self.known.iter_mut().min_by_key(|known| known.used) {
            *oldest = known;
        }
    }
}
