//! Stage `selected` on a GPU, as a training loop calls it: tensors and workspace stay on the device, a call is launched
//! or replayed from a recorded graph.
//!
//! Both ways are compared with the oracle, on sampled rows of sampled heads, before either is timed.

mod buffers;
mod clock;
mod inputs;
mod reference;

use super::definition::Point;
use super::timing::Times;
use super::work::Measured;
use crate::random::normal_tensor;
use crate::sampled::Compared;
use buffers::{Buffers, download, replace};
use clock::{Clock, Timed};
use fsa::cuda::Kernels;
use fsa::cuda::driver::{DeviceBuffer, Graph, Stream};
use fsa::cuda::plan::{PlanOptions, Problem};
use fsa::cuda::selected::{LaunchContext, SelectedBackward, SelectedForward};
use fsa::{DType, Tensor};
use fsa_oracle::Pass;
use reference::Reference;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// What a measurement on a GPU has besides the times of launched calls.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceTimes {
    /// Half of the replays of the recorded call were faster, in milliseconds of the device.
    pub graph_median_ms: f64,
    /// A fifth of them were faster.
    pub graph_p20_ms: f64,
    /// Four fifths of them were faster.
    pub graph_p80_ms: f64,
    /// Median microseconds of the host for a launch.
    pub host_us: f64,
    /// The same with the plan made anew for every call.
    pub plan_host_us: f64,
    /// The same for a replay.
    pub graph_host_us: f64,
    /// Scratch memory.
    pub workspace_bytes: usize,
    /// Backward: equal bits for equal input.
    pub deterministic: bool,
}

/// What is timed.
#[derive(Debug)]
enum Planned {
    Forward(SelectedForward),
    Backward(SelectedBackward),
}

/// A measurement: planned, its tensors on the device.
#[derive(Debug)]
pub struct Work<'a> {
    kernels: &'a Arc<Kernels>,
    stream: Stream,
    problem: Problem,
    options: PlanOptions,
    reference: Reference,
    buffers: Buffers,
    planned: Planned,
    workspace: DeviceBuffer,
}

impl Planned {
    fn new(kernels: &Arc<Kernels>, pass: Pass, problem: &Problem, options: &PlanOptions) -> fsa::Result<Self> {
        Ok(match pass {
            Pass::Forward => Self::Forward(SelectedForward::plan(kernels, problem, options)?),
            Pass::Backward => Self::Backward(SelectedBackward::plan(kernels, problem, options)?),
        })
    }

    fn workspace_bytes(&self) -> usize {
        match self {
            Self::Forward(planned) => planned.workspace_bytes(),
            Self::Backward(planned) => planned.workspace_bytes(),
        }
    }
}

impl<'a> Work<'a> {
    /// Makes tensors and kernels ready.
    pub fn new(kernels: &'a Arc<Kernels>, point: &Point, deterministic: bool) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *point;
        let problem = Problem {
            total_q: tokens,
            total_kv: tokens,
            sequences: 1,
            num_q_heads,
            num_kv_heads,
            head_dim,
            block_size: point.config.block_size,
            topk: point.config.topk,
            dtype,
        };
        let options = PlanOptions { deterministic, ..PlanOptions::default() };
        let planned = Planned::new(kernels, point.pass, &problem, &options)?;
        let (device, stream) = (kernels.device(), Stream::new(kernels.device())?);
        let workspace = DeviceBuffer::new(device, "workspace", planned.workspace_bytes())?;
        let reference = Reference::new(point)?;
        let buffers = Buffers::new(device, &reference, &stream)?;
        let work = Self { kernels, stream, problem, options, reference, buffers, planned, workspace };
        if point.pass == Pass::Backward {
            work.forward()?;
        }
        Ok(work)
    }

    /// What a backward needs: `out` and `lse` of the forward.
    fn forward(&self) -> fsa::Result<()> {
        let planned = Planned::new(self.kernels, Pass::Forward, &self.problem, &self.options)?;
        let workspace = DeviceBuffer::new(self.kernels.device(), "workspace", planned.workspace_bytes())?;
        self.launch(&planned, &workspace)
    }

    /// Compares and times. Without times the comparison failed.
    pub fn run(&self, budget: Duration) -> fsa::Result<(Measured, Option<DeviceTimes>)> {
        let launch = || self.launch(&self.planned, &self.workspace);
        let mut compared = self.verify("launched", launch)?;
        let graph = Graph::capture(&self.stream, launch)?;
        let replay = || -> fsa::Result<()> { Ok(graph.launch(&self.stream)?) };
        compared.extend(self.verify("replayed", replay)?);
        if !compared.iter().all(Compared::passed) {
            return Ok((Measured { times: None, compared, wrong_selections: 0 }, None));
        }
        if matches!(self.planned, Planned::Backward(_)) {
            let grad_out = normal_tensor("grad_out", 5, self.problem.dtype, self.reference.inputs.query.shape())?;
            replace(&self.buffers.grad_out, &grad_out, &self.stream)?;
        }
        let (times, device) = self.time(budget, replay)?;
        Ok((Measured { times: Some(times), compared, wrong_selections: 0 }, Some(device)))
    }

    fn time(&self, budget: Duration, replay: impl FnMut() -> fsa::Result<()>) -> fsa::Result<(Times, DeviceTimes)> {
        let clock = Clock::new(self.kernels.device(), &self.stream)?;
        let share = budget / 3;
        let launched = clock.measure(share, || self.launch(&self.planned, &self.workspace))?;
        let planned_anew = clock.measure(share, || {
            let planned = Planned::new(self.kernels, self.pass(), &self.problem, &self.options)?;
            self.launch(&planned, &self.workspace)
        })?;
        let Timed { device: graph, host_us: graph_host_us } = clock.measure(share, replay)?;
        let times = DeviceTimes {
            graph_median_ms: graph.median_ms,
            graph_p20_ms: graph.p20_ms,
            graph_p80_ms: graph.p80_ms,
            host_us: launched.host_us,
            plan_host_us: planned_anew.host_us,
            graph_host_us,
            workspace_bytes: self.planned.workspace_bytes(),
            deterministic: self.options.deterministic,
        };
        Ok((launched.device, times))
    }

    fn pass(&self) -> Pass {
        match self.planned {
            Planned::Forward(_) => Pass::Forward,
            Planned::Backward(_) => Pass::Backward,
        }
    }

    fn scale(&self) -> f32 {
        (self.problem.head_dim as f32).powf(-0.5)
    }

    /// Gives a call to the stream.
    fn launch(&self, planned: &Planned, workspace: &DeviceBuffer) -> fsa::Result<()> {
        let context = LaunchContext { stream: &self.stream, workspace: workspace.span() };
        let batch = self.buffers.batch.get();
        match planned {
            Planned::Forward(planned) => {
                planned.launch(&context, &batch, &self.buffers.forward(&self.problem), self.scale())
            }
            Planned::Backward(planned) => {
                planned.launch(&context, &batch, &self.buffers.backward(&self.problem), self.scale())
            }
        }
    }

    /// Runs `call` over poisoned results and compares them with the oracle.
    fn verify(&self, how: &str, call: impl FnOnce() -> fsa::Result<()>) -> fsa::Result<Vec<Compared>> {
        self.poison()?;
        call()?;
        self.stream.synchronize()?;
        let named = |c: Compared| Compared { tensor: format!("{how} {}", c.tensor), ..c };
        Ok(self.reference.compare(&self.results()?)?.into_iter().map(named).collect())
    }

    /// Makes NaN of what the call writes: floats whose every byte is 0xff.
    fn poison(&self) -> fsa::Result<()> {
        let Buffers { out, lse, grad_query, grad_key, grad_value, .. } = &self.buffers;
        let written = match self.pass() {
            Pass::Forward => &[out, lse][..],
            Pass::Backward => &[grad_query, grad_key, grad_value],
        };
        let _bound = self.kernels.device().bind()?;
        written.iter().try_for_each(|buffer| Ok(buffer.span().fill(0xff, &self.stream)?))
    }

    /// `out` and `lse`, or the three gradients.
    fn results(&self) -> fsa::Result<Vec<Tensor>> {
        let (buffers, stream, dtype) = (&self.buffers, &self.stream, self.problem.dtype);
        let [q, kv] = [self.reference.inputs.query.shape(), self.reference.inputs.key.shape()];
        match self.pass() {
            Pass::Forward => {
                let out = download("out", &buffers.out, dtype, q, stream)?;
                Ok(vec![out, download("lse", &buffers.lse, DType::F32, &[q[1], q[0]], stream)?])
            }
            Pass::Backward => {
                let query = download("grad_query", &buffers.grad_query, dtype, q, stream)?;
                let key = download("grad_key", &buffers.grad_key, dtype, kv, stream)?;
                Ok(vec![query, key, download("grad_value", &buffers.grad_value, dtype, kv, stream)?])
            }
        }
    }
}
