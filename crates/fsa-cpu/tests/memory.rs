//! The whole forward takes little memory besides its inputs, output and saved state. The peak of a process
//! never falls, so this file holds a single test and its own process. Linux tells a process its peak.
//!
//! `FSA_TEST_TOKENS=131072 cargo test --release -p fsa-cpu --test memory -- --nocapture` measures another length.
#![cfg(target_os = "linux")]

use fsa_core::{Backend, Batch, Compression, DType, NsaArgs, NsaConfig, Tensor};
use fsa_cpu::{CpuBackend, CpuOptions};

/// Peak resident memory of this process in bytes.
fn peak_resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("peak");
    let kibibytes: usize = line.split_whitespace().nth(1).expect("value").parse().expect("number");
    kibibytes * 1024
}

#[test]
fn scratch_memory_stays_within_its_bound() {
    let tokens = std::env::var("FSA_TEST_TOKENS").map_or(24 * 1024, |text| text.parse().expect("a number"));
    let (batch, config) = (Batch::single(tokens), NsaConfig::default());
    let backend = CpuBackend::new(&CpuOptions { threads: Some(2), isa: None }).expect("starts");
    let filled = |shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| ((i * 37) % 101) as f32 * 0.01).collect();
        Tensor::new("input", values, shape).expect("fits")
    };
    let (query, gates) = (filled(&[tokens, 8, 64]), filled(&[tokens, 3]));
    let (key, value) = (filled(&[tokens, 2, 64]), filled(&[tokens, 2, 64]));
    let args = NsaArgs {
        query: query.view(),
        key: key.view(),
        value: value.view(),
        gates: gates.view(),
        batch: &batch,
        config: &config,
        key_compression: Compression::Mean,
        value_compression: Compression::Mean,
        rope: None,
        softmax_scale: None,
    };
    let mut out = Tensor::new("out", vec![1.0f32; tokens * 8 * 64], &[tokens, 8, 64]).expect("fits");
    let before = peak_resident_bytes();
    let planned = backend.workspace_bytes(&args).expect("valid");
    let topk = backend.nsa(&args, &mut out.view_mut(), false).expect("runs").topk_indices.expect("returned");
    let grown = peak_resident_bytes() - before;
    // Stacks and the allocator's slack.
    let slack = 16 << 20;
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    let (extra, bound) = (mib(grown) - mib(topk.size_bytes()), mib(planned));
    eprintln!("{tokens} tokens: {extra:.1} MiB beyond inputs and outputs, {bound:.1} MiB planned");
    assert!(grown <= planned + topk.size_bytes() + slack, "{grown} bytes for a plan of {planned}");
    assert!(grown <= 256 << 20, "{grown} bytes");
    assert_eq!(out.dtype(), DType::F32);
}
