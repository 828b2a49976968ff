//! Device tensors of a call, and the checks that make a launch sound.

use crate::arch::KernelSet;
use crate::driver::{Address, Boxes, DeviceSpan, MapWords};
use crate::params::{self, TensorMap};
use crate::plan::Sizes;
use crate::selected::{self, TensorSpan};
use fsa_core::{DType, Error, Result};
use std::ops::Range;

/// Rows are read and written in pieces of 16 bytes.
const VECTOR_BYTES: usize = 16;

/// Checks size and alignment of a piece of memory.
pub(super) fn check_span(name: &str, span: &DeviceSpan<'_>, bytes: usize) -> Result<()> {
    check_aligned(name, span, bytes, VECTOR_BYTES)
}

/// The same for memory that is read in pieces of `alignment` bytes.
pub(super) fn check_aligned(name: &str, span: &DeviceSpan<'_>, bytes: usize, alignment: usize) -> Result<()> {
    if span.size_bytes() < bytes {
        let got = format!("{} bytes", span.size_bytes());
        return Err(Error::input(name, format!("{bytes} bytes of device memory"), got));
    }
    if !span.address().0.is_multiple_of(alignment as u64) {
        let got = format!("{:#x}", span.address().0);
        return Err(Error::input(name, format!("an address that is a multiple of {alignment}"), got));
    }
    if bytes > 0 && span.address() == Address::default() {
        return Err(Error::input(name, "device memory", "a null pointer"));
    }
    Ok(())
}

/// Checks a list of 4-byte words, which kernels read one by one.
pub(super) fn check_words(name: &str, span: &DeviceSpan<'_>, bytes: usize) -> Result<()> {
    check_aligned(name, span, bytes, size_of::<u32>())
}

/// A part of `span`, or none of one that is empty.
pub(super) fn part<'a>(span: &DeviceSpan<'a>, offset: usize) -> DeviceSpan<'a> {
    span.part(offset.min(span.size_bytes()), span.size_bytes().saturating_sub(offset))
}

impl<'a> TensorSpan<'a> {
    /// Checks that the tensor has `rows` rows of `heads` vectors of `head_dim` elements inside its memory, in pieces of 16 bytes.
    pub(super) fn require(&self, name: &str, [rows, heads]: [usize; 2], sizes: &Sizes) -> Result<()> {
        let element = sizes.dtype.size_bytes();
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let pieces = VECTOR_BYTES / element;
        if !self.row_stride.is_multiple_of(pieces) || !self.head_stride.is_multiple_of(pieces) {
            let got = format!("{} and {}", self.row_stride, self.head_stride);
            return Err(Error::input(name, format!("strides that are multiples of {pieces} elements"), got));
        }
        let last = (rows - 1).checked_mul(self.row_stride).zip((heads - 1).checked_mul(self.head_stride));
        let elements = last.and_then(|(row, head)| row.checked_add(head)?.checked_add(sizes.head_dim));
        let bytes = elements.and_then(|elements| elements.checked_mul(element)).unwrap_or(usize::MAX);
        check_span(name, &self.span, bytes)
    }

    /// The heads from `first` on.
    pub(super) fn heads_from(&self, first: usize, dtype: DType) -> Self {
        Self { span: part(&self.span, first * self.head_stride * dtype.size_bytes()), ..*self }
    }

    /// As the kernels take it.
    pub(super) fn device(&self) -> params::Tensor {
        params::Tensor {
            data: self.span.address(),
            row_stride: self.row_stride as i64,
            head_stride: self.head_stride as i64,
        }
    }

    /// As Hopper's kernels copy it, in boxes of `extent` tokens and heads; nothing where the kernels are portable.
    pub(super) fn map(
        &self,
        set: KernelSet,
        [rows, heads]: [usize; 2],
        extent: [usize; 2],
        sizes: &Sizes,
    ) -> Result<TensorMap> {
        if set == KernelSet::Sm80 {
            return Ok(TensorMap { words: MapWords::default() });
        }
        let element = sizes.dtype.size_bytes();
        let boxes = Boxes {
            data: self.span.address(),
            shape: [rows, heads, sizes.head_dim],
            stride_bytes: [self.row_stride * element, self.head_stride * element],
            extent,
            is_bf16: sizes.dtype == DType::Bf16,
        };
        Ok(TensorMap { words: MapWords::new(&boxes)? })
    }

    /// What a launch takes of it.
    pub(super) fn numbers(&self) -> [u64; 3] {
        [self.span.address().0, self.row_stride as u64, self.head_stride as u64]
    }
}

/// No tensor.
pub(super) fn absent() -> params::Tensor {
    params::Tensor { data: Address::default(), row_stride: 0, head_stride: 0 }
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
        let (rows, keys) = ([sizes.total_q, sizes.num_q_heads], [total_keys, sizes.num_kv_heads]);
        self.forward.check(sizes, total_keys)?;
        self.grad_out.require("grad_out", rows, sizes)?;
        self.grad_query.require("grad_query", rows, sizes)?;
        self.grad_key.require("grad_key", keys, sizes)?;
        self.grad_value.require("grad_value", keys, sizes)?;
        self.grad_lse.as_ref().map_or(Ok(()), |grad| check_words("grad_lse", grad, sizes.lse_bytes()))
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
        selected::BackwardTensors { forward, grad_out, grad_lse, grad_query, grad_key, grad_value }
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

    /// The gates of the heads from `first` on.
    pub(super) fn heads_from(&self, first: usize, dtype: DType) -> Self {
        Self { span: part(&self.span, first * self.head_stride * dtype.size_bytes()), ..*self }
    }
}

/// The kv heads of every pass, and all of them where there is one.
pub(super) fn passes(num_kv_heads: usize, kv_heads: usize) -> impl Iterator<Item = Range<usize>> {
    (0..num_kv_heads).step_by(kv_heads.max(1)).map(move |first| first..(first + kv_heads).min(num_kv_heads))
}
