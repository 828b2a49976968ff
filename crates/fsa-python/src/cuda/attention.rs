//! Stages `selected`, `dense`, `window` and `compressed` on CUDA tensors.

use super::inputs::{Packed, rank3, shape};
use super::plans::{Launch, Planned, Work};
use super::tensors::{Call, Held, Read, Triple};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place, batch};
use crate::packed::COMPRESSED;
use crate::run::detached;
use fsa::cuda::driver::{DeviceBatch, DeviceSpan};
use fsa::cuda::plan::{BandProblem, Keys, Windows};
use fsa::cuda::selected::{BackwardTensors, ForwardTensors};
use fsa::cuda::stages::{AttentionGradInputs, AttentionGradTensors, AttentionTensors};
use fsa::{DType, NsaConfig, Result};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// `(topk_indices, block_size, validate)`, `(kernel_size, kernel_stride)`, `(window_size,)`, or `()` for dense.
pub enum Stage<'py> {
    Selected(Held<'py>, usize, bool),
    Compressed(usize, usize),
    Window(usize),
    Dense,
}

impl<'py> FromPyObject<'_, 'py> for Stage<'py> {
    type Error = PyErr;

    /// The number of elements says which it is: to try one after the other takes longer than all the rest of it.
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let stage = object.cast::<PyTuple>()?;
        Ok(match stage.len() {
            0 => Self::Dense,
            1 => Self::Window(stage.get_item(0)?.extract()?),
            2 => Self::Compressed(stage.get_item(0)?.extract()?, stage.get_item(1)?.extract()?),
            _ => {
                let (topk_indices, block_size, validate) = stage.extract()?;
                Self::Selected(topk_indices, block_size, validate)
            }
        })
    }
}

impl<'py> Stage<'py> {
    /// Checks a call. `deterministic` is that of a backward; `None` is a forward.
    fn work(&self, inputs: &Packed<'_>, deterministic: Option<bool>) -> Result<(Place, Work)> {
        let (names, others) = match self {
            Stage::Selected(topk_indices, ..) => (["k", "v"], vec![("topk_indices", &**topk_indices, true)]),
            Stage::Compressed(..) => (COMPRESSED, Vec::new()),
            Stage::Window(_) | Stage::Dense => (["k", "v"], Vec::new()),
        };
        let mut place = inputs.place(names, &others)?;
        let keys = match *self {
            Stage::Selected(ref topk_indices, block_size, _) => {
                NsaConfig { block_size, ..NsaConfig::default() }.validate()?;
                let [_, _, topk] = rank3("topk_indices", "[num_kv_heads, total_q, topk]", topk_indices)?;
                shape("topk_indices", &[place.sizes.num_kv_heads, place.sizes.total_q, topk], topk_indices)?;
                let problem = place.sizes.selected(block_size, topk);
                let backward = |deterministic| Work::SelectedBackward { problem, deterministic };
                return Ok((place, deterministic.map_or(Work::Selected(problem), backward)));
            }
            Stage::Compressed(kernel_size, kernel_stride) => {
                let windows = windows(kernel_size, kernel_stride)?;
                place.sizes.total_kv *= windows.kernel_stride;
                Keys::Compressed(windows)
            }
            Stage::Window(window_size) => Keys::Window { window_size },
            Stage::Dense => Keys::Dense,
        };
        let problem = BandProblem { sizes: place.sizes, keys };
        let backward = |deterministic| Work::BandBackward { problem, deterministic };
        Ok((place, deterministic.map_or(Work::Band(problem), backward)))
    }

    /// `topk_indices` as kernels read them.
    fn listed(&self) -> PyResult<Option<Read<'_, 'py>>> {
        if let Stage::Selected(topk_indices, ..) = self { topk_indices.read_plain().map(Some) } else { Ok(None) }
    }

    /// Refuses wrong ids and wrong prefix sums, if it is asked to. Copies them to the host, for which it waits for the device.
    fn validate(
        &self,
        py: Python<'_>,
        Packed(q, k, _, cu_seqlens_q, cu_seqlens_k): &Packed<'_>,
    ) -> Result<(), Failure> {
        let Stage::Selected(topk_indices, block_size, true) = self else { return Ok(()) };
        let host = [topk_indices, cu_seqlens_q, cu_seqlens_k].map(|x| x.object.call_method0("cpu"));
        let [topk_indices, cu_q, cu_k] = host;
        let (rows, sums) = ([q.shape()[0], k.shape()[0]], (cu_q?.extract()?, cu_k?.extract()?));
        crate::attention::validate(py, rows, *block_size, topk_indices?.extract()?, sums)
    }
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

/// The factor of the logits; by default that of the head dimension.
pub fn scale(softmax_scale: Option<f64>, q: &DeviceTensor) -> f32 {
    let dim = q.shape().last().copied().unwrap_or(1);
    softmax_scale.unwrap_or_else(|| (dim as f64).powf(-0.5)) as f32
}

/// `(q, k, v, cu_seqlens_q, cu_seqlens_k)` as kernels read them.
pub struct Inputs<'a, 'py>([Read<'a, 'py>; 5]);

impl<'a, 'py> Inputs<'a, 'py> {
    pub fn new(call: &Call, Packed(q, k, v, cu_seqlens_q, cu_seqlens_k): &'a Packed<'py>) -> PyResult<Self> {
        let sums = [cu_seqlens_q.read_plain()?, cu_seqlens_k.read_plain()?];
        let [cu_seqlens_q, cu_seqlens_k] = sums;
        Ok(Self([call.query(q)?, call.vectors(k)?, call.vectors(v)?, cu_seqlens_q, cu_seqlens_k]))
    }

    pub fn vectors(&self) -> [&DeviceTensor; 3] {
        let [q, k, v, ..] = &self.0;
        [q, k, v]
    }

    pub fn batch(&self, place: &Place) -> Result<DeviceBatch<'_>> {
        batch(&self.0[3], &self.0[4], place)
    }

    /// With the results of a stage, as spans; of `total_keys` keys.
    ///
    /// # Errors
    /// [`fsa::Error::Input`] for a tensor that is not as planned.
    pub fn spans<'s>(
        &'s self,
        planned: &Planned,
        [out, lse]: [&'s DeviceTensor; 2],
        total_keys: usize,
    ) -> Result<AttentionTensors<'s>> {
        let (place, sizes, [q, k, v]) = (planned.place(), planned.place().sizes, self.vectors());
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

/// Room for `out` and `lse` of a stage.
pub fn results<'py>(call: &Call, q: &Held<'py>) -> PyResult<[Held<'py>; 2]> {
    let sizes = &call.planned.place().sizes;
    Ok([call.like(q)?, q.empty_of("float32", &[sizes.num_q_heads, sizes.total_q])?])
}

/// `topk_indices` of a call that has them.
fn listed<'a>(topk_indices: &'a Option<Read<'_, '_>>, planned: &Planned, topk: usize) -> Result<DeviceSpan<'a>> {
    let sizes = &planned.place().sizes;
    let missing = || fsa::Error::input("topk_indices", "a tensor", "None");
    let shape = [sizes.num_kv_heads, sizes.total_q, topk];
    topk_indices.as_ref().ok_or_else(missing)?.plain("topk_indices", planned.place(), DType::I32, &shape)
}

/// `out` and `lse` of a stage.
#[pyfunction]
pub fn cuda_attention<'py>(
    py: Python<'py>,
    stage: Stage<'py>,
    inputs: Packed<'py>,
    softmax_scale: Option<f64>,
) -> Result<(Bound<'py, PyAny>, Bound<'py, PyAny>), Failure> {
    let (place, work) = stage.work(&inputs, None)?;
    let call = Call::plan(py, place, work, scale(softmax_scale, &inputs.0))?;
    stage.validate(py, &inputs)?;
    let (read, topk_indices) = (Inputs::new(&call, &inputs)?, stage.listed()?);
    let (scratch, planned) = (call.scratch(&inputs.0)?, &*call.planned);
    let (context, batch) = (scratch.context(planned)?, read.batch(&place)?);
    if let Launch::Band(launch) = &planned.launch {
        detached(py, || launch.prepare(&context, &batch))?;
    }
    let [out, lse] = results(&call, &inputs.0)?;
    match (&planned.key.work, &planned.launch) {
        (Work::Selected(problem), Launch::Selected(launch)) => {
            let AttentionTensors { query, key, value, out, lse } =
                read.spans(planned, [&out, &lse], problem.total_kv)?;
            let topk_indices = listed(&topk_indices, planned, problem.topk)?;
            let forward = ForwardTensors { query, key, value, topk_indices, out, lse };
            detached(py, || launch.launch(&context, &batch, &forward, call.scale))?;
        }
        (Work::Band(problem), Launch::Band(launch)) => {
            let forward = read.spans(planned, [&out, &lse], problem.total_keys())?;
            detached(py, || launch.launch_prepared(&context, &batch, &forward, call.scale))?;
        }
        _ => return Err(planned.other("the forward of an attention stage").into()),
    }
    Ok((out.cut(inputs.2.dim())?, lse.object))
}

/// `(out, lse, grad_out, grad_lse or None)`.
type Forward<'py> = (Held<'py>, Held<'py>, Held<'py>, Option<Held<'py>>);

/// Gradients of `q`, `k` and `v`.
#[pyfunction]
pub fn cuda_attention_backward<'py>(
    py: Python<'py>,
    stage: Stage<'py>,
    inputs: Packed<'py>,
    softmax_scale: Option<f64>,
    deterministic: bool,
    forward: Forward<'py>,
) -> Result<Triple<'py>, Failure> {
    let (place, work) = stage.work(&inputs, Some(deterministic))?;
    let call = Call::plan(py, place, work, scale(softmax_scale, &inputs.0))?;
    let Packed(q, k, v, ..) = &inputs;
    let (read, topk_indices) = (Inputs::new(&call, &inputs)?, stage.listed()?);
    let (out, lse, grad_out, grad_lse) = &forward;
    let (out, lse, grad_out) = (call.vectors(out)?, lse.read_plain()?, call.vectors(grad_out)?);
    let grad_lse = grad_lse.as_ref().map(Held::read_plain).transpose()?;
    let (scratch, planned) = (call.scratch(q)?, &*call.planned);
    let (context, batch) = (scratch.context(planned)?, read.batch(&place)?);
    let (sizes, total_keys) = (&place.sizes, planned.total_keys());
    let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [total_keys, sizes.num_kv_heads]);
    let grad_lse =
        grad_lse.as_ref().map(|grad| grad.plain("grad_lse", &place, DType::F32, &[sizes.num_q_heads, sizes.total_q]));
    let given = AttentionGradInputs {
        forward: read.spans(planned, [&out, &lse], total_keys)?,
        grad_out: grad_out.vectors("grad_out", &place, rows)?,
        grad_lse: grad_lse.transpose()?,
    };
    if let Launch::BandBackward(launch) = &planned.launch {
        detached(py, || launch.prepare(&context, &batch, &given, call.scale))?;
    }
    let [grad_q, grad_k, grad_v] = [call.like(q)?, call.like(k)?, call.like(v)?];
    let tensors = given.with([
        grad_q.vectors("grad_q", &place, rows)?,
        grad_k.vectors("grad_k", &place, keys)?,
        grad_v.vectors("grad_v", &place, keys)?,
    ]);
    match (&planned.key.work, &planned.launch) {
        (Work::SelectedBackward { problem, .. }, Launch::SelectedBackward(launch)) => {
            let AttentionGradTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value } = tensors;
            let topk_indices = listed(&topk_indices, planned, problem.topk)?;
            let AttentionTensors { query, key, value, out, lse } = forward;
            let forward = ForwardTensors { query, key, value, topk_indices, out, lse };
            let (row_stats, accumulate) = (None, false);
            let backward = BackwardTensors {
                forward,
                grad_out,
                grad_lse,
                grad_query,
                grad_key,
                grad_value,
                row_stats,
                accumulate,
            };
            detached(py, || launch.launch(&context, &batch, &backward, call.scale))?;
        }
        (Work::BandBackward { problem, .. }, Launch::BandBackward(launch)) => {
            detached(py, || {
                if problem.keys.windows().is_some() {
                    // Rows after the last compressed one are not written.
                    let _bound = planned.kernels.device().bind()?;
                    tensors.grad_key.span.fill(0, context.stream)?;
                    tensors.grad_value.span.fill(0, context.stream)?;
                }
                launch.launch_prepared(&context, &batch, &tensors, call.scale)
            })?;
        }
        _ => return Err(planned.other("the backward of an attention stage").into()),
    }
    Ok((call.grad_query(grad_q, q.dim())?, grad_k.cut(k.dim())?, grad_v.cut(v.dim())?))
}
