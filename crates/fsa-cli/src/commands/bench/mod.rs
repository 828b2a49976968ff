//! `fsa bench`: times of the stages, each next to the f64 oracle, dense attention and the machine's matrix product.

mod definition;
mod device;
mod matrix_rate;
mod record;
mod report;
mod timing;
mod work;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::gpu::Gpu;
use crate::machine::{self, Machine};
use crate::options::{self, Device, DeviceFlags};
use crate::progress::Progress;
use clap::Args;
use definition::{Point, Suite};
use device::DeviceTimes;
use fsa::cuda::CudaBackend;
use fsa::plan::{Plan, PlanInput};
use fsa::{AttentionShape, Batch, Engine, Stage};
use fsa_oracle::Pass;
use matrix_rate::MatrixRate;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use timing::Times;
use work::{Measured, Work};

/// Measure: medians with quantiles, GFLOP/s, share of the machine's matrix-product rate, ratio to dense attention
///
/// Every result is compared with the f64 oracle on sampled rows before it is timed.
///
/// With --device cuda the rows are those whose stage and dtype CUDA has. Tensors and workspace stay on the device; times
/// are the device's, with a cold L2 cache, for launched calls and for replays of the recorded call, beside the time that
/// the host takes to give a call.
#[derive(Debug, Args)]
pub struct Flags {
    /// Definition to measure: acceptance, quick, stages, shapes, scaling, cuda or cuda_stages [quick; cuda on a GPU]
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// List the definitions and their rows, and measure nothing
    #[arg(long)]
    list: bool,
    /// Only rows whose name holds this text, such as nsa/forward or n32768 (may be repeated; all must hold)
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Lengths in place of those of the definition
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    tokens: Option<Vec<usize>>,
    /// Seconds that the repetitions of a row may take; long calls are repeated at least twice
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, allow_negative_numbers = true)]
    budget: f64,
    /// Save JSON and CSV under PATH/<machine>/<date>-<device>, or as PATH if it ends in .json
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "bench/records")]
    record: Option<PathBuf>,
    /// For --device cuda: the backward whose bits are the same every time
    #[arg(long)]
    deterministic: bool,
    #[command(flatten)]
    device: DeviceFlags,
}

/// One row of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    name: String,
    #[serde(flatten)]
    point: Point,
    #[serde(flatten)]
    times: Times,
    /// Operations of the definition of the stage over the median.
    gflops: f64,
    /// Rate of the processor's f32 matrix product, the higher of just before and just after.
    matrix_gflops: Option<f64>,
    /// `gflops / matrix_gflops`.
    matrix_share: Option<f64>,
    /// Median of dense over this median, where dense was measured on the same tensors.
    speedup: Option<f64>,
    max_error: f64,
    error_bound: f64,
    /// On a GPU.
    #[serde(flatten)]
    device: Option<DeviceTimes>,
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Record {
    date: String,
    commit: String,
    version: &'static str,
    backend: &'static str,
    command: String,
    suite: String,
    machine: Machine,
    results: Vec<Row>,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct List {
    suites: Vec<Listed>,
}

#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    description: String,
    rows: Vec<String>,
}

/// What the rows are measured on.
enum Bench {
    Cpu { engine: Engine, rate: Box<MatrixRate>, threads: usize },
    Cuda { backend: Arc<CudaBackend>, deterministic: bool, threads: usize },
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    if flags.list {
        return list(context);
    }
    let mut bench = Bench::new(flags, context.threads)?;
    let default = if flags.device.device == Device::Cuda { "cuda" } else { "quick" };
    let suite = Suite::find(flags.suite.as_deref().unwrap_or(default))?;
    let points = bench.reduce(chosen(flags, &suite)?, context)?;
    let progress = Progress::new(points.len());
    let mut results: Vec<Row> = Vec::new();
    for point in &points {
        results.push(progress.step(point.name(), || bench.measure(point, Duration::from_secs_f64(flags.budget)))?);
    }
    drop(progress);
    compare_with_dense(&mut results);
    let record = Record {
        date: machine::today(),
        commit: machine::commit().unwrap_or_else(|| "unknown".into()),
        version: env!("CARGO_PKG_VERSION"),
        backend: bench.backend(),
        command: std::env::args().skip(1).fold("fsa".into(), |command, word| format!("{command} {word}")),
        suite: suite.name,
        machine: bench.machine(),
        results,
    };
    context.output.report(&record)?;
    if let Some(path) = &flags.record {
        for file in record::save(&record, path)? {
            context.output.note(format!("saved {}", file.display()))?;
        }
    }
    Ok(())
}

fn list(context: &Context) -> Outcome {
    let suites = Suite::all()?
        .into_iter()
        .map(|suite| Listed {
            rows: suite.points(None).iter().map(Point::name).collect(),
            name: suite.name,
            description: suite.description,
        })
        .collect();
    context.output.report(&List { suites })
}

fn chosen(flags: &Flags, suite: &Suite) -> Outcome<Vec<Point>> {
    if let Some(short) = flags.tokens.iter().flatten().find(|tokens| **tokens == 0) {
        return Err(Failure::misuse("--tokens", "at least 1", short));
    }
    if !(flags.budget.is_finite() && flags.budget >= 0.0) {
        return Err(Failure::misuse("--budget", "a number of seconds, at least 0", flags.budget));
    }
    let mut points = suite.points(flags.tokens.as_deref());
    points.retain(|point| flags.filter.iter().all(|text| point.name().contains(text)));
    if points.is_empty() {
        let expected = format!("text that a row of suite {} holds (see --list)", suite.name);
        return Err(Failure::misuse("--filter", expected, flags.filter.join(" and ")));
    }
    Ok(points)
}

impl Bench {
    fn new(flags: &Flags, threads: usize) -> Outcome<Self> {
        let chosen = options::engine(&flags.device, threads)?;
        match chosen.cuda {
            Some(backend) => Ok(Self::Cuda { backend, deterministic: flags.deterministic, threads }),
            None if flags.deterministic => {
                Err(Failure::misuse("--deterministic", "--device cuda", "--device cpu, which always is"))
            }
            None => Ok(Self::Cpu { engine: chosen.engine, rate: Box::new(MatrixRate::new(threads)?), threads }),
        }
    }

    fn backend(&self) -> &'static str {
        match self {
            Self::Cpu { .. } => "cpu",
            Self::Cuda { .. } => "cuda",
        }
    }

    fn machine(&self) -> Machine {
        match self {
            Self::Cpu { threads, .. } => Machine::describe(*threads),
            Self::Cuda { backend, threads, .. } => {
                Machine { gpu: Some(Gpu::describe(backend)), ..Machine::describe(*threads) }
            }
        }
    }

    /// The rows that can be measured; how many others there are is said.
    fn reduce(&self, points: Vec<Point>, context: &Context) -> Outcome<Vec<Point>> {
        let Self::Cuda { backend, .. } = self else { return Ok(points) };
        let check = |point: &Point| {
            backend.check_stage(point.stage, point.pass == Pass::Backward)?;
            backend.check_dtype(point.dtype)
        };
        let (has, lacks): (Vec<Point>, Vec<Point>) = points.into_iter().partition(|point| check(point).is_ok());
        match lacks.first() {
            Some(point) if has.is_empty() => check(point)?,
            Some(point) => {
                let names = (lacks.len(), point.name());
                context
                    .output
                    .note(format!("skipped: {} rows that CUDA does not have, such as {}", names.0, names.1))?;
            }
            None => {}
        }
        Ok(has)
    }

    fn measure(&mut self, point: &Point, budget: Duration) -> Outcome<Row> {
        match self {
            Self::Cpu { engine, rate, threads } => {
                let before = rate.gflops();
                let measured = Work::new(engine, point, budget)?.run()?;
                let row = row(point, &measured, *threads)?;
                // Other work on the machine only lowers the rate: the higher of the two is nearer to what it can do.
                let matrix_gflops = before.max(rate.gflops());
                let matrix_share = Some(row.gflops / matrix_gflops);
                Ok(Row { matrix_gflops: Some(matrix_gflops), matrix_share, ..row })
            }
            Self::Cuda { backend, deterministic, threads } => {
                let work = device::Work::new(backend.kernels(), point, *deterministic)?;
                let (measured, device) = work.run(budget)?;
                Ok(Row { device, ..row(point, &measured, *threads)? })
            }
        }
    }
}

/// The row of a measurement, unless its result is wrong.
fn row(point: &Point, measured: &Measured, threads: usize) -> Outcome<Row> {
    let Measured { times, compared, wrong_selections } = measured;
    if *wrong_selections > 0 {
        let message =
            format!("{}: topk_indices: {wrong_selections} sampled rows differ from the oracle's", point.name());
        return Err(Failure::Check(message));
    }
    let ratio = |c: &&crate::sampled::Compared| c.max_error / c.error_bound.max(f64::MIN_POSITIVE);
    let worst = compared.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
    let (max_error, error_bound) = worst.map_or((0.0, 0.0), |worst| (worst.max_error, worst.error_bound));
    let Some(times) = *times else {
        let tensor = worst.map_or("nothing", |worst| &worst.tensor);
        let message = format!("{}: {tensor}: error {max_error:.3e} above its bound {error_bound:.3e}", point.name());
        return Err(Failure::Check(message));
    };
    Ok(Row {
        name: point.name(),
        point: point.clone(),
        gflops: flops(point, threads)? / (times.median_ms * 1e6),
        times,
        matrix_gflops: None,
        matrix_share: None,
        speedup: None,
        max_error,
        error_bound,
        device: None,
    })
}

/// Operations that the definition of the stage needs.
fn flops(point: &Point, workers: usize) -> Outcome<f64> {
    let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *point;
    let batch = Batch::from_lengths(&[tokens])?;
    let shape = AttentionShape {
        total_q: tokens,
        total_keys: tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        value_dim: head_dim,
        dtype,
    };
    let (config, rope) = (&point.config, point.stage == Stage::Rope);
    let plan = Plan::new(&PlanInput { shape, batch: &batch, config, linear_compression: false, rope, workers })?;
    let of = |stage| plan.stage(stage).map(|stage| stage.cost).unwrap_or_default();
    let cost = match point.stage {
        Stage::Nsa => plan.cost(),
        Stage::Select => of(Stage::Compressed).plus(of(Stage::Select)),
        stage => of(stage),
    };
    Ok(if point.pass == Pass::Forward { cost.forward_flops } else { cost.backward_flops })
}

fn compare_with_dense(rows: &mut [Row]) {
    let dense: Vec<Row> = rows.iter().filter(|row| row.point.stage == Stage::Dense).cloned().collect();
    for row in rows {
        let same = dense.iter().find(|dense| dense.point.same_tensors(&row.point));
        row.speedup = same.map(|dense| dense.times.median_ms / row.times.median_ms);
    }
}
