//! Stage `compress` on CUDA tensors.

use super::attention::windows;
use super::inputs::{Parameters, Windowed, device_and_dtype, padded, parameter_names, rank3, sequences};
use super::plans::{Launch, Planned, Work};
use super::{Context, CudaPlan, Plan, planned};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place, batch};
use crate::run::detached;
use fsa::Result;
use fsa::cuda::driver::DeviceSpan;
use fsa::cuda::plan::{CompressProblem, CompressionKind, Sizes};
use fsa::cuda::stages::{CompressBackwardTensors, CompressTensors};
use pyo3::prelude::*;

/// `(input, cu_seqlens_k)`.
type Input = (DeviceTensor, DeviceTensor);

/// Checks a call and plans it. `name` is that of the compressed argument.
#[pyfunction]
pub fn cuda_compress_plan(
    py: Python<'_>,
    name: &str,
    geometry: (usize, usize),
    input: Input,
    parameters: Parameters,
    backward: bool,
) -> Result<Plan, Failure> {
    let names = parameter_names(name);
    let (input, cu_seqlens_k) = &input;
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
    let work = if backward { Work::CompressBackward(problem) } else { Work::Compress(problem) };
    planned(py, Place { ordinal, sizes }, work)
}

/// `weight` and `position` as the kernels take them.
///
/// # Errors
/// [`fsa::Error::Input`] for a parameter that is not as planned.
pub fn parameter_spans<'a>(
    Parameters(weight, position): &'a Parameters,
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

/// `(input, cu_seqlens_k, out)`, vectors padded; `out` is `grad_out` in a backward.
type Tensors = (DeviceTensor, DeviceTensor, DeviceTensor);

fn spans<'a>(
    (input, _, out): &'a Tensors,
    parameters: &'a Parameters,
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

/// Gives the forward to the stream; it writes the compressed rows to the front of `out`.
#[pyfunction]
pub fn cuda_compress(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    tensors: Tensors,
    parameters: Parameters,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    let (Work::Compress(problem), Launch::Compress(launch)) = (&planned.key.work, &planned.launch) else {
        return Err(planned.other("the forward of stage compress").into());
    };
    let batch = batch(&tensors.1, &tensors.1, planned.place())?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    let forward = spans(&tensors, &parameters, planned, problem)?;
    detached(py, || launch.launch(&context, &batch, &forward))
}

/// Gives the backward to the stream; it writes the gradients of the input and of the parameters.
#[pyfunction]
pub fn cuda_compress_backward(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    tensors: Tensors,
    parameters: Parameters,
    grad_input: DeviceTensor,
    grad_parameters: Parameters,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    let (Work::CompressBackward(problem), Launch::CompressBackward(launch)) = (&planned.key.work, &planned.launch)
    else {
        return Err(planned.other("the backward of stage compress").into());
    };
    let place = planned.place();
    let batch = batch(&tensors.1, &tensors.1, place)?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    let forward = spans(&tensors, &parameters, planned, problem)?;
    let names = parameter_names("grad_k");
    let [grad_weight, grad_position] = parameter_spans(&grad_parameters, &names, place, problem)?;
    let backward = CompressBackwardTensors {
        forward,
        grad_out: forward.out,
        grad_input: grad_input.vectors("grad_input", place, [problem.sizes.total_kv, problem.sizes.num_kv_heads])?,
        grad_weight,
        grad_position,
        accumulate: false,
    };
    detached(py, || launch.launch(&context, &batch, &backward))
}
