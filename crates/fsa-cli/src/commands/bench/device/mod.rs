//! The stages on a GPU, as a training loop calls them: tensors and workspace stay on the device, a call is launched or replayed
//! from a recorded graph.
//!
//! Both ways are compared with the oracle, on sampled rows of sampled heads, before either is timed.

mod attention;
mod buffers;
mod clock;
mod combine;
mod compress;
mod inputs;
mod nsa;
mod reference;
mod rope;
mod select;

use super::definition::Point;
use super::timing::Times;
use super::work::Measured;
use crate::sampled::Compared;
use clock::{Clock, Timed};
use fsa::Stage;
use fsa::cuda::Kernels;
use fsa::cuda::driver::{DeviceBuffer, Graph, Stream};
use fsa::cuda::plan::{PlanOptions, Sizes};
use fsa::cuda::stages::LaunchContext;
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

/// What every call runs with.
#[derive(Debug)]
pub struct Setup<'a> {
    kernels: &'a Arc<Kernels>,
    stream: Stream,
    options: PlanOptions,
    sizes: Sizes,
}

/// A planned call on tensors of an operation.
pub struct Planned<'a> {
    workspace_bytes: usize,
    launch: Launch<'a>,
}

/// Gives a planned call to a stream.
type Launch<'a> = Box<dyn Fn(&LaunchContext<'_>) -> fsa::Result<()> + 'a>;

/// Comparisons with the oracle.
#[derive(Debug, Default)]
pub struct Checked {
    compared: Vec<Compared>,
    /// Rows whose selection no rounding explains.
    wrong_selections: usize,
}

/// A stage with its tensors on the device.
pub trait Operation {
    /// Plans the call and makes its kernels ready.
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>>;

    /// What a call writes.
    fn written(&self) -> Vec<&DeviceBuffer>;

    /// Compares what a call wrote with the oracle.
    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked>;

    /// Puts the tensors in place that are timed: those that are compared may be mostly zeros.
    fn before_timing(&self, _: &Setup<'_>) -> fsa::Result<()> {
        Ok(())
    }
}

impl<'a> Planned<'a> {
    /// A call that needs no workspace.
    fn without_workspace(launch: impl Fn(&Stream) -> fsa::Result<()> + 'a) -> Self {
        Self { workspace_bytes: 0, launch: Box::new(move |context| launch(context.stream)) }
    }

    fn new(workspace_bytes: usize, launch: impl Fn(&LaunchContext<'_>) -> fsa::Result<()> + 'a) -> Self {
        Self { workspace_bytes, launch: Box::new(launch) }
    }
}

impl Setup<'_> {
    fn scale(&self) -> f32 {
        (self.sizes.head_dim as f32).powf(-0.5)
    }

    /// Runs a call once.
    fn run(&self, planned: &Planned<'_>) -> fsa::Result<()> {
        let workspace = DeviceBuffer::new(self.kernels.device(), "workspace", planned.workspace_bytes)?;
        (planned.launch)(&LaunchContext { stream: &self.stream, workspace: workspace.span() })?;
        Ok(self.stream.synchronize()?)
    }
}

/// A measurement: its tensors on the device.
pub struct Work<'a> {
    setup: Setup<'a>,
    operation: Box<dyn Operation>,
}

impl<'a> Work<'a> {
    /// Makes tensors and kernels ready.
    pub fn new(kernels: &'a Arc<Kernels>, point: &Point, deterministic: bool) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *point;
        let (total_q, total_kv, sequences) = (tokens, tokens, 1);
        let sizes = Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype };
        let options = PlanOptions { deterministic, ..PlanOptions::default() };
        let setup = Setup { kernels, stream: Stream::new(kernels.device())?, options, sizes };
        let operation: Box<dyn Operation> = match point.stage {
            Stage::Compress => Box::new(compress::Compress::new(&setup, point)?),
            Stage::Rope => Box::new(rope::Rotate::new(&setup, point)?),
            Stage::Combine => Box::new(combine::Combine::new(&setup, point)?),
            Stage::Select => Box::new(select::Lists::new(&setup, point)?),
            Stage::Nsa => Box::new(nsa::Whole::new(&setup, point)?),
            Stage::Dense | Stage::Window | Stage::Compressed | Stage::Selected => {
                Box::new(attention::Attention::new(&setup, point)?)
            }
            Stage::Index => return Err(fsa::Error::input("stage", "an operation of its own", Stage::Index)),
        };
        Ok(Self { setup, operation })
    }

    /// Compares and times. Without times the comparison failed.
    pub fn run(&self, budget: Duration) -> fsa::Result<(Measured, Option<DeviceTimes>)> {
        let (setup, stream) = (&self.setup, &self.setup.stream);
        let planned = self.operation.plan(setup)?;
        let workspace = DeviceBuffer::new(setup.kernels.device(), "workspace", planned.workspace_bytes)?;
        let context = LaunchContext { stream, workspace: workspace.span() };
        let launch = || (planned.launch)(&context);
        let mut checked = self.verify("launched", launch)?;
        let graph = Graph::capture(stream, launch)?;
        let replay = || -> fsa::Result<()> { Ok(graph.launch(stream)?) };
        let replayed = self.verify("replayed", replay)?;
        checked.compared.extend(replayed.compared);
        checked.wrong_selections += replayed.wrong_selections;
        let Checked { compared, wrong_selections } = checked;
        if wrong_selections > 0 || !compared.iter().all(Compared::passed) {
            return Ok((Measured { times: None, compared, wrong_selections }, None));
        }
        self.operation.before_timing(setup)?;
        let (times, device) = self.time(budget, (&planned, &context), replay)?;
        Ok((Measured { times: Some(times), compared, wrong_selections }, Some(device)))
    }

    fn time(
        &self,
        budget: Duration,
        (planned, context): (&Planned<'_>, &LaunchContext<'_>),
        replay: impl FnMut() -> fsa::Result<()>,
    ) -> fsa::Result<(Times, DeviceTimes)> {
        let setup = &self.setup;
        let clock = Clock::new(setup.kernels.device(), &setup.stream)?;
        let share = budget / 3;
        let launched = clock.measure(share, || (planned.launch)(context))?;
        let planned_anew = clock.measure(share, || (self.operation.plan(setup)?.launch)(context))?;
        let Timed { device: graph, host_us: graph_host_us } = clock.measure(share, replay)?;
        let times = DeviceTimes {
            graph_median_ms: graph.median_ms,
            graph_p20_ms: graph.p20_ms,
            graph_p80_ms: graph.p80_ms,
            host_us: launched.host_us,
            plan_host_us: planned_anew.host_us,
            graph_host_us,
            workspace_bytes: planned.workspace_bytes,
            deterministic: setup.options.deterministic,
        };
        Ok((launched.device, times))
    }

    /// Runs `call` over poisoned results and compares them with the oracle.
    fn verify(&self, how: &str, call: impl FnOnce() -> fsa::Result<()>) -> fsa::Result<Checked> {
        self.poison()?;
        call()?;
        self.setup.stream.synchronize()?;
        let named = |c: Compared| Compared { tensor: format!("{how} {}", c.tensor), ..c };
        let Checked { compared, wrong_selections } = self.operation.compare(&self.setup)?;
        Ok(Checked { compared: compared.into_iter().map(named).collect(), wrong_selections })
    }

    /// Makes NaN of what the call writes: floats whose every byte is 0xff.
    fn poison(&self) -> fsa::Result<()> {
        let _bound = self.setup.kernels.device().bind()?;
        let written = self.operation.written();
        written.into_iter().try_for_each(|buffer| Ok(buffer.span().fill(0xff, &self.setup.stream)?))
    }
}
