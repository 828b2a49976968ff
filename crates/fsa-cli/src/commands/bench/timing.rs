//! Repeats a call for as long as it is worth it.

use serde::Serialize;
use std::time::{Duration, Instant};

/// Repetitions of anything short.
const MOST: usize = 30;
/// Repetitions of anything, however long.
const LEAST: usize = 2;
/// Repetitions that are worth going beyond the budget by half.
const WANTED: usize = 3;

/// Quantiles of the times of a call, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Times {
    /// Half of the calls were faster.
    pub median_ms: f64,
    /// The fastest.
    pub min_ms: f64,
    /// A fifth of the calls were faster.
    pub p20_ms: f64,
    /// Four fifths of the calls were faster.
    pub p80_ms: f64,
    /// The slowest.
    pub max_ms: f64,
    /// Number of calls.
    pub repetitions: usize,
}

/// Quantile by linear interpolation between the sorted values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] * (1.0 - part) + sorted[high] * part
}

impl Times {
    fn new(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self {
            median_ms: quantile(&times, 0.5),
            min_ms: times[0],
            p20_ms: quantile(&times, 0.2),
            p80_ms: quantile(&times, 0.8),
            max_ms: times[times.len() - 1],
            repetitions: times.len(),
        }
    }
}

/// Times `call`, which has been warmed up, until `budget` is spent.
pub fn measure(budget: Duration, mut call: impl FnMut() -> fsa::Result<()>) -> fsa::Result<Times> {
    collect(budget, || {
        let start = Instant::now();
        call()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    })
}

/// Calls `timed`, which says how many milliseconds a call took, until `budget` is spent.
pub fn collect(budget: Duration, mut timed: impl FnMut() -> fsa::Result<f64>) -> fsa::Result<Times> {
    let mut times = Vec::new();
    let begin = Instant::now();
    loop {
        times.push(timed()?);
        let spent = begin.elapsed();
        let budget = if times.len() < WANTED { budget.mul_f64(1.5) } else { budget };
        // Stops before a repetition that would end beyond the budget.
        let next = spent + spent / times.len() as u32;
        if times.len() >= MOST || (times.len() >= LEAST && next > budget) {
            return Ok(Times::new(times));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let times = Times::new(vec![5.0, 1.0, 2.0, 4.0, 3.0, 6.0]);
        assert_eq!((times.median_ms, times.min_ms, times.p20_ms), (3.5, 1.0, 2.0));
        assert_eq!((times.p80_ms, times.max_ms, times.repetitions), (5.0, 6.0, 6));
    }

    #[test]
    fn repetitions_follow_the_budget() {
        let count = |budget_ms, call_ms| {
            let call = || {
                std::thread::sleep(Duration::from_millis(call_ms));
                Ok(())
            };
            measure(Duration::from_millis(budget_ms), call).expect("runs").repetitions
        };
        assert_eq!(count(0, 5), LEAST);
        assert_eq!(count(10_000, 0), MOST);
    }
}
