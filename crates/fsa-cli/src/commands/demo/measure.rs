//! Runs and times dense attention, the whole operation and every stage of it, and checks them on sampled rows.

use crate::failure::Outcome;
use crate::progress::Progress;
use crate::sampled::{Compared, Sample};
use fsa::{
    AttentionArgs, AttentionResult, AttentionStage, CombineArgs, Engine, NsaArgs, SelectArgs, Selection, Tensor,
};
use serde::Serialize;
use std::time::Instant;

/// Steps that [`run`] reports.
pub const STEPS: usize = 5;
/// Rows that are compared with the oracle.
const SAMPLED_ROWS: usize = 48;
/// Times that everything but dense attention runs; the median counts.
const REPETITIONS: usize = 3;

/// Milliseconds. `select` is compressed attention together with the selection, as they run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TimeMs {
    /// Dense causal attention.
    pub dense: f64,
    /// The whole operation, in one call.
    pub nsa: f64,
    /// Compression of keys and values.
    pub compress: f64,
    /// Compressed attention, scores and top-k.
    pub select: f64,
    /// Attention to the selected blocks.
    pub selected: f64,
    /// Sliding-window attention.
    pub window: f64,
    /// The gated sum.
    pub combine: f64,
}

/// Results, times and errors.
#[derive(Debug)]
pub struct Measured {
    /// Dense attention.
    pub dense: AttentionResult,
    /// The whole operation.
    pub out: Tensor,
    /// Compressed, selected, window.
    pub branches: [Tensor; 3],
    /// Log-sum-exp of the branches.
    pub lse: [Tensor; 3],
    /// The chosen blocks.
    pub topk_indices: Tensor,
    /// Times.
    pub time_ms: TimeMs,
    /// Comparison with the oracle.
    pub errors: Vec<Compared>,
    /// Rows whose selection no rounding explains.
    pub wrong_selections: usize,
    /// Rows that were compared.
    pub sampled_rows: usize,
}

impl Measured {
    /// The comparison with the largest error over bound.
    pub fn worst(&self) -> Compared {
        let ratio = |compared: &&Compared| compared.max_error / compared.error_bound.max(f64::MIN_POSITIVE);
        let worst = self.errors.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        worst.cloned().unwrap_or(Compared { tensor: "none".into(), max_error: 0.0, error_bound: 0.0 })
    }
}

fn timed<T>(run: impl FnOnce() -> fsa::Result<T>) -> fsa::Result<(T, f64)> {
    let start = Instant::now();
    let result = run()?;
    Ok((result, start.elapsed().as_secs_f64() * 1e3))
}

/// Runs several times; the last result and the median time.
fn median<T>(mut run: impl FnMut() -> fsa::Result<T>) -> fsa::Result<(T, f64)> {
    let (mut result, first) = timed(&mut run)?;
    let mut times = vec![first];
    for _ in 1..REPETITIONS {
        let (next, time) = timed(&mut run)?;
        result = next;
        times.push(time);
    }
    times.sort_by(f64::total_cmp);
    Ok((result, times[times.len() / 2]))
}

/// Runs everything.
pub fn run(engine: &Engine, args: &NsaArgs<'_>, seed: u64, progress: &Progress) -> Outcome<Measured> {
    let attention = args.attention();
    let (result, nsa) = progress.step("nsa", || median(|| engine.nsa(args, true)))?;
    let (out, saved) = result.into_parts();
    let saved = saved.ok_or_else(|| fsa::Error::input("saved", "the state that was asked for", "none"))?;
    let stages = progress.step("stages of nsa", || stage_times(engine, args, &saved))?;
    let dense = || timed(|| engine.dense(&attention));
    let (dense, dense_ms) = progress.step("dense attention, the yardstick", dense)?;
    let sample = Sample::new(args.batch, SAMPLED_ROWS, seed)?;
    let check = || -> fsa::Result<Vec<Compared>> {
        let lse = saved.lse.each_ref().map(Tensor::view);
        let mut errors = sample.nsa(args, (&out.view(), lse), saved.topk_indices.view())?;
        let outputs = [dense.out.view(), dense.lse.view()];
        errors.extend(renamed("dense", sample.attention(&AttentionStage::Dense, &attention, outputs)?));
        Ok(errors)
    };
    let errors = progress.step("oracle on sampled rows", check)?;
    let wrong_selections = progress.step("oracle on sampled selections", || {
        let compressed = compressed(args, &saved);
        sample.wrong_selections(&compressed, args.config, &saved.topk_indices.view())
    })?;
    Ok(Measured {
        time_ms: TimeMs { dense: dense_ms, nsa, ..stages },
        dense,
        out,
        branches: saved.branches,
        lse: saved.lse,
        topk_indices: saved.topk_indices,
        errors,
        wrong_selections,
        sampled_rows: sample.len(),
    })
}

/// Query with compressed keys and values.
fn compressed<'a>(args: &NsaArgs<'a>, saved: &'a fsa::NsaSaved) -> AttentionArgs<'a> {
    let [key, value] = &saved.compressed;
    AttentionArgs { key: key.view(), value: value.view(), ..args.attention() }
}

/// Times of the stages, each called by itself as a user would.
fn stage_times(engine: &Engine, args: &NsaArgs<'_>, saved: &fsa::NsaSaved) -> fsa::Result<TimeMs> {
    let attention = args.attention();
    let (_, compress) =
        median(|| Ok((engine.compress(&args.compress_key())?, engine.compress(&args.compress_value())?)))?;
    let select = SelectArgs { attention: compressed(args, saved), config: args.config };
    let (_, select) = median(|| engine.select(&select))?;
    let topk_indices = saved.topk_indices.view();
    let selection = Selection { topk_indices, block_size: args.config.block_size, validate: false };
    let (_, selected) = median(|| engine.selected(&attention, &selection))?;
    let (_, window) = median(|| engine.window(&attention, args.config.window_size))?;
    let branches = saved.branches.each_ref().map(Tensor::view);
    let (_, combine) = median(|| engine.combine(&CombineArgs { gates: args.gates, branches }))?;
    Ok(TimeMs { dense: 0.0, nsa: 0.0, compress, select, selected, window, combine })
}

fn renamed(prefix: &str, compared: Vec<Compared>) -> Vec<Compared> {
    compared.into_iter().map(|c| Compared { tensor: format!("{prefix} {}", c.tensor), ..c }).collect()
}
