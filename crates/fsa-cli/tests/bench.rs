//! `fsa bench` on short sequences: the schema, records, and misuse.

mod common;

use common::{Folder, fsa};

#[test]
fn every_stage_is_verified_and_timed() {
    let record = fsa(&["bench", "--suite", "quick", "--tokens", "700", "--budget", "0", "--json"]).json();
    assert_eq!((&record["suite"], &record["backend"]), (&"quick".into(), &"cpu".into()));
    assert!(record["machine"]["cpu"].is_string() && record["date"].as_str().is_some_and(|date| date.len() == 10));
    let rows = record["results"].as_array().expect("a list");
    assert_eq!(rows.len(), 17, "nine stages, forward and backward, without the backward of the selection");
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"));
        assert!(number("median_ms") >= number("min_ms") && number("max_ms") >= number("p80_ms"));
        assert!(number("gflops") > 0.0 && number("matrix_share") > 0.0 && number("repetitions") >= 2.0, "{row}");
        assert!(number("max_error") <= number("error_bound"));
        assert!(number("speedup") > 0.0, "dense is in the same run");
        assert_eq!(row["tokens"], 700);
    }
}

#[test]
fn a_record_is_json_and_csv() {
    let folder = Folder::new();
    let path = folder.argument("records");
    let flags = ["--tokens", "300", "--budget", "0", "--filter", "window/", "--filter", "forward"];
    let run = fsa(&[&["bench", "--record", &path][..], &flags].concat());
    assert_eq!(run.code, 0, "{run:?}");
    let machine = std::fs::read_dir(&path).expect("made").next().expect("one machine").expect("entry").path();
    let mut names: Vec<_> =
        std::fs::read_dir(machine).expect("made").map(|entry| entry.expect("entry").path()).collect();
    names.sort();
    let [csv, json] = &names[..] else { panic!("{names:?}") };
    assert!(json.to_string_lossy().ends_with("-cpu.json"), "{json:?}");
    let record: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(json).expect("readable")).expect("JSON");
    assert_eq!(record["results"].as_array().expect("a list").len(), 1);
    assert!(record["command"].as_str().is_some_and(|command| command.starts_with("fsa bench --record")));
    let text = std::fs::read_to_string(csv).expect("readable");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(lines.len(), 2, "a header and a row");
    assert_eq!(lines[0].split(',').count(), lines[1].split(',').count());
    assert!(text.contains("# cpu: ") && lines[1].contains("window,forward,f32,300"), "{text}");
}

#[test]
fn definitions_can_be_listed() {
    let suites = fsa(&["bench", "--list", "--json"]).json();
    let names: Vec<_> = suites.as_array().expect("a list").iter().map(|suite| &suite["name"]).collect();
    assert!(names.contains(&&"acceptance".into()) && names.contains(&&"quick".into()));
    assert!(fsa(&["bench", "--list"]).stdout.contains("nsa/forward/f32/h8-2/d64/b64-16/n65536"));
}

#[test]
fn misuse_names_the_flag_and_the_choices() {
    fsa(&["bench", "--suite", "fast"]).is_misuse(&["--suite: expected one of acceptance, quick", "got fast"]);
    fsa(&["bench", "--filter", "nothing-like-it"]).is_misuse(&["--filter", "nothing-like-it"]);
    fsa(&["bench", "--tokens", "0"]).is_misuse(&["--tokens: expected at least 1, got 0"]);
    fsa(&["bench", "--budget", "-1"]).is_misuse(&["--budget"]);
}
