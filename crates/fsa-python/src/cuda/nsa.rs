//! The whole operation on CUDA tensors.

use super::attention::{Inputs as Packs, scale, windows};
use super::compress::{ParametersRead, parameter_spans};
use super::inputs::{Packed, Parameters, Windowed, parameter_names};
use super::plans::{Launch, Planned, Rotation, Work};
use super::tensors::{Call, Held, Read};
use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place};
use crate::packed::config;
use crate::run::detached;
use fsa::cuda::plan::{NsaProblem, Sizes};
use fsa::cuda::stages::{NsaBackwardTensors, NsaForwardTensors, NsaParameters, NsaSavedTensors, Recompute};
use fsa::{DType, Error, Result};
use pyo3::prelude::*;

/// Packed inputs, gates, parameters of the compression of keys and of values.
#[derive(FromPyObject)]
pub struct Inputs<'py>(Packed<'py>, Held<'py>, Parameters<'py>, Parameters<'py>);

/// `(sizes, rope, softmax_scale)`.
type Options = ([usize; 8], Vec<f64>, Option<f64>);

/// What a call is for.
enum Pass {
    Forward { saves: bool },
    Backward { deterministic: bool },
}

/// Checks a call and plans it.
fn plan(py: Python<'_>, options: &Options, inputs: &Inputs<'_>, pass: Pass) -> Result<(Call, NsaProblem), Failure> {
    let Inputs(packed, gates, k, v) = inputs;
    let names = [parameter_names("k"), parameter_names("v")];
    let others = [vec![("gates", &**gates, false)], k.named(&names[0]), v.named(&names[1])].concat();
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
    let work = match pass {
        Pass::Forward { saves } => Work::Nsa { problem, rotation, saves },
        Pass::Backward { deterministic } => Work::NsaBackward { problem, rotation, deterministic },
    };
    Ok((Call::plan(py, place, work, scale(options.2, &packed.0))?, problem))
}

/// Inputs as kernels read them.
struct InputsRead<'a, 'py> {
    packed: Packs<'a, 'py>,
    gates: Read<'a, 'py>,
    parameters: [ParametersRead<'a, 'py>; 2],
}

impl<'a, 'py> InputsRead<'a, 'py> {
    fn new(call: &Call, Inputs(packed, gates, k, v): &'a Inputs<'py>) -> PyResult<Self> {
        let adjacent = gates.strides().last() == Some(&1);
        Ok(Self {
            packed: Packs::new(call, packed)?,
            gates: if adjacent { Read::AsItLies(gates) } else { gates.read_plain()? },
            parameters: [k.read(call.dim())?, v.read(call.dim())?],
        })
    }
}

/// What a forward saves, or a backward takes: `(k_cmp, v_cmp)`, the branches, their `lse`, `(q, k)` rotated or nothing.
type Saved = ([DeviceTensor; 2], [DeviceTensor; 3], [DeviceTensor; 3], Option<[DeviceTensor; 2]>);

fn saved_spans<'a>(saved: &'a Saved, place: &Place, problem: &NsaProblem) -> Result<NsaSavedTensors<'a>> {
    let sizes = &problem.sizes;
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
    [k, v]: &'a [ParametersRead<'_, '_>; 2],
    prefix: &str,
    place: &Place,
    problem: &NsaProblem,
) -> Result<[NsaParameters<'a>; 2]> {
    let [key, value] = problem.compress();
    let [k_weight, k_position] = parameter_spans(k, &parameter_names(&format!("{prefix}k")), place, &key)?;
    let [v_weight, v_position] = parameter_spans(v, &parameter_names(&format!("{prefix}v")), place, &value)?;
    Ok([
        NsaParameters { weight: k_weight, position: k_position },
        NsaParameters { weight: v_weight, position: v_position },
    ])
}

/// Shape of `topk_indices`.
fn lists(problem: &NsaProblem) -> [usize; 3] {
    [problem.sizes.num_kv_heads, problem.sizes.total_q, problem.topk]
}

/// Gives a forward to the stream. With `again` it reads `topk_indices`, and writes what another forward did not keep, and `out`.
fn forward<'py>(
    py: Python<'py>,
    (call, problem): &(Call, NsaProblem),
    inputs: &Inputs<'py>,
    [out, topk_indices]: [&DeviceTensor; 2],
    saved: Option<&Saved>,
    again: Option<Recompute>,
) -> Result<(), Failure> {
    let planned: &Planned = &call.planned;
    let Launch::Nsa(launch) = &planned.launch else {
        return Err(planned.other("the forward of the whole operation").into());
    };
    let (place, read) = (planned.place(), InputsRead::new(call, inputs)?);
    let scratch = call.scratch(&inputs.0.0)?;
    let (context, batch) = (scratch.context(planned)?, read.packed.batch(place)?);
    let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, .. } = problem.sizes;
    let [q, k, v] = read.packed.vectors();
    let tensors = NsaForwardTensors {
        query: q.vectors("q", place, [total_q, num_q_heads])?,
        key: k.vectors("k", place, [total_kv, num_kv_heads])?,
        value: v.vectors("v", place, [total_kv, num_kv_heads])?,
        gates: read.gates.gates("gates", place)?,
        parameters: parameters(&read.parameters, "", place, problem)?,
        out: out.vectors("out", place, [total_q, num_q_heads])?,
        topk_indices: topk_indices.plain("topk_indices", place, DType::I32, &lists(problem))?,
        saved: saved.map(|saved| saved_spans(saved, place, problem)).transpose()?,
    };
    detached(py, || {
        if let Some(saved) = tensors.saved.as_ref().filter(|_| again != Some(Recompute::Rotated)) {
            // Rows after the last compressed one are not written by a matrix product.
            let _bound = planned.kernels.device().bind()?;
            let linear = saved.compressed.iter().zip(problem.compressions).filter(|(_, kind)| kind.is_linear());
            linear.map(|(rows, _)| rows.span).try_for_each(|span| span.fill(0, context.stream))?;
        }
        match again {
            None => launch.launch(&context, &batch, &tensors, call.scale),
            Some(recompute) => launch.launch_again(&context, &batch, &tensors, call.scale, recompute),
        }
    })
}

/// `out` and `topk_indices`; writes the state for the backward, if there is room for it.
#[pyfunction]
pub fn cuda_nsa<'py>(
    py: Python<'py>,
    options: Options,
    inputs: Inputs<'py>,
    saved: Option<Saved>,
) -> Result<(Bound<'py, PyAny>, Bound<'py, PyAny>), Failure> {
    let planned = plan(py, &options, &inputs, Pass::Forward { saves: saved.is_some() })?;
    let Packed(q, _, v, ..) = &inputs.0;
    let (out, topk_indices) = (planned.0.like(q)?, q.empty_of("int32", &lists(&planned.1))?);
    forward(py, &planned, &inputs, [&out, &topk_indices], saved.as_ref(), None)?;
    Ok((out.cut(v.dim())?, topk_indices.object))
}

/// Gradients of `q`, `k`, `v`, the gates, and of the parameters that are there. `recompute` is what the forward did not keep of
/// the state: `"none"`, `"rotated"`, its last part, or `"all"` of it; there is room for it.
#[pyfunction]
pub fn cuda_nsa_backward<'py>(
    py: Python<'py>,
    options: Options,
    inputs: Inputs<'py>,
    deterministic: bool,
    state: (Held<'py>, Saved, &str),
    grad_out: Held<'py>,
) -> Result<Vec<Bound<'py, PyAny>>, Failure> {
    let (call, problem) = plan(py, &options, &inputs, Pass::Backward { deterministic })?;
    let planned: &Planned = &call.planned;
    let Launch::NsaBackward(launch) = &planned.launch else {
        return Err(planned.other("the backward of the whole operation").into());
    };
    let Inputs(Packed(q, k, v, ..), gates, key, value) = &inputs;
    let [grad_q, grad_k, grad_v] = [call.like(q)?, call.like(k)?, call.like(v)?];
    let grad_gates = gates.empty(gates.shape())?;
    let [grad_key, grad_value] = [key.gradients(call.dim())?, value.gradients(call.dim())?];
    let (topk_indices, saved, recompute) = &state;
    let topk_indices = topk_indices.read_plain()?;
    let again = match *recompute {
        "rotated" if saved.3.is_some() => Some(Recompute::Rotated),
        "all" => Some(Recompute::All),
        _ => None,
    };
    if let Some(again) = again {
        let planned = plan(py, &options, &inputs, Pass::Forward { saves: true })?;
        // `out` is not needed: its place is memory that is written later.
        forward(py, &planned, &inputs, [&grad_q, &topk_indices], Some(saved), Some(again))?;
    }
    let (place, read) = (planned.place(), InputsRead::new(&call, &inputs)?);
    let grad_out = call.vectors(&grad_out)?;
    let scratch = call.scratch(q)?;
    let (context, batch) = (scratch.context(planned)?, read.packed.batch(place)?);
    let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, dtype, .. } = problem.sizes;
    let (rows, keys) = ([total_q, num_q_heads], [total_kv, num_kv_heads]);
    let [query, key_span, value_span] = read.packed.vectors();
    let grad_parameters = [grad_key.written(), grad_value.written()];
    let tensors = NsaBackwardTensors {
        query: query.vectors("q", place, rows)?,
        key: key_span.vectors("k", place, keys)?,
        value: value_span.vectors("v", place, keys)?,
        gates: read.gates.gates("gates", place)?,
        parameters: parameters(&read.parameters, "", place, &problem)?,
        saved: saved_spans(saved, place, &problem)?,
        topk_indices: topk_indices.plain("topk_indices", place, DType::I32, &lists(&problem))?,
        grad_out: grad_out.vectors("grad_out", place, rows)?,
        grad_query: grad_q.vectors("grad_q", place, rows)?,
        grad_key: grad_k.vectors("grad_k", place, keys)?,
        grad_value: grad_v.vectors("grad_v", place, keys)?,
        grad_gates: grad_gates.plain("grad_gates", place, dtype, gates.shape())?,
        grad_parameters: parameters(&grad_parameters, "grad_", place, &problem)?,
    };
    detached(py, || launch.launch(&context, &batch, &tensors, call.scale))?;
    let mut grads = vec![call.grad_query(grad_q, q.dim())?, grad_k.cut(k.dim())?, grad_v.cut(v.dim())?];
    grads.push(grad_gates.object);
    grads.extend(grad_key.results(key)?);
    grads.extend(grad_value.results(value)?);
    Ok(grads)
}
