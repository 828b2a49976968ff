//! Stage `compress` on CUDA tensors: keys and values in one call.

use super::attention::windows;
use super::inputs::{Parameters, Windowed, device_and_dtype, padded, parameter_names, rank3, sequences};
use super::plans::{Launch, Planned, Work};
use super::tensors::{Call, Held, Read, Scratch, Triple};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place, batch, dtype_object};
use crate::run::detached;
use fsa::cuda::driver::DeviceSpan;
use fsa::cuda::plan::{CompressProblem, CompressionKind, Sizes};
use fsa::cuda::stages::{CompressBackwardTensors, CompressTensors};
use fsa::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::Arc;

/// `(k, v, cu_seqlens_k)`.
type Inputs<'py> = (Held<'py>, Held<'py>, Held<'py>);

/// Checks the compression of the argument `name`, and plans it.
fn plan(
    py: Python<'_>,
    (name, input, parameters): (&str, &DeviceTensor, &Parameters<'_>),
    cu_seqlens_k: &DeviceTensor,
    geometry: (usize, usize),
    work: fn(CompressProblem) -> Work,
) -> Result<(Call, CompressProblem), Failure> {
    let names = parameter_names(name);
    let arguments = [vec![(name, input, false)], parameters.named(&names), vec![("cu_seqlens_k", cu_seqlens_k, true)]];
    let (ordinal, dtype) = device_and_dtype(&arguments.concat())?;
    let [total_kv, heads, dim] = rank3(name, "[total_k, num_kv_heads, dim]", input)?;
    let head_dim = padded("dim", dim)?;
    let windows = windows(geometry.0, geometry.1)?;
    let kind = parameters.kind(&names, &Windowed { heads, kernel_size: geometry.0, dim })?;
    let sequences = sequences("cu_seqlens_k", cu_seqlens_k)?;
    // There is no query: its sizes are those of the keys.
    let (total_q, num_q_heads, num_kv_heads) = (total_kv, heads, heads);
    let sizes = Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype };
    let problem = CompressProblem { sizes, windows, kind };
    Ok((Call::plan(py, Place { ordinal, sizes }, work(problem), 1.0)?, problem))
}

/// `(weight, position)` as kernels read or write them.
pub struct ParametersRead<'a, 'py>(Option<Read<'a, 'py>>, Option<Read<'a, 'py>>);

impl<'py> Parameters<'py> {
    /// Padded as the vectors are.
    pub fn read(&self, dim: usize) -> PyResult<ParametersRead<'_, 'py>> {
        let Parameters(weight, position) = self;
        let weight = weight.as_ref().map(|weight| match *weight.shape() {
            [heads, _, own] if own < dim => {
                let windows = weight.object.call_method1("reshape", (heads, -1, own, own))?.extract::<Held<'py>>()?;
                let padded = windows.padded(&[0, dim - own, 0, dim - own])?;
                Ok(Read::Copy(padded.call_method1("flatten", (1, 2))?.extract()?))
            }
            _ => weight.read_plain(),
        });
        let position = position.as_ref().map(|position| match *position.shape() {
            [.., own] if own < dim => Ok(Read::Copy(position.padded(&[0, dim - own])?.extract()?)),
            _ => position.read_plain(),
        });
        Ok(ParametersRead(weight.transpose()?, position.transpose()?))
    }

    /// Room for gradients, padded.
    pub fn gradients(&self, dim: usize) -> PyResult<Gradients<'py>> {
        let weight = self.0.as_ref().map(|weight| match *weight.shape() {
            [heads, rows, own] => weight.empty(&[heads, rows / own * dim, dim]),
            ref shape => weight.empty(shape),
        });
        let position = self.1.as_ref().map(|position| match *position.shape() {
            [heads, rows, _] => position.empty(&[heads, rows, dim]),
            ref shape => position.empty(shape),
        });
        Ok(Gradients { weight: weight.transpose()?, position: position.transpose()? })
    }
}

/// Gradients of the parameters.
pub struct Gradients<'py> {
    weight: Option<Held<'py>>,
    position: Option<Held<'py>>,
}

impl<'py> Gradients<'py> {
    /// As kernels write them.
    pub fn written(&self) -> ParametersRead<'_, 'py> {
        let [weight, position] = [&self.weight, &self.position].map(|held| held.as_deref().map(Read::AsItLies));
        ParametersRead(weight, position)
    }

    /// Those of the parameters that are there, without padding.
    pub fn results(self, Parameters(weight, position): &Parameters<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let mut results = Vec::new();
        if let (Some(grad), Some(weight)) = (self.weight, weight) {
            let (own, dim) = (weight.dim(), grad.dim());
            results.push(if own == dim {
                grad.object
            } else {
                let windows = grad.object.call_method1("reshape", (weight.shape()[0], -1, dim, dim))?;
                let cut = windows.call_method1("narrow", (2, 0, own))?.call_method1("narrow", (3, 0, own))?;
                cut.call_method1("reshape", (PyTuple::new(cut.py(), weight.shape())?,))?
            });
        }
        if let (Some(grad), Some(position)) = (self.position, position) {
            results.push(grad.cut(position.dim())?);
        }
        Ok(results)
    }
}

/// `weight` and `position` as spans.
///
/// # Errors
/// [`fsa::Error::Input`] for a parameter that is not as planned.
pub fn parameter_spans<'a>(
    ParametersRead(weight, position): &'a ParametersRead<'_, '_>,
    [weight_name, position_name]: &[String; 2],
    place: &Place,
    problem: &CompressProblem,
) -> Result<[Option<DeviceSpan<'a>>; 2]> {
    let Sizes { num_kv_heads, head_dim, dtype, .. } = problem.sizes;
    let kernel_size = problem.windows.kernel_size;
    let linear = [num_kv_heads, kernel_size * head_dim, head_dim];
    let shape: &[usize] =
        if problem.kind == CompressionKind::Weighted { &[num_kv_heads, kernel_size] } else { &linear };
    let weight = weight.as_ref().map(|weight| weight.plain(weight_name, place, dtype, shape));
    let shape = [num_kv_heads, kernel_size, head_dim];
    let position = position.as_ref().map(|position| position.plain(position_name, place, dtype, &shape));
    Ok([weight.transpose()?, position.transpose()?])
}

/// Spans of an input, of its compressed rows or their gradient, and of the parameters.
fn spans<'a>(
    [input, out]: [&'a DeviceTensor; 2],
    parameters: &'a ParametersRead<'_, '_>,
    planned: &Planned,
    problem: &CompressProblem,
) -> Result<CompressTensors<'a>> {
    let (place, heads) = (planned.place(), problem.sizes.num_kv_heads);
    let [weight, position] = parameter_spans(parameters, &parameter_names("k"), place, problem)?;
    Ok(CompressTensors {
        input: input.vectors("input", place, [problem.sizes.total_kv, heads])?,
        out: out.vectors("out", place, [problem.total_compressed(), heads])?,
        weight,
        position,
    })
}

/// Whether a call can do with the scratch memory of one before it, and the tables in it.
fn shares(planned: &Planned, before: &Planned) -> bool {
    match (&planned.launch, &before.launch) {
        (Launch::Compress(own), Launch::Compress(other)) => own.plan_value().shares(other.plan_value()),
        (Launch::CompressBackward(own), Launch::CompressBackward(other)) => own.plan_value().shares(other.plan_value()),
        _ => false,
    }
}

/// Fills the tables in scratch memory, which need no tensors: the device has something to do before there are outputs.
fn prepare(py: Python<'_>, call: &Call, scratch: &Scratch<'_>, cu_seqlens_k: &DeviceTensor) -> Result<(), Failure> {
    let planned = &*call.planned;
    let (context, batch) = (scratch.context(planned)?, batch(cu_seqlens_k, cu_seqlens_k, planned.place())?);
    detached(py, || match &planned.launch {
        Launch::Compress(launch) => launch.prepare(&context, &batch),
        Launch::CompressBackward(launch) => launch.prepare(&context, &batch),
        _ => Err(planned.other("stage compress")),
    })
}

/// Compressed rows of one input, zeros behind the last. The scratch memory is prepared.
fn forward<'py>(
    py: Python<'py>,
    (call, problem): &(Call, CompressProblem),
    scratch: &Scratch<'py>,
    (input, parameters): (&Held<'py>, &Parameters<'py>),
    cu_seqlens_k: &DeviceTensor,
) -> Result<Bound<'py, PyAny>, Failure> {
    let planned = &*call.planned;
    let Launch::Compress(launch) = &planned.launch else {
        return Err(planned.other("the forward of stage compress").into());
    };
    let out = input.empty(&[problem.total_compressed(), problem.sizes.num_kv_heads, call.dim()])?;
    let (read, parameters) = (call.vectors(input)?, parameters.read(call.dim())?);
    let (context, batch) = (scratch.context(planned)?, batch(cu_seqlens_k, cu_seqlens_k, planned.place())?);
    let tensors = spans([&read, &out], &parameters, planned, problem)?;
    detached(py, || {
        let _bound = planned.kernels.device().bind()?;
        if problem.kind.is_linear() {
            // A matrix product does not write the rows behind the last.
            tensors.out.span.fill(0, context.stream)?;
        }
        launch.launch_prepared(&context, &batch, &tensors)
    })?;
    out.cut(input.dim()).map_err(Failure::from)
}

/// The prefix sums of compressed rows that a forward left in its scratch memory.
fn prefix_sums<'py>(planned: &Planned, workspace: &Held<'py>) -> Result<Bound<'py, PyAny>, Failure> {
    let Launch::Compress(launch) = &planned.launch else {
        return Err(planned.other("the forward of stage compress").into());
    };
    let regions = launch.plan_value().workspace.regions();
    let slot = regions.iter().find(|(name, _)| *name == "cu_compressed").map(|(_, slot)| slot);
    let slot = slot.ok_or_else(|| Error::input("plan", "one with prefix sums", "none"))?;
    let bytes = workspace.object.call_method1("narrow", (0, slot.offset, slot.bytes))?;
    Ok(bytes.call_method1("view", (dtype_object(bytes.py(), "int32")?,))?)
}

/// Compressed keys and values, zeros behind the last, and their prefix sums.
#[pyfunction]
pub fn cuda_compress<'py>(
    py: Python<'py>,
    geometry: (usize, usize),
    inputs: Inputs<'py>,
    parameters: (Parameters<'py>, Parameters<'py>),
) -> Result<Triple<'py>, Failure> {
    let (k, v, cu_seqlens_k) = &inputs;
    let key = plan(py, ("k", k, &parameters.0), cu_seqlens_k, geometry, Work::Compress)?;
    let value = plan(py, ("v", v, &parameters.1), cu_seqlens_k, geometry, Work::Compress)?;
    let cu_seqlens_k = cu_seqlens_k.read_plain()?;
    let shares = shares(&value.0.planned, &key.0.planned);
    let scratch = key.0.scratch(k)?;
    prepare(py, &key.0, &scratch, &cu_seqlens_k)?;
    let k_cmp = forward(py, &key, &scratch, (k, &parameters.0), &cu_seqlens_k)?;
    let own = if shares { None } else { Some(value.0.scratch(v)?) };
    if let Some(own) = &own {
        prepare(py, &value.0, own, &cu_seqlens_k)?;
    }
    let v_cmp = forward(py, &value, own.as_ref().unwrap_or(&scratch), (v, &parameters.1), &cu_seqlens_k)?;
    Ok((k_cmp, v_cmp, prefix_sums(&key.0.planned, &scratch.workspace)?))
}

/// Gradients of one input and of its parameters that are there. The scratch memory is prepared.
fn backward<'py>(
    py: Python<'py>,
    (call, problem): &(Call, CompressProblem),
    scratch: &Scratch<'py>,
    (input, grad_out, parameters): (&Held<'py>, &Held<'py>, &Parameters<'py>),
    cu_seqlens_k: &DeviceTensor,
) -> Result<Vec<Bound<'py, PyAny>>, Failure> {
    let (planned, place) = (&*call.planned, call.planned.place());
    let Launch::CompressBackward(launch) = &planned.launch else {
        return Err(planned.other("the backward of stage compress").into());
    };
    let (grad_input, gradients) = (call.like(input)?, parameters.gradients(call.dim())?);
    let (read, grad_out, given) = (call.vectors(input)?, call.vectors(grad_out)?, parameters.read(call.dim())?);
    let (context, batch) = (scratch.context(planned)?, batch(cu_seqlens_k, cu_seqlens_k, place)?);
    let forward = spans([&read, &grad_out], &given, planned, problem)?;
    let written = gradients.written();
    let [grad_weight, grad_position] = parameter_spans(&written, &parameter_names("grad_k"), place, problem)?;
    let tensors = CompressBackwardTensors {
        forward,
        grad_out: forward.out,
        grad_input: grad_input.vectors("grad_input", place, [problem.sizes.total_kv, problem.sizes.num_kv_heads])?,
        grad_weight,
        grad_position,
        accumulate: false,
    };
    detached(py, || launch.launch_prepared(&context, &batch, &tensors))?;
    let mut grads = vec![grad_input.cut(input.dim())?];
    grads.extend(gradients.results(parameters)?);
    Ok(grads)
}

/// Gradients of the inputs whose compressed rows have one, each followed by those of its parameters that are there.
#[pyfunction]
pub fn cuda_compress_backward<'py>(
    py: Python<'py>,
    geometry: (usize, usize),
    inputs: Inputs<'py>,
    parameters: (Parameters<'py>, Parameters<'py>),
    grads_out: (Option<Held<'py>>, Option<Held<'py>>),
) -> Result<Vec<Bound<'py, PyAny>>, Failure> {
    let (k, v, cu_seqlens_k) = &inputs;
    let sums = cu_seqlens_k.read_plain()?;
    let (mut grads, mut before) = (Vec::new(), None::<(Arc<Planned>, Scratch<'py>)>);
    let sides = [("k", k, &parameters.0, &grads_out.0), ("v", v, &parameters.1, &grads_out.1)];
    for (name, input, parameters, grad_out) in sides {
        let Some(grad_out) = grad_out else { continue };
        let planned = plan(py, (name, input, parameters), cu_seqlens_k, geometry, Work::CompressBackward)?;
        let scratch = match before.take() {
            Some((other, scratch)) if shares(&planned.0.planned, &other) => scratch,
            _ => {
                let scratch = planned.0.scratch(input)?;
                prepare(py, &planned.0, &scratch, &sums)?;
                scratch
            }
        };
        grads.extend(backward(py, &planned, &scratch, (input, grad_out, parameters), &sums)?);
        before = Some((planned.0.planned, scratch));
    }
    Ok(grads)
}
