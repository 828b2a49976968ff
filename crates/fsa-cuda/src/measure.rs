//! Times both routes of stage `selected` on the device of a plan.

use crate::driver::{Device, DeviceBuffer, Event, Graph, Stream, UploadedBatch};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, TensorSpan};
use crate::measured::RouteTimes;
use crate::plan::{Pass, PlanOptions, Problem, Route};
use crate::selected::{BackwardTensors, ForwardTensors, SelectedBackward, SelectedForward};
use fsa_core::{Batch, DType, Error, Result};
use std::sync::Arc;

/// Replays that count, and those before them.
const REPLAYS: usize = 11;
const WARM_UP: usize = 3;

/// Tensors of a call on the device: noise, and lists as a selection makes them, whose rows agree on nothing but the first block and
/// the last two.
struct Tensors {
    batch: UploadedBatch,
    /// Query, its gradient, `out` and the gradient of `out`.
    rows: [DeviceBuffer; 4],
    /// Key, value and their gradients.
    keys: [DeviceBuffer; 4],
    lse: DeviceBuffer,
    topk_indices: DeviceBuffer,
}

/// A generator of noise that is good enough for times.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// Numbers of either sign, from 1 to 2 in size.
    fn values(&mut self, count: usize, dtype: DType) -> Vec<u16> {
        let (one, mantissa) = if dtype == DType::Bf16 { (0x3f80, 0x7f) } else { (0x3c00, 0x3ff) };
        (0..count).map(|_| self.next() as u16).map(|bits| one | (bits & (mantissa | 0x8000))).collect()
    }
}

impl Tensors {
    fn new(problem: &Problem, batch: &Batch, stream: &Stream) -> Result<Self> {
        let (device, mut noise) = (stream.device(), Noise(1));
        let size = |rows: usize, heads: usize| rows * heads * problem.head_dim;
        let mut tensor = |size: usize| -> Result<DeviceBuffer> {
            let buffer = DeviceBuffer::new(device, "tensor", size * problem.dtype.size_bytes())?;
            buffer.upload(&noise.values(size, problem.dtype), stream)?;
            Ok(buffer)
        };
        let (q, kv) = (size(problem.total_q, problem.num_q_heads), size(problem.total_kv, problem.num_kv_heads));
        let rows = [tensor(q)?, tensor(q)?, tensor(q)?, tensor(q)?];
        let keys = [tensor(kv)?, tensor(kv)?, tensor(kv)?, tensor(kv)?];
        let topk_indices = DeviceBuffer::new(device, "topk_indices", problem.topk_indices_bytes())?;
        topk_indices.upload(&lists(problem, batch, &mut noise), stream)?;
        let lse = DeviceBuffer::new(device, "lse", problem.num_q_heads * problem.total_q * size_of::<f32>())?;
        Ok(Self { batch: UploadedBatch::new(device, batch, stream)?, rows, keys, lse, topk_indices })
    }

    fn forward(&self, problem: &Problem) -> ForwardTensors<'_> {
        let [query, _, out, _] = self.rows.each_ref().map(|rows| of(rows, problem.num_q_heads, problem));
        let [key, value, ..] = self.keys.each_ref().map(|rows| of(rows, problem.num_kv_heads, problem));
        ForwardTensors { query, key, value, topk_indices: self.topk_indices.span(), out, lse: self.lse.span() }
    }

    fn backward(&self, problem: &Problem) -> BackwardTensors<'_> {
        let [_, grad_query, _, grad_out] = self.rows.each_ref().map(|rows| of(rows, problem.num_q_heads, problem));
        let [_, _, grad_key, grad_value] = self.keys.each_ref().map(|rows| of(rows, problem.num_kv_heads, problem));
        let forward = self.forward(problem);
        let (grad_lse, row_stats, accumulate) = (None, None, false);
        BackwardTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value, row_stats, accumulate }
    }
}

fn of<'a>(buffer: &'a DeviceBuffer, heads: usize, problem: &Problem) -> TensorSpan<'a> {
    TensorSpan::contiguous(buffer.span(), heads, problem.head_dim)
}

/// The first block, the last two, and for the rest one of every stretch of the blocks between.
fn lists(problem: &Problem, batch: &Batch, noise: &mut Noise) -> Vec<i32> {
    let mut ids = vec![-1; problem.num_kv_heads * problem.total_q * problem.topk];
    let positions = batch.sequences().iter().flat_map(|s| s.first_position..s.first_position + s.query_len());
    let positions: Vec<usize> = positions.collect();
    for (row, list) in ids.chunks_exact_mut(problem.topk).enumerate() {
        let own = positions[row % positions.len()] / problem.block_size;
        if own < problem.topk {
            list.iter_mut().zip(0..=own as i32).for_each(|(id, block)| *id = block);
            continue;
        }
        let (stretches, between) = (problem.topk.saturating_sub(3), own.saturating_sub(2));
        for (stretch, id) in list.iter_mut().enumerate() {
            let (low, high) = (stretch * between / stretches.max(1), (stretch + 1) * between / stretches.max(1));
            *id = match stretch {
                stretch if stretch < stretches => (1 + low + noise.next() as usize % (high - low)) as i32,
                stretch => [own, own - 1, 0][(stretch - stretches).min(2)] as i32,
            };
        }
    }
    ids
}

/// Median of the replays of a call, in milliseconds.
fn time(device: &Arc<Device>, stream: &Stream, launch: impl Fn() -> Result<()>) -> Result<f64> {
    launch()?;
    stream.synchronize()?;
    let graph = Graph::capture(stream, launch)?;
    let (start, stop) = (Event::timed(device)?, Event::timed(device)?);
    let mut all = Vec::new();
    for replay in 0..WARM_UP + REPLAYS {
        let _bound = device.bind()?;
        start.record(stream)?;
        graph.launch(stream)?;
        stop.record(stream)?;
        let ms = f64::from(stop.elapsed_ms(&start)?);
        all.extend((replay >= WARM_UP).then_some(ms));
    }
    all.sort_unstable_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

impl Kernels {
    /// Times both routes of a pass at the shapes of a call, on random data, and keeps the times for the plans of such calls.
    ///
    /// # Errors
    /// The kernels do not support the problem or one of the routes has no room; memory for the tensors or times of the device
    /// cannot be had.
    pub fn measure(self: &Arc<Self>, problem: &Problem, batch: &Batch, pass: Pass) -> Result<RouteTimes> {
        let stream = Stream::new(self.device())?;
        let tensors = Tensors::new(problem, batch, &stream)?;
        // What a backward needs of its forward.
        self.run(problem, Pass::Forward, Route::KvOuter, (&tensors, &stream))?;
        let time = |route| self.run(problem, pass, route, (&tensors, &stream));
        let times = RouteTimes { kv_outer: time(Route::KvOuter)?, dense_masked: time(Route::DenseMasked)? };
        self.measured().put(problem, pass, &times);
        Ok(times)
    }

    fn run(
        self: &Arc<Self>,
        problem: &Problem,
        pass: Pass,
        route: Route,
        (tensors, stream): (&Tensors, &Stream),
    ) -> Result<f64> {
        let options = PlanOptions { route: Some(route), ..PlanOptions::default() };
        let memory = |bytes| DeviceBuffer::new(self.device(), "workspace", bytes);
        let batch = tensors.batch.get();
        let scale = (problem.head_dim as f32).powf(-0.5);
        let no_room = || Error::Unsupported {
            constraint: format!("{route} of {problem}"),
            got: "no room for its mask".into(),
            supported: "the other route".into(),
        };
        match pass {
            Pass::Forward => {
                let planned = SelectedForward::plan(self, problem, &options)?;
                if planned.plan_value().route() != route {
                    return Err(no_room());
                }
                let workspace = memory(planned.workspace_bytes())?;
                let context = LaunchContext { stream, workspace: workspace.span() };
                let work = tensors.forward(problem);
                time(self.device(), stream, || planned.launch(&context, &batch, &work, scale))
            }
            Pass::Backward => {
                let planned = SelectedBackward::plan(self, problem, &options)?;
                if planned.plan_value().route() != route {
                    return Err(no_room());
                }
                let workspace = memory(planned.workspace_bytes())?;
                let context = LaunchContext { stream, workspace: workspace.span() };
                let work = tensors.backward(problem);
                time(self.device(), stream, || planned.launch(&context, &batch, &work, scale))
            }
        }
    }
}
