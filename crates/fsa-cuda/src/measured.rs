//! Times of the routes of stage `selected` that were measured on this machine, kept on disk for the plans of calls.
//!
//! An entry belongs to a device, to the kernels that were timed and to a class of shapes. It is written beside its place and renamed
//! into it; what cannot be read, or is not whole, counts as absent.

use crate::arch::KernelSet;
use crate::cache::replace;
use crate::plan::{Pass, Problem, Route};
use crate::source::files;
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// First line of an entry; the number is the version of the format.
const MAGIC: &str = "FSAroute01";

/// Milliseconds of each route.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RouteTimes {
    /// Block by block.
    pub kv_outer: f64,
    /// All earlier keys, with a mask.
    pub dense_masked: f64,
}

impl RouteTimes {
    /// The route that took less.
    pub fn faster(&self) -> Route {
        if self.dense_masked < self.kv_outer { Route::DenseMasked } else { Route::KvOuter }
    }

    /// Of a route.
    pub fn of(&self, route: Route) -> f64 {
        match route {
            Route::KvOuter => self.kv_outer,
            Route::DenseMasked => self.dense_masked,
        }
    }
}

/// The entries of a device. What was read once is kept: a plan costs no look at the disk but the first of its shapes.
#[derive(Debug)]
pub struct MeasuredRoutes {
    folder: Option<PathBuf>,
    /// Of the device and its kernels.
    prefix: blake3::Hasher,
    known: Mutex<HashMap<String, Option<RouteTimes>>>,
}

impl MeasuredRoutes {
    /// Entries below `folder`, which need not exist, for a device and the kernels that it uses; without a folder there are none.
    pub fn new(folder: Option<PathBuf>, device: &str, set: KernelSet) -> Self {
        let mut prefix = blake3::Hasher::new();
        if folder.is_some() {
            let kernels = files().iter().flat_map(|(name, text)| [*name, *text]);
            [device, set.name()].into_iter().chain(kernels).for_each(|text| part(&mut prefix, text));
        }
        Self { folder: folder.map(|folder| folder.join("routes")), prefix, known: Mutex::default() }
    }

    /// What was measured for the shapes of a call.
    pub fn get(&self, problem: &Problem, pass: Pass) -> Option<RouteTimes> {
        let class = class(problem, pass);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(times) = known.get(&class) {
            return *times;
        }
        let times = self.path(&class).and_then(|path| decode(&std::fs::read_to_string(path).ok()?));
        known.insert(class, times);
        times
    }

    /// Keeps a measurement; false if it could not be written, which is no error.
    pub fn put(&self, problem: &Problem, pass: Pass, times: &RouteTimes) -> bool {
        let class = class(problem, pass);
        let (Some(folder), Some(path)) = (&self.folder, self.path(&class)) else { return false };
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(class, Some(*times));
        std::fs::create_dir_all(folder).and_then(|()| replace(&path, encode(times).as_bytes())).is_ok()
    }

    fn path(&self, class: &str) -> Option<PathBuf> {
        let mut hasher = self.prefix.clone();
        part(&mut hasher, class);
        let name = hasher.finalize().to_hex();
        self.folder.as_ref().map(|folder| folder.join(name.as_str()).with_extension("route"))
    }
}

/// Hashes text with its length, so that it cannot move from one part to the next unseen.
fn part(hasher: &mut blake3::Hasher, text: &str) {
    hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
}

/// The shapes that share a measurement: lengths that differ by less than a fifth, everything else being equal.
fn class(problem: &Problem, pass: Pass) -> String {
    let Problem { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, block_size, topk, dtype } =
        *problem;
    let length = |total: usize| (4.0 * (total.div_ceil(sequences.max(1)).max(1) as f64).log2()).round();
    let lengths = [length(total_q), length(total_kv)];
    format!(
        "{pass:?} {lengths:?} {} {num_q_heads} {num_kv_heads} {head_dim} {block_size} {topk} {dtype}",
        sequences.next_power_of_two()
    )
}

fn encode(times: &RouteTimes) -> String {
    let mut text = format!("{MAGIC}\n");
    for route in Route::ALL {
        let _ = writeln!(text, "{} {:e}", route.name(), times.of(route));
    }
    text + "end\n"
}

fn decode(text: &str) -> Option<RouteTimes> {
    let mut lines = text.lines();
    if lines.next()? != MAGIC {
        return None;
    }
    let mut time = |route: Route| {
        let ms: f64 = lines.next()?.strip_prefix(route.name())?.trim().parse().ok()?;
        (ms.is_finite() && ms > 0.0).then_some(ms)
    };
    let times = RouteTimes { kv_outer: time(Route::KvOuter)?, dense_masked: time(Route::DenseMasked)? };
    (lines.next()? == "end").then_some(times)
}
