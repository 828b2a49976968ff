//! `--device cuda`: what is said without a GPU, and what runs with one.

mod common;

use common::{Folder, Run, fsa, fsa_with};

/// No machine has as many GPUs, and most have none.
const NOWHERE: [(&str, &str); 1] = [("FSA_CUDA_DEVICE", "4096")];

/// One line on standard error that names what is missing; nothing else.
#[track_caller]
fn says_what_is_missing(run: &Run) {
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    let reason = ["no CUDA driver", "driver is too old", "no CUDA device"].iter().any(|text| run.stderr.contains(text));
    assert!(reason && run.stderr.lines().count() == 1, "{run:?}");
}

#[test]
fn without_the_gpu_every_command_says_so_before_anything_is_read_or_written() {
    let folder = Folder::new();
    let (input, output) = (folder.argument("none.safetensors"), folder.argument("out.safetensors"));
    let record = folder.argument("records");
    let png = folder.argument("map.png");
    let commands: [&[&str]; 6] = [
        &["demo", "--png", &png],
        &["check"],
        &["bench"],
        &["bench", "--record", &record],
        &["info"],
        &["attend", &input, "-o", &output, "--stage", "selected"],
    ];
    for command in commands {
        says_what_is_missing(&fsa_with(&[command, &["--device", "cuda"]].concat(), &NOWHERE));
    }
    assert_eq!(folder.names(), Vec::<String>::new());
}

#[test]
fn info_alone_shows_why_there_is_no_gpu() {
    let run = fsa_with(&["info"], &NOWHERE);
    assert!(run.code == 0 && run.stdout.contains("no CUDA d"), "{run:?}");
    let info = fsa_with(&["info", "--json"], &NOWHERE).json();
    assert!(info["cuda"]["missing"].as_str().is_some_and(|text| text.contains("no CUDA d")), "{info}");
    assert_eq!(info["backends"], serde_json::json!(["cpu"]));
}

#[test]
fn misuse_names_the_flag_or_the_variable() {
    fsa(&["check", "--device", "tpu"]).is_misuse(&["--device", "cpu, cuda"]);
    fsa(&["check", "--kernels", "sm80"]).is_misuse(&["--kernels: expected --device cuda"]);
    fsa(&["info", "--kernels", "sm80"]).is_misuse(&["--kernels: expected --device cuda"]);
    fsa(&["check", "--device", "cuda", "--kernels", "sm75"]).is_misuse(&["--kernels", "sm80 or sm90a", "sm75"]);
    fsa(&["bench", "--deterministic"]).is_misuse(&["--deterministic: expected --device cuda"]);
    fsa(&["check", "--repeat", "1"]).is_misuse(&["--repeat: expected at least 2, got 1"]);
    for (name, value) in [("FSA_CUDA_DEVICE", "first"), ("FSA_CUDA_ARCH", "hopper")] {
        fsa_with(&["check", "--device", "cuda"], &[(name, value)]).is_misuse(&[name, value]);
    }
}

#[test]
fn the_suite_of_the_gpu_is_listed_with_the_others() {
    let suites = fsa(&["bench", "--list", "--json"]).json();
    let suite = suites.as_array().expect("a list").iter().find(|suite| suite["name"] == "cuda").expect("listed");
    let rows = suite["rows"].as_array().expect("a list");
    assert_eq!(rows.len(), 12, "two passes, three kinds of heads, two block sizes");
    assert!(rows.iter().all(|row| row.as_str().is_some_and(|row| row.starts_with("selected/"))), "{rows:?}");
    let all = suites.as_array().expect("a list").iter().find(|suite| suite["name"] == "cuda_stages").expect("listed");
    assert_eq!(all["rows"].as_array().expect("a list").len(), 2 * 17, "every stage at two lengths");
}

#[test]
fn calls_are_repeated_on_the_cpu_too() {
    let run = fsa(&["check", "--cases", "2", "--stage", "selected", "--dtype", "bf16", "--repeat", "5", "--json"]);
    let rows = run.json();
    assert!(rows.as_array().is_some_and(|rows| rows.len() == 2 && rows.iter().all(|row| row["failures"] == 0)));
    assert!(rows[0].get("beside").is_none(), "the CPU has nothing beside it");
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_suite_passes_beside_the_cpu() {
    let rows = fsa(&["check", "--device", "cuda", "--cases", "5", "--repeat", "3", "--json"]).json();
    let rows = rows.as_array().expect("a list");
    assert_eq!(rows.len(), 2 * 17, "bf16 and f16 of nine stages, forward and backward, without that of the selection");
    for row in rows {
        assert_eq!(row["failures"], 0, "{row}");
        let number = |name: &str| row["beside"][name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"));
        assert!(number("worst_ratio") <= 1.0 && number("greatest_difference") <= 2.0, "{row}");
    }
    fsa(&["check", "--device", "cuda", "--dtype", "f32"]).is_misuse(&["dtype on CUDA", "got f32"]);
    fsa(&["check", "--device", "cuda", "--compare-threads", "2"]).is_misuse(&["--compare-threads"]);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_demo_is_right_on_the_device() {
    let folder = Folder::new();
    let png = folder.argument("map.png");
    let demo = fsa(&["demo", "--device", "cuda", "--tokens", "2000", "--png", &png, "--json"]).json();
    assert_eq!((&demo["device"], &demo["dtype"]), (&"cuda".into(), &"bf16".into()));
    assert_eq!(demo["wrong_selections"], 0);
}

#[test]
#[ignore = "needs a CUDA device"]
fn every_stage_is_verified_and_timed_on_the_device() {
    let flags = ["--suite", "cuda_stages", "--tokens", "1024", "--filter", "h32-8", "--budget", "0", "--json"];
    let record = fsa(&[&["bench", "--device", "cuda"][..], &flags].concat()).json();
    let rows = record["results"].as_array().expect("a list");
    assert_eq!(rows.len(), 17, "nine stages, forward and backward, without the backward of the selection");
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"));
        assert!(number("median_ms") > 0.0 && number("max_error") <= number("error_bound"), "{row}");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_row_is_verified_and_timed_on_the_device() {
    let flags = ["--tokens", "4096", "--filter", "h32-8", "--filter", "b64-16", "--budget", "1", "--json"];
    let record = fsa(&[&["bench", "--device", "cuda"][..], &flags].concat()).json();
    assert_eq!((&record["backend"], &record["suite"]), (&"cuda".into(), &"cuda".into()));
    assert!(record["machine"]["gpu"]["name"].is_string() && record["machine"]["gpu"]["kernels"].is_string());
    let rows = record["results"].as_array().expect("a list");
    assert_eq!(rows.len(), 2, "forward and backward");
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or_else(|| panic!("{name} of {row}"));
        assert!(number("median_ms") > 0.0 && number("graph_median_ms") > 0.0 && number("workspace_bytes") > 0.0);
        assert!(number("host_us") > 0.0 && number("plan_host_us") > 0.0 && number("graph_host_us") > 0.0);
        assert!(number("max_error") <= number("error_bound"));
        assert!(row["matrix_gflops"].is_null());
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn info_names_the_gpu_and_where_its_kernels_come_from() {
    let info = fsa(&["info", "--device", "cuda", "--json"]).json();
    for name in ["name", "capability", "cuda", "kernels"] {
        assert!(info["cuda"][name].is_string(), "{name} of {info}");
    }
    assert!(info["cuda"]["multiprocessors"].as_u64().is_some_and(|count| count > 0));
    assert_eq!(info["backends"], serde_json::json!(["cpu", "cuda"]));
}
