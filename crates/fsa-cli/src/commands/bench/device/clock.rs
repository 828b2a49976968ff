//! Times of the device and of the host.

use super::super::timing::{Times, collect};
use fsa::cuda::driver::{Device, DeviceBuffer, Event, Stream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Calls before the first that counts.
const WARM_UP: usize = 3;

/// Two events around a call, and memory whose filling empties the L2 cache before it.
#[derive(Debug)]
pub struct Clock<'a> {
    stream: &'a Stream,
    start: Event,
    stop: Event,
    flush: DeviceBuffer,
}

/// How long calls take.
#[derive(Debug, Clone, Copy)]
pub struct Timed {
    /// On the device.
    pub device: Times,
    /// On the host, until the call returns: median in microseconds.
    pub host_us: f64,
}

impl<'a> Clock<'a> {
    /// A clock for calls on `stream`.
    pub fn new(device: &Arc<Device>, stream: &'a Stream) -> fsa::Result<Self> {
        // Twice the cache, so that nothing of the call before is left in it.
        let flush = DeviceBuffer::new(device, "the flush of the cache", 2 * device.facts().l2_bytes)?;
        Ok(Self { stream, start: Event::timed(device)?, stop: Event::timed(device)?, flush })
    }

    /// Repeats `call` until `budget` is spent.
    pub fn measure(&self, budget: Duration, mut call: impl FnMut() -> fsa::Result<()>) -> fsa::Result<Timed> {
        for _ in 0..WARM_UP {
            call()?;
        }
        self.stream.synchronize()?;
        let _bound = self.stream.device().bind()?;
        let mut host = Vec::new();
        let device = collect(budget, || {
            self.flush.span().fill(0, self.stream)?;
            self.start.record(self.stream)?;
            let begin = Instant::now();
            call()?;
            host.push(begin.elapsed().as_secs_f64() * 1e6);
            self.stop.record(self.stream)?;
            Ok(f64::from(self.stop.elapsed_ms(&self.start)?))
        })?;
        host.sort_unstable_by(f64::total_cmp);
        Ok(Timed { device, host_us: host[host.len() / 2] })
    }
}
