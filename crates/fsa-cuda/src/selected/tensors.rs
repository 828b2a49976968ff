//! Device tensors of a call, and the checks that make a launch sound.

use crate::driver::{Address, Call, DeviceSpan};
use crate::params;
use crate::plan::Problem;
use fsa_core::{Error, Result};

/// Rows are read and written in pieces of 16 bytes.
const VECTOR_BYTES: usize = 16;

/// A `[tokens, heads, head_dim]` tensor on the device; the elements of a vector are adjacent.
#[derive(Debug, Clone, Copy)]
pub struct TensorSpan<'a> {
    /// Its memory, from the first element on.
    pub span: DeviceSpan<'a>,
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl<'a> TensorSpan<'a> {
    /// A tensor without gaps.
    pub fn contiguous(span: DeviceSpan<'a>, heads: usize, head_dim: usize) -> Self {
        Self { span, row_stride: heads * head_dim, head_stride: head_dim }
    }

    /// Checks that the tensor has `rows` rows of `heads` vectors inside its memory, in pieces of 16 bytes.
    fn check(&self, name: &str, rows: usize, heads: usize, problem: &Problem) -> Result<()> {
        let element = problem.dtype.size_bytes();
        if rows == 0 {
            return Ok(());
        }
        let pieces = VECTOR_BYTES / element;
        if !self.row_stride.is_multiple_of(pieces) || !self.head_stride.is_multiple_of(pieces) {
            let got = format!("{} and {}", self.row_stride, self.head_stride);
            return Err(Error::input(name, format!("strides that are multiples of {pieces} elements"), got));
        }
        let last = (rows - 1).checked_mul(self.row_stride).zip((heads - 1).checked_mul(self.head_stride));
        let elements = last.and_then(|(row, head)| row.checked_add(head)?.checked_add(problem.head_dim));
        let bytes = elements.and_then(|elements| elements.checked_mul(element)).unwrap_or(usize::MAX);
        check_span(name, &self.span, bytes)
    }

    /// What a launch takes of it.
    fn call(&self) -> [u64; 3] {
        [self.span.address().0, self.row_stride as u64, self.head_stride as u64]
    }

    /// As the kernels take it.
    pub(super) fn params(&self) -> params::Tensor {
        params::Tensor {
            data: self.span.address(),
            row_stride: self.row_stride as i64,
            head_stride: self.head_stride as i64,
        }
    }
}

/// Checks size and alignment of a piece of memory.
pub(super) fn check_span(name: &str, span: &DeviceSpan<'_>, bytes: usize) -> Result<()> {
    if span.size_bytes() < bytes {
        return Err(Error::input(
            name,
            format!("{bytes} bytes of device memory"),
            format!("{} bytes", span.size_bytes()),
        ));
    }
    if !span.address().0.is_multiple_of(VECTOR_BYTES as u64) {
        let got = format!("{:#x}", span.address().0);
        return Err(Error::input(name, format!("an address that is a multiple of {VECTOR_BYTES}"), got));
    }
    if bytes > 0 && span.address() == Address::default() {
        return Err(Error::input(name, "device memory", "a null pointer"));
    }
    Ok(())
}

/// Tensors of a forward.
#[derive(Debug, Clone, Copy)]
pub struct ForwardTensors<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub key: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub value: TensorSpan<'a>,
    /// `[num_kv_heads, total_q, topk]` i32, without gaps. Any i32 is safe.
    pub topk_indices: DeviceSpan<'a>,
    /// `[total_q, num_q_heads, head_dim]`, written.
    pub out: TensorSpan<'a>,
    /// `[num_q_heads, total_q]` f32 without gaps, written.
    pub lse: DeviceSpan<'a>,
}

impl ForwardTensors<'_> {
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        let Problem { total_q, total_kv, num_q_heads, num_kv_heads, .. } = *problem;
        self.query.check("query", total_q, num_q_heads, problem)?;
        self.key.check("key", total_kv, num_kv_heads, problem)?;
        self.value.check("value", total_kv, num_kv_heads, problem)?;
        self.out.check("out", total_q, num_q_heads, problem)?;
        check_span("topk_indices", &self.topk_indices, problem.topk_indices_bytes())?;
        check_span("lse", &self.lse, num_q_heads * total_q * size_of::<f32>())
    }

    /// What a launch takes of the tensors.
    pub(super) fn call(&self) -> Call {
        let tensors = [&self.query, &self.key, &self.value, &self.out];
        let spans = [&self.topk_indices, &self.lse];
        tensors.into_iter().flat_map(TensorSpan::call).chain(spans.map(|span| span.address().0)).collect()
    }
}

/// Tensors of a backward, besides those of its forward (`out` and `lse` are read).
#[derive(Debug, Clone, Copy)]
pub struct BackwardTensors<'a> {
    /// The forward's tensors.
    pub forward: ForwardTensors<'a>,
    /// Shape of `out`.
    pub grad_out: TensorSpan<'a>,
    /// Shape of `lse`, if a gradient reached it.
    pub grad_lse: Option<DeviceSpan<'a>>,
    /// Shape of `query`, written.
    pub grad_query: TensorSpan<'a>,
    /// Shape of `key`, written.
    pub grad_key: TensorSpan<'a>,
    /// Shape of `value`, written.
    pub grad_value: TensorSpan<'a>,
}

impl BackwardTensors<'_> {
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        let Problem { total_q, total_kv, num_q_heads, num_kv_heads, .. } = *problem;
        self.forward.check(problem)?;
        self.grad_out.check("grad_out", total_q, num_q_heads, problem)?;
        self.grad_query.check("grad_query", total_q, num_q_heads, problem)?;
        self.grad_key.check("grad_key", total_kv, num_kv_heads, problem)?;
        self.grad_value.check("grad_value", total_kv, num_kv_heads, problem)?;
        let bytes = num_q_heads * total_q * size_of::<f32>();
        self.grad_lse.as_ref().map_or(Ok(()), |grad| check_span("grad_lse", grad, bytes))
    }
    /// What a launch takes of the tensors.
    pub(super) fn call(&self) -> Call {
        let mut call = self.forward.call();
        let tensors = [&self.grad_out, &self.grad_query, &self.grad_key, &self.grad_value];
        call.extend(tensors.into_iter().flat_map(TensorSpan::call));
        call.push(self.grad_lse.map_or(0, |grad| grad.address().0));
        call
    }
}
