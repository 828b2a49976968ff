//! Stage `compress` on device tensors: mean, weighted sum or matrix product of every window, and the gradients.

use super::tensors::absent;
use crate::compress::CompressKernels;
use crate::compress_linear::CompressLinearKernels;
use crate::driver::{Address, DeviceBatch, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, TensorSpan, check_batch, check_span};
use crate::params::{CompressBackwardParams, CompressParams};
use crate::plan::{CompressPlan, CompressProblem, CompressScratch, CompressionKind, Tables};
use crate::prepare::PrepareKernel;
use crate::source::{Kernel, Specialisation};
use fsa_core::{Error, Result};
use std::sync::Arc;

/// Tensors of a compression.
#[derive(Debug, Clone, Copy)]
pub struct CompressTensors<'a> {
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub input: TensorSpan<'a>,
    /// `[total_compressed, num_kv_heads, head_dim]`, written; room for as many rows as shapes allow. Not used by a backward.
    pub out: TensorSpan<'a>,
    /// Without gaps: `[num_kv_heads, kernel_size]` for a weighted sum, `[num_kv_heads, kernel_size * head_dim, head_dim]` for a
    /// matrix product.
    pub weight: Option<DeviceSpan<'a>>,
    /// `[num_kv_heads, kernel_size, head_dim]` without gaps, for a matrix product with one.
    pub position: Option<DeviceSpan<'a>>,
}

/// What a backward takes besides. Gradients of the parameters are written where they are wanted.
#[derive(Debug, Clone, Copy)]
pub struct CompressBackwardTensors<'a> {
    /// The forward's tensors.
    pub forward: CompressTensors<'a>,
    /// Shape of `out`.
    pub grad_out: TensorSpan<'a>,
    /// Shape of `input`, written.
    pub grad_input: TensorSpan<'a>,
    /// Shape of `weight`.
    pub grad_weight: Option<DeviceSpan<'a>>,
    /// Shape of `position`.
    pub grad_position: Option<DeviceSpan<'a>>,
    /// `grad_input` holds a gradient that is added to.
    pub accumulate: bool,
}

impl CompressTensors<'_> {
    fn check(&self, problem: &CompressProblem) -> Result<()> {
        let sizes = &problem.sizes;
        self.input.require("input", [sizes.total_kv, sizes.num_kv_heads], sizes)?;
        let parameters =
            [("weight", &self.weight, problem.weight_bytes()), ("position", &self.position, problem.position_bytes())];
        parameters.into_iter().try_for_each(|(name, parameter, bytes)| check_parameter(name, parameter, bytes))
    }
}

/// A parameter is there if the kind has one.
pub(super) fn check_parameter(name: &str, parameter: &Option<DeviceSpan<'_>>, bytes: usize) -> Result<()> {
    match parameter {
        Some(span) if bytes > 0 => check_span(name, span, bytes),
        None if bytes == 0 => Ok(()),
        Some(_) => Err(Error::input(name, "none for this kind of compression", "one")),
        None => Err(Error::input(name, format!("{bytes} bytes of device memory"), "none")),
    }
}

impl CompressBackwardTensors<'_> {
    fn check(&self, problem: &CompressProblem) -> Result<()> {
        let sizes = &problem.sizes;
        self.forward.check(problem)?;
        self.grad_out.require("grad_out", [problem.total_compressed(), sizes.num_kv_heads], sizes)?;
        self.grad_input.require("grad_input", [sizes.total_kv, sizes.num_kv_heads], sizes)?;
        let gradients = [
            ("grad_weight", &self.grad_weight, problem.weight_bytes()),
            ("grad_position", &self.grad_position, problem.position_bytes()),
        ];
        let wanted = gradients.into_iter().filter(|(_, gradient, _)| gradient.is_some());
        wanted.into_iter().try_for_each(|(name, gradient, bytes)| check_parameter(name, gradient, bytes))
    }
}

/// The kernels of a kind.
#[derive(Debug)]
enum Loaded {
    Sum(Arc<CompressKernels>),
    Linear(Arc<CompressLinearKernels>),
}

/// The specialisation that a kind takes.
pub(super) fn specialisation(kernels: &Kernels, problem: &CompressProblem) -> Specialisation {
    let kernel = if problem.kind.is_linear() { Kernel::CompressLinear } else { Kernel::Compress };
    problem.sizes.specialisation(kernel, kernels.set(), 64)
}

/// The compression alone, forward or backward, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) struct CompressStep {
    pub problem: CompressProblem,
    scratch: CompressScratch,
    kernels: Loaded,
    multiprocessors: usize,
}

impl CompressStep {
    pub(super) fn new(kernels: &Kernels, problem: &CompressProblem, scratch: CompressScratch) -> Result<Self> {
        let specialisation = specialisation(kernels, problem);
        let loaded = if problem.kind.is_linear() {
            Loaded::Linear(kernels.one(&specialisation)?)
        } else {
            Loaded::Sum(kernels.one(&specialisation)?)
        };
        let multiprocessors = kernels.device().facts().multiprocessors;
        Ok(Self { problem: *problem, scratch, kernels: loaded, multiprocessors })
    }

    fn params(&self, batch: &DeviceBatch<'_>, tables: &Tables, tensors: &CompressTensors<'_>) -> CompressParams {
        let CompressProblem { sizes, windows, kind } = &self.problem;
        let address = |span: &Option<DeviceSpan<'_>>| span.map_or(Address::default(), |span| span.address());
        CompressParams {
            cu_seqlens_kv: batch.spans()[1].address(),
            cu_compressed: tables.cu_compressed,
            input: tensors.input.device(),
            out: absent(),
            weight: if *kind == CompressionKind::Mean { Address::default() } else { address(&tensors.weight) },
            position: address(&tensors.position),
            partial: Address::default(),
            batch: sizes.sequences as i32,
            total_compressed: self.problem.total_compressed() as i32,
            num_kv_heads: sizes.num_kv_heads as i32,
            kernel_size: windows.kernel_size as i32,
            kernel_stride: windows.kernel_stride as i32,
            pieces: self.scratch.pieces as i32,
        }
    }

    /// `workspace` is what the scratch lies in.
    pub(super) fn forward(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        (tables, workspace): (&Tables, &DeviceSpan<'_>),
        tensors: &CompressTensors<'_>,
    ) -> Result<()> {
        let partial = self.scratch.sums.map_or(Address::default(), |slot| slot.address(workspace));
        let params = CompressParams { partial, ..self.forward_params(batch, tables, tensors) };
        match &self.kernels {
            Loaded::Sum(kernels) => kernels.forward(stream, self.multiprocessors, &[params], false)?,
            Loaded::Linear(kernels) => kernels.forward(stream, &params)?,
        }
        Ok(())
    }

    /// Whether two inputs of the same windows can go together, see [`forward_two`](Self::forward_two).
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        [self, other].iter().all(|step| matches!(step.kernels, Loaded::Sum(_)))
    }

    /// [`forward`](Self::forward) of two inputs in one launch, which with `follows` starts under the kernel right ahead, which fills the tables.
    pub(super) fn forward_two(
        steps: [&Self; 2],
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        (tensors, follows): ([&CompressTensors<'_>; 2], bool),
    ) -> Result<()> {
        let Loaded::Sum(kernels) = &steps[0].kernels else { unreachable!("asked for by `goes_with`") };
        let inputs = [0, 1].map(|c| steps[c].forward_params(batch, tables, tensors[c]));
        Ok(kernels.forward(stream, steps[0].multiprocessors, &inputs, follows)?)
    }

    fn forward_params(
        &self,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        tensors: &CompressTensors<'_>,
    ) -> CompressParams {
        CompressParams { out: tensors.out.device(), ..self.params(batch, tables, tensors) }
    }

    /// A part of the gradients.
    pub(super) fn backward(
        &self,
        part: GradientPart,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        (tables, workspace): (&Tables, &DeviceSpan<'_>),
        tensors: &CompressBackwardTensors<'_>,
    ) -> Result<()> {
        let address = |span: &Option<DeviceSpan<'_>>| span.map_or(Address::default(), |span| span.address());
        let params = CompressBackwardParams {
            forward: self.params(batch, tables, &tensors.forward),
            grad_out: tensors.grad_out.device(),
            grad_input: tensors.grad_input.device(),
            grad_weight: address(&tensors.grad_weight),
            grad_position: address(&tensors.grad_position),
            partial: self.scratch.sums.map_or(Address::default(), |slot| slot.address(workspace)),
            pieces: self.scratch.pieces as i32,
            accumulate: tensors.accumulate.into(),
        };
        match (&self.kernels, part) {
            (Loaded::Sum(kernels), GradientPart::Input) => kernels.backward(stream, &params)?,
            (Loaded::Sum(kernels), GradientPart::Parameters) => kernels.backward_parameters(stream, &params)?,
            (Loaded::Linear(kernels), GradientPart::Input) => kernels.backward(stream, &params)?,
            (Loaded::Linear(kernels), GradientPart::Parameters) => kernels.backward_parameters(stream, &params)?,
        }
        Ok(())
    }
}

/// Gradients of a compression that do not wait for each other.
#[derive(Debug, Clone, Copy)]
pub(super) enum GradientPart {
    Input,
    /// Of those parameters that are wanted.
    Parameters,
}

/// What forward and backward are planned with.
#[derive(Debug)]
struct Planned {
    kernels: Arc<Kernels>,
    plan: CompressPlan,
    prepare: Arc<PrepareKernel>,
    step: CompressStep,
}

impl Planned {
    fn new(kernels: &Arc<Kernels>, problem: &CompressProblem, plan: CompressPlan) -> Result<Self> {
        let prepare = problem.sizes.specialisation(Kernel::Prepare, kernels.set(), 64);
        let used = [prepare, specialisation(kernels, problem)];
        problem.check(kernels.device().facts(), &used)?;
        kernels.get(&used)?;
        let step = CompressStep::new(kernels, problem, plan.scratch)?;
        Ok(Self { kernels: Arc::clone(kernels), plan, prepare: kernels.one(&prepare)?, step })
    }

    /// Fills the tables.
    fn prepare(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        self.check(context, batch)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        Ok(self.prepare.launch(context.stream, &self.plan.tables.params(batch, &context.workspace))?)
    }

    /// Does `work`, with the tables.
    fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        work: impl FnOnce(&Tables) -> Result<()>,
    ) -> Result<()> {
        self.check(context, batch)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        work(&self.plan.tables.tables(&context.workspace))
    }

    fn check(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        check_batch(batch, &self.plan.problem.sizes)?;
        self.plan.workspace.check(&context.workspace)
    }
}

/// A planned forward with its kernels.
#[derive(Debug)]
pub struct CompressForward(Planned);

impl CompressForward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &CompressProblem) -> Result<Self> {
        Ok(Self(Planned::new(kernels, problem, CompressPlan::forward(problem))?))
    }

    /// Workspace.
    pub fn plan_value(&self) -> &CompressPlan {
        &self.0.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.0.plan.workspace.size_bytes()
    }

    /// Gives the forward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &CompressTensors<'_>,
    ) -> Result<()> {
        self.check(tensors)?;
        self.prepare(context, batch)?;
        self.launch_prepared(context, batch, tensors)
    }

    /// The part of a launch that needs no tensors, for callers that have them only later, or compress several inputs of the same sequences:
    /// [`launch_prepared`](Self::launch_prepared) does the rest, with the same workspace and on the same stream.
    ///
    /// # Errors
    /// The workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn prepare(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        self.0.prepare(context, batch)
    }

    /// The rest of a launch.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_prepared(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &CompressTensors<'_>,
    ) -> Result<()> {
        self.check(tensors)?;
        let work = |tables: &Tables| self.0.step.forward(context.stream, batch, (tables, &context.workspace), tensors);
        self.0.launch(context, batch, work)
    }

    fn check(&self, tensors: &CompressTensors<'_>) -> Result<()> {
        let problem = &self.0.plan.problem;
        tensors.check(problem)?;
        let rows = [problem.total_compressed(), problem.sizes.num_kv_heads];
        tensors.out.require("out", rows, &problem.sizes)
    }
}

/// A planned backward with its kernels. Equal bits for equal input.
#[derive(Debug)]
pub struct CompressBackward(Planned);

impl CompressBackward {
    /// Plans a call and makes its kernels ready; compiles those that this process and the cache lack.
    ///
    /// # Errors
    /// The kernels do not support the problem, or cannot be had.
    pub fn plan(kernels: &Arc<Kernels>, problem: &CompressProblem) -> Result<Self> {
        Ok(Self(Planned::new(kernels, problem, CompressPlan::backward(problem))?))
    }

    /// Workspace.
    pub fn plan_value(&self) -> &CompressPlan {
        &self.0.plan
    }

    /// Size of the workspace that a launch needs.
    pub fn workspace_bytes(&self) -> usize {
        self.0.plan.workspace.size_bytes()
    }

    /// Gives the backward to the stream.
    ///
    /// # Errors
    /// A tensor or the workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &CompressBackwardTensors<'_>,
    ) -> Result<()> {
        tensors.check(&self.0.plan.problem)?;
        self.prepare(context, batch)?;
        self.launch_prepared(context, batch, tensors)
    }

    /// As [`CompressForward::prepare`].
    ///
    /// # Errors
    /// The workspace is smaller than planned for; nothing was launched. Or the driver fails.
    pub fn prepare(&self, context: &LaunchContext<'_>, batch: &DeviceBatch<'_>) -> Result<()> {
        self.0.prepare(context, batch)
    }

    /// The rest of a launch.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn launch_prepared(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        tensors: &CompressBackwardTensors<'_>,
    ) -> Result<()> {
        tensors.check(&self.0.plan.problem)?;
        let work = |tables: &Tables| {
            let memory = (tables, &context.workspace);
            let parts = [GradientPart::Input, GradientPart::Parameters];
            parts.into_iter().try_for_each(|part| self.0.step.backward(part, context.stream, batch, memory, tensors))
        };
        self.0.launch(context, batch, work)
    }
}
