//! Stage `select` on CUDA tensors: attention to compressed keys, and the blocks that it points to.

use super::attention::{Inputs, results, scale, windows};
use super::inputs::Packed;
use super::plans::{Launch, Work};
use super::tensors::{Call, Triple};
use crate::failure::Failure;
use crate::packed::{COMPRESSED, config};
use crate::run::detached;
use fsa::DType;
use fsa::cuda::plan::SelectProblem;
use pyo3::prelude::*;

/// `out`, `lse` and `topk_indices` of compressed attention. Its backward is that of stage `compressed`.
#[pyfunction]
pub fn cuda_select<'py>(
    py: Python<'py>,
    sizes: [usize; 8],
    inputs: Packed<'py>,
    softmax_scale: Option<f64>,
) -> Result<Triple<'py>, Failure> {
    let mut place = inputs.place(COMPRESSED, &[])?;
    let config = config(sizes);
    config.validate()?;
    place.sizes.total_kv *= windows(config.kernel_size, config.kernel_stride)?.kernel_stride;
    let problem = SelectProblem::new(&place.sizes, &config);
    let call = Call::plan(py, place, Work::Select(problem), scale(softmax_scale, &inputs.0))?;
    let Launch::Select(launch) = &call.planned.launch else {
        return Err(call.planned.other("stage select").into());
    };
    let read = Inputs::new(&call, &inputs)?;
    let scratch = call.scratch(&inputs.0)?;
    let (context, batch) = (scratch.context(&call.planned)?, read.batch(&place)?);
    detached(py, || launch.prepare(&context, &batch))?;
    let [out, lse] = results(&call, &inputs.0)?;
    let shape = [problem.sizes.num_kv_heads, problem.sizes.total_q, problem.topk];
    let lists = inputs.0.empty_of("int32", &shape)?;
    let forward = read.spans(&call.planned, [&out, &lse], problem.attention().total_keys())?;
    let topk_indices = lists.plain("topk_indices", &place, DType::I32, &shape)?;
    detached(py, || launch.launch_prepared(&context, &batch, &forward, &topk_indices, call.scale))?;
    Ok((out.cut(inputs.2.dim())?, lse.object, lists.object))
}
