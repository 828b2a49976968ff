//! Tables from the records of `bench/compare.py`: ours beside the public implementations.
//!
//! A record is a list of rows, and a text beside it whose first lines say what was measured where.

use super::{Table, number, text};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write;

/// Rows of one section of a record, and how they are shown.
struct Kind {
    section: &'static str,
    /// Of the README.
    region: &'static str,
    /// Heads of the columns between those of the heads and of the pass, and the fields that fill them.
    words: &'static [(&'static str, &'static str)],
    /// What is shown, in this order: name in the record, head of its column.
    columns: &'static [(&'static str, &'static str)],
}

const KINDS: [Kind; 3] = [
    Kind {
        section: "sel",
        region: "selected",
        words: &[("blocks", BLOCKS), ("selection", "/selection")],
        columns: &[
            ("FSA", "FSA"),
            ("NSA-ref", "NSA"),
            ("SFNSA", "SFNSA"),
            (DENSE, "dense"),
            (OURS, "fsa"),
            ("fsa_rs-autograd", "fsa by autograd"),
            ("fsa_rs-graph", "fsa in a graph"),
        ],
    },
    Kind {
        section: "nsa",
        region: "nsa",
        words: &[("compression", "/what")],
        columns: &[
            ("FSA", "FSA"),
            ("SFNSA", "SFNSA"),
            (DENSE, "dense"),
            (OURS, "fsa"),
            ("fsa_rs-graph", "fsa in a graph"),
        ],
    },
    Kind {
        section: "branch",
        region: "stages",
        words: &[("stage", "/what")],
        columns: &[
            ("NSA-ref", "NSA"),
            ("SFNSA", "SFNSA"),
            ("FA2", "FlashAttention 2"),
            (OURS, "fsa"),
            ("fsa_rs-graph", "fsa in a graph"),
        ],
    },
];
const DENSE: &str = "CUDNN_ATTENTION";
const OURS: &str = "fsa_rs";
/// No field: how many blocks a row lists, and how many keys a block has.
const BLOCKS: &str = "blocks";

/// A line of the table: what was measured, and the times by name.
struct Line {
    words: String,
    pass: String,
    /// What dense attention depends on: tokens, query heads, elements of a vector.
    size: [u64; 3],
    times: HashMap<String, f64>,
}

/// Reads a record and the text beside it: a table for each kind of rows. The error names what is missing.
pub(super) fn tables(rows: &[Value], about: &str) -> Result<Vec<Table>, String> {
    let of = |kind: &Kind| rows.iter().any(|row| row["section"] == kind.section);
    KINDS.iter().filter(|kind| of(kind)).map(|kind| table(kind, rows, about)).collect()
}

fn table(kind: &Kind, rows: &[Value], about: &str) -> Result<Table, String> {
    let fact = |name: &str| {
        let found = about.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.map(str::to_string).ok_or_else(|| format!("the text beside it has no line `{name}: `"))
    };
    let (machine, date) = (fact("gpu")?, fact("date")?);
    let mut text = format!(
        "{machine}, torch {}, Triton {}; {date}, commit {}; ms:\n\n| tokens | heads ",
        fact("torch")?,
        fact("triton")?,
        fact("commit")?
    );
    let heads = kind.words.iter().map(|(head, _)| *head).chain(["pass"]);
    for head in heads.chain(kind.columns.iter().map(|(_, head)| *head)) {
        text.push_str(&format!("| {head} "));
    }
    text.push_str("| best of the others / fsa |\n|---:|---|");
    text.push_str(&"---|".repeat(kind.words.len() + 1));
    text.push_str(&"---:|".repeat(kind.columns.len() + 1));
    text.push('\n');
    for line in lines(kind, rows)? {
        write_line(&mut text, kind, &line).map_err(|error| error.to_string())?;
    }
    Ok(Table { region: kind.region.into(), machine, date, text })
}

/// The lines in the order in which they were measured.
fn lines(kind: &Kind, rows: &[Value]) -> Result<Vec<Line>, String> {
    let mut lines: Vec<Line> = Vec::new();
    // How many heads share keys changes little for dense attention: it is measured once.
    let mut dense: HashMap<([u64; 3], String), f64> = HashMap::new();
    for row in rows.iter().filter(|row| !row["ms"].is_null()) {
        let count = |field: &str| number(row, field).map(|number| number as u64);
        let (pass, ms) = (pass(&text(row, "/phase")?), number(row, "/ms")?);
        let size = [count("/N")?, count("/hq")?, count("/d")?];
        let [tokens, heads, _] = size;
        let (section, implementation) = (text(row, "/section")?, text(row, "/impl")?);
        if section == "dense" && implementation == DENSE {
            dense.entry((size, pass.clone())).or_insert(ms);
        }
        if section != kind.section {
            continue;
        }
        let mut words = format!("{tokens} | {heads}/{}", heads / count("/g")?.max(1));
        for (_, field) in kind.words {
            let word = match *field {
                BLOCKS => format!("{} x {}", count("/T")?, count("/bk")?),
                field => text(row, field)?,
            };
            words.push_str(&format!(" | {word}"));
        }
        let known = lines.iter().position(|line| line.words == words && line.pass == pass);
        let at = known.unwrap_or_else(|| {
            lines.push(Line { words, pass, size, times: HashMap::new() });
            lines.len() - 1
        });
        lines[at].times.insert(implementation, ms);
    }
    for line in &mut lines {
        if let Some(ms) = dense.get(&(line.size, line.pass.clone())) {
            line.times.insert(DENSE.into(), *ms);
        }
    }
    Ok(lines)
}

fn pass(phase: &str) -> String {
    match phase {
        "fwd" => "forward".into(),
        "bwd" => "backward".into(),
        "fwd+bwd" => "both".into(),
        other => other.into(),
    }
}

fn write_line(text: &mut String, kind: &Kind, line: &Line) -> std::fmt::Result {
    write!(text, "| {} | {} ", line.words, line.pass)?;
    for (name, _) in kind.columns {
        let ms = line.times.get(*name);
        write!(text, "| {} ", ms.map_or(String::new(), |ms| format!("{ms:.2}")))?;
    }
    let others = kind.columns.iter().filter(|(name, _)| *name != DENSE && !name.starts_with(OURS));
    let peers = others.filter_map(|(name, _)| line.times.get(*name));
    let ratio = peers.copied().reduce(f64::min).zip(line.times.get(OURS)).map(|(best, ours)| best / ours);
    writeln!(text, "| {} |", ratio.map_or(String::new(), |ratio| format!("{ratio:.2}")))
}

#[cfg(test)]
pub(super) fn example() -> Table {
    tables(&tests::rows(), tests::ABOUT).expect("complete").remove(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    pub(super) const ABOUT: &str = "commit: abc\ndate: 2026-02-01 10:00 UTC\ncommand: python compare.py\n\
        gpu: NVIDIA H200\ntorch: 2.11.0, CUDA 13.0\ntriton: 3.6.0\n\nselection: no line of this kind\n";

    fn row(implementation: &str, phase: &str, ms: f64) -> Value {
        json!({
            "section": "sel", "impl": implementation, "phase": phase, "N": 65536, "g": 4, "hq": 32, "d": 128,
            "bk": 64, "T": 16, "selection": "random", "ms": ms, "extra_mb": 1.0,
        })
    }

    pub(super) fn rows() -> Vec<Value> {
        let mut dense = row(DENSE, "fwd", 60.0);
        dense["section"] = "dense".into();
        let failed = json!({ "section": "sel", "impl": "NSA-ref", "phase": "bwd", "err": "out of memory" });
        let mut other = row(OURS, "fwd", 20.0);
        other["g"] = 5.into();
        other["hq"] = 40.into();
        vec![
            row(OURS, "fwd", 10.0),
            row("fsa_rs-graph", "fwd", 9.5),
            row("FSA", "fwd", 36.1),
            row("SFNSA", "fwd", 27.0),
            row(OURS, "bwd", 16.0),
            row("fsa_rs-autograd", "bwd", 16.5),
            row("FSA", "bwd", 40.0),
            failed,
            dense,
            other,
        ]
    }

    #[test]
    fn a_line_holds_all_times_and_the_ratio_to_the_best_of_the_others() {
        let Table { region, machine, date, text } = example();
        assert_eq!((&*region, &*machine, &*date), ("selected", "NVIDIA H200", "2026-02-01 10:00 UTC"));
        let lines: Vec<&str> = text.lines().collect();
        let head = "NVIDIA H200, torch 2.11.0, CUDA 13.0, Triton 3.6.0; 2026-02-01 10:00 UTC, commit abc; ms:";
        assert_eq!(lines[0], head);
        let forward =
            "| 65536 | 32/8 | 16 x 64 | random | forward | 36.10 |  | 27.00 | 60.00 | 10.00 |  | 9.50 | 2.70 |";
        assert_eq!(lines[4], forward);
        assert_eq!(
            lines[5],
            "| 65536 | 32/8 | 16 x 64 | random | backward | 40.00 |  |  |  | 16.00 | 16.50 |  | 2.50 |"
        );
        assert_eq!(lines[6], "| 65536 | 40/8 | 16 x 64 | random | forward |  |  |  |  | 20.00 |  |  |  |");
        let columns = |line: &str| line.matches('|').count();
        assert!(lines[2..].iter().all(|line| columns(line) == columns(lines[2])), "{text}");
    }

    #[test]
    fn a_record_of_the_whole_operation_fills_two_regions() {
        let of = |section: &str, what: &str, implementation: &str, ms: f64| {
            let mut row = row(implementation, "fwd+bwd", ms);
            row["section"] = section.into();
            row["what"] = what.into();
            row
        };
        let rows = [
            of("nsa", "mean", OURS, 5.0),
            of("nsa", "mean", "SFNSA", 40.0),
            of("dense", "dense", DENSE, 20.0),
            of("dense", "dense", "CUDNN_ATTENTION-graph", 19.0),
            of("branch", "window", OURS, 1.0),
            of("branch", "window", "FA2", 2.5),
        ];
        let tables = tables(&rows, ABOUT).expect("complete");
        let [nsa, stages] = &tables[..] else { panic!("{tables:?}") };
        assert_eq!((&*nsa.region, &*stages.region), ("nsa", "stages"));
        let whole = "| 65536 | 32/8 | mean | both |  | 40.00 | 20.00 | 5.00 |  | 8.00 |\n";
        assert!(nsa.text.ends_with(whole), "{}", nsa.text);
        let window = "| 65536 | 32/8 | window | both |  |  | 2.50 | 1.00 |  | 2.50 |\n";
        assert!(stages.text.ends_with(window), "{}", stages.text);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = tables(&rows(), "gpu: NVIDIA H200\n").expect_err("no date");
        assert_eq!(error, "the text beside it has no line `date: `");
        let error = tables(&[json!({ "section": "nsa", "ms": 1.0, "N": 1 })], ABOUT).expect_err("no pass");
        assert_eq!(error, "field /phase is missing or no text");
    }
}
