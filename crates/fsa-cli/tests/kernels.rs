//! `fsa kernels` lists without a compiler, and says what is missing when it is asked to compile without one.

use std::process::{Command, Output};

fn fsa(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsa"))
        .arg("kernels")
        .args(arguments)
        .env("FSA_NVRTC_PATH", "/nowhere/libnvrtc.so")
        .env("FSA_DISABLE_CACHE", "1")
        .output()
        .expect("runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_stage_of_the_selected_branch_is_listed() {
    let output = fsa(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let listed = text(&output.stdout);
    for name in ["index", "attend_sm90", "reduce_sm90", "backward"] {
        assert!(listed.lines().any(|line| line.starts_with(name)), "{name} in\n{listed}");
    }
    let json = fsa(&["--json", "--filter", "attend", "--filter", "head_dim 128"]);
    let rows: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let rows = rows.as_array().expect("a list");
    assert!(!rows.is_empty());
    for row in rows {
        assert!(row["specialisation"].as_str().is_some_and(|name| name.contains("attend")), "{row}");
        assert!(row["dynamic_smem_bytes"].as_u64().is_some_and(|bytes| bytes <= 227 * 1024), "{row}");
    }
}

#[test]
fn compiling_without_nvrtc_says_what_is_missing() {
    let output = fsa(&["--build", "--filter", "index"]);
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert!(message.contains("NVRTC") && message.contains("/nowhere/libnvrtc.so"), "{message}");
}

#[test]
fn misuse_is_named() {
    for (arguments, expected) in [(["--arch", "sm_12"], "sm_12"), (["--filter", "nothing of this name"], "--filter")] {
        let output = fsa(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
}
