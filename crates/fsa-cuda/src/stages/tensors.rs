//! Device tensors of attention, and gates.

use crate::driver::DeviceSpan;
use crate::launch::{TensorSpan, check_aligned, check_words, part};
use crate::params;
use crate::plan::Sizes;
use crate::selected;
use fsa_core::{DType, Result};
use std::ops::Range;

/// No tensor.
pub(super) fn absent() -> params::Tensor {
    params::Tensor::default()
}

/// Tensors of the forward of an attention stage.
#[derive(Debug, Clone, Copy)]
pub struct AttentionTensors<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: TensorSpan<'a>,
    /// `[total_keys, num_kv_heads, head_dim]`: tokens, or compressed keys, of which there is room for as many as shapes allow.
    pub key: TensorSpan<'a>,
    /// The same shape.
    pub value: TensorSpan<'a>,
    /// `[total_q, num_q_heads, head_dim]`, written.
    pub out: TensorSpan<'a>,
    /// `[num_q_heads, total_q]` f32 without gaps, written.
    pub lse: DeviceSpan<'a>,
}

impl<'a> AttentionTensors<'a> {
    pub(super) fn check(&self, sizes: &Sizes, total_keys: usize) -> Result<()> {
        let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [total_keys, sizes.num_kv_heads]);
        self.query.require("query", rows, sizes)?;
        self.key.require("key", keys, sizes)?;
        self.value.require("value", keys, sizes)?;
        self.out.require("out", rows, sizes)?;
        check_words("lse", &self.lse, sizes.lse_bytes())
    }

    /// The kv heads from `first` on, with their query heads.
    pub(super) fn kv_heads_from(&self, first: usize, sizes: &Sizes) -> Self {
        let (group, dtype) = (sizes.gqa_group_size(), sizes.dtype);
        Self {
            query: self.query.heads_from(first * group, dtype),
            key: self.key.heads_from(first, dtype),
            value: self.value.heads_from(first, dtype),
            out: self.out.heads_from(first * group, dtype),
            lse: part(&self.lse, first * group * sizes.total_q * size_of::<f32>()),
        }
    }

    /// Those of stage `selected`.
    pub(crate) fn selected(&self, topk_indices: DeviceSpan<'a>) -> selected::ForwardTensors<'a> {
        let Self { query, key, value, out, lse } = *self;
        selected::ForwardTensors { query, key, value, topk_indices, out, lse }
    }
}

/// What the backward of an attention stage reads.
#[derive(Debug, Clone, Copy)]
pub struct AttentionGradInputs<'a> {
    /// The forward's tensors.
    pub forward: AttentionTensors<'a>,
    /// Shape of `out`.
    pub grad_out: TensorSpan<'a>,
    /// Shape of `lse`, if a gradient reached it.
    pub grad_lse: Option<DeviceSpan<'a>>,
}

impl<'a> AttentionGradInputs<'a> {
    pub(super) fn check(&self, sizes: &Sizes, total_keys: usize) -> Result<()> {
        self.forward.check(sizes, total_keys)?;
        self.grad_out.require("grad_out", [sizes.total_q, sizes.num_q_heads], sizes)?;
        self.grad_lse.as_ref().map_or(Ok(()), |grad| check_words("grad_lse", grad, sizes.lse_bytes()))
    }

    /// With room for gradients of queries, keys and values.
    pub fn with(&self, [grad_query, grad_key, grad_value]: [TensorSpan<'a>; 3]) -> AttentionGradTensors<'a> {
        let Self { forward, grad_out, grad_lse } = *self;
        AttentionGradTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value }
    }

    /// For kernels that write none of them.
    pub(super) fn without_gradients(&self) -> AttentionGradTensors<'a> {
        self.with([TensorSpan::none(); 3])
    }
}

/// Tensors of the backward of an attention stage, besides those of its forward (`out` and `lse` are read).
#[derive(Debug, Clone, Copy)]
pub struct AttentionGradTensors<'a> {
    /// The forward's tensors.
    pub forward: AttentionTensors<'a>,
    /// Shape of `out`.
    pub grad_out: TensorSpan<'a>,
    /// Shape of `lse`, if a gradient reached it.
    pub grad_lse: Option<DeviceSpan<'a>>,
    /// Shape of `query`, written.
    pub grad_query: TensorSpan<'a>,
    /// Shape of `key`, written; rows that no sequence has are not.
    pub grad_key: TensorSpan<'a>,
    /// Shape of `value`, written likewise.
    pub grad_value: TensorSpan<'a>,
}

impl<'a> AttentionGradTensors<'a> {
    pub(super) fn check(&self, sizes: &Sizes, total_keys: usize) -> Result<()> {
        let keys = [total_keys, sizes.num_kv_heads];
        self.inputs().check(sizes, total_keys)?;
        self.grad_query.require("grad_query", [sizes.total_q, sizes.num_q_heads], sizes)?;
        self.grad_key.require("grad_key", keys, sizes)?;
        self.grad_value.require("grad_value", keys, sizes)
    }

    /// What is read.
    pub(super) fn inputs(&self) -> AttentionGradInputs<'a> {
        let Self { forward, grad_out, grad_lse, .. } = *self;
        AttentionGradInputs { forward, grad_out, grad_lse }
    }

    /// The kv heads from `first` on, with their query heads.
    pub(super) fn kv_heads_from(&self, first: usize, sizes: &Sizes) -> Self {
        let (group, dtype) = (sizes.gqa_group_size(), sizes.dtype);
        let lse_offset = first * group * sizes.total_q * size_of::<f32>();
        Self {
            forward: self.forward.kv_heads_from(first, sizes),
            grad_out: self.grad_out.heads_from(first * group, dtype),
            grad_lse: self.grad_lse.as_ref().map(|grad| part(grad, lse_offset)),
            grad_query: self.grad_query.heads_from(first * group, dtype),
            grad_key: self.grad_key.heads_from(first, dtype),
            grad_value: self.grad_value.heads_from(first, dtype),
        }
    }

    /// Those of stage `selected`.
    pub(crate) fn selected(&self, topk_indices: DeviceSpan<'a>) -> selected::BackwardTensors<'a> {
        let Self { forward, grad_out, grad_lse, grad_query, grad_key, grad_value } = *self;
        let forward = forward.selected(topk_indices);
        selected::BackwardTensors {
            forward,
            grad_out,
            grad_lse,
            grad_query,
            grad_key,
            grad_value,
            row_stats: None,
            accumulate: false,
        }
    }
}

/// Three gates per row, or per row and head; the three are adjacent.
#[derive(Debug, Clone, Copy)]
pub struct Gates<'a> {
    /// Their memory, from the first gate on.
    pub span: DeviceSpan<'a>,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one head to the next; 0 where all heads of a row share their gates.
    pub head_stride: usize,
}

impl<'a> Gates<'a> {
    /// `[rows, 3]` without gaps.
    pub fn per_row(span: DeviceSpan<'a>) -> Self {
        Self { span, row_stride: 3, head_stride: 0 }
    }

    /// `[rows, heads, 3]` without gaps.
    pub fn per_head(span: DeviceSpan<'a>, heads: usize) -> Self {
        Self { span, row_stride: 3 * heads, head_stride: 3 }
    }

    pub(super) fn check(&self, name: &str, [rows, heads]: [usize; 2], dtype: DType) -> Result<()> {
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let element = dtype.size_bytes();
        let last = (rows - 1).checked_mul(self.row_stride).zip((heads - 1).checked_mul(self.head_stride));
        let elements = last.and_then(|(row, head)| row.checked_add(head)?.checked_add(3));
        let bytes = elements.and_then(|elements| elements.checked_mul(element)).unwrap_or(usize::MAX);
        check_aligned(name, &self.span, bytes, element)
    }

    /// As the kernels take them.
    pub(super) fn device(&self) -> params::Gates {
        params::Gates {
            data: self.span.address(),
            row_stride: self.row_stride as i64,
            head_stride: self.head_stride as i64,
        }
    }

    /// The gates of the heads from `first` on.
    pub(super) fn heads_from(&self, first: usize, dtype: DType) -> Self {
        Self { span: part(&self.span, first * self.head_stride * dtype.size_bytes()), ..*self }
    }
}

/// The kv heads of every pass, and all of them where there is one.
pub(super) fn passes(num_kv_heads: usize, kv_heads: usize) -> impl Iterator<Item = Range<usize>> {
    (0..num_kv_heads).step_by(kv_heads.max(1)).map(move |first| first..(first + kv_heads).min(num_kv_heads))
}
