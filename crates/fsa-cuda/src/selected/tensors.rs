//! Device tensors of a call, and the checks that make a launch sound.

use crate::driver::{Call, DeviceSpan};
use crate::launch::{TensorSpan, check_aligned, check_words};
use crate::params::Branch;
use crate::plan::Problem;
use crate::stages::SharedSums;
use fsa_core::Result;

/// Statistics of a row: they are read together.
const ROW_STATS_BYTES: usize = 2 * size_of::<f32>();

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
        let sizes = &problem.sizes();
        self.query.require("query", [total_q, num_q_heads], sizes)?;
        self.key.require("key", [total_kv, num_kv_heads], sizes)?;
        self.value.require("value", [total_kv, num_kv_heads], sizes)?;
        self.out.require("out", [total_q, num_q_heads], sizes)?;
        check_words("topk_indices", &self.topk_indices, problem.topk_indices_bytes())?;
        check_words("lse", &self.lse, num_q_heads * total_q * size_of::<f32>())
    }

    /// What a launch takes of the tensors.
    pub(super) fn call(&self, branch: &Branch) -> Call {
        let tensors = [&self.query, &self.key, &self.value, &self.out];
        let spans = [&self.topk_indices, &self.lse];
        let spans = spans.map(|span| span.address().0);
        tensors.into_iter().flat_map(TensorSpan::numbers).chain(spans).chain(branch.numbers()).collect()
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
    /// Statistics of all rows: `[num_q_heads, total_q]` of two f32, the log2-sum-exp less the log2 of the size of the row's
    /// gate, and delta, whose lowest bit says that the gate is negative. `forward.out`, `forward.lse` and `grad_lse` are
    /// not read then, and `grad_out` is not multiplied by the gate. Behind them two bounds, f32: of all rows the largest sum
    /// of the sizes of the elements of `grad_out`, and the largest size of delta, each times the size of the gate; rows in
    /// which they are not finite do not count.
    pub row_stats: Option<DeviceSpan<'a>>,
    /// The gradients are added to what the targets hold, in f32 and rounded once, instead of written. Plans for that have
    /// [`PlanOptions::adds_to_grads`](crate::plan::PlanOptions::adds_to_grads).
    pub accumulate: bool,
}

impl BackwardTensors<'_> {
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        let Problem { total_q, total_kv, num_q_heads, num_kv_heads, .. } = *problem;
        let sizes = &problem.sizes();
        self.forward.check(problem)?;
        self.grad_out.require("grad_out", [total_q, num_q_heads], sizes)?;
        self.grad_query.require("grad_query", [total_q, num_q_heads], sizes)?;
        self.grad_key.require("grad_key", [total_kv, num_kv_heads], sizes)?;
        self.grad_value.require("grad_value", [total_kv, num_kv_heads], sizes)?;
        for (name, tensor) in
            [("query", &self.forward.query), ("grad_out", &self.grad_out), ("grad_query", &self.grad_query)]
        {
            tensor.require_near_heads(name, num_q_heads)?;
        }
        let bytes = num_q_heads * total_q * size_of::<f32>();
        self.grad_lse.as_ref().map_or(Ok(()), |grad| check_words("grad_lse", grad, bytes))?;
        let check = |stats| check_aligned("row_stats", stats, sizes.given_stats_bytes(), ROW_STATS_BYTES);
        self.row_stats.as_ref().map_or(Ok(()), check)
    }

    /// What a launch takes of the tensors.
    pub(super) fn call(&self) -> Call {
        let mut call = self.forward.call(&Branch::default());
        let tensors = [&self.grad_out, &self.grad_query, &self.grad_key, &self.grad_value];
        call.extend(tensors.into_iter().flat_map(TensorSpan::numbers));
        call.extend([self.grad_lse, self.row_stats].map(|span| span.map_or(0, |span| span.address().0)));
        call.push(self.accumulate.into());
        call
    }
}

/// What a backward takes of the other branches of the whole; which of it, its plan says.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WholeGrads<'a> {
    /// Statistics of the rows' attention to the window, as those of the blocks.
    pub window_stats: Option<DeviceSpan<'a>>,
    /// `grad_query` holds scaled sums, or is to hold them.
    pub sums: Option<SharedSums>,
    /// The dense route is prepared.
    pub is_prepared: bool,
    /// What splits of the dense route leave of gradients of keys and values is added to them later.
    pub merges_later: bool,
}
