//! `fsa check`: the conformance suite against the f64 oracle, on this machine.

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::options::{self, float_dtype};
use crate::output::{Output, Report};
use crate::progress::Progress;
use clap::Args;
use fsa::{DType, Engine, Stage};
use fsa_oracle::suite::{self, CaseOutcome, CheckOptions, STAGES};
use fsa_oracle::{Case, Pass};
use serde::Serialize;

/// Run the conformance suite: every stage against the f64 oracle, on generated and hostile cases
///
/// A case passes if its error is at most twice the error of a naive evaluation in the same dtype plus a few units in the
/// last place, if NaN and infinities lie where the oracle has them, if every element of the outputs and nothing else was
/// written, and if a second call gives the same bits. A failed case is printed as a line that --case repeats.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct Flags {
    /// Cases per stage, pass and dtype
    #[arg(long, value_name = "N", default_value_t = 100)]
    cases: usize,
    /// Seed of all cases
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Only this stage (may be repeated)
    #[arg(long, value_name = "STAGE", value_parser = stage)]
    stage: Vec<Stage>,
    /// Only this dtype (may be repeated)
    #[arg(long, value_name = "DTYPE", value_parser = float_dtype)]
    dtype: Vec<DType>,
    /// Only this pass: forward or backward
    #[arg(long, value_name = "PASS", value_parser = pass)]
    pass: Option<Pass>,
    /// Repeat one case, given as the line that a failure prints
    #[arg(long, value_name = "LINE", conflicts_with_all = ["cases", "seed", "stage", "dtype", "pass"])]
    case: Option<String>,
    /// Repeat every case with this number of threads and require equal bits
    #[arg(long, value_name = "N")]
    compare_threads: Option<usize>,
}

fn stage(text: &str) -> Result<Stage, String> {
    let parsed = text.parse::<Stage>().map_err(|error| error.to_string())?;
    if STAGES.contains(&parsed) {
        return Ok(parsed);
    }
    let names: Vec<_> = STAGES.iter().map(|stage| stage.name()).collect();
    Err(format!("{text} has no operation of its own; expected one of {}", names.join(", ")))
}

fn pass(text: &str) -> Result<Pass, String> {
    text.parse().map_err(|error: fsa::Error| error.to_string())
}

/// The JSON form is a list of rows.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Checked {
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    stage: Stage,
    pass: Pass,
    dtype: DType,
    cases: usize,
    failures: usize,
    worst_ratio: f64,
    /// Line of the case with the largest ratio.
    worst_case: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failed: Vec<Failed>,
}

#[derive(Debug, Serialize)]
struct Failed {
    case: String,
    message: String,
}

impl Row {
    fn add(&mut self, case: String, message: String) {
        self.failures += 1;
        self.failed.push(Failed { case, message });
    }
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let engine = options::engine(context.threads)?;
    let other = match flags.compare_threads {
        Some(0) => return Err(Failure::misuse("--compare-threads", "at least 1", 0)),
        threads => threads.map(options::engine).transpose()?,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(context.threads).build();
    let pool = pool.map_err(|error| Failure::Check(format!("threads do not start: {error}")))?;
    let rows = pool.install(|| match &flags.case {
        Some(line) => one_case(line, &engine, other.as_ref()).map(|row| vec![row]),
        None => Ok(all_cases(flags, &engine, other.as_ref())),
    })?;
    let checked = Checked { rows };
    context.output.report(&checked)?;
    let (failures, cases) = checked.totals();
    if failures > 0 {
        return Err(Failure::Check(format!("{failures} of {cases} cases failed")));
    }
    Ok(())
}

/// What differs between the bits of a case and those of a run with another number of threads.
fn difference(other: Option<&Engine>, outcome: &CaseOutcome) -> Option<String> {
    let repeated = suite::run_case(other?.backend(), &outcome.case);
    (repeated.digest != outcome.digest).then(|| "another number of threads gives other bits".to_string())
}

fn one_case(line: &str, engine: &Engine, other: Option<&Engine>) -> Outcome<Row> {
    let case: Case = line.trim().parse().map_err(named)?;
    case.validate().map_err(named)?;
    let outcome = suite::run_case(engine.backend(), &case);
    let mut row = Row {
        stage: case.stage,
        pass: case.pass,
        dtype: case.dtype,
        cases: 1,
        failures: 0,
        worst_ratio: outcome.worst_ratio,
        worst_case: Some(case.to_string()),
        failed: Vec::new(),
    };
    let messages: Vec<String> = outcome.failures.iter().cloned().chain(difference(other, &outcome)).collect();
    if !messages.is_empty() {
        row.add(case.to_string(), messages.join("; "));
    }
    Ok(row)
}

/// An error in the line of a case names the flag, then the field.
fn named(error: fsa::Error) -> Failure {
    let fsa::Error::Input(mut input) = error else { return Failure::Library(error) };
    input.argument = format!("--case: {}", input.argument);
    Failure::Library(input.into())
}

fn all_cases(flags: &Flags, engine: &Engine, other: Option<&Engine>) -> Vec<Row> {
    let mut options = CheckOptions { cases: flags.cases, seed: flags.seed, ..CheckOptions::default() };
    if !flags.stage.is_empty() {
        options.stages.retain(|stage| flags.stage.contains(stage));
    }
    if !flags.dtype.is_empty() {
        options.dtypes.retain(|dtype| flags.dtype.contains(dtype));
    }
    options.passes.retain(|pass| flags.pass.is_none_or(|wanted| wanted == *pass));
    let progress = Progress::new(options.total_cases());
    let mut different = Vec::new();
    let reports = suite::run(engine.backend(), &options, &mut |outcome| {
        let case = &outcome.case;
        progress.start(format!("{} {} {}", case.stage, case.pass, case.dtype));
        progress.advance();
        different.extend(difference(other, outcome).map(|message| (case.clone(), message)));
    });
    let mut rows: Vec<Row> = reports
        .into_iter()
        .map(|report| Row {
            stage: report.stage,
            pass: report.pass,
            dtype: report.dtype,
            cases: report.cases,
            failures: report.failures,
            worst_ratio: report.worst_ratio,
            worst_case: report.worst_case,
            failed: report.failed.into_iter().map(|f| Failed { case: f.case, message: f.message }).collect(),
        })
        .collect();
    for (case, message) in different {
        let group = |row: &&mut Row| (row.stage, row.pass, row.dtype) == (case.stage, case.pass, case.dtype);
        if let Some(row) = rows.iter_mut().find(group) {
            row.add(case.to_string(), message);
        }
    }
    rows
}

impl Checked {
    fn totals(&self) -> (usize, usize) {
        (self.rows.iter().map(|row| row.failures).sum(), self.rows.iter().map(|row| row.cases).sum())
    }
}

/// A message that lists every wrong row of a case may fill pages; the whole of it is in the JSON form.
fn shortened(message: &str) -> String {
    const SHOWN: usize = 600;
    match message.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{} .. ({} more characters with --json)", &message[..end], message.len() - end),
        None => message.to_string(),
    }
}

impl Report for Checked {
    fn show(&self, output: &Output) -> Outcome {
        let mut table =
            output.new_table(&["<stage", "<pass", "<dtype", "cases", "failures", "worst error / bound", "<"]);
        for row in &self.rows {
            table.add_row(vec![
                row.stage.to_string().into(),
                row.pass.to_string().into(),
                row.dtype.to_string().into(),
                row.cases.to_string().into(),
                row.failures.to_string().into(),
                format!("{:.3}", row.worst_ratio).into(),
                output.verdict(row.failures == 0),
            ]);
        }
        output.table(&table)?;
        for failed in self.rows.iter().flat_map(|row| &row.failed) {
            output.line(format!("FAILED --case \"{}\"\n       {}", failed.case, shortened(&failed.message)))?;
        }
        let (failures, cases) = self.totals();
        output.line(format!("{cases} cases, {failures} failures"))
    }
}
