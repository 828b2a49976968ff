//! The result of `fsa check`: one row per stage, pass and dtype.

use crate::failure::Outcome;
use crate::output::{Output, Report};
use fsa::{DType, Stage};
use fsa_oracle::suite::{BesideReport, CaseOutcome, StageReport};
use fsa_oracle::{Case, Pass};
use serde::Serialize;

/// The JSON form is a list of rows.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Checked {
    /// One per stage, pass and dtype.
    pub rows: Vec<Row>,
}

/// Cases of one stage, pass and dtype.
#[derive(Debug, Serialize)]
pub struct Row {
    stage: Stage,
    pass: Pass,
    dtype: DType,
    cases: usize,
    failures: usize,
    worst_ratio: f64,
    /// Line of the case with the largest ratio.
    worst_case: Option<String>,
    /// What the CPU made of the same cases, for another device.
    #[serde(skip_serializing_if = "Option::is_none")]
    beside: Option<BesideReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failed: Vec<Failed>,
}

#[derive(Debug, Serialize)]
struct Failed {
    case: String,
    message: String,
}

impl Row {
    /// A single case, and what the backend of the name `beside` made of it; no failures yet.
    pub fn of_case(outcome: &CaseOutcome, beside: Option<&'static str>) -> Self {
        let case = &outcome.case;
        let beside =
            beside.zip(outcome.beside.as_ref()).map(|(name, beside)| BesideReport::of_case(name, case, beside));
        Self {
            stage: case.stage,
            pass: case.pass,
            dtype: case.dtype,
            cases: 1,
            failures: 0,
            worst_ratio: outcome.worst_ratio,
            worst_case: Some(case.to_string()),
            beside,
            failed: Vec::new(),
        }
    }

    /// Adds a failure.
    pub fn add(&mut self, case: String, message: String) {
        self.failures += 1;
        self.failed.push(Failed { case, message });
    }

    /// True if `case` is one of the row's.
    pub fn is_of(&self, case: &Case) -> bool {
        (self.stage, self.pass, self.dtype) == (case.stage, case.pass, case.dtype)
    }
}

impl From<StageReport> for Row {
    fn from(report: StageReport) -> Self {
        Self {
            stage: report.stage,
            pass: report.pass,
            dtype: report.dtype,
            cases: report.cases,
            failures: report.failures,
            worst_ratio: report.worst_ratio,
            worst_case: report.worst_case,
            beside: report.beside,
            failed: report.failed.into_iter().map(|f| Failed { case: f.case, message: f.message }).collect(),
        }
    }
}

impl Checked {
    /// Failures and cases.
    pub fn totals(&self) -> (usize, usize) {
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
        let beside = self.rows.iter().find_map(|row| row.beside.as_ref()).map(|beside| beside.backend);
        let of_other = beside.map_or(String::new(), |backend| format!("{backend} error / bound"));
        let mut header = vec!["<stage", "<pass", "<dtype", "cases", "failures", "worst error / bound"];
        if beside.is_some() {
            header.extend([of_other.as_str(), "difference / bound"]);
        }
        header.push("<");
        let mut table = output.new_table(&header);
        for row in &self.rows {
            let mut cells = vec![
                row.stage.to_string().into(),
                row.pass.to_string().into(),
                row.dtype.to_string().into(),
                row.cases.to_string().into(),
                row.failures.to_string().into(),
                format!("{:.3}", row.worst_ratio).into(),
            ];
            if let Some(beside) = &row.beside {
                cells.push(format!("{:.3}", beside.worst_ratio).into());
                cells.push(format!("{:.3}", beside.greatest_difference).into());
            }
            cells.push(output.verdict(row.failures == 0));
            table.add_row(cells);
        }
        output.table(&table)?;
        for row in &self.rows {
            let Some(difference) = row.beside.as_ref().and_then(|beside| beside.difference.as_ref()) else { continue };
            output.line(format!("{} {} {}: greatest difference at {difference}", row.stage, row.pass, row.dtype))?;
        }
        for failed in self.rows.iter().flat_map(|row| &row.failed) {
            output.line(format!("FAILED --case \"{}\"\n       {}", failed.case, shortened(&failed.message)))?;
        }
        let (failures, cases) = self.totals();
        output.line(format!("{cases} cases, {failures} failures"))
    }
}
