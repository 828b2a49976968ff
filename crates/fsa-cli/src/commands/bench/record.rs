//! Records: what was measured, on which machine, from which commit, by which command.

use super::{Record, Row};
use crate::failure::{Failure, Outcome};
use crate::whole_file::WholeFile;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Writes `record` as JSON and as CSV. A path that ends in `.json` names the files; any other path is the
/// folder in which they get the machine's and the date's name.
pub fn save(record: &Record, path: &Path) -> Outcome<Vec<PathBuf>> {
    let json = if path.extension().is_some_and(|extension| extension == "json") {
        path.to_path_buf()
    } else {
        path.join(record.machine.slug()).join(format!("{}-{}.json", record.date, record.backend))
    };
    let csv = json.with_extension("csv");
    if let Some(folder) = json.parent() {
        std::fs::create_dir_all(folder).map_err(Failure::file(folder, "cannot be made"))?;
    }
    let mut text = serde_json::to_string_pretty(record)
        .map_err(|error| Failure::Check(format!("the record cannot be written as JSON: {error}")))?;
    text.push('\n');
    let (json_file, csv_file) = (WholeFile::create(&json)?, WholeFile::create(&csv)?);
    json_file.write(text.as_bytes())?;
    csv_file.write(to_csv(record).as_bytes())?;
    Ok(vec![json, csv])
}

/// Columns of the CSV form and how they are filled.
type Column = (&'static str, fn(&Row) -> String);

const COLUMNS: [Column; 27] = [
    ("definition", |row| row.point.definition.clone()),
    ("stage", |row| row.point.stage.to_string()),
    ("pass", |row| row.point.pass.to_string()),
    ("dtype", |row| row.point.dtype.to_string()),
    ("tokens", |row| row.point.tokens.to_string()),
    ("num_q_heads", |row| row.point.num_q_heads.to_string()),
    ("num_kv_heads", |row| row.point.num_kv_heads.to_string()),
    ("head_dim", |row| row.point.head_dim.to_string()),
    ("block_size", |row| row.point.config.block_size.to_string()),
    ("topk", |row| row.point.config.topk.to_string()),
    ("median_ms", |row| format!("{:.4}", row.times.median_ms)),
    ("min_ms", |row| format!("{:.4}", row.times.min_ms)),
    ("p20_ms", |row| format!("{:.4}", row.times.p20_ms)),
    ("p80_ms", |row| format!("{:.4}", row.times.p80_ms)),
    ("max_ms", |row| format!("{:.4}", row.times.max_ms)),
    ("repetitions", |row| row.times.repetitions.to_string()),
    ("gflops", |row| format!("{:.2}", row.gflops)),
    ("matrix_gflops", |row| optional(row.matrix_gflops, |rate| format!("{rate:.2}"))),
    ("matrix_share", |row| optional(row.matrix_share, |share| format!("{share:.4}"))),
    ("speedup", |row| optional(row.speedup, |speedup| format!("{speedup:.3}"))),
    ("max_error", |row| format!("{:e}", row.max_error)),
    ("error_bound", |row| format!("{:e}", row.error_bound)),
    ("graph_median_ms", |row| optional(row.device.as_ref(), |device| format!("{:.4}", device.graph_median_ms))),
    ("host_us", |row| optional(row.device.as_ref(), |device| format!("{:.2}", device.host_us))),
    ("plan_host_us", |row| optional(row.device.as_ref(), |device| format!("{:.2}", device.plan_host_us))),
    ("graph_host_us", |row| optional(row.device.as_ref(), |device| format!("{:.2}", device.graph_host_us))),
    ("workspace_bytes", |row| optional(row.device.as_ref(), |device| device.workspace_bytes.to_string())),
];

/// An empty cell where there is nothing.
fn optional<T>(value: Option<T>, cell: impl FnOnce(T) -> String) -> String {
    value.map_or(String::new(), cell)
}

/// The machine in comments, then one line per row.
fn to_csv(record: &Record) -> String {
    let machine = &record.machine;
    let mut text = String::new();
    let header = [
        ("date", record.date.clone()),
        ("commit", record.commit.clone()),
        ("version", record.version.to_string()),
        ("backend", record.backend.to_string()),
        ("cpu", machine.cpu.clone()),
        ("cores", machine.cores.to_string()),
        ("threads", machine.threads.to_string()),
        ("simd", machine.simd.to_string()),
        ("system", machine.system.clone()),
        ("command", record.command.clone()),
    ];
    for (name, value) in header {
        // Writing to a string does not fail.
        let _ = writeln!(text, "# {name}: {value}");
    }
    if let Some(gpu) = &machine.gpu {
        let _ = writeln!(text, "# gpu: {}", gpu.line());
    }
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let _ = writeln!(text, "{}", names.join(","));
    for row in &record.results {
        let cells: Vec<String> = COLUMNS.iter().map(|(_, cell)| cell(row)).collect();
        let _ = writeln!(text, "{}", cells.join(","));
    }
    text
}
