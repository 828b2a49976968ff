//! The CPU backend passes the conformance suite on every instruction set that this machine has.

use fsa_cpu::{CpuBackend, CpuOptions, Isa};
use fsa_oracle::suite::{CheckOptions, run};

fn check(isa: Isa, cases: usize, seed: u64) {
    let backend = CpuBackend::new(&CpuOptions { threads: Some(2), isa: Some(isa) }).expect("starts");
    let options = CheckOptions { cases, seed, ..CheckOptions::default() };
    let reports = run(&backend, &options, &mut |_| {});
    assert_eq!(reports.iter().map(|report| report.cases).sum::<usize>(), options.total_cases());
    let failures: Vec<String> = reports
        .iter()
        .flat_map(|report| report.failed.iter())
        .map(|failure| format!("{}\n    {}", failure.case, failure.message))
        .collect();
    assert!(failures.is_empty(), "{}: {} failures\n{}", isa.name(), failures.len(), failures.join("\n"));
}

#[test]
fn the_best_instruction_set_conforms() {
    check(Isa::detect(), 60, 1);
}

#[test]
fn every_other_instruction_set_conforms() {
    for isa in Isa::available().into_iter().skip(1) {
        check(isa, 12, 2);
    }
}
