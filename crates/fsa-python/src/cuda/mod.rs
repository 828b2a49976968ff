//! Stage `selected` on CUDA tensors of PyTorch: plan, then launch on PyTorch's stream.
//!
//! Python allocates outputs and workspace with PyTorch's allocator between the two calls; nothing here allocates
//! device memory, waits for the device or looks at its memory, so a call may be recorded into a CUDA graph.

mod inputs;
mod plans;

use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, batch, stream};
use crate::run::detached;
use fsa::cuda::plan::Problem;
use fsa::cuda::selected::{BackwardTensors, ForwardTensors, LaunchContext};
use fsa::{DType, Error, Result};
use inputs::Inputs;
use plans::{Key, Launch, Planned};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// A plan of a call and its kernels.
#[pyclass(frozen, module = "fsa_rs._native")]
pub struct SelectedPlan(Arc<Planned>);

/// `(plan, head_dim, workspace_bytes)`: the plan of a call, the dimension that vectors have to be padded to, and
/// the size of the workspace. The first call for given sizes makes the plan, and may compile kernels.
#[pyfunction]
pub fn selected_plan(
    py: Python<'_>,
    inputs: Inputs,
    block_size: usize,
    backward: bool,
    deterministic: bool,
) -> Result<(SelectedPlan, usize, usize), Failure> {
    let place = inputs.place(block_size)?;
    let key = Key { place, backward, deterministic: backward && deterministic };
    let planned = match plans::find(&key) {
        Some(planned) => planned,
        None => {
            let path = python_path(py);
            detached(py, || plans::make(&key, &path))?
        }
    };
    let bytes = planned.workspace_bytes();
    Ok((SelectedPlan(planned), place.problem.head_dim, bytes))
}

/// `sys.path`, as far as it is text.
fn python_path(py: Python<'_>) -> Vec<PathBuf> {
    let path = py.import("sys").and_then(|sys| sys.getattr("path")).and_then(|path| path.try_iter());
    let entries = path.into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.extract::<String>().ok()).map(PathBuf::from).collect()
}

/// `(q, k, v, topk_indices, cu_seqlens_q, cu_seqlens_k, out, lse)`, vectors padded.
#[derive(FromPyObject)]
pub struct Forward(
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
    DeviceTensor,
);

/// `(grad_out, grad_lse or None, grad_q, grad_k, grad_v)`, vectors padded.
#[derive(FromPyObject)]
pub struct Backward(DeviceTensor, Option<DeviceTensor>, DeviceTensor, DeviceTensor, DeviceTensor);

/// `(stream, workspace)`.
#[derive(FromPyObject)]
pub struct Context(u64, DeviceTensor);

#[pymethods]
impl SelectedPlan {
    /// Gives the forward to the stream; it writes `out` and `lse`.
    fn forward(&self, py: Python<'_>, context: Context, softmax_scale: f32, tensors: Forward) -> Result<(), Failure> {
        let Planned { place, kernels, launch: Launch::Forward(planned) } = &*self.0 else {
            return Err(other_plan("forward").into());
        };
        check_scale(softmax_scale)?;
        let batch = batch(&tensors.4, &tensors.5, place)?;
        let forward = tensors.spans(&self.0)?;
        let stream = stream(kernels.device(), context.0);
        let context = LaunchContext { stream: &stream, workspace: context.1.bytes("workspace", place)? };
        detached(py, || planned.launch(&context, &batch, &forward, softmax_scale))
    }

    /// Gives the backward to the stream; it writes the last three tensors of `gradients`.
    fn backward(
        &self,
        py: Python<'_>,
        context: Context,
        softmax_scale: f32,
        tensors: Forward,
        gradients: Backward,
    ) -> Result<(), Failure> {
        let Planned { place, kernels, launch: Launch::Backward(planned) } = &*self.0 else {
            return Err(other_plan("backward").into());
        };
        check_scale(softmax_scale)?;
        let batch = batch(&tensors.4, &tensors.5, place)?;
        let Problem { total_q, total_kv, num_q_heads, num_kv_heads, .. } = place.problem;
        let Backward(grad_out, grad_lse, grad_q, grad_k, grad_v) = &gradients;
        let backward = BackwardTensors {
            forward: tensors.spans(&self.0)?,
            grad_out: grad_out.vectors("grad_out", place, total_q, num_q_heads)?,
            grad_lse: match grad_lse {
                Some(grad) => Some(grad.plain("grad_lse", place, DType::F32, &[num_q_heads, total_q])?),
                None => None,
            },
            grad_query: grad_q.vectors("grad_q", place, total_q, num_q_heads)?,
            grad_key: grad_k.vectors("grad_k", place, total_kv, num_kv_heads)?,
            grad_value: grad_v.vectors("grad_v", place, total_kv, num_kv_heads)?,
        };
        let stream = stream(kernels.device(), context.0);
        let context = LaunchContext { stream: &stream, workspace: context.1.bytes("workspace", place)? };
        detached(py, || planned.launch(&context, &batch, &backward, softmax_scale))
    }
}

impl Forward {
    fn spans(&self, planned: &Planned) -> Result<ForwardTensors<'_>> {
        let Forward(q, k, v, topk_indices, _, _, out, lse) = self;
        let place = &planned.place;
        let Problem { total_q, total_kv, num_q_heads, num_kv_heads, topk, .. } = place.problem;
        Ok(ForwardTensors {
            query: q.vectors("q", place, total_q, num_q_heads)?,
            key: k.vectors("k", place, total_kv, num_kv_heads)?,
            value: v.vectors("v", place, total_kv, num_kv_heads)?,
            topk_indices: topk_indices.plain("topk_indices", place, DType::I32, &[num_kv_heads, total_q, topk])?,
            out: out.vectors("out", place, total_q, num_q_heads)?,
            lse: lse.plain("lse", place, DType::F32, &[num_q_heads, total_q])?,
        })
    }
}

/// The sign of a negative factor is in `q` by now.
fn check_scale(softmax_scale: f32) -> Result<()> {
    if softmax_scale.is_finite() {
        return Ok(());
    }
    Err(Error::input("softmax_scale", "a finite number", softmax_scale))
}

fn other_plan(pass: &str) -> Error {
    Error::input("plan", format!("one of the {pass}"), "one of the other pass")
}
