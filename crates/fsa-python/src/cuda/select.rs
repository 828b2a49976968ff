//! Stage `select` on CUDA tensors: attention to compressed keys, and the blocks that it points to.

use super::attention::{Forward, windows};
use super::inputs::Packed;
use super::plans::{Launch, Work};
use super::{Context, CudaPlan, Plan, check_scale, planned};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, batch};
use crate::packed::{COMPRESSED, config};
use crate::run::detached;
use fsa::DType;
use fsa::cuda::plan::SelectProblem;
use pyo3::prelude::*;

/// Checks a call and plans it. Its backward is that of stage `compressed`.
#[pyfunction]
pub fn cuda_select_plan(py: Python<'_>, inputs: Packed, sizes: [usize; 8]) -> Result<Plan, Failure> {
    let mut place = inputs.place(COMPRESSED, &[])?;
    let config = config(sizes);
    config.validate()?;
    place.sizes.total_kv *= windows(config.kernel_size, config.kernel_stride)?.kernel_stride;
    planned(py, place, Work::Select(SelectProblem::new(&place.sizes, &config)))
}

/// Gives the call to the stream; it writes `out`, `lse` and `topk_indices`.
#[pyfunction]
pub fn cuda_select(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    softmax_scale: f32,
    tensors: Forward,
    topk_indices: DeviceTensor,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    let (Work::Select(problem), Launch::Select(launch)) = (&planned.key.work, &planned.launch) else {
        return Err(planned.other("stage select").into());
    };
    check_scale(softmax_scale)?;
    let batch = batch(&tensors.3, &tensors.4, planned.place())?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    let forward = tensors.spans(planned, problem.attention().total_keys())?;
    let shape = [problem.sizes.num_kv_heads, problem.sizes.total_q, problem.topk];
    let topk_indices = topk_indices.plain("topk_indices", planned.place(), DType::I32, &shape)?;
    detached(py, || launch.launch(&context, &batch, &forward, &topk_indices, softmax_scale))
}
