//! Stages `dense`, `window`, `compressed`, `selected` and `select`.

use crate::failure::{Failure, renamed};
use crate::memory::{Memory, Role, write_views};
use crate::packed::{COMPRESSED, Packed, compressed_count, compressed_rows, config, prefix_sums};
use crate::run::{detached, run};
use fsa::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Batch, Error, NsaConfig, Result,
    SelectArgs, TensorViewMut, selection,
};
use pyo3::prelude::*;

/// `(topk_indices, block_size, validate)`, `(kernel_size, kernel_stride)`, `(window_size,)`, or `()` for dense.
#[derive(FromPyObject)]
pub enum Stage<'py> {
    Selected(Memory<'py>, usize, bool),
    Compressed(usize, usize),
    Window((usize,)),
    Dense([usize; 0]),
}

impl<'py> Stage<'py> {
    fn view(&self) -> Result<AttentionStage<'_>> {
        Ok(match self {
            Stage::Selected(topk_indices, block_size, validate) => AttentionStage::Selected {
                topk_indices: topk_indices.view("topk_indices", Role::Index)?,
                block_size: *block_size,
                validate: *validate,
            },
            Stage::Compressed(kernel_size, kernel_stride) => {
                AttentionStage::Compressed { kernel_size: *kernel_size, kernel_stride: *kernel_stride }
            }
            Stage::Window((window_size,)) => AttentionStage::Window { window_size: *window_size },
            Stage::Dense(_) => AttentionStage::Dense,
        })
    }

    /// The memory of a selection.
    fn memory(&self) -> Option<&Memory<'py>> {
        if let Stage::Selected(topk_indices, ..) = self { Some(topk_indices) } else { None }
    }
}

/// Arguments of a stage: those of compressed rows lose the rows beyond the last compressed key.
fn stage_args<'a>(
    stage: &AttentionStage<'_>,
    packed: &'a Packed<'_>,
    batch: &'a Batch,
    scale: Option<f32>,
) -> Result<AttentionArgs<'a>> {
    let AttentionStage::Compressed { kernel_size, kernel_stride } = *stage else {
        return packed.attention(batch, scale);
    };
    let args = packed.named(COMPRESSED, batch, scale)?;
    let [key, value] = COMPRESSED;
    Ok(AttentionArgs {
        key: compressed_rows(key, args.key, batch, kernel_size, kernel_stride)?,
        value: compressed_rows(value, args.value, batch, kernel_size, kernel_stride)?,
        ..args
    })
}

/// Writes `out` and `lse` of an attention stage.
#[pyfunction]
pub fn attention(
    py: Python<'_>,
    stage: Stage<'_>,
    inputs: Packed<'_>,
    softmax_scale: Option<f32>,
    outputs: (Memory<'_>, Memory<'_>),
) -> Result<(), Failure> {
    let (mut out, mut lse) = outputs;
    let batch = inputs.batch()?;
    let (view, read) = (stage.view()?, inputs.memories().into_iter().chain(stage.memory()));
    let args = stage_args(&view, &inputs, &batch, softmax_scale)?;
    let required = [("out", Role::Number, &mut out), ("lse", Role::Number, &mut lse)];
    let ([out, lse], []) = write_views(&read.collect::<Vec<_>>(), required, [])?;
    let mut output = AttentionOutput { out, lse };
    run(py, |engine| engine.attention_into(&view, &args, &mut output))
}

/// Checks prefix sums and a selection, copied to the host from the device of the call; `rows` are those of `q` and `k`.
#[pyfunction]
pub fn validate(
    py: Python<'_>,
    rows: [usize; 2],
    block_size: usize,
    topk_indices: Memory<'_>,
    cu_seqlens: (Memory<'_>, Memory<'_>),
) -> Result<(), Failure> {
    let [q, k] = [prefix_sums("cu_seqlens_q", &cu_seqlens.0)?, prefix_sums("cu_seqlens_k", &cu_seqlens.1)?];
    let batch = Batch::from_cu_seqlens(&q, &k)?;
    for (name, sums, rows) in [("cu_seqlens_q", &q, rows[0]), ("cu_seqlens_k", &k, rows[1])] {
        if sums.last().is_none_or(|last| usize::try_from(*last) != Ok(rows)) {
            return Err(Error::input(name, format!("prefix sums that end at {rows}"), format!("{sums:?}")).into());
        }
    }
    let view = topk_indices.view("topk_indices", Role::Index)?;
    let heads = topk_indices.shape().first().copied().unwrap_or(0);
    let typed = selection::check(&view, heads, rows[0])?;
    detached(py, || selection::validate(&typed, &batch, block_size))
}

/// `(out, lse, grad_out, grad_lse or None)`.
type Forward<'py> = (Memory<'py>, Memory<'py>, Memory<'py>, Option<Memory<'py>>);

/// Writes the gradients of `q`, `k` and `v`.
#[pyfunction]
pub fn attention_backward(
    py: Python<'_>,
    stage: Stage<'_>,
    inputs: Packed<'_>,
    softmax_scale: Option<f32>,
    forward: Forward<'_>,
    grads: (Memory<'_>, Memory<'_>, Memory<'_>),
) -> Result<(), Failure> {
    let (mut grad_q, mut grad_k, mut grad_v) = grads;
    let batch = inputs.batch()?;
    let view = stage.view()?;
    let args = stage_args(&view, &inputs, &batch, softmax_scale)?;
    let (out, lse, grad_out, grad_lse) = &forward;
    let grad = AttentionGradArgs {
        out: out.view("out", Role::Number)?,
        lse: lse.view("lse", Role::Number)?,
        grad_out: grad_out.view("grad_out", Role::Number)?,
        grad_lse: grad_lse.as_ref().map(|memory| memory.view("grad_lse", Role::Number)).transpose()?,
    };
    let read = inputs.memories().into_iter().chain(stage.memory()).chain([out, lse, grad_out]).chain(grad_lse);
    let required = [("grad_q", &mut grad_q), ("grad_k", &mut grad_k), ("grad_v", &mut grad_v)];
    let required = required.map(|(name, memory)| (name, Role::Number, memory));
    let (mut grads, []) = write_views(&read.collect::<Vec<_>>(), required, [])?;
    let mut grads = attention_grads(&view, &batch, &mut grads)?;
    run(py, |engine| engine.attention_backward_into(&view, &args, &grad, &mut grads))
}

/// The gradients of a stage: those of compressed rows lose the rows beyond the last compressed key.
fn attention_grads<'a>(
    stage: &AttentionStage<'_>,
    batch: &Batch,
    grads: &'a mut [TensorViewMut<'_>; 3],
) -> Result<AttentionGrads<'a>> {
    let [grad_query, grad_key, grad_value] = grads;
    let grad_query = grad_query.reborrow();
    let AttentionStage::Compressed { kernel_size, kernel_stride } = *stage else {
        let (grad_key, grad_value) = (grad_key.reborrow(), grad_value.reborrow());
        return Ok(AttentionGrads { grad_query, grad_key, grad_value });
    };
    let rows = |name, view: &TensorViewMut<'_>| compressed_count(name, view.shape(), batch, kernel_size, kernel_stride);
    let (keys, values) = (rows("grad_k", grad_key)?, rows("grad_v", grad_value)?);
    Ok(AttentionGrads {
        grad_query,
        grad_key: grad_key.slice_axis("grad_k", 0, 0..keys)?,
        grad_value: grad_value.slice_axis("grad_v", 0, 0..values)?,
    })
}

/// Writes `out`, `lse` and `topk_indices` of compressed attention. `k` and `v` are compressed rows.
#[pyfunction]
pub fn select(
    py: Python<'_>,
    sizes: [usize; 8],
    inputs: Packed<'_>,
    softmax_scale: Option<f32>,
    outputs: (Memory<'_>, Memory<'_>, Memory<'_>),
) -> Result<(), Failure> {
    let (mut out, mut lse, mut topk_indices) = outputs;
    let (config, batch) = (config(sizes), inputs.batch()?);
    let attention = stage_args(&compressed_stage(&config), &inputs, &batch, softmax_scale)?;
    let required = [
        ("out", Role::Number, &mut out),
        ("lse", Role::Number, &mut lse),
        ("topk_indices", Role::Index, &mut topk_indices),
    ];
    let ([out, lse, mut topk_indices], []) = write_views(&inputs.memories(), required, [])?;
    let (args, mut output) = (SelectArgs { attention, config: &config }, AttentionOutput { out, lse });
    let names = [("key", COMPRESSED[0]), ("value", COMPRESSED[1])];
    run(py, |engine| engine.select_into(&args, &mut output, &mut topk_indices).map_err(|error| renamed(error, &names)))
}

fn compressed_stage(config: &NsaConfig) -> AttentionStage<'static> {
    AttentionStage::Compressed { kernel_size: config.kernel_size, kernel_stride: config.kernel_stride }
}
