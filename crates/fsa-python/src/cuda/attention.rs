//! Stages `selected`, `dense`, `window` and `compressed` on CUDA tensors.

use super::inputs::{Packed, rank3, shape};
use super::plans::{Launch, Planned, Work};
use super::{Context, CudaPlan, Plan, check_scale, planned};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, batch};
use crate::packed::COMPRESSED;
use crate::run::detached;
use fsa::cuda::driver::DeviceSpan;
use fsa::cuda::plan::{BandProblem, Keys, Windows};
use fsa::cuda::selected::{BackwardTensors, ForwardTensors};
use fsa::cuda::stages::{AttentionGradTensors, AttentionTensors};
use fsa::{DType, NsaConfig, Result};
use pyo3::prelude::*;

/// `(topk_indices, block_size)`, `(kernel_size, kernel_stride)`, `(window_size,)`, or `()` for dense.
#[derive(FromPyObject)]
pub enum Stage {
    Selected(DeviceTensor, usize),
    Compressed(usize, usize),
    Window((usize,)),
    Dense([usize; 0]),
}

/// Checks a call of a stage and plans it.
#[pyfunction]
pub fn cuda_attention_plan(
    py: Python<'_>,
    inputs: Packed,
    stage: Stage,
    backward: bool,
    deterministic: bool,
) -> Result<Plan, Failure> {
    let (names, others) = match &stage {
        Stage::Selected(topk_indices, _) => (["k", "v"], vec![("topk_indices", topk_indices, true)]),
        Stage::Compressed(..) => (COMPRESSED, Vec::new()),
        Stage::Window(_) | Stage::Dense(_) => (["k", "v"], Vec::new()),
    };
    let mut place = inputs.place(names, &others)?;
    let keys = match stage {
        Stage::Selected(topk_indices, block_size) => {
            NsaConfig { block_size, ..NsaConfig::default() }.validate()?;
            let [_, _, topk] = rank3("topk_indices", "[num_kv_heads, total_q, topk]", &topk_indices)?;
            shape("topk_indices", &[place.sizes.num_kv_heads, place.sizes.total_q, topk], &topk_indices)?;
            let problem = place.sizes.selected(block_size, topk);
            let work =
                if backward { Work::SelectedBackward { problem, deterministic } } else { Work::Selected(problem) };
            return planned(py, place, work);
        }
        Stage::Compressed(kernel_size, kernel_stride) => {
            let windows = windows(kernel_size, kernel_stride)?;
            place.sizes.total_kv *= windows.kernel_stride;
            Keys::Compressed(windows)
        }
        Stage::Window((window_size,)) => Keys::Window { window_size },
        Stage::Dense(_) => Keys::Dense,
    };
    let problem = BandProblem { sizes: place.sizes, keys };
    planned(py, place, if backward { Work::BandBackward(problem) } else { Work::Band(problem) })
}

/// Windows that a compression has.
///
/// # Errors
/// [`fsa::Error::Input`] that names the argument.
pub fn windows(kernel_size: usize, kernel_stride: usize) -> Result<Windows> {
    match (NsaConfig { kernel_size, kernel_stride, ..NsaConfig::default() }).validate() {
        Err(error) if error.argument() != Some("block_size") => Err(error),
        _ => Ok(Windows { kernel_size, kernel_stride }),
    }
}

/// `(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse)`, vectors padded.
#[derive(FromPyObject)]
pub struct Forward(
    pub DeviceTensor,
    pub DeviceTensor,
    pub DeviceTensor,
    pub DeviceTensor,
    pub DeviceTensor,
    pub DeviceTensor,
    pub DeviceTensor,
);

/// `(grad_out, grad_lse or None, grad_q, grad_k, grad_v)`, vectors padded.
#[derive(FromPyObject)]
pub struct Backward(DeviceTensor, Option<DeviceTensor>, DeviceTensor, DeviceTensor, DeviceTensor);

impl Forward {
    /// As spans, of `total_keys` keys.
    ///
    /// # Errors
    /// [`fsa::Error::Input`] for a tensor that is not as planned.
    pub fn spans(&self, planned: &Planned, total_keys: usize) -> Result<AttentionTensors<'_>> {
        let Forward(q, k, v, _, _, out, lse) = self;
        let (place, sizes) = (planned.place(), planned.place().sizes);
        let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [total_keys, sizes.num_kv_heads]);
        Ok(AttentionTensors {
            query: q.vectors("q", place, rows)?,
            key: k.vectors("k", place, keys)?,
            value: v.vectors("v", place, keys)?,
            out: out.vectors("out", place, rows)?,
            lse: lse.plain("lse", place, DType::F32, &[sizes.num_q_heads, sizes.total_q])?,
        })
    }
}

impl Backward {
    fn spans<'a>(
        &'a self,
        planned: &Planned,
        forward: AttentionTensors<'a>,
        total_keys: usize,
    ) -> Result<AttentionGradTensors<'a>> {
        let Backward(grad_out, grad_lse, grad_q, grad_k, grad_v) = self;
        let (place, sizes) = (planned.place(), planned.place().sizes);
        let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [total_keys, sizes.num_kv_heads]);
        let lse = [sizes.num_q_heads, sizes.total_q];
        let grad_lse = grad_lse.as_ref().map(|grad| grad.plain("grad_lse", place, DType::F32, &lse));
        Ok(AttentionGradTensors {
            forward,
            grad_out: grad_out.vectors("grad_out", place, rows)?,
            grad_lse: grad_lse.transpose()?,
            grad_query: grad_q.vectors("grad_q", place, rows)?,
            grad_key: grad_k.vectors("grad_k", place, keys)?,
            grad_value: grad_v.vectors("grad_v", place, keys)?,
        })
    }
}

/// `topk_indices` of a call that has them.
fn listed<'a>(topk_indices: &'a Option<DeviceTensor>, planned: &Planned, topk: usize) -> Result<DeviceSpan<'a>> {
    let sizes = &planned.place().sizes;
    let missing = || fsa::Error::input("topk_indices", "a tensor", "None");
    let shape = [sizes.num_kv_heads, sizes.total_q, topk];
    topk_indices.as_ref().ok_or_else(missing)?.plain("topk_indices", planned.place(), DType::I32, &shape)
}

/// Gives the forward to the stream; it writes `out` and `lse`.
#[pyfunction]
pub fn cuda_attention(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    softmax_scale: f32,
    tensors: Forward,
    topk_indices: Option<DeviceTensor>,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    check_scale(softmax_scale)?;
    let batch = batch(&tensors.3, &tensors.4, planned.place())?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    match (&planned.key.work, &planned.launch) {
        (Work::Selected(problem), Launch::Selected(launch)) => {
            let AttentionTensors { query, key, value, out, lse } = tensors.spans(planned, problem.total_kv)?;
            let topk_indices = listed(&topk_indices, planned, problem.topk)?;
            let forward = ForwardTensors { query, key, value, topk_indices, out, lse };
            detached(py, || launch.launch(&context, &batch, &forward, softmax_scale))
        }
        (Work::Band(problem), Launch::Band(launch)) => {
            let forward = tensors.spans(planned, problem.total_keys())?;
            detached(py, || launch.launch(&context, &batch, &forward, softmax_scale))
        }
        _ => Err(planned.other("the forward of an attention stage").into()),
    }
}

/// Gives the backward to the stream; it writes the last three tensors of `gradients`.
#[pyfunction]
pub fn cuda_attention_backward(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    softmax_scale: f32,
    tensors: Forward,
    topk_indices: Option<DeviceTensor>,
    gradients: Backward,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    check_scale(softmax_scale)?;
    let batch = batch(&tensors.3, &tensors.4, planned.place())?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    match (&planned.key.work, &planned.launch) {
        (Work::SelectedBackward { problem, .. }, Launch::SelectedBackward(launch)) => {
            let forward = tensors.spans(planned, problem.total_kv)?;
            let AttentionGradTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value } =
                gradients.spans(planned, forward, problem.total_kv)?;
            let topk_indices = listed(&topk_indices, planned, problem.topk)?;
            let AttentionTensors { query, key, value, out, lse } = forward;
            let forward = ForwardTensors { query, key, value, topk_indices, out, lse };
            let backward = BackwardTensors {
                forward,
                grad_out,
                grad_lse,
                grad_query,
                grad_key,
                grad_value,
                row_stats: None,
                accumulate: false,
            };
            detached(py, || launch.launch(&context, &batch, &backward, softmax_scale))
        }
        (Work::BandBackward(problem), Launch::BandBackward(launch)) => {
            let forward = tensors.spans(planned, problem.total_keys())?;
            let backward = gradients.spans(planned, forward, problem.total_keys())?;
            detached(py, || launch.launch(&context, &batch, &backward, softmax_scale))
        }
        _ => Err(planned.other("the backward of an attention stage").into()),
    }
}
