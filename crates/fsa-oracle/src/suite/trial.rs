//! How a backend is tried: how often it is called, in which other way, and beside which other one.

use super::check::{CaseOutcome, Check};
use super::{CheckOptions, StageReport, dispatch, run_groups};
use crate::case::{Case, Pass};
use crate::tolerance::Worst;
use fsa_core::Backend;
use serde::Serialize;
use std::fmt;

/// Calls of every case whose bits must be equal, if nobody says.
const CALLS: usize = 2;

/// A backend under test, and how it is tried.
///
/// ```
/// use fsa_oracle::naive::NaiveBackend;
/// use fsa_oracle::suite::Trial;
///
/// let (tested, other) = (NaiveBackend::default(), NaiveBackend::default());
/// let case = "window:forward:bf16:seed=3:q=20:kv=20:hq=2:hkv=1:d=8".parse()?;
/// let outcome = Trial::new(&tested).calls(5).beside(&other).run_case(&case);
/// assert!(outcome.passed(), "{:?}", outcome.failures);
/// assert_eq!(outcome.beside.expect("asked for").difference.expect("not empty").ratio, 0.0);
/// # Ok::<(), fsa_core::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct Trial<'a> {
    backend: &'a dyn Backend,
    calls: usize,
    unordered: Option<&'a dyn Backend>,
    beside: Option<&'a dyn Backend>,
}

/// What another backend made of the same case.
#[derive(Debug, Clone)]
pub struct Beside {
    /// Its largest error over its bound.
    pub worst_ratio: f64,
    /// The element in which the two differ most, over the bound of its tensor; `expected` is the other backend's. At
    /// most 2 if both are right.
    pub difference: Option<Worst>,
}

/// What another backend made of a group of cases.
#[derive(Debug, Clone, Serialize)]
pub struct BesideReport {
    /// Its name.
    pub backend: &'static str,
    /// Its largest error over its bound; at most 1 passes.
    pub worst_ratio: f64,
    /// Largest difference of the two, over the bound.
    pub greatest_difference: f64,
    /// That element: what the backend under test gave, and what the other one did.
    pub difference: Option<String>,
    /// Line of the case with that element.
    pub case: Option<String>,
}

impl<'a> Trial<'a> {
    /// Two calls of every case.
    pub fn new(backend: &'a dyn Backend) -> Self {
        Self { backend, calls: CALLS, unordered: None, beside: None }
    }

    /// This many calls of every case, which must give equal bits; at least one.
    pub fn calls(self, calls: usize) -> Self {
        Self { calls: calls.max(1), ..self }
    }

    /// Runs every backward on `other` too, once: the same backend where it may add up in any order. It must pass as well, but
    /// promises no bits.
    pub fn unordered(self, other: &'a dyn Backend) -> Self {
        Self { unordered: Some(other), ..self }
    }

    /// Runs every case on `other` too, which must pass as well, and finds the greatest difference.
    pub fn beside(self, other: &'a dyn Backend) -> Self {
        Self { beside: Some(other), ..self }
    }

    /// Runs the suite, as [`super::run`].
    pub fn run(&self, options: &CheckOptions, progress: &mut dyn FnMut(&CaseOutcome)) -> Vec<StageReport> {
        run_groups(self, options, progress)
    }

    /// Runs one case.
    pub fn run_case(&self, case: &Case) -> CaseOutcome {
        let mut check = self.judge(self.backend, case, self.calls);
        if let Some(other) = self.unordered.filter(|_| case.pass == Pass::Backward) {
            check.add_way("in any order", self.judge(other, case, 1));
        }
        if let Some(other) = self.beside {
            check.set_beside(other.name(), self.judge(other, case, self.calls));
        }
        check.outcome()
    }

    fn judge<'c>(&self, backend: &dyn Backend, case: &'c Case, calls: usize) -> Check<'c> {
        let mut check = Check::new(case, calls);
        if let Err(error) = dispatch(backend, case, &mut check) {
            check.fail(error.to_string());
        }
        check
    }

    /// An empty report on the other backend, if there is one.
    pub(super) fn beside_report(&self) -> Option<BesideReport> {
        self.beside.map(|other| BesideReport::new(other.name()))
    }
}

impl fmt::Debug for Trial<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unordered, beside) = (self.unordered.is_some(), self.beside.map(Backend::name));
        let mut shown = f.debug_struct("Trial");
        shown.field("backend", &self.backend.name()).field("calls", &self.calls);
        shown.field("unordered", &unordered).field("beside", &beside).finish()
    }
}

impl BesideReport {
    fn new(backend: &'static str) -> Self {
        Self { backend, worst_ratio: 0.0, greatest_difference: 0.0, difference: None, case: None }
    }

    /// The report of a single case, on the backend of that name.
    pub fn of_case(backend: &'static str, case: &Case, beside: &Beside) -> Self {
        let mut report = Self::new(backend);
        report.add(case, beside);
        report
    }

    pub(super) fn add(&mut self, case: &Case, beside: &Beside) {
        self.worst_ratio = self.worst_ratio.max(beside.worst_ratio);
        let Some(difference) = beside.difference.as_ref().filter(|worst| worst.ratio > self.greatest_difference) else {
            return;
        };
        self.greatest_difference = difference.ratio;
        let Worst { tensor, index, got, expected, .. } = difference;
        self.difference = Some(format!("{tensor}{index:?}: {got:e}, {} {expected:e}", self.backend));
        self.case = Some(case.to_string());
    }
}
