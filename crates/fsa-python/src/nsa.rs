//! The whole operation, and its backward from the state that the forward left in Python's tensors.

use crate::compress::{Parameters, compression};
use crate::failure::{Failure, renamed};
use crate::memory::{Memory, Output, Role, write_views};
use crate::packed::{Packed, compressed_count, config, rope};
use crate::run::run;
use fsa::{
    Batch, Compression, CompressionGrads, DType, Element, Error, NsaArgs, NsaConfig, NsaGrads, NsaSaved, Result, Rope,
    Tensor, TensorView, TensorViewMut, bf16, f16,
};
use pyo3::prelude::*;

/// `(q, k, v, cu_seqlens_q, cu_seqlens_k)`, `gates`, parameters of the compression of keys and of values.
#[derive(FromPyObject)]
pub struct Inputs<'py>(Packed<'py>, Memory<'py>, Parameters<'py>, Parameters<'py>);

impl<'py> Inputs<'py> {
    fn memories(&self) -> Vec<&Memory<'py>> {
        let parameters = [&self.2.0, &self.2.1, &self.3.0, &self.3.1];
        self.0.memories().into_iter().chain([&self.1]).chain(parameters.into_iter().flatten()).collect()
    }

    fn args<'a>(&'a self, batch: &'a Batch, options: &'a Options) -> Result<NsaArgs<'a>> {
        let attention = self.0.attention(batch, options.softmax_scale)?;
        Ok(NsaArgs {
            query: attention.query,
            key: attention.key,
            value: attention.value,
            gates: self.1.view("gates", Role::Number)?,
            batch,
            config: &options.config,
            key_compression: compression(&self.2, "k")?,
            value_compression: compression(&self.3, "v")?,
            rope: options.rope.as_ref(),
            softmax_scale: options.softmax_scale,
        })
    }
}

/// What is computed.
struct Options {
    config: NsaConfig,
    rope: Option<Rope>,
    softmax_scale: Option<f32>,
}

/// `(sizes, rope, softmax_scale)`.
type OptionValues = ([usize; 8], Vec<f64>, Option<f32>);

impl Options {
    fn new((sizes, numbers, softmax_scale): OptionValues) -> Result<Self> {
        Ok(Self { config: config(sizes), rope: rope(&numbers)?, softmax_scale })
    }
}

/// Checks what a layer is made of, before there are tensors: `heads` of query and key, and their dimension.
#[pyfunction]
pub fn check_options(options: OptionValues, heads: (usize, usize), head_dim: usize) -> Result<(), Failure> {
    let options = Options::new(options)?;
    let batch = Batch::from_cu_seqlens(&[0], &[0])?;
    let rows = |name, heads| TensorView::new::<bf16>(name, &[], &[0, heads, head_dim]);
    let args = NsaArgs {
        query: rows("query", heads.0)?,
        key: rows("key", heads.1)?,
        value: rows("value", heads.1)?,
        gates: TensorView::new::<bf16>("gates", &[], &[0, 3])?,
        batch: &batch,
        config: &options.config,
        key_compression: Compression::Mean,
        value_compression: Compression::Mean,
        rope: options.rope.as_ref(),
        softmax_scale: options.softmax_scale,
    };
    args.shape().map_err(|error| renamed(error, &[("query", "num_q_heads")]))?;
    Ok(())
}

/// State for the backward, by name and in order; the last two only under a rotary embedding.
const STATE: [&str; 10] =
    ["k_cmp", "v_cmp", "out_cmp", "out_slc", "out_win", "lse_cmp", "lse_slc", "lse_win", "q_rotated", "k_rotated"];

/// Writes `out`, `topk_indices` and, unless `state` is empty, the state for the backward.
#[pyfunction]
pub fn nsa(
    py: Python<'_>,
    options: OptionValues,
    inputs: Inputs<'_>,
    outputs: (Memory<'_>, Memory<'_>),
    mut state: Vec<Memory<'_>>,
) -> Result<(), Failure> {
    let (mut out, mut topk_indices) = outputs;
    let save = !state.is_empty();
    let options = Options::new(options)?;
    let batch = inputs.0.batch()?;
    let args = inputs.args(&batch, &options)?;
    args.shape()?;
    check_state(save.then_some(state.len()), &options)?;
    let mut state = state.iter_mut();
    let state = STATE.map(|name| state.next().map(|memory| (name, Role::Number, memory)));
    let required = [("out", Role::Number, &mut out), ("topk_indices", Role::Index, &mut topk_indices)];
    let ([mut out, mut topk_indices], mut state) = write_views(&inputs.memories(), required, state)?;
    let rows = state_rows(state.each_ref().map(|view| view.as_ref().map(TensorViewMut::shape)), &batch, &options)?;
    run(py, |engine| {
        let forward = engine.nsa_into(&args, &mut out, save)?;
        if let Some(chosen) = forward.topk_indices() {
            copy("topk_indices", &chosen.view(), &mut topk_indices)?;
        }
        let parts = forward.saved.as_ref().map(parts).unwrap_or_default();
        for (at, (part, target)) in parts.into_iter().zip(state.iter_mut().flatten()).enumerate() {
            let rows = if at < 2 { rows } else { part.shape()[0] };
            copy(STATE[at], &part.view(), &mut target.slice_axis(STATE[at], 0, 0..rows)?)?;
        }
        Ok(())
    })
}

/// `(grad_q, grad_k, grad_v, grad_gates)` and the gradients of the compressions' parameters.
type Grads<'py> = ([Memory<'py>; 4], Parameters<'py>, Parameters<'py>);

/// Writes all gradients.
#[pyfunction]
pub fn nsa_backward(
    py: Python<'_>,
    options: OptionValues,
    inputs: Inputs<'_>,
    forward: (Memory<'_>, Vec<Memory<'_>>),
    grad_out: Memory<'_>,
    mut grads: Grads<'_>,
) -> Result<(), Failure> {
    let options = Options::new(options)?;
    let batch = inputs.0.batch()?;
    let (topk_indices, state) = forward;
    let args = inputs.args(&batch, &options)?;
    args.shape()?;
    check_state(Some(state.len()), &options)?;
    let saved = saved(&topk_indices, &state, &batch, &options)?;
    let grad = grad_out.view("grad_out", Role::Number)?;
    let read = inputs.memories().into_iter().chain(&state).chain([&topk_indices, &grad_out]);
    let mut grads = grad_views(&read.collect::<Vec<_>>(), &mut grads)?;
    run(py, |engine| engine.nsa_backward_into(&args, &saved, &grad, &mut grads))
}

fn grad_views<'a>(inputs: &[&Memory<'_>], grads: &'a mut Grads<'_>) -> Result<NsaGrads<'a>> {
    let ([q, k, v, gates], key, value) = grads;
    let required = [("grad_q", q), ("grad_k", k), ("grad_v", v), ("grad_gates", gates)];
    let required = required.map(|(name, memory)| -> Output<'_, '_> { (name, Role::Number, memory) });
    let optional = [
        ("grad_k_weight", &mut key.0),
        ("grad_k_position", &mut key.1),
        ("grad_v_weight", &mut value.0),
        ("grad_v_position", &mut value.1),
    ];
    let optional = optional.map(|(name, memory)| memory.as_mut().map(|memory| (name, Role::Number, memory)));
    let (required, optional) = write_views(inputs, required, optional)?;
    let [grad_query, grad_key, grad_value, grad_gates] = required;
    let [key_weight, key_position, value_weight, value_position] = optional;
    let key_compression = CompressionGrads { grad_weight: key_weight, grad_position: key_position };
    let value_compression = CompressionGrads { grad_weight: value_weight, grad_position: value_position };
    Ok(NsaGrads { grad_query, grad_key, grad_value, grad_gates, key_compression, value_compression })
}

/// Refuses a state with more or fewer parts than the operation has.
fn check_state(parts: Option<usize>, options: &Options) -> Result<()> {
    let expected = if options.rope.is_some() { STATE.len() } else { STATE.len() - 2 };
    match parts {
        Some(got) if got != expected => Err(Error::input("state", format!("{expected} tensors"), got)),
        _ => Ok(()),
    }
}

/// Compressed rows of the state's first two parts, whose `shapes` may have room for more; 0 without a state.
fn state_rows(shapes: [Option<&[usize]>; 10], batch: &Batch, options: &Options) -> Result<usize> {
    let (size, stride) = (options.config.kernel_size, options.config.kernel_stride);
    let mut rows = 0;
    for (name, shape) in STATE.iter().zip(shapes).take(2) {
        rows = shape.map_or(Ok(0), |shape| compressed_count(name, shape, batch, size, stride))?;
    }
    Ok(rows)
}

/// The tensors of a saved state in the order of [`STATE`].
fn parts(saved: &NsaSaved) -> Vec<&Tensor> {
    let rotated = saved.rotated.iter().flatten();
    saved.compressed.iter().chain(&saved.branches).chain(&saved.lse).chain(rotated).collect()
}

/// A saved state from the tensors that [`nsa`] wrote.
fn saved(topk_indices: &Memory<'_>, state: &[Memory<'_>], batch: &Batch, options: &Options) -> Result<NsaSaved> {
    let mut memories = state.iter();
    let shapes = STATE.map(|_| memories.next().map(Memory::shape));
    let rows = state_rows(shapes, batch, options)?;
    let part = |at: usize| -> Result<Tensor> {
        let missing = || Error::input("state", format!("{} tensors", at + 1), state.len());
        let view = state.get(at).ok_or_else(missing)?.view(STATE[at], Role::Number)?;
        Ok(if at < 2 { view.slice_axis(STATE[at], 0, 0..rows)?.to_tensor() } else { view.to_tensor() })
    };
    Ok(NsaSaved {
        compressed: [part(0)?, part(1)?],
        branches: [part(2)?, part(3)?, part(4)?],
        lse: [part(5)?, part(6)?, part(7)?],
        rotated: if options.rope.is_some() { Some([part(8)?, part(9)?]) } else { None },
        topk_indices: topk_indices.view("topk_indices", Role::Index)?.to_tensor(),
    })
}

/// Copies all elements. Both have rank 2 or 3, the same shape and dtype.
fn copy(name: &str, source: &TensorView<'_>, target: &mut TensorViewMut<'_>) -> Result<()> {
    fn of<T: Element>(name: &str, source: &TensorView<'_>, target: &mut TensorViewMut<'_>) -> Result<()> {
        let (source, mut target) = (source.typed::<T>(name)?, target.typed::<T>(name)?);
        if source.shape() != target.shape() {
            return Err(Error::input(name, format!("shape {:?}", source.shape()), format!("{:?}", target.shape())));
        }
        let shape = source.shape().to_vec();
        if shape.contains(&0) {
            return Ok(()); // `lse` of no rows has heads all the same
        }
        let (last, leading) = (shape.len() - 1, &shape[..shape.len() - 1]);
        let mut values = vec![0.0; shape[last]];
        for row in 0..leading.iter().product() {
            // A position in the leading one or two axes, and one in the last.
            let mut index = if last == 1 { vec![row] } else { vec![row / leading[1], row % leading[1]] };
            if T::DTYPE.is_float() {
                source.load_row(&index, &mut values); // f32 holds every value of every float exactly
                target.store_row(&index, &values);
                continue;
            }
            index.push(0);
            for column in 0..shape[last] {
                index[last] = column;
                target.set(&index, source.at(&index));
            }
        }
        Ok(())
    }
    match source.dtype() {
        DType::F32 => of::<f32>(name, source, target),
        DType::Bf16 => of::<bf16>(name, source, target),
        DType::F16 => of::<f16>(name, source, target),
        DType::I32 => of::<i32>(name, source, target),
    }
}
