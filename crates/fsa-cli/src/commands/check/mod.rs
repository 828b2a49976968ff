//! `fsa check`: the conformance suite against the f64 oracle, on this machine.

mod report;
mod scope;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::gpu::Gpu;
use crate::options::{self, Chosen, Device, DeviceFlags, float_dtype};
use crate::progress::Progress;
use clap::Args;
use fsa::cuda::plan::Routing;
use fsa::{DType, Engine, Stage};
use fsa_oracle::suite::{self, CaseOutcome, STAGES, Trial};
use fsa_oracle::{Case, Pass};
use report::{Checked, Row};
use scope::Scope;

/// Run the conformance suite: every stage against the f64 oracle, on generated and hostile cases
///
/// A case passes if its error is at most twice the error of a naive evaluation in the same dtype plus a few units in the
/// last place, if NaN and infinities lie where the oracle has them, if every element of the outputs and nothing else was
/// written, and if a second call gives the same bits. A failed case is printed as a line that --case repeats.
///
/// With --device cuda the stages and dtypes that CUDA has are run, and what is left out is named. Every case runs on the
/// CPU backend too, which must pass as well; the greatest difference of the two is shown, in units of the bound. A backward
/// runs with deterministic sums, whose bits are compared, and once more with those that may come in any order. Half of the
/// cases of stage `selected` and of the whole take one route, half the other, unless --route names one; likewise lists of
/// blocks are made in one pass with compressed attention or in their own, where both are possible.
#[derive(Debug, Args)]
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
    /// Calls of every case, which must give equal bits; at least 2
    #[arg(long, value_name = "N", default_value_t = 2)]
    repeat: usize,
    /// Repeat every case with this number of threads and require equal bits
    #[arg(long, value_name = "N")]
    compare_threads: Option<usize>,
    #[command(flatten)]
    device: DeviceFlags,
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

/// Backends of a run.
struct Tested {
    chosen: Chosen,
    /// The GPU where sums may come in any order.
    unordered: Option<Engine>,
    /// The CPU, beside a GPU.
    beside: Option<Engine>,
    /// The same backend with another number of threads.
    other: Option<Engine>,
    repeat: usize,
}

impl Tested {
    fn new(flags: &Flags, context: &Context) -> Outcome<Self> {
        if flags.repeat < 2 {
            return Err(Failure::misuse("--repeat", "at least 2", flags.repeat));
        }
        let mut device = flags.device;
        if device.device == Device::Cuda && fsa::cuda::Environment::read()?.routing == Routing::Fastest {
            device.route = device.route.or(Some(Routing::Both));
        }
        let chosen = options::engine(&device, context.threads)?;
        let other = match flags.compare_threads {
            Some(0) => return Err(Failure::misuse("--compare-threads", "at least 1", 0)),
            Some(_) if chosen.cuda.is_some() => {
                return Err(Failure::misuse("--compare-threads", "--device cpu", "--device cuda"));
            }
            threads => threads.map(options::cpu).transpose()?,
        };
        let unordered = chosen
            .cuda
            .as_ref()
            .map(|backend| Ok::<_, fsa::Error>(Engine::from_backend(backend.unordered()?)))
            .transpose()?;
        let beside = chosen.cuda.as_ref().map(|_| options::cpu(context.threads)).transpose()?;
        Ok(Self { chosen, unordered, beside, other, repeat: flags.repeat })
    }

    fn trial(&self) -> Trial<'_> {
        let trial = Trial::new(self.chosen.engine.backend()).calls(self.repeat);
        let trial = self.unordered.iter().fold(trial, |trial, engine| trial.unordered(engine.backend()));
        self.beside.iter().fold(trial, |trial, engine| trial.beside(engine.backend()))
    }

    /// What differs between the bits of a case and those of a run with another number of threads.
    fn difference(&self, outcome: &CaseOutcome) -> Option<String> {
        let repeated = suite::run_case(self.other.as_ref()?.backend(), &outcome.case);
        (repeated.digest != outcome.digest).then(|| "another number of threads gives other bits".to_string())
    }
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let tested = Tested::new(flags, context)?;
    let (case, scope) = match &flags.case {
        Some(line) => (Some(scope::case(line, &tested.chosen)?), Scope::default()),
        None => (None, Scope::new(flags, &tested.chosen)?),
    };
    if let Some(backend) = &tested.chosen.cuda {
        context.output.note(Gpu::describe(backend).line())?;
    }
    scope.skipped.iter().try_for_each(|line| context.output.note(format!("skipped: {line}")))?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(context.threads).build();
    let pool = pool.map_err(|error| Failure::Check(format!("threads do not start: {error}")))?;
    let rows = pool.install(|| match &case {
        Some(case) => vec![one_case(case, &tested)],
        None => all_cases(&scope, &tested),
    });
    let checked = Checked { rows };
    context.output.report(&checked)?;
    let (failures, cases) = checked.totals();
    if failures > 0 {
        return Err(Failure::Check(format!("{failures} of {cases} cases failed")));
    }
    Ok(())
}

fn one_case(case: &Case, tested: &Tested) -> Row {
    let outcome = tested.trial().run_case(case);
    let mut row = Row::of_case(&outcome, tested.beside.as_ref().map(|engine| engine.backend().name()));
    let messages: Vec<String> = outcome.failures.iter().cloned().chain(tested.difference(&outcome)).collect();
    if !messages.is_empty() {
        row.add(case.to_string(), messages.join("; "));
    }
    row
}

fn all_cases(scope: &Scope, tested: &Tested) -> Vec<Row> {
    let progress = Progress::new(scope.options.total_cases());
    let mut different = Vec::new();
    let reports = tested.trial().run(&scope.options, &mut |outcome| {
        let case = &outcome.case;
        progress.start(format!("{} {} {}", case.stage, case.pass, case.dtype));
        progress.advance();
        different.extend(tested.difference(outcome).map(|message| (case.clone(), message)));
    });
    let mut rows: Vec<Row> = reports.into_iter().map(Row::from).collect();
    for (case, message) in different {
        let group = |row: &&mut Row| row.is_of(&case);
        if let Some(row) = rows.iter_mut().find(group) {
            row.add(case.to_string(), message);
        }
    }
    rows
}
