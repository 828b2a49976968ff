//! Proves the kernels on the GPU of this machine, and measures what the host does:
//!
//! ```text
//! cargo run --release -p fsa-cuda --example prove -- [device] [conformance] [repeat] [first-call] [time]
//! ```
//!
//! Without arguments everything runs. `FSA_CASES` sets the cases per pass and dtype (300), `FSA_CASE` runs one case
//! from its line, `FSA_TOKENS` the length of `time` (65536). Exit status 1 if a case fails.
#![allow(clippy::print_stdout, reason = "printing is what it does")]

mod timing;

use fsa_core::{DType, Result, Stage};
use fsa_cuda::CudaBackend;
use fsa_oracle::suite::{self, CheckOptions};
use fsa_oracle::{Case, Pass};
use std::process::ExitCode;
use std::time::Instant;

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() -> ExitCode {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|word| word == name);
    let mut proved = true;
    for (name, run) in COMMANDS {
        if !wanted(name) {
            continue;
        }
        let started = Instant::now();
        match run() {
            Ok(passed) => proved &= passed,
            Err(error) => {
                println!("{name}: {error}");
                proved = false;
            }
        }
        println!("[{name}: {:.1} s]\n", started.elapsed().as_secs_f64());
    }
    if proved { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

type Command = fn() -> Result<bool>;

const COMMANDS: [(&str, Command); 5] = [
    ("device", device),
    ("first-call", timing::first_call),
    ("conformance", conformance),
    ("repeat", repeat),
    ("time", timing::time),
];

fn device() -> Result<bool> {
    let backend = CudaBackend::new()?;
    let kernels = backend.kernels();
    println!("{:#?}\nkernels {}", kernels.device().facts(), kernels.set());
    match kernels.compiler().nvrtc() {
        Ok(nvrtc) => println!("{nvrtc:?}"),
        Err(error) => println!("{error}"),
    }
    println!("cache {:?}", kernels.compiler().cache().folder());
    Ok(true)
}

fn conformance() -> Result<bool> {
    let backend = CudaBackend::new()?;
    if let Ok(line) = std::env::var("FSA_CASE") {
        let outcome = suite::run_case(&backend, &line.parse::<Case>()?);
        println!("{outcome:#?}");
        return Ok(outcome.passed());
    }
    let options = CheckOptions {
        cases: number("FSA_CASES", 300),
        seed: number("FSA_SEED", 0) as u64,
        stages: vec![Stage::Selected],
        dtypes: vec![DType::Bf16, DType::F16],
        passes: Pass::ALL.to_vec(),
    };
    println!(
        "{:<10} {:<9} {:<5} {:>6} {:>8} {:>12}  worst case",
        "stage", "pass", "dtype", "cases", "failures", "worst ratio"
    );
    let reports = suite::run(&backend, &options, &mut |_| {});
    for report in &reports {
        println!(
            "{:<10} {:<9} {:<5} {:>6} {:>8} {:>12.3}  {}",
            report.stage,
            report.pass.to_string(),
            report.dtype,
            report.cases,
            report.failures,
            report.worst_ratio,
            report.worst_case.as_deref().unwrap_or("-"),
        );
        for failure in report.failed.iter().take(12) {
            println!("  FSA_CASE='{}'\n    {:.300}", failure.case, failure.message);
        }
    }
    Ok(reports.iter().all(|report| report.failures == 0))
}

/// The same case 20 times: equal bits.
fn repeat() -> Result<bool> {
    let backend = CudaBackend::new()?;
    let mut equal = true;
    for pass in Pass::ALL {
        let case: Case = format!("selected:{pass}:bf16:seed=1:q=700:kv=700:hq=4:hkv=2:d=128:topk=4").parse()?;
        let digests: Vec<u64> = (0..20).map(|_| suite::run_case(&backend, &case).digest).collect();
        let same = digests.iter().all(|digest| *digest == digests[0]);
        println!("{pass}: 20 repetitions {}", if same { "equal" } else { "DIFFER" });
        equal &= same;
    }
    Ok(equal)
}
