//! The suite on backends that are right, and the form of its reports.

use fsa_core::{DType, Stage};
use fsa_oracle::naive::NaiveBackend;
use fsa_oracle::suite::{CheckOptions, STAGES, run, run_case};
use fsa_oracle::{Case, Pass};

fn passes(backend: &NaiveBackend, cases: usize, seed: u64) {
    let options = CheckOptions { cases, seed, ..CheckOptions::default() };
    let mut seen = 0;
    for report in run(backend, &options, &mut |_| seen += 1) {
        assert_eq!((report.cases, report.failures), (cases, 0), "{report:#?}");
        assert!(report.worst_ratio > 0.0 && report.worst_ratio <= 1.0, "{report:#?}");
        if report.stage == Stage::Select {
            // One peak that two blocks share equally leaves them tied for all rows of a case.
            assert!(report.ambiguous_rows * 2 < report.decided_rows, "{report:#?}");
        }
    }
    assert_eq!(seen, options.total_cases());
}

#[test]
fn the_naive_evaluation_passes() {
    passes(&NaiveBackend::default(), 24, 0);
}

#[test]
fn f32_sums_in_another_order_pass() {
    passes(&NaiveBackend::reordered(), 24, 1);
}

#[test]
fn every_stage_has_both_passes_but_the_selection() {
    let groups = CheckOptions::default().groups();
    assert_eq!(groups.len(), (2 * STAGES.len() - 1) * DType::FLOATS.len());
    assert!(!groups.iter().any(|(stage, pass, _)| *stage == Stage::Select && *pass == Pass::Backward));
}

#[test]
fn a_report_is_what_the_command_prints() {
    let options = CheckOptions {
        cases: 3,
        stages: vec![Stage::Selected],
        dtypes: vec![DType::Bf16],
        passes: vec![Pass::Backward],
        ..CheckOptions::default()
    };
    let reports = run(&NaiveBackend::default(), &options, &mut |_| {});
    let json = serde_json::to_value(&reports).expect("serialises");
    let report = json[0].as_object().expect("an object");
    let mut keys: Vec<_> = report.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["cases", "dtype", "failures", "pass", "stage", "worst_ratio"]);
    assert_eq!(
        (&report["stage"], &report["pass"], &report["dtype"]),
        (&"selected".into(), &"backward".into(), &"bf16".into())
    );
    assert!(report["worst_ratio"].is_f64());
}

#[test]
fn a_case_repeats_from_its_line() {
    let line = "selected:backward:f16:seed=17:q=33,0,64:kv=40,0,64:hq=6:hkv=2:d=64:dv=32:block=16:topk=4:grad_lse=true:layout=padded:hostile=absurd_indices";
    let case: Case = line.parse().expect("valid");
    let (a, b) = (run_case(&NaiveBackend::default(), &case), run_case(&NaiveBackend::default(), &case));
    assert!(a.passed(), "{:?}", a.failures);
    assert_eq!((a.digest, a.worst_ratio), (b.digest, b.worst_ratio));
    let other = run_case(&NaiveBackend::default(), &Case { seed: 18, ..case });
    assert_ne!(a.digest, other.digest);
}

/// Cases that once found something, or that reach what random ones seldom do.
const CURATED: [&str; 8] = [
    // Nothing at all.
    "dense:forward:f32:q=0:kv=0:d=8",
    "nsa:backward:bf16:q=0,0:kv=0,7:hq=2:hkv=2:d=8",
    // A sequence shorter than a window: the compressed branch is empty for every row.
    "nsa:forward:f16:q=31:kv=31:hq=4:hkv=1:d=16",
    "compress:backward:f32:q=31:kv=31:d=16:keys=linear_position",
    // One key: dP - delta is exactly 0.
    "dense:backward:f32:q=1,1,1:kv=1,1,1:hq=6:hkv=2:d=24:dv=80",
    // Gradients beyond the largest f16.
    "nsa:backward:f16:seed=776557:q=0,3,1,0,16:kv=0,3,2,1,64:hq=6:hkv=2:d=64:dv=32:block=32:topk=8:init=2:local=1:window=64:gates=per_head:keys=weighted:values=weighted:rope=llama3:scale=0.25:hostile=huge",
    // More slots than blocks, and no slot.
    "selected:forward:bf16:q=20:kv=20:d=8:block=256:topk=16:hostile=absurd_indices",
    "selected:backward:f32:q=20:kv=20:d=8:block=16:topk=0",
];

#[test]
fn curated_cases_pass() {
    for line in CURATED {
        let case: Case = line.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
        let outcome = run_case(&NaiveBackend::default(), &case);
        assert!(outcome.passed(), "{line}: {:?}", outcome.failures);
    }
}
