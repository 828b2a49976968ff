//! Tables from the records of `fsa bench`.

use super::{Table, number, text};
use serde_json::Value;
use std::fmt::Write;

/// Reads a record; the error names the field that is missing.
pub(super) fn table(record: &Value) -> Result<Table, String> {
    let (cpu, simd) = (text(record, "/machine/cpu")?, text(record, "/machine/simd")?);
    let (cores, threads) = (number(record, "/machine/cores")?, number(record, "/machine/threads")?);
    let machine = match text(record, "/machine/gpu/name") {
        Ok(gpu) => gpu,
        Err(_) => format!("{cpu}, {cores} cores, {threads} threads, {simd}"),
    };
    let (date, commit) = (text(record, "/date")?, text(record, "/commit")?);
    let mut table = format!("{machine}; {date}, commit {commit}:\n\n");
    table.push_str("| benchmark | stage | pass | dtype | tokens | median ms | GFLOP/s | times dense |\n");
    table.push_str("|---|---|---|---|---:|---:|---:|---:|\n");
    let results = record["results"].as_array().ok_or("field /results is missing or no list")?;
    for result in results {
        row(&mut table, result)?;
    }
    Ok(Table { region: text(record, "/backend")?, machine, date, text: table })
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

#[cfg(test)]
pub(super) fn example(date: &str, median_ms: f64) -> Value {
    use serde_json::json;
    let machine = json!({ "cpu": "EPYC", "cores": 2, "threads": 2, "simd": "avx512" });
    let result = json!({
        "definition": "nsa-32k", "stage": "nsa", "pass": "forward", "dtype": "f32", "tokens": 32768,
        "median_ms": median_ms, "gflops": 50.0, "speedup": 4.256,
    });
    json!({ "date": date, "commit": "abc", "backend": "cpu", "machine": machine, "results": [result] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_gpu_is_one_of_that_machine() {
        let mut record = example("2026-02-01", 20.0);
        record["machine"]["gpu"] = serde_json::json!({ "name": "NVIDIA H200" });
        assert_eq!(table(&record).expect("complete").machine, "NVIDIA H200");
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut broken = example("2026-02-01", 20.0);
        broken["results"][0]["gflops"] = Value::Null;
        assert_eq!(table(&broken).expect_err("no rate"), "field /gflops is missing or no number");
    }
}
