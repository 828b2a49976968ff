//! Side streams on which the chunks of a call overlap, forked from the caller's stream and joined to it.

use crate::driver::{Device, Event, Stream};
use crate::error::Result;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lanes of a set.
pub(crate) const LANES: usize = 2;

/// Two streams that take turns: what is given to `urgent` goes ahead of waiting CTAs of any `main`.
#[derive(Debug)]
pub(crate) struct Lane {
    pub main: Stream,
    pub urgent: Stream,
    main_done: Event,
    urgent_done: Event,
}

impl Lane {
    fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self {
            main: Stream::new(device, false)?,
            urgent: Stream::new(device, true)?,
            main_done: Event::new(device)?,
            urgent_done: Event::new(device)?,
        })
    }

    /// What follows on `urgent` waits for `main`.
    pub(crate) fn to_urgent(&self) -> Result<()> {
        self.main_done.record(&self.main)?;
        self.urgent.wait(&self.main_done)
    }

    /// What follows on `main` waits for `urgent`.
    pub(crate) fn to_main(&self) -> Result<()> {
        self.urgent_done.record(&self.urgent)?;
        self.main.wait(&self.urgent_done)
    }
}

/// Lanes that one call at a time uses.
#[derive(Debug)]
pub(crate) struct LaneSet {
    pub lanes: [Lane; LANES],
    fork: Event,
}

impl LaneSet {
    fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { lanes: [Lane::new(device)?, Lane::new(device)?], fork: Event::new(device)? })
    }

    /// The first `count` lanes wait for `stream`.
    pub(crate) fn fork(&self, stream: &Stream, count: usize) -> Result<()> {
        self.fork.record(stream)?;
        self.lanes[..count].iter().try_for_each(|lane| lane.main.wait(&self.fork))
    }

    /// `stream` waits for the `main` streams of the first `count` lanes.
    pub(crate) fn join(&self, stream: &Stream, count: usize) -> Result<()> {
        self.lanes[..count].iter().try_for_each(|lane| {
            lane.main_done.record(&lane.main)?;
            stream.wait(&lane.main_done)
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
