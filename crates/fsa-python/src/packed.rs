//! What the calls share: packed inputs, prefix sums, the parameters of the operation.

use crate::memory::{Memory, Role};
use fsa::{AttentionArgs, Batch, Error, NsaConfig, Result, Rope, RopeScaling, ScoreHeads, TensorView};
use pyo3::FromPyObject;

/// Names of the keys and values that a call takes.
const ORIGINAL: [&str; 2] = ["k", "v"];
/// Their names where they are compressed.
pub const COMPRESSED: [&str; 2] = ["k_cmp", "v_cmp"];

/// `(q, k, v, cu_seqlens_q, cu_seqlens_k)`.
#[derive(FromPyObject)]
pub struct Packed<'py>(pub Memory<'py>, pub Memory<'py>, pub Memory<'py>, pub Memory<'py>, pub Memory<'py>);

impl<'py> Packed<'py> {
    /// All of them, for [`write_views`](crate::memory::write_views).
    pub fn memories(&self) -> [&Memory<'py>; 5] {
        [&self.0, &self.1, &self.2, &self.3, &self.4]
    }

    /// The checked batch. The first check of a call: that of the device, by the name of `q`.
    pub fn batch(&self) -> Result<Batch> {
        self.0.check_host("q")?;
        Batch::from_cu_seqlens(&prefix_sums("cu_seqlens_q", &self.3)?, &prefix_sums("cu_seqlens_k", &self.4)?)
    }

    /// Arguments of an attention stage over the original keys.
    pub fn attention<'a>(&'a self, batch: &'a Batch, softmax_scale: Option<f32>) -> Result<AttentionArgs<'a>> {
        self.named(ORIGINAL, batch, softmax_scale)
    }

    /// [`Packed::attention`] over keys and values with other names.
    pub fn named<'a>(
        &'a self,
        [key, value]: [&str; 2],
        batch: &'a Batch,
        softmax_scale: Option<f32>,
    ) -> Result<AttentionArgs<'a>> {
        Ok(AttentionArgs {
            query: self.0.view("q", Role::Number)?,
            key: self.1.view(key, Role::Number)?,
            value: self.2.view(value, Role::Number)?,
            batch,
            softmax_scale,
        })
    }
}

/// The elements of `cu_seqlens_q` or `cu_seqlens_k`; at least one.
pub fn prefix_sums(argument: &str, memory: &Memory<'_>) -> Result<Vec<i32>> {
    let view = memory.view(argument, Role::Index)?;
    if view.shape().len() != 1 {
        return Err(Error::input(argument, "shape [batch + 1]", format!("shape {:?}", view.shape())));
    }
    let sums = view.typed::<i32>(argument)?;
    if sums.shape()[0] == 0 {
        return Err(Error::input(argument, "batch + 1 prefix sums", "no element"));
    }
    Ok((0..sums.shape()[0]).map(|i| sums.at(&[i])).collect())
}

/// The rows of `view` that are compressed keys. Python allocates compressed keys for the most that
/// `cu_seqlens_k` may hold, `total_kv / kernel_stride`, which it knows without reading it.
pub fn compressed_rows<'a>(
    argument: &str,
    view: TensorView<'a>,
    batch: &Batch,
    kernel_size: usize,
    kernel_stride: usize,
) -> Result<TensorView<'a>> {
    let rows = compressed_count(argument, view.shape(), batch, kernel_size, kernel_stride)?;
    view.slice_axis(argument, 0, 0..rows)
}

/// Number of compressed keys of a batch, if `shape` is that of a tensor with room for them and no other.
pub fn compressed_count(
    argument: &str,
    shape: &[usize],
    batch: &Batch,
    kernel_size: usize,
    kernel_stride: usize,
) -> Result<usize> {
    let geometry = NsaConfig { kernel_size, kernel_stride, ..NsaConfig::default() };
    match geometry.validate() {
        Err(error) if error.argument() != Some("block_size") => return Err(error),
        _ => {}
    }
    let exact = batch.total_compressed(kernel_size, kernel_stride);
    let most = batch.total_kv() / kernel_stride;
    match shape.first() {
        Some(rows) if shape.len() == 3 && (exact..=most).contains(rows) => Ok(exact),
        _ => {
            let expected = format!("[{exact} to {most} compressed rows, num_kv_heads, dim], as compress_kv returns");
            Err(Error::input(argument, expected, format!("shape {shape:?}")))
        }
    }
}

/// `[kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size, first_head]`, the
/// last of them 0 or 1.
pub fn config(values: [usize; 8]) -> NsaConfig {
    let [kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size, first_head] = values;
    let score_heads = if first_head == 0 { ScoreHeads::GroupSum } else { ScoreHeads::FirstHead };
    NsaConfig { kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window_size, score_heads }
}

/// `[]`, `[theta]` or `[theta, factor, low_freq_factor, high_freq_factor, original_max_position]`.
pub fn rope(values: &[f64]) -> Result<Option<Rope>> {
    match *values {
        [] => Ok(None),
        [theta] => Ok(Some(Rope { theta, scaling: RopeScaling::Default })),
        [theta, factor, low_freq_factor, high_freq_factor, original] => {
            let original_max_position = original as usize;
            let scaling = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position };
            Ok(Some(Rope { theta, scaling }))
        }
        _ => Err(Error::input("rope", "0, 1 or 5 numbers", values.len())),
    }
}
