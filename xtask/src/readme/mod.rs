//! `cargo xtask readme`: fills the performance tables of the README from the records in `bench/records`.
//!
//! A region `<!-- bench:NAME -->` ... `<!-- /bench -->` gets one table per machine, from its latest record. The
//! name is a backend that `fsa bench` recorded, or what `bench/compare.py` recorded: `selected`, `nsa`, `stages`.
//! `--check` changes nothing and fails if the README would change, so that no figure in it is typed by hand or left
//! behind.

mod backend;
mod comparison;

use crate::{Findings, files, read};
use serde_json::Value;
use std::path::{Path, PathBuf};

const README: &str = "README.md";
const RECORDS: &str = "bench/records";
const OPEN: &str = "<!-- bench:";
const OPEN_END: &str = " -->\n";
const CLOSE: &str = "<!-- /bench -->";

/// Writes the tables.
pub fn write(root: &Path) -> Findings {
    let (old, new) = rendered(root)?;
    if old != new {
        std::fs::write(root.join(README), new).map_err(|error| format!("{README}: {error}"))?;
    }
    Ok(Vec::new())
}

/// Finds out whether the tables are those of the records.
pub fn check(root: &Path) -> Findings {
    let (old, new) = rendered(root)?;
    let stale = format!("the tables of {README} are not those of {RECORDS}: run cargo xtask readme");
    Ok(if old == new { Vec::new() } else { vec![stale] })
}

/// The README as it is and as it should be.
fn rendered(root: &Path) -> Result<(String, String), String> {
    let mut records = Vec::new();
    // Times of routes are the cost model's: a test of fsa-cuda holds it to them.
    let is_table = |path: &&PathBuf| path.starts_with(RECORDS) && !path.to_string_lossy().ends_with("-routes.json");
    for path in files(root, &["json"])?.iter().filter(is_table) {
        let record = serde_json::from_str(&read(&root.join(path))?);
        let record: Value = record.map_err(|error| format!("{}: {error}", path.display()))?;
        let tables = match &record {
            Value::Array(rows) => {
                let about = path.with_extension("txt");
                comparison::tables(rows, &read(&root.join(about))?)
            }
            _ => backend::table(&record).map(|table| vec![table]),
        };
        records.extend(tables.map_err(|reason| format!("{}: {reason}", path.display()))?);
    }
    let old = read(&root.join(README))?;
    let new = fill(&old, &records)?;
    Ok((old, new))
}

/// Replaces what stands in every region.
fn fill(text: &str, records: &[Table]) -> Result<String, String> {
    let (mut filled, mut rest) = (String::new(), text);
    while let Some(start) = rest.find(OPEN) {
        let unclosed = || format!("{README}: a region that {OPEN:?} opens has no {CLOSE:?}");
        let name = start + OPEN.len();
        let body = name + rest[name..].find(OPEN_END).ok_or_else(unclosed)?;
        let end = body + rest[body..].find(CLOSE).ok_or_else(unclosed)?;
        filled.push_str(&rest[..body + OPEN_END.len()]);
        filled.push_str(&tables(records, &rest[name..body]));
        rest = &rest[end..];
    }
    filled.push_str(rest);
    Ok(filled)
}

/// The latest table of every machine.
fn tables(records: &[Table], region: &str) -> String {
    let mut latest: Vec<&Table> = Vec::new();
    for table in records.iter().filter(|table| table.region == region) {
        match latest.iter_mut().find(|known| known.machine == table.machine) {
            Some(known) if known.date <= table.date => *known = table,
            Some(_) => {}
            None => latest.push(table),
        }
    }
    latest.sort_by(|a, b| a.machine.cmp(&b.machine));
    if latest.is_empty() {
        return "No record has been committed yet.\n".into();
    }
    latest.iter().map(|table| table.text.as_str()).collect::<Vec<_>>().join("\n")
}

/// A record as the README shows it.
#[derive(Debug)]
struct Table {
    region: String,
    machine: String,
    date: String,
    text: String,
}

fn text(value: &Value, field: &str) -> Result<String, String> {
    let found = value.pointer(field).and_then(Value::as_str);
    found.map(str::to_string).ok_or_else(|| format!("field {field} is missing or no text"))
}

fn number(value: &Value, field: &str) -> Result<f64, String> {
    value.pointer(field).and_then(Value::as_f64).ok_or_else(|| format!("field {field} is missing or no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(date: &str, median_ms: f64) -> Table {
        backend::table(&backend::example(date, median_ms)).expect("complete")
    }

    #[test]
    fn the_latest_record_of_a_machine_fills_the_region() {
        let text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n";
        let filled = fill(text, &[table("2026-02-01", 20.0), table("2026-01-01", 10.0)]).expect("well-formed");
        assert!(filled.contains("| nsa-32k | nsa | forward | f32 | 32768 | 20.00 | 50.0 | 4.26 |"), "{filled}");
        assert!(filled.starts_with("before\n<!-- bench:cpu -->\nEPYC, 2 cores, 2 threads, avx512; 2026-02-01"));
        assert!(!filled.contains("old") && !filled.contains("10.00") && filled.ends_with("<!-- /bench -->\nafter\n"));
        assert_eq!(
            fill(&filled, &[table("2026-02-01", 20.0)]).expect("well-formed"),
            filled,
            "a second run changes it"
        );
    }

    #[test]
    fn records_go_to_the_region_of_their_kind() {
        let text = "<!-- bench:cpu -->\n<!-- /bench -->\n<!-- bench:selected -->\n<!-- /bench -->\n";
        let filled = fill(text, &[table("2026-02-01", 20.0), comparison::example()]).expect("well-formed");
        let (cpu, selected) = filled.split_once("<!-- bench:selected -->").expect("both regions");
        assert!(cpu.contains("EPYC") && !cpu.contains("H200") && selected.contains("H200"), "{filled}");
    }

    #[test]
    fn a_region_without_records_says_so() {
        for name in ["cuda", "selected"] {
            let text = format!("<!-- bench:{name} -->\n<!-- /bench -->");
            let filled = fill(&text, &[table("2026-02-01", 20.0)]).expect("well-formed");
            let expected = format!("<!-- bench:{name} -->\nNo record has been committed yet.\n<!-- /bench -->");
            assert_eq!(filled, expected);
        }
    }

    #[test]
    fn what_is_not_closed_is_named() {
        assert!(fill("<!-- bench:cpu -->\n", &[]).expect_err("no end").contains(CLOSE));
    }
}
