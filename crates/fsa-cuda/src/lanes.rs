//! Side streams on which the chunks of a call overlap, forked from the caller's stream and joined to it.

use crate::driver::{Device, Event, Stream};
use crate::error::Result;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Side streams of a set.
pub(crate) const LANES: usize = 2;

/// Side streams that one call at a time uses.
#[derive(Debug)]
pub(crate) struct LaneSet {
    pub lanes: [Stream; LANES],
    done: [Event; LANES],
    fork: Event,
}

impl LaneSet {
    fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self {
            lanes: [Stream::new(device)?, Stream::new(device)?],
            done: [Event::new(device)?, Event::new(device)?],
            fork: Event::new(device)?,
        })
    }

    /// The first `count` lanes wait for `stream`.
    pub(crate) fn fork(&self, stream: &Stream, count: usize) -> Result<()> {
        self.fork.record(stream)?;
        self.lanes[..count].iter().try_for_each(|lane| lane.wait(&self.fork))
    }

    /// `stream` waits for the first `count` lanes.
    pub(crate) fn join(&self, stream: &Stream, count: usize) -> Result<()> {
        self.lanes[..count].iter().zip(&self.done).try_for_each(|(lane, done)| {
            done.record(lane)?;
            stream.wait(done)
        })
    }
}

/// The lanes of a device, for calls that run and for calls that are recorded into a graph: a side stream stays
/// part of a recording until all of it ends, and must not be used by others meanwhile.
#[derive(Debug)]
pub(crate) struct Lanes {
    running: Mutex<LaneSet>,
    recorded: Mutex<LaneSet>,
}

impl Lanes {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { running: Mutex::new(LaneSet::new(device)?), recorded: Mutex::new(LaneSet::new(device)?) })
    }

    /// The lanes for a call on `stream`. Held while the call is given to the device, not until it is done.
    pub(crate) fn take(&self, stream: &Stream) -> Result<MutexGuard<'_, LaneSet>> {
        let set = if stream.is_capturing()? { &self.recorded } else { &self.running };
        Ok(set.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
