//! `fsa bench`: times of the stages, each next to the f64 oracle, dense attention and the machine's matrix product.

mod definition;
mod matrix_rate;
mod record;
mod timing;
mod work;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::machine::{self, Machine};
use crate::options;
use crate::output::{self, Output, Report};
use crate::progress::Progress;
use clap::Args;
use definition::{Point, Suite};
use fsa::plan::{Plan, PlanInput};
use fsa::{AttentionShape, Batch, Engine, Stage};
use fsa_oracle::Pass;
use matrix_rate::MatrixRate;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use timing::Times;
use work::{Measured, Work};

/// Measure: medians with quantiles, GFLOP/s, share of the machine's matrix-product rate, ratio to dense attention
///
/// Every result is compared with the f64 oracle on sampled rows before it is timed.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct Flags {
    /// Definition to measure: acceptance, quick, stages, shapes or scaling
    #[arg(long, value_name = "NAME", default_value = "quick")]
    suite: String,
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
    /// Save JSON and CSV under PATH/<machine>/<date>-cpu, or as PATH if it ends in .json
    #[arg(long, value_name = "PATH", num_args = 0..=1, default_missing_value = "bench/records")]
    record: Option<PathBuf>,
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
    /// Rate of the f32 matrix product, the higher of just before and just after.
    matrix_gflops: f64,
    /// `gflops / matrix_gflops`.
    matrix_share: f64,
    /// Median of dense over this median, where dense was measured on the same tensors.
    speedup: Option<f64>,
    max_error: f64,
    error_bound: f64,
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

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    if flags.list {
        return list(context);
    }
    let suite = Suite::find(&flags.suite)?;
    let points = chosen(flags, &suite)?;
    let engine = options::engine(context.threads)?;
    let mut rate = MatrixRate::new(context.threads)?;
    let progress = Progress::new(points.len());
    let mut results: Vec<Row> = Vec::new();
    for point in &points {
        results
            .push(progress.step(point.name(), || measure(&engine, &mut rate, point, flags.budget, context.threads))?);
    }
    drop(progress);
    compare_with_dense(&mut results);
    let record = Record {
        date: machine::today(),
        commit: machine::commit().unwrap_or_else(|| "unknown".into()),
        version: env!("CARGO_PKG_VERSION"),
        backend: "cpu",
        command: std::env::args().skip(1).fold("fsa".into(), |command, word| format!("{command} {word}")),
        suite: suite.name,
        machine: Machine::describe(context.threads),
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

fn measure(engine: &Engine, rate: &mut MatrixRate, point: &Point, budget: f64, threads: usize) -> Outcome<Row> {
    let before = rate.gflops();
    let work = Work::new(engine, point, Duration::from_secs_f64(budget))?;
    let Measured { times, compared, wrong_selections } = work.run()?;
    if wrong_selections > 0 {
        let message =
            format!("{}: topk_indices: {wrong_selections} sampled rows differ from the oracle's", point.name());
        return Err(Failure::Check(message));
    }
    let ratio = |c: &&crate::sampled::Compared| c.max_error / c.error_bound.max(f64::MIN_POSITIVE);
    let worst = compared.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
    let (max_error, error_bound) = worst.map_or((0.0, 0.0), |worst| (worst.max_error, worst.error_bound));
    let Some(times) = times else {
        let tensor = worst.map_or("nothing", |worst| &worst.tensor);
        let message = format!("{}: {tensor}: error {max_error:.3e} above its bound {error_bound:.3e}", point.name());
        return Err(Failure::Check(message));
    };
    let gflops = flops(point, threads)? / (times.median_ms * 1e6);
    // Other work on the machine only lowers the rate: the higher of the two is nearer to what the machine can do.
    let matrix_gflops = before.max(rate.gflops());
    Ok(Row {
        name: point.name(),
        point: point.clone(),
        times,
        gflops,
        matrix_gflops,
        matrix_share: gflops / matrix_gflops,
        speedup: None,
        max_error,
        error_bound,
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

impl Report for Record {
    fn show(&self, output: &Output) -> Outcome {
        let machine = &self.machine;
        output.line(format!(
            "{}: {}, {} cores, {} threads, {}; commit {}",
            self.suite, machine.cpu, machine.cores, machine.threads, machine.simd, self.commit
        ))?;
        let mut table = output.new_table(&[
            "<stage/pass/dtype/heads/head_dim/block-topk/tokens",
            "median",
            "20 % .. 80 %",
            "runs",
            "GFLOP/s",
            "of matrix product",
            "times dense",
            "error / bound",
        ]);
        for row in &self.results {
            let times = &row.times;
            table.add_row([
                row.name.clone(),
                output::duration(times.median_ms),
                format!("{} .. {}", output::duration(times.p20_ms), output::duration(times.p80_ms)),
                times.repetitions.to_string(),
                format!("{:.1}", row.gflops),
                format!("{:.1} % of {:.0}", 100.0 * row.matrix_share, row.matrix_gflops),
                row.speedup.map_or(String::new(), |speedup| format!("{speedup:.2}x")),
                format!("{:.3}", row.max_error / row.error_bound.max(f64::MIN_POSITIVE)),
            ]);
        }
        output.table(&table)
    }
}

impl Report for List {
    fn show(&self, output: &Output) -> Outcome {
        for suite in &self.suites {
            output.line(format!("{}: {}", suite.name, suite.description))?;
            for row in &suite.rows {
                output.line(format!("  {row}"))?;
            }
        }
        Ok(())
    }
}
