//! What the first call costs, what a warm call costs the host, and how long the device takes.

use fsa_core::{Batch, DType, Error, Result};
use fsa_cuda::driver::{Device, DeviceBuffer, Graph, Stream, UploadedBatch};
use fsa_cuda::plan::{PlanOptions, Problem};
use fsa_cuda::selected::{
    BackwardTensors, ForwardTensors, LaunchContext, SelectedBackward, SelectedForward, TensorSpan,
};
use fsa_cuda::{Environment, Kernels};
use std::sync::Arc;
use std::time::Instant;

/// Head dimension, block size and top-k of the measured shapes.
const HEAD_DIM: usize = 128;
const SELECTIONS: [(usize, usize); 2] = [(64, 16), (128, 8)];
const HEADS: [(usize, usize); 3] = [(32, 32), (32, 8), (32, 2)];

fn problem(tokens: usize, heads: (usize, usize), (block_size, topk): (usize, usize)) -> Problem {
    Problem {
        total_q: tokens,
        total_kv: tokens,
        sequences: 1,
        num_q_heads: heads.0,
        num_kv_heads: heads.1,
        head_dim: HEAD_DIM,
        block_size,
        topk,
        dtype: DType::Bf16,
    }
}

/// Opens the device and makes the forward ready, with an empty cache and with the one that this filled.
pub fn first_call() -> Result<bool> {
    let folder = std::env::temp_dir().join(format!("fsa-first-call-{}", std::process::id()));
    let environment = Environment { cache_dir: Some(folder.clone()), ..Environment::read()? };
    let problem = problem(65_536, HEADS[1], SELECTIONS[0]);
    for cache in ["empty", "filled"] {
        let started = Instant::now();
        let kernels = Kernels::open(&environment)?;
        let opened = started.elapsed().as_secs_f64();
        SelectedForward::plan(&kernels, &problem, &PlanOptions::default())?;
        let forward = started.elapsed().as_secs_f64();
        SelectedBackward::plan(&kernels, &problem, &PlanOptions::default())?;
        let backward = started.elapsed().as_secs_f64();
        println!(
            "first call, {cache} cache: device {opened:.3} s, forward ready after {forward:.3} s, backward after {backward:.3} s"
        );
    }
    let removed = std::fs::remove_dir_all(&folder);
    removed.map_err(|error| Error::Backend { backend: "cuda".into(), message: error.to_string() })?;
    Ok(true)
}

/// Deterministic 64-bit numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Bits of bf16 numbers in +-[0.5, 2), all exponents and mantissas about as often.
fn random_bf16(count: usize, seed: u64) -> Vec<u16> {
    let mut numbers = Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut values = Vec::with_capacity(count + 3);
    while values.len() < count {
        let word = numbers.next();
        values.extend((0..4).map(|k| 0x3f00 | (word >> (16 * k)) as u16 & 0x80ff));
    }
    values.truncate(count);
    values
}

/// The first block, the own one and the one before, then random ones: ascending, left-packed.
fn random_selection(problem: &Problem) -> Vec<i32> {
    let (mut numbers, topk) = (Numbers(7), problem.topk);
    let mut ids = Vec::with_capacity(problem.topk_indices_bytes() / 4);
    let mut row = Vec::with_capacity(topk);
    for _ in 0..problem.num_kv_heads {
        for position in 0..problem.total_q {
            let own = (position / problem.block_size) as i32;
            row.clear();
            row.extend([0, own - 1, own].into_iter().filter(|id| *id >= 0));
            row.dedup();
            let most = topk.min(own as usize + 1);
            while row.len() < most {
                let id = (numbers.next() % (own as u64 + 1)) as i32;
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            row.truncate(topk);
            row.sort_unstable();
            row.resize(topk, -1);
            ids.extend_from_slice(&row);
        }
    }
    ids
}

/// Everything that a call needs, on the device.
struct Tensors {
    batch: UploadedBatch,
    /// query, out, grad_out, grad_query.
    of_query: [DeviceBuffer; 4],
    /// key, value, grad_key, grad_value.
    of_key: [DeviceBuffer; 4],
    topk_indices: DeviceBuffer,
    lse: DeviceBuffer,
}

impl Tensors {
    fn new(device: &Arc<Device>, problem: &Problem, stream: &Stream) -> Result<Self> {
        let random = |name: &str, heads: usize, tokens: usize, seed: u64| -> Result<DeviceBuffer> {
            let host = random_bf16(tokens * heads * HEAD_DIM, seed);
            let buffer = DeviceBuffer::new(device, name, 2 * host.len())?;
            buffer.upload(&host, stream)?;
            Ok(buffer)
        };
        let q = |name, seed| random(name, problem.num_q_heads, problem.total_q, seed);
        let kv = |name, seed| random(name, problem.num_kv_heads, problem.total_kv, seed);
        let ids = random_selection(problem);
        let topk_indices = DeviceBuffer::new(device, "topk_indices", 4 * ids.len())?;
        topk_indices.upload(&ids, stream)?;
        Ok(Self {
            batch: UploadedBatch::new(device, &Batch::single(problem.total_q), stream)?,
            of_query: [q("query", 1)?, q("out", 2)?, q("grad_out", 3)?, q("grad_query", 4)?],
            of_key: [kv("key", 5)?, kv("value", 6)?, kv("grad_key", 7)?, kv("grad_value", 8)?],
            topk_indices,
            lse: DeviceBuffer::new(device, "lse", 4 * problem.num_q_heads * problem.total_q)?,
        })
    }

    fn forward(&self, problem: &Problem) -> ForwardTensors<'_> {
        let [query, out, ..] = self.of_query.each_ref().map(|b| span(b, problem.num_q_heads));
        let [key, value, ..] = self.of_key.each_ref().map(|b| span(b, problem.num_kv_heads));
        ForwardTensors { query, key, value, topk_indices: self.topk_indices.span(), out, lse: self.lse.span() }
    }

    fn backward(&self, problem: &Problem) -> BackwardTensors<'_> {
        let [.., grad_out, grad_query] = self.of_query.each_ref().map(|b| span(b, problem.num_q_heads));
        let [.., grad_key, grad_value] = self.of_key.each_ref().map(|b| span(b, problem.num_kv_heads));
        BackwardTensors { forward: self.forward(problem), grad_out, grad_lse: None, grad_query, grad_key, grad_value }
    }
}

fn span(buffer: &DeviceBuffer, heads: usize) -> TensorSpan<'_> {
    TensorSpan::contiguous(buffer.span(), heads, HEAD_DIM)
}

/// Median host microseconds and total milliseconds of a call that starts with an idle device.
fn measure(stream: &Stream, mut call: impl FnMut() -> Result<()>) -> Result<(f64, f64)> {
    let (mut host, mut total) = (Vec::new(), Vec::new());
    for round in 0..25 {
        let started = Instant::now();
        call()?;
        let given = started.elapsed().as_secs_f64();
        stream.synchronize()?;
        if round >= 5 {
            host.push(given * 1e6);
            total.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_unstable_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Ok((median(&mut host), median(&mut total)))
}

/// Host and device time of forward and backward, direct and as a recorded graph.
pub fn time() -> Result<bool> {
    let kernels = Kernels::open(&Environment::read()?)?;
    let stream = Stream::new(kernels.device())?;
    let tokens = super::number("FSA_TOKENS", 65_536);
    for selection in SELECTIONS {
        for heads in HEADS {
            let problem = problem(tokens, heads, selection);
            let tensors = Tensors::new(kernels.device(), &problem, &stream)?;
            time_problem(&kernels, &stream, &problem, &tensors)?;
        }
    }
    Ok(true)
}

fn time_problem(kernels: &Arc<Kernels>, stream: &Stream, problem: &Problem, tensors: &Tensors) -> Result<()> {
    let (options, device) = (PlanOptions::default(), kernels.device());
    let scale = (HEAD_DIM as f32).powf(-0.5);
    let forward = SelectedForward::plan(kernels, problem, &options)?;
    let backward = SelectedBackward::plan(kernels, problem, &options)?;
    println!("{}\n{}", forward.plan_value(), backward.plan_value());
    let bytes = forward.workspace_bytes().max(backward.workspace_bytes());
    let workspace = DeviceBuffer::new(device, "workspace", bytes)?;
    let context = LaunchContext { stream, workspace: workspace.span() };
    let batch = tensors.batch.get();
    // A warm call plans anew: this is what a caller that keeps nothing pays.
    let call_forward = || {
        let planned = SelectedForward::plan(kernels, problem, &options)?;
        planned.launch(&context, &batch, &tensors.forward(problem), scale)
    };
    let call_backward = || {
        let planned = SelectedBackward::plan(kernels, problem, &options)?;
        planned.launch(&context, &batch, &tensors.backward(problem), scale)
    };
    let show =
        |name: &str, (host, total): (f64, f64)| println!("  {name:<17} host {host:8.1} us, total {total:8.3} ms");
    show("forward", measure(stream, call_forward)?);
    show("backward", measure(stream, call_backward)?);
    let graph = Graph::capture(stream, || forward.launch(&context, &batch, &tensors.forward(problem), scale))?;
    show("forward, graph", measure(stream, || Ok(graph.launch(stream)?))?);
    let graph = Graph::capture(stream, || backward.launch(&context, &batch, &tensors.backward(problem), scale))?;
    show("backward, graph", measure(stream, || Ok(graph.launch(stream)?))?);
    Ok(())
}
