//! Arguments of the whole operation.

use super::attention::{AttentionArgs, AttentionShape, AttentionStage};
use super::combine::GateLayout;
use super::compress::{CompressArgs, Compression, check_parameter_grads};
use super::{expect_mut, expect_view};
use crate::batch::Batch;
use crate::config::NsaConfig;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::rope::Rope;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// Inputs of native sparse attention.
#[derive(Debug, Clone, Copy)]
pub struct NsaArgs<'a> {
    /// `[total_q, num_q_heads, head_dim]`, before rotary embedding.
    pub query: TensorView<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`, before rotary embedding.
    pub key: TensorView<'a>,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub value: TensorView<'a>,
    /// `[total_q, 3]` or `[total_q, num_q_heads, 3]`, already activated.
    pub gates: TensorView<'a>,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// What is computed.
    pub config: &'a NsaConfig,
    /// How keys are compressed.
    pub key_compression: Compression<'a>,
    /// How values are compressed.
    pub value_compression: Compression<'a>,
    /// Rotary embedding of query, key (after compression) and compressed key, if any.
    pub rope: Option<&'a Rope>,
    /// Factor of the logits; `None` is `head_dim^-0.5`.
    pub softmax_scale: Option<f32>,
}

/// Prefixes `key_` or `value_` to the argument that an error of a compression names.
fn prefixed(error: Error, prefix: &str) -> Error {
    match error {
        Error::Input(mut input) => {
            input.argument = match input.argument.as_str() {
                "input" => prefix.to_string(),
                "kernel_size" | "kernel_stride" => input.argument,
                name => format!("{prefix}_compression.{name}"),
            };
            Error::Input(input)
        }
        other => other,
    }
}

impl<'a> NsaArgs<'a> {
    /// Query, key and value as the arguments of an attention stage.
    pub fn attention(&self) -> AttentionArgs<'a> {
        AttentionArgs {
            query: self.query,
            key: self.key,
            value: self.value,
            batch: self.batch,
            softmax_scale: self.softmax_scale,
        }
    }

    /// Arguments of the compression of keys.
    pub fn compress_key(&self) -> CompressArgs<'a> {
        self.compress(self.key, self.key_compression)
    }

    /// Arguments of the compression of values.
    pub fn compress_value(&self) -> CompressArgs<'a> {
        self.compress(self.value, self.value_compression)
    }

    fn compress(&self, input: TensorView<'a>, compression: Compression<'a>) -> CompressArgs<'a> {
        let (kernel_size, kernel_stride) = (self.config.kernel_size, self.config.kernel_stride);
        CompressArgs { input, batch: self.batch, kernel_size, kernel_stride, compression }
    }

    /// Checks everything and returns the sizes.
    pub fn shape(&self) -> Result<AttentionShape> {
        self.config.validate()?;
        let shape = self.attention().shape(&AttentionStage::Dense)?;
        GateLayout::of(&self.gates, shape.dtype, shape.out())?;
        self.compress_key().shape().map_err(|error| prefixed(error, "key"))?;
        self.compress_value().shape().map_err(|error| prefixed(error, "value"))?;
        if let Some(rope) = self.rope {
            rope.validate(shape.head_dim)?;
        }
        Ok(shape)
    }

    /// [`NsaArgs::shape`] that also checks the output.
    pub fn shape_with_output(&self, out: &TensorViewMut<'_>) -> Result<AttentionShape> {
        let shape = self.shape()?;
        expect_mut("out", shape.dtype, &shape.out(), out)?;
        Ok(shape)
    }
}

/// What the backward needs of the forward. Opaque to callers but for its parts' meaning.
#[derive(Debug, Clone)]
pub struct NsaSaved {
    /// Rotated query and key, if there is a rotary embedding.
    pub rotated: Option<[Tensor; 2]>,
    /// Compressed keys (rotated, if there is a rotary embedding) and values.
    pub compressed: [Tensor; 2],
    /// Outputs of the compressed, selected and window branch.
    pub branches: [Tensor; 3],
    /// Their log-sum-exp, each `[num_q_heads, total_q]` f32.
    pub lse: [Tensor; 3],
    /// `[num_kv_heads, total_q, topk]` i32.
    pub topk_indices: Tensor,
}

impl NsaSaved {
    /// Bytes that the saved state occupies.
    pub fn size_bytes(&self) -> usize {
        let rotated = self.rotated.iter().flatten();
        let parts = rotated.chain(&self.compressed).chain(&self.branches).chain(&self.lse);
        parts.map(Tensor::size_bytes).sum::<usize>() + self.topk_indices.size_bytes()
    }
}

/// What the forward returns besides the output that it writes.
#[derive(Debug, Clone)]
pub struct NsaForward {
    /// The chosen blocks `[num_kv_heads, total_q, topk]` i32, when no state was saved.
    pub topk_indices: Option<Tensor>,
    /// State for the backward, when it was asked for.
    pub saved: Option<NsaSaved>,
}

impl NsaForward {
    /// The chosen blocks `[num_kv_heads, total_q, topk]` i32.
    pub fn topk_indices(&self) -> Option<&Tensor> {
        self.saved.as_ref().map(|saved| &saved.topk_indices).or(self.topk_indices.as_ref())
    }
}

/// Gradients of the parameters of a compression, where asked for.
#[derive(Debug, Default)]
pub struct CompressionGrads<'a> {
    /// Shape of the weight, for `weighted` and `linear`.
    pub grad_weight: Option<TensorViewMut<'a>>,
    /// Shape of `position`, for `linear` with one.
    pub grad_position: Option<TensorViewMut<'a>>,
}

/// What the backward of the whole operation writes; shapes and dtype of the inputs.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct NsaGrads<'a> {
    pub grad_query: TensorViewMut<'a>,
    pub grad_key: TensorViewMut<'a>,
    pub grad_value: TensorViewMut<'a>,
    pub grad_gates: TensorViewMut<'a>,
    pub key_compression: CompressionGrads<'a>,
    pub value_compression: CompressionGrads<'a>,
}

impl NsaGrads<'_> {
    /// Checks the gradients against the call and the saved state, and returns the sizes.
    pub fn validate(&self, args: &NsaArgs<'_>, saved: &NsaSaved, grad_out: &TensorView<'_>) -> Result<AttentionShape> {
        let shape = args.shape()?;
        expect_view("grad_out", shape.dtype, &shape.out(), grad_out)?;
        expect_mut("grad_query", shape.dtype, args.query.shape(), &self.grad_query)?;
        expect_mut("grad_key", shape.dtype, args.key.shape(), &self.grad_key)?;
        expect_mut("grad_value", shape.dtype, args.value.shape(), &self.grad_value)?;
        expect_mut("grad_gates", shape.dtype, args.gates.shape(), &self.grad_gates)?;
        for (prefix, compression, grads) in [
            ("key_compression.", &args.key_compression, &self.key_compression),
            ("value_compression.", &args.value_compression, &self.value_compression),
        ] {
            check_parameter_grads(prefix, compression, (&grads.grad_weight, &grads.grad_position), shape.dtype)?;
        }
        check_saved(args, saved, &shape)?;
        Ok(shape)
    }
}

/// A saved state of another call is an error, not a wrong gradient.
fn check_saved(args: &NsaArgs<'_>, saved: &NsaSaved, shape: &AttentionShape) -> Result<()> {
    let (l, s) = (args.config.kernel_size, args.config.kernel_stride);
    let compressed = args.batch.total_compressed(l, s);
    let kv = shape.num_kv_heads;
    let of = |tensor: &Tensor, name: &str, dtype, expected: &[usize]| {
        expect_view(&format!("saved.{name}"), dtype, expected, &tensor.view())
    };
    of(&saved.compressed[0], "key_compressed", shape.dtype, &[compressed, kv, shape.head_dim])?;
    of(&saved.compressed[1], "value_compressed", shape.dtype, &[compressed, kv, shape.value_dim])?;
    for branch in &saved.branches {
        of(branch, "branches", shape.dtype, &shape.out())?;
    }
    for lse in &saved.lse {
        of(lse, "lse", DType::F32, &shape.lse())?;
    }
    of(&saved.topk_indices, "topk_indices", DType::I32, &[kv, shape.total_q, args.config.topk])?;
    if saved.rotated.is_some() != args.rope.is_some() {
        let word = |present| if present { "rotated query and key" } else { "no rotated query and key" };
        let (expected, got) = (word(args.rope.is_some()), word(saved.rotated.is_some()));
        return Err(Error::input("saved.rotated", expected, got));
    }
    if let Some([query, key]) = &saved.rotated {
        of(query, "query_rotated", shape.dtype, args.query.shape())?;
        of(key, "key_rotated", shape.dtype, args.key.shape())?;
    }
    Ok(())
}
