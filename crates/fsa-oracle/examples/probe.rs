//! probe
#![allow(clippy::print_stdout)]
use fsa_oracle::suite::{CheckOptions, run};
fn main() {
    let cases = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(100);
    let seed = std::env::args().nth(2).and_then(|s| s.parse().ok()).unwrap_or(0);
    let stages = std::env::args().nth(3).and_then(|s| s.parse::<fsa_core::Stage>().ok());
    let mut options = CheckOptions { cases, seed, ..CheckOptions::default() };
    if let Some(stage) = stages { options.stages = vec![stage]; }
    let backend = if std::env::args().nth(4).is_some() { fsa_oracle::naive::NaiveBackend::reordered() } else { fsa_oracle::naive::NaiveBackend::default() };
    let mut slow = Vec::new();
    let all = std::time::Instant::now();
    for group in options.groups() {
        let one = CheckOptions { stages: vec![group.0], passes: vec![group.1], dtypes: vec![group.2], ..options.clone() };
        let start = std::time::Instant::now();
        for r in run(&backend, &one, &mut |o| slow.push((o.case.cost(), o.case.to_string()))) {
            println!("{:10} {:8} {:4} cases {} failures {} worst {:.3} ambiguous {}/{} {:.1}s", r.stage, r.pass, r.dtype, r.cases, r.failures, r.worst_ratio, r.ambiguous_rows, r.decided_rows, start.elapsed().as_secs_f64());
            for f in r.failed.iter().take(4) { println!("   {}\n      {}", f.case, f.message.chars().take(300).collect::<String>()); }
        }
    }
    println!("{:.1}s", all.elapsed().as_secs_f64());
}
