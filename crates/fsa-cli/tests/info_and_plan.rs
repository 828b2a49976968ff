//! `fsa info` and `fsa plan`, and what all commands share.

mod common;

use common::{Folder, fsa, fsa_with};

#[test]
fn info_says_what_runs_here() {
    let info = fsa_with(&["info", "--json"], &[("RAYON_NUM_THREADS", "7")]).json();
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(info["machine"]["threads"], 2);
    assert!(info["machine"]["cores"].as_u64().is_some_and(|cores| cores >= 1));
    assert!(info["machine"]["simd"].is_string() && info["machine"]["cpu"].is_string());
    let variables = info["environment"].as_array().expect("a list");
    let value = |name: &str| &variables.iter().find(|v| v["name"] == name).expect("listed")["value"];
    assert_eq!(value("FSA_NUM_THREADS"), "2");
    assert_eq!(value("RAYON_NUM_THREADS"), "7");
    assert!(value("NO_COLOR").is_null());
}

#[test]
fn the_flag_beats_the_environment_and_zero_threads_are_refused() {
    assert_eq!(fsa(&["info", "--json", "--threads", "1"]).json()["machine"]["threads"], 1);
    fsa(&["info", "--threads", "0"]).is_misuse(&["--threads: expected at least 1, got 0"]);
    fsa_with(&["info"], &[("FSA_NUM_THREADS", "many")]).is_misuse(&["FSA_NUM_THREADS", "a number", "many"]);
}

#[test]
fn without_a_terminal_there_is_no_color() {
    for environment in [&[][..], &[("NO_COLOR", "1")], &[("CLICOLOR_FORCE", "1")]] {
        let run = fsa_with(&["info"], environment);
        assert!(run.code == 0 && !run.stdout.contains('\u{1b}'), "{run:?}");
    }
}

#[test]
fn an_unknown_flag_is_misuse() {
    fsa(&["info", "--frobnicate"]).is_misuse(&["--frobnicate"]);
    assert_eq!(fsa(&[]).code, 2);
    assert_eq!(fsa(&["--help"]).code, 0);
}

#[test]
fn a_plan_counts_what_the_definition_needs() {
    let plan = fsa(&["plan", "--json", "--tokens", "4096"]).json();
    let stages = plan["plan"]["stages"].as_array().expect("a list");
    let names: Vec<_> = stages.iter().filter_map(|stage| stage["stage"].as_str()).collect();
    assert_eq!(names, ["compress", "compressed", "select", "index", "selected", "window", "combine"]);
    // Dense: rows see 1 .. 4096 keys; two products of 64 per pair, 8 heads.
    let pairs = 4096.0 * 4097.0 / 2.0;
    assert_eq!(plan["plan"]["dense"]["cost"]["forward_flops"], 8.0 * pairs * 2.0 * 128.0);
    assert!(plan["forward_workspace_bytes"].as_u64().is_some_and(|bytes| bytes > 0 && bytes < 256 << 20));
    assert_eq!(plan["config"]["block_size"], 64);
}

#[test]
fn a_plan_for_a_gpu_says_how_stage_selected_goes() {
    let shape = ["--num-q-heads", "32", "--num-kv-heads", "8", "--head-dim", "128"];
    let plan =
        |tokens: &str, more: &[&str]| fsa(&[&["plan", "--gpu", "h200", "--tokens", tokens], &shape[..], more].concat());
    let passes = |tokens| plan(tokens, &["--json"]).json()["routes"]["passes"].as_array().expect("two").clone();
    let (short, long) = (passes("1024"), passes("65536"));
    assert!(short.iter().all(|pass| pass["route"] == "dense_masked" && pass["reason"] == "predicted"), "{short:?}");
    assert!(long.iter().all(|pass| pass["route"] == "kv_outer" && pass["masked"] == true), "{long:?}");
    assert!(long[0]["predicted"]["query_outer"].as_f64() > long[0]["predicted"]["kv_outer"].as_f64());
    let text = plan("2048", &[]).stdout;
    for words in
        ["forward, g = 4, 2K: dense with mask, 1.", "backward, g = 4, 2K: ", "(predicted)", "query-outer, not built"]
    {
        assert!(text.contains(words), "{words} in {text}");
    }
    assert!(fsa(&["plan", "--json"]).json()["routes"].is_null(), "the CPU has one route");
    fsa(&["plan", "--measure"]).is_misuse(&["--measure", "--device cuda", "--device cpu"]);
    fsa(&["plan", "--route", "both"]).is_misuse(&["--route", "--device cuda"]);
    fsa(&["plan", "--gpu", "h200", "--dtype", "f32"]).is_misuse(&["dtype", "bf16, f16", "f32"]);
    assert_eq!(fsa(&["plan", "--gpu", "h200", "--measure"]).code, 2);
}

#[test]
fn a_plan_prints_every_stage() {
    let run = fsa(&["plan", "--tokens", "1000,200", "--kv-tokens", "3000,200", "--rope", "--regions"]);
    assert_eq!(run.code, 0, "{run:?}");
    for word in ["compress", "rope", "select", "index", "window", "combine", "nsa", "dense", "work items", "copies"] {
        assert!(run.stdout.contains(word), "{word} is not in {}", run.stdout);
    }
}

#[test]
fn shapes_and_parameters_are_checked_by_name() {
    fsa(&["plan", "--num-q-heads", "7"]).is_misuse(&["query", "a multiple of num_kv_heads 2", "7 heads"]);
    fsa(&["plan", "--head-dim", "100"]).is_misuse(&["head_dim", "100", "multiples of 8"]);
    fsa(&["plan", "--block-size", "48"]).is_misuse(&["block_size", "16, 32, 64, 128, 256", "48"]);
    fsa(&["plan", "--block-size", "32", "--kernel-size", "64", "--kernel-stride", "64"]).is_misuse(&[
        "block_size",
        "a multiple of kernel_stride 64",
        "32",
    ]);
    fsa(&["plan", "--topk", "2"]).is_misuse(&["topk", "init_blocks + local_blocks = 3", "got 2"]);
    fsa(&["plan", "--tokens", "10", "--kv-tokens", "4"]).is_misuse(&["cu_seqlens_q", "at most 4 query rows"]);
    fsa(&["plan", "--dtype", "i32"]).is_misuse(&["--dtype", "f32, bf16, f16", "i32"]);
}

#[test]
fn parameters_come_from_a_file_and_flags_override_them() {
    let folder = Folder::new();
    let path = folder.argument("config.json");
    std::fs::write(&path, "{\"block_size\": 128, \"topk\": 8}").expect("written");
    let plan = fsa(&["plan", "--json", "--config", &path, "--topk", "9"]).json();
    assert_eq!((&plan["config"]["block_size"], &plan["config"]["topk"]), (&128.into(), &9.into()));
    std::fs::write(&path, "{\"top_k\": 8}").expect("written");
    fsa(&["plan", "--config", &path]).is_misuse(&["config.json", "top_k"]);
    fsa(&["plan", "--config", &folder.argument("none.json")]).is_misuse(&["none.json", "cannot be read"]);
}
