//! Side streams on which the chunks of a call overlap, forked from the caller's stream and joined to it.

use crate::driver::{Device, Event, Stream};
use crate::error::{CudaError, Result};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Side streams of a set.
pub(crate) const LANES: usize = 3;

/// Gives kernels to a stream.
pub(crate) type Work<'a, E> = &'a dyn Fn(&Stream) -> Result<(), E>;

/// Side streams that one call at a time uses.
#[derive(Debug)]
pub(crate) struct LaneSet {
    pub lanes: Vec<Stream>,
    done: Vec<Event>,
    fork: Event,
}

impl LaneSet {
    fn new(device: &Arc<Device>) -> Result<Self> {
        Self::of(device, (0..LANES).map(|_| Stream::new(device)).collect::<Result<_>>()?)
    }

    fn of(device: &Arc<Device>, lanes: Vec<Stream>) -> Result<Self> {
        let done = lanes.iter().map(|_| Event::new(device)).collect::<Result<_>>()?;
        Ok(Self { lanes, done, fork: Event::new(device)? })
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

    /// Gives the first of some works that do not wait for each other to `stream`, and every other one to a lane of its own.
    pub(crate) fn side_by_side<E: From<CudaError>>(&self, stream: &Stream, works: &[Work<'_, E>]) -> Result<(), E> {
        if let [work] = works {
            return work(stream);
        }
        let lanes = works.len().saturating_sub(1);
        self.fork(stream, lanes)?;
        let streams = std::iter::once(stream).chain(&self.lanes);
        works.iter().zip(streams).try_for_each(|(work, stream)| work(stream))?;
        Ok(self.join(stream, lanes)?)
    }
}

/// The lanes of a device, for calls that run and for calls on a captured stream: a side stream stays part of a capture until
/// all of it ends, and must not be used by others meanwhile.
#[derive(Debug)]
pub(crate) struct Lanes {
    running: Mutex<LaneSet>,
    captured: Mutex<LaneSet>,
}

/// The lanes of a call.
#[derive(Debug)]
pub(crate) enum Taken<'a> {
    /// Held while the call is given to the device, not until it is done.
    Shared(MutexGuard<'a, LaneSet>),
    /// Of a call that is written down.
    Own(Box<LaneSet>),
}

impl Deref for Taken<'_> {
    type Target = LaneSet;

    fn deref(&self) -> &LaneSet {
        match self {
            Taken::Shared(set) => set,
            Taken::Own(set) => set,
        }
    }
}

impl Lanes {
    pub(crate) fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { running: Mutex::new(LaneSet::new(device)?), captured: Mutex::new(LaneSet::new(device)?) })
    }

    /// The lanes for a call on `stream`.
    pub(crate) fn take(&self, stream: &Stream) -> Result<Taken<'_>> {
        if let Some(branches) = (0..LANES).map(|_| stream.branch()).collect() {
            return Ok(Taken::Own(Box::new(LaneSet::of(stream.device(), branches)?)));
        }
        let set = if stream.is_capturing()? { &self.captured } else { &self.running };
        Ok(Taken::Shared(set.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}
