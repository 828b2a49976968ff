//! `cargo xtask readme`: fills the performance tables of the README from the records in `bench/records`.
//!
//! A region `<!-- bench:BACKEND -->` ... `<!-- /bench -->` gets one table per machine, from its latest
//! record. `--check` changes nothing and fails if the README would change, so that no figure in it is
//! typed by hand or left behind.

use crate::{Findings, files, read};
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

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
    for path in files(root, &["json"])?.iter().filter(|path| path.starts_with(RECORDS)) {
        let record = serde_json::from_str(&read(&root.join(path))?);
        let record: Value = record.map_err(|error| format!("{}: {error}", path.display()))?;
        let table = Table::new(&record).map_err(|field| format!("{}: {field}", path.display()))?;
        records.push(table);
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
fn tables(records: &[Table], backend: &str) -> String {
    let mut latest: Vec<&Table> = Vec::new();
    for table in records.iter().filter(|table| table.backend == backend) {
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
    backend: String,
    machine: String,
    date: String,
    text: String,
}

impl Table {
    /// Reads a record; the error names the field that is missing.
    fn new(record: &Value) -> Result<Self, String> {
        let (cpu, simd) = (text(record, "/machine/cpu")?, text(record, "/machine/simd")?);
        let (cores, threads) = (number(record, "/machine/cores")?, number(record, "/machine/threads")?);
        let machine = format!("{cpu}, {cores} cores, {threads} threads, {simd}");
        let (date, commit) = (text(record, "/date")?, text(record, "/commit")?);
        let mut table = format!("{machine}; {date}, commit {commit}:\n\n");
        table.push_str("| benchmark | stage | pass | dtype | tokens | median ms | GFLOP/s | times dense |\n");
        table.push_str("|---|---|---|---|---:|---:|---:|---:|\n");
        let results = record["results"].as_array().ok_or("field /results is missing or no list")?;
        for result in results {
            row(&mut table, result)?;
        }
        Ok(Self { backend: text(record, "/backend")?, machine, date, text: table })
    }
}

fn row(table: &mut String, result: &Value) -> Result<(), String> {
    let words = ["/definition", "/stage", "/pass", "/dtype"].map(|field| text(result, field));
    for word in words {
        write!(table, "| {} ", word?).map_err(|error| error.to_string())?;
    }
    let (tokens, median) = (number(result, "/tokens")?, number(result, "/median_ms")?);
    let gflops = number(result, "/gflops")?;
    let speedup = result.pointer("/speedup").and_then(Value::as_f64);
    let speedup = speedup.map_or("".into(), |speedup| format!("{speedup:.2}"));
    writeln!(table, "| {tokens} | {median:.2} | {gflops:.1} | {speedup} |").map_err(|error| error.to_string())
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
    use serde_json::json;

    fn record(date: &str, median_ms: f64) -> Value {
        let machine = json!({ "cpu": "EPYC", "cores": 2, "threads": 2, "simd": "avx512" });
        let result = json!({
            "definition": "nsa-32k", "stage": "nsa", "pass": "forward", "dtype": "f32", "tokens": 32768,
            "median_ms": median_ms, "gflops": 50.0, "speedup": 4.256,
        });
        json!({ "date": date, "commit": "abc", "backend": "cpu", "machine": machine, "results": [result] })
    }

    fn table(date: &str, median_ms: f64) -> Table {
        Table::new(&record(date, median_ms)).expect("complete")
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
    fn a_region_without_records_says_so() {
        let filled = fill("<!-- bench:cuda -->\n<!-- /bench -->", &[table("2026-02-01", 20.0)]).expect("well-formed");
        assert_eq!(filled, "<!-- bench:cuda -->\nNo record has been committed yet.\n<!-- /bench -->");
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(fill("<!-- bench:cpu -->\n", &[]).expect_err("no end").contains(CLOSE));
        let mut broken = record("2026-02-01", 20.0);
        broken["results"][0]["gflops"] = Value::Null;
        assert_eq!(Table::new(&broken).expect_err("no rate"), "field /gflops is missing or no number");
    }
}
