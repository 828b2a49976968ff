//! The conformance suite: one for every backend.
//!
//! Every case calls the backend twice (more often where a [`Trial`] says so) over poisoned outputs, requires equal bits,
//! requires that every element of the outputs and nothing else was written, and compares every tensor with the oracle
//! under the tolerance rule ([`crate::tolerance`]). The backward of an attention stage is given the backend's own
//! forward.

mod attention;
mod check;
mod combine;
mod compress;
mod nsa;
mod rope;
mod select;
mod trial;

pub use check::CaseOutcome;
pub use trial::{Beside, BesideReport, Trial};

use crate::case::{Case, Pass};
use crate::generate::generate;
use check::Check;
use fsa_core::{Backend, DType, Error, Result, Stage};
use rayon::prelude::*;
use serde::Serialize;

/// Stages with an operation of their own, in the order of a report.
pub const STAGES: [Stage; 9] = [
    Stage::Compress,
    Stage::Rope,
    Stage::Compressed,
    Stage::Select,
    Stage::Selected,
    Stage::Window,
    Stage::Combine,
    Stage::Dense,
    Stage::Nsa,
];

/// What is run.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// Cases per stage, pass and dtype.
    pub cases: usize,
    /// Seed of all of them.
    pub seed: u64,
    /// Stages.
    pub stages: Vec<Stage>,
    /// Types.
    pub dtypes: Vec<DType>,
    /// Forward, backward or both.
    pub passes: Vec<Pass>,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            cases: 100,
            seed: 0,
            stages: STAGES.to_vec(),
            dtypes: DType::FLOATS.to_vec(),
            passes: Pass::ALL.to_vec(),
        }
    }
}

impl CheckOptions {
    /// Every stage, pass and dtype that the options name and that exists, in the order of the report.
    pub fn groups(&self) -> Vec<(Stage, Pass, DType)> {
        let mut groups = Vec::new();
        for stage in &self.stages {
            for pass in &self.passes {
                for dtype in &self.dtypes {
                    if Case::new(*stage, *pass, *dtype).validate().is_ok() {
                        groups.push((*stage, *pass, *dtype));
                    }
                }
            }
        }
        groups
    }

    /// How many cases [`run`] will report to `progress`.
    pub fn total_cases(&self) -> usize {
        self.groups().len() * self.cases
    }
}

/// A case that failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failure {
    /// Its line, for `fsa check --case`.
    pub case: String,
    /// What was wrong.
    pub message: String,
}

/// The result of one stage, pass and dtype.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// The stage.
    pub stage: Stage,
    /// Forward or backward.
    pub pass: Pass,
    /// Type of the tensors.
    pub dtype: DType,
    /// Cases that ran.
    pub cases: usize,
    /// Cases that failed.
    pub failures: usize,
    /// Largest error over its bound; at most 1 passes.
    pub worst_ratio: f64,
    /// The failed cases, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failure>,
    /// Rows whose selection rounding may decide, over all cases. They were checked as selections, not id by id.
    #[serde(skip)]
    pub ambiguous_rows: usize,
    /// Rows whose selection was compared id by id.
    #[serde(skip)]
    pub decided_rows: usize,
    /// Line of the case with the largest ratio.
    #[serde(skip)]
    pub worst_case: Option<String>,
    /// What the other backend of a [`Trial`] made of the same cases.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<BesideReport>,
}

/// Cases that run side by side before `progress` hears of them.
const CHUNK: usize = 16;

/// Runs the suite. Cases run in the current rayon pool; `progress` hears of them in their order, which does not
/// depend on the number of threads.
pub fn run(backend: &dyn Backend, options: &CheckOptions, progress: &mut dyn FnMut(&CaseOutcome)) -> Vec<StageReport> {
    Trial::new(backend).run(options, progress)
}

fn run_groups(trial: &Trial<'_>, options: &CheckOptions, progress: &mut dyn FnMut(&CaseOutcome)) -> Vec<StageReport> {
    let mut reports = Vec::new();
    for (stage, pass, dtype) in options.groups() {
        let mut report = StageReport {
            stage,
            pass,
            dtype,
            cases: 0,
            failures: 0,
            worst_ratio: 0.0,
            failed: Vec::new(),
            ambiguous_rows: 0,
            decided_rows: 0,
            worst_case: None,
            beside: trial.beside_report(),
        };
        for start in (0..options.cases).step_by(CHUNK) {
            let numbers = start..(start + CHUNK).min(options.cases);
            let cases: Vec<Case> = numbers.map(|number| generate(stage, pass, dtype, options.seed, number)).collect();
            let outcomes: Vec<CaseOutcome> = cases.par_iter().map(|case| trial.run_case(case)).collect();
            for outcome in &outcomes {
                report.add(outcome);
                progress(outcome);
            }
        }
        reports.push(report);
    }
    reports
}

impl StageReport {
    fn add(&mut self, outcome: &CaseOutcome) {
        self.cases += 1;
        self.ambiguous_rows += outcome.ambiguous_rows;
        self.decided_rows += outcome.decided_rows;
        if outcome.worst_ratio > self.worst_ratio {
            self.worst_ratio = outcome.worst_ratio;
            self.worst_case = Some(outcome.case.to_string());
        }
        if let (Some(report), Some(beside)) = (&mut self.beside, &outcome.beside) {
            report.add(&outcome.case, beside);
        }
        if !outcome.passed() {
            self.failures += 1;
            let (case, message) = (outcome.case.to_string(), outcome.failures.join("; "));
            self.failed.push(Failure { case, message });
        }
    }
}

/// Runs one case.
pub fn run_case(backend: &dyn Backend, case: &Case) -> CaseOutcome {
    Trial::new(backend).run_case(case)
}

fn dispatch(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    case.validate()?;
    match (case.stage, case.pass) {
        (Stage::Compressed | Stage::Selected | Stage::Window | Stage::Dense, Pass::Forward) => {
            attention::forward(backend, case, check)
        }
        (Stage::Compressed | Stage::Selected | Stage::Window | Stage::Dense, Pass::Backward) => {
            attention::backward(backend, case, check)
        }
        (Stage::Compress, Pass::Forward) => compress::forward(backend, case, check),
        (Stage::Compress, Pass::Backward) => compress::backward(backend, case, check),
        (Stage::Rope, _) => rope::rotate(backend, case, check),
        (Stage::Combine, Pass::Forward) => combine::forward(backend, case, check),
        (Stage::Combine, Pass::Backward) => combine::backward(backend, case, check),
        (Stage::Select, _) => select::forward(backend, case, check),
        (Stage::Nsa, Pass::Forward) => nsa::forward(backend, case, check),
        (Stage::Nsa, Pass::Backward) => nsa::backward(backend, case, check),
        (Stage::Index, _) => Err(Error::input("stage", "a stage with an operation of its own", "index")),
    }
}
