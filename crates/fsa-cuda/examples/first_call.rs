//! What the first call costs: opening the device and making the kernels of stage `selected` ready, with an empty cache
//! and with the one that this filled.
//!
//! ```text
//! cargo run --release -p fsa-cuda --example first_call
//! ```
//!
//! Results and times of warm calls: `fsa check --device cuda` and `fsa bench --device cuda`.
#![allow(clippy::print_stdout, reason = "printing is what it does")]

use fsa_core::DType;
use fsa_cuda::plan::{PlanOptions, Problem};
use fsa_cuda::selected::{SelectedBackward, SelectedForward};
use fsa_cuda::{Environment, Kernels};
use std::time::Instant;

const PROBLEM: Problem = Problem {
    total_q: 65_536,
    total_kv: 65_536,
    sequences: 1,
    num_q_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    block_size: 64,
    topk: 16,
    dtype: DType::Bf16,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::temp_dir().join(format!("fsa-first-call-{}", std::process::id()));
    let environment = Environment { cache_dir: Some(folder.clone()), ..Environment::read()? };
    let measured = ["empty", "filled"].into_iter().try_for_each(|cache| measure(cache, &environment));
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(measured?)
}

fn measure(cache: &str, environment: &Environment) -> fsa_core::Result<()> {
    let started = Instant::now();
    let kernels = Kernels::open(environment)?;
    let opened = started.elapsed().as_secs_f64();
    SelectedForward::plan(&kernels, &PROBLEM, &PlanOptions::default())?;
    let forward = started.elapsed().as_secs_f64();
    SelectedBackward::plan(&kernels, &PROBLEM, &PlanOptions::default())?;
    let backward = started.elapsed().as_secs_f64();
    println!("{cache} cache: device {opened:.3} s, forward ready after {forward:.3} s, backward after {backward:.3} s");
    Ok(())
}
