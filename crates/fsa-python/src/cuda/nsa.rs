//! The whole operation on CUDA tensors.

use super::attention::windows;
use super::compress::parameter_spans;
use super::inputs::{Packed, Parameters, Windowed, parameter_names};
use super::plans::{Launch, Planned, Rotation, Work};
use super::{Context, CudaPlan, Plan, check_scale, planned};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, batch};
use crate::packed::config;
use crate::run::detached;
use fsa::cuda::plan::{NsaProblem, Sizes};
use fsa::cuda::stages::{NsaBackwardTensors, NsaForwardTensors, NsaParameters, NsaSavedTensors, Recompute};
use fsa::{DType, Error, Result};
use pyo3::prelude::*;

/// Packed inputs, gates, parameters of the compression of keys and of values.
#[derive(FromPyObject)]
pub struct Inputs(Packed, DeviceTensor, Parameters, Parameters);

/// `(sizes, rope)`.
type Options = ([usize; 8], Vec<f64>);

/// Checks a call and plans it: its forward, which `saves` the state for the backward or does not, or its backward.
#[pyfunction]
pub fn cuda_nsa_plan(
    py: Python<'_>,
    options: Options,
    inputs: Inputs,
    saves: bool,
    backward: bool,
    deterministic: bool,
) -> Result<Plan, Failure> {
    let Inputs(packed, gates, k, v) = &inputs;
    let names = [parameter_names("k"), parameter_names("v")];
    let others = [vec![("gates", gates, false)], k.named(&names[0]), v.named(&names[1])].concat();
    let place = packed.place(["k", "v"], &others)?;
    let config = config(options.0);
    config.validate()?;
    windows(config.kernel_size, config.kernel_stride)?;
    let Sizes { total_q, num_q_heads, num_kv_heads, .. } = place.sizes;
    if gates.shape() != [total_q, 3] && gates.shape() != [total_q, num_q_heads, 3] {
        let expected = format!("shape [{total_q}, 3] or [{total_q}, {num_q_heads}, 3]");
        return Err(Error::input("gates", expected, format!("shape {:?}", gates.shape())).into());
    }
    let [head_dim, value_dim] = packed.dims();
    let about = |dim| Windowed { heads: num_kv_heads, kernel_size: config.kernel_size, dim };
    let kinds = [k.kind(&names[0], &about(head_dim))?, v.kind(&names[1], &about(value_dim))?];
    let rotation = Rotation::new(&options.1, head_dim);
    let problem = NsaProblem::new(&place.sizes, &config, kinds, rotation.is_some());
    let work = if backward {
        Work::NsaBackward { problem, rotation, deterministic }
    } else {
        Work::Nsa { problem, rotation, saves }
    };
    planned(py, place, work)
}

/// What a forward saves, or a backward takes: `(k_cmp, v_cmp)`, the branches, their `lse`, `(q, k)` rotated or nothing.
type Saved = ([DeviceTensor; 2], [DeviceTensor; 3], [DeviceTensor; 3], Option<[DeviceTensor; 2]>);

fn saved_spans<'a>(saved: &'a Saved, planned: &Planned, problem: &NsaProblem) -> Result<NsaSavedTensors<'a>> {
    let (place, sizes) = (planned.place(), &problem.sizes);
    let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [sizes.total_kv, sizes.num_kv_heads]);
    let compressed = [problem.total_compressed(), sizes.num_kv_heads];
    let ([k_cmp, v_cmp], [cmp, slc, win], lse, rotated) = saved;
    let [a, b, c] = lse;
    let lse = |tensor: &'a DeviceTensor| tensor.plain("lse", place, DType::F32, &[sizes.num_q_heads, sizes.total_q]);
    let rotated = rotated.as_ref().map(|[q, k]| -> Result<_> {
        Ok([q.vectors("q_rotated", place, rows)?, k.vectors("k_rotated", place, keys)?])
    });
    Ok(NsaSavedTensors {
        rotated: rotated.transpose()?,
        compressed: [k_cmp.vectors("k_cmp", place, compressed)?, v_cmp.vectors("v_cmp", place, compressed)?],
        branches: [
            cmp.vectors("out_cmp", place, rows)?,
            slc.vectors("out_slc", place, rows)?,
            win.vectors("out_win", place, rows)?,
        ],
        lse: [lse(a)?, lse(b)?, lse(c)?],
    })
}

fn parameters<'a>(
    [k, v]: [&'a Parameters; 2],
    prefix: &str,
    planned: &Planned,
    problem: &NsaProblem,
) -> Result<[NsaParameters<'a>; 2]> {
    let [key, value] = problem.compress();
    let place = planned.place();
    let [k_weight, k_position] = parameter_spans(k, &parameter_names(&format!("{prefix}k")), place, &key)?;
    let [v_weight, v_position] = parameter_spans(v, &parameter_names(&format!("{prefix}v")), place, &value)?;
    Ok([
        NsaParameters { weight: k_weight, position: k_position },
        NsaParameters { weight: v_weight, position: v_position },
    ])
}

/// Gives the forward to the stream; it writes `out`, `topk_indices` and, if it was planned to, the state. With `recompute` it reads
/// `topk_indices`, and writes what a forward did not keep: `"rotated"`, the last part of the state, or `"all"` of it, and `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "of a function of the extension, which Python gives one by one")]
pub fn cuda_nsa(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    softmax_scale: f32,
    inputs: Inputs,
    outputs: (DeviceTensor, DeviceTensor),
    saved: Option<Saved>,
    recompute: Option<&str>,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    let (Work::Nsa { problem, .. }, Launch::Nsa(launch)) = (&planned.key.work, &planned.launch) else {
        return Err(planned.other("the forward of the whole operation").into());
    };
    check_scale(softmax_scale)?;
    let Inputs(Packed(q, k, v, cu_seqlens_q, cu_seqlens_k), gates, key, value) = &inputs;
    let place = planned.place();
    let batch = batch(cu_seqlens_q, cu_seqlens_k, place)?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, .. } = problem.sizes;
    let lists = [num_kv_heads, total_q, problem.topk];
    let tensors = NsaForwardTensors {
        query: q.vectors("q", place, [total_q, num_q_heads])?,
        key: k.vectors("k", place, [total_kv, num_kv_heads])?,
        value: v.vectors("v", place, [total_kv, num_kv_heads])?,
        gates: gates.gates("gates", place)?,
        parameters: parameters([key, value], "", planned, problem)?,
        out: outputs.0.vectors("out", place, [total_q, num_q_heads])?,
        topk_indices: outputs.1.plain("topk_indices", place, DType::I32, &lists)?,
        saved: saved.as_ref().map(|saved| saved_spans(saved, planned, problem)).transpose()?,
    };
    let again = match recompute {
        None => None,
        Some("rotated") => Some(Recompute::Rotated),
        Some("all") => Some(Recompute::All),
        Some(other) => return Err(Error::input("recompute", "'rotated' or 'all'", format!("'{other}'")).into()),
    };
    detached(py, || match again {
        None => launch.launch(&context, &batch, &tensors, softmax_scale),
        Some(recompute) => launch.launch_again(&context, &batch, &tensors, softmax_scale, recompute),
    })
}

/// `(grad_q, grad_k, grad_v, grad_gates)` and the gradients of the parameters.
#[derive(FromPyObject)]
pub struct Grads([DeviceTensor; 4], Parameters, Parameters);

/// Gives the backward to the stream; it writes all gradients.
#[pyfunction]
pub fn cuda_nsa_backward(
    py: Python<'_>,
    plan: &CudaPlan,
    context: Context,
    softmax_scale: f32,
    inputs: Inputs,
    forward: (DeviceTensor, Saved, DeviceTensor),
    grads: Grads,
) -> Result<(), Failure> {
    let planned = &*plan.0;
    let (Work::NsaBackward { problem, .. }, Launch::NsaBackward(launch)) = (&planned.key.work, &planned.launch) else {
        return Err(planned.other("the backward of the whole operation").into());
    };
    check_scale(softmax_scale)?;
    let Inputs(Packed(q, k, v, cu_seqlens_q, cu_seqlens_k), gates, key, value) = &inputs;
    let place = planned.place();
    let batch = batch(cu_seqlens_q, cu_seqlens_k, place)?;
    let stream = context.stream(planned);
    let context = context.launch(&stream, planned)?;
    let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, dtype, .. } = problem.sizes;
    let (rows, keys) = ([total_q, num_q_heads], [total_kv, num_kv_heads]);
    let (topk_indices, saved, grad_out) = &forward;
    let Grads([grad_q, grad_k, grad_v, grad_gates], grad_key, grad_value) = &grads;
    let tensors = NsaBackwardTensors {
        query: q.vectors("q", place, rows)?,
        key: k.vectors("k", place, keys)?,
        value: v.vectors("v", place, keys)?,
        gates: gates.gates("gates", place)?,
        parameters: parameters([key, value], "", planned, problem)?,
        saved: saved_spans(saved, planned, problem)?,
        topk_indices: topk_indices.plain("topk_indices", place, DType::I32, &[num_kv_heads, total_q, problem.topk])?,
        grad_out: grad_out.vectors("grad_out", place, rows)?,
        grad_query: grad_q.vectors("grad_q", place, rows)?,
        grad_key: grad_k.vectors("grad_k", place, keys)?,
        grad_value: grad_v.vectors("grad_v", place, keys)?,
        grad_gates: grad_gates.plain("grad_gates", place, dtype, gates.shape())?,
        grad_parameters: parameters([grad_key, grad_value], "grad_", planned, problem)?,
    };
    detached(py, || launch.launch(&context, &batch, &tensors, softmax_scale))
}
