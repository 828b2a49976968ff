//! Device tensors of the whole operation.

use crate::driver::DeviceSpan;
use crate::launch::{TensorSpan, check_aligned, check_words, part};
use crate::plan::{NsaProblem, Sizes};
use crate::stages::Gates;
use crate::stages::combine::grad_gates_bytes;
use crate::stages::compress::check_parameter;
use fsa_core::{Error, Result};

/// Parameters of a compression; see [`crate::stages::CompressTensors`].
#[derive(Debug, Clone, Copy, Default)]
pub struct NsaParameters<'a> {
    /// Of a weighted sum or a matrix product.
    pub weight: Option<DeviceSpan<'a>>,
    /// Of a matrix product with one.
    pub position: Option<DeviceSpan<'a>>,
}

/// Their gradients, where they are wanted.
pub type NsaParameterGrads<'a> = NsaParameters<'a>;

/// What the backward needs of the forward besides `topk_indices`. Without gaps or with any strides.
#[derive(Debug, Clone, Copy)]
pub struct NsaSavedTensors<'a> {
    /// Rotated query and key, with a rotary embedding.
    pub rotated: Option<[TensorSpan<'a>; 2]>,
    /// Compressed keys, rotated, and values, `[total_compressed, num_kv_heads, head_dim]` with room for as many rows as shapes allow.
    pub compressed: [TensorSpan<'a>; 2],
    /// Outputs of the compressed, selected and window branch.
    pub branches: [TensorSpan<'a>; 3],
    /// Their log-sum-exp, each `[num_q_heads, total_q]` f32.
    pub lse: [DeviceSpan<'a>; 3],
}

/// Tensors of a forward.
#[derive(Debug, Clone, Copy)]
pub struct NsaForwardTensors<'a> {
    /// `[total_q, num_q_heads, head_dim]`, before rotary embedding.
    pub query: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`, before rotary embedding.
    pub key: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub value: TensorSpan<'a>,
    /// Weights of the branches.
    pub gates: Gates<'a>,
    /// Of the compression of keys, then of values.
    pub parameters: [NsaParameters<'a>; 2],
    /// `[total_q, num_q_heads, head_dim]`, written.
    pub out: TensorSpan<'a>,
    /// `[num_kv_heads, total_q, topk]` i32 without gaps, written.
    pub topk_indices: DeviceSpan<'a>,
    /// Written; there if the call was planned to save.
    pub saved: Option<NsaSavedTensors<'a>>,
}

/// Tensors of a backward. Gradients are written, not added to.
#[derive(Debug, Clone, Copy)]
pub struct NsaBackwardTensors<'a> {
    /// `[total_q, num_q_heads, head_dim]`, before rotary embedding.
    pub query: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`, before rotary embedding.
    pub key: TensorSpan<'a>,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub value: TensorSpan<'a>,
    /// Weights of the branches.
    pub gates: Gates<'a>,
    /// Of the compression of keys, then of values.
    pub parameters: [NsaParameters<'a>; 2],
    /// What the forward saved.
    pub saved: NsaSavedTensors<'a>,
    /// What the forward selected.
    pub topk_indices: DeviceSpan<'a>,
    /// Shape of the forward's `out`.
    pub grad_out: TensorSpan<'a>,
    /// Shape of `query`.
    pub grad_query: TensorSpan<'a>,
    /// Shape of `key`.
    pub grad_key: TensorSpan<'a>,
    /// Shape of `value`.
    pub grad_value: TensorSpan<'a>,
    /// `[total_q, 3]`, or `[total_q, num_q_heads, 3]` if every head has gates of its own; without gaps.
    pub grad_gates: DeviceSpan<'a>,
    /// Of the compression of keys, then of values.
    pub grad_parameters: [NsaParameterGrads<'a>; 2],
}

/// Names of the compressions, for errors.
const COMPRESSIONS: [&str; 2] = ["key_compression", "value_compression"];

impl<'a> NsaParameters<'a> {
    /// Bytes of weight and position.
    fn bytes(problem: &NsaProblem, compression: usize) -> [usize; 2] {
        let compress = &problem.compress()[compression];
        [compress.weight_bytes(), compress.position_bytes()]
    }

    fn check(&self, problem: &NsaProblem, compression: usize) -> Result<()> {
        let [weight, position] = Self::bytes(problem, compression);
        let prefix = COMPRESSIONS[compression];
        check_parameter(&format!("{prefix}.weight"), &self.weight, weight)?;
        check_parameter(&format!("{prefix}.position"), &self.position, position)
    }

    fn check_gradients(&self, problem: &NsaProblem, compression: usize) -> Result<()> {
        let sizes = Self::bytes(problem, compression);
        let parts = [("grad_weight", &self.weight, sizes[0]), ("grad_position", &self.position, sizes[1])];
        let wanted = parts.into_iter().filter(|(_, gradient, _)| gradient.is_some());
        wanted.into_iter().try_for_each(|(name, gradient, bytes)| {
            check_parameter(&format!("{}.{name}", COMPRESSIONS[compression]), gradient, bytes)
        })
    }

    /// Those of the kv heads from `first` on.
    fn heads_from(&self, first: usize, problem: &NsaProblem, compression: usize) -> Self {
        let [weight, position] = Self::bytes(problem, compression).map(|bytes| bytes / problem.sizes.num_kv_heads);
        Self {
            weight: self.weight.as_ref().map(|span| part(span, first * weight)),
            position: self.position.as_ref().map(|span| part(span, first * position)),
        }
    }

    /// What a launch takes of them.
    fn numbers(&self) -> [u64; 2] {
        [self.weight, self.position].map(|span| span.map_or(0, |span| span.address().0))
    }
}

/// Rows and heads of tensors of query rows, of tokens and of compressed rows.
fn shapes(problem: &NsaProblem) -> [[usize; 2]; 3] {
    let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, .. } = problem.sizes;
    [[total_q, num_q_heads], [total_kv, num_kv_heads], [problem.total_compressed(), num_kv_heads]]
}

impl NsaSavedTensors<'_> {
    fn check(&self, problem: &NsaProblem) -> Result<()> {
        let (sizes, [rows, tokens, compressed]) = (&problem.sizes, shapes(problem));
        if self.rotated.is_some() != problem.rope {
            let word = |there| if there { "rotated query and key" } else { "no rotated query and key" };
            return Err(Error::input("saved.rotated", word(problem.rope), word(self.rotated.is_some())));
        }
        if let Some([query, key]) = &self.rotated {
            query.require("saved.query_rotated", rows, sizes)?;
            key.require("saved.key_rotated", tokens, sizes)?;
        }
        self.compressed[0].require("saved.key_compressed", compressed, sizes)?;
        self.compressed[1].require("saved.value_compressed", compressed, sizes)?;
        self.branches.iter().try_for_each(|branch| branch.require("saved.branches", rows, sizes))?;
        self.lse.iter().try_for_each(|lse| check_words("saved.lse", lse, sizes.lse_bytes()))
    }

    /// Those of the kv heads from `first` on.
    pub(super) fn heads_from(&self, first: usize, sizes: &Sizes) -> Self {
        let (group, dtype) = (sizes.gqa_group_size(), sizes.dtype);
        let rotated = self.rotated.as_ref();
        Self {
            rotated: rotated.map(|[query, key]| [query.heads_from(first * group, dtype), key.heads_from(first, dtype)]),
            compressed: self.compressed.each_ref().map(|tensor| tensor.heads_from(first, dtype)),
            branches: self.branches.each_ref().map(|branch| branch.heads_from(first * group, dtype)),
            lse: self.lse.each_ref().map(|lse| part(lse, first * group * sizes.total_q * size_of::<f32>())),
        }
    }

    fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        let tensors = self.rotated.iter().flatten().chain(&self.compressed).chain(&self.branches);
        tensors.flat_map(TensorSpan::numbers).chain(self.lse.iter().map(|span| span.address().0))
    }
}

fn gate_numbers(gates: &Gates<'_>) -> [u64; 3] {
    [gates.span.address().0, gates.row_stride as u64, gates.head_stride as u64]
}

/// Where `topk_indices` of the kv heads from `first` on start.
fn topk_from<'a>(topk_indices: &DeviceSpan<'a>, first: usize, problem: &NsaProblem) -> DeviceSpan<'a> {
    part(topk_indices, first * problem.sizes.total_q * problem.topk * size_of::<i32>())
}

impl NsaForwardTensors<'_> {
    pub(super) fn check(&self, problem: &NsaProblem, saves: bool) -> Result<()> {
        let (sizes, [rows, tokens, _]) = (&problem.sizes, shapes(problem));
        self.query.require("query", rows, sizes)?;
        self.key.require("key", tokens, sizes)?;
        self.value.require("value", tokens, sizes)?;
        self.gates.check("gates", rows, sizes.dtype)?;
        (0..2).try_for_each(|compression| self.parameters[compression].check(problem, compression))?;
        self.out.require("out", rows, sizes)?;
        check_words("topk_indices", &self.topk_indices, problem.topk_indices_bytes())?;
        match (&self.saved, saves) {
            (Some(saved), true) => saved.check(problem),
            (None, false) => Ok(()),
            (None, true) => Err(Error::input("saved", "tensors for the state, as planned", "none")),
            (Some(_), false) => Err(Error::input("saved", "none, as planned", "tensors")),
        }
    }

    /// Those of the kv heads from `first` on, with their query heads.
    pub(super) fn heads_from(&self, first: usize, problem: &NsaProblem) -> Self {
        let (sizes, group, dtype) = (&problem.sizes, problem.sizes.gqa_group_size(), problem.sizes.dtype);
        Self {
            query: self.query.heads_from(first * group, dtype),
            key: self.key.heads_from(first, dtype),
            value: self.value.heads_from(first, dtype),
            gates: self.gates.heads_from(first * group, dtype),
            parameters: [0, 1].map(|c| self.parameters[c].heads_from(first, problem, c)),
            out: self.out.heads_from(first * group, dtype),
            topk_indices: topk_from(&self.topk_indices, first, problem),
            saved: self.saved.as_ref().map(|saved| saved.heads_from(first, sizes)),
        }
    }

    /// What a launch takes of them.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let tensors = [&self.query, &self.key, &self.value, &self.out];
        let mut numbers: Vec<u64> = tensors.into_iter().flat_map(TensorSpan::numbers).collect();
        numbers.extend(gate_numbers(&self.gates));
        numbers.extend(self.parameters.iter().flat_map(NsaParameters::numbers));
        numbers.push(self.topk_indices.address().0);
        numbers.extend(self.saved.iter().flat_map(NsaSavedTensors::numbers));
        numbers
    }
}

impl NsaBackwardTensors<'_> {
    pub(super) fn check(&self, problem: &NsaProblem) -> Result<()> {
        let (sizes, [rows, tokens, _]) = (&problem.sizes, shapes(problem));
        let of_rows = [("query", &self.query), ("grad_out", &self.grad_out), ("grad_query", &self.grad_query)];
        let of_tokens = [
            ("key", &self.key),
            ("value", &self.value),
            ("grad_key", &self.grad_key),
            ("grad_value", &self.grad_value),
        ];
        of_rows.into_iter().try_for_each(|(name, tensor)| tensor.require(name, rows, sizes))?;
        of_tokens.into_iter().try_for_each(|(name, tensor)| tensor.require(name, tokens, sizes))?;
        self.gates.check("gates", rows, sizes.dtype)?;
        for compression in 0..2 {
            self.parameters[compression].check(problem, compression)?;
            self.grad_parameters[compression].check_gradients(problem, compression)?;
        }
        self.saved.check(problem)?;
        check_words("topk_indices", &self.topk_indices, problem.topk_indices_bytes())?;
        check_aligned("grad_gates", &self.grad_gates, grad_gates_bytes(sizes, &self.gates), sizes.dtype.size_bytes())
    }

    /// Those of the kv heads from `first` on, with their query heads; `grad_gates` stays that of all.
    pub(super) fn heads_from(&self, first: usize, problem: &NsaProblem) -> Self {
        let (sizes, group, dtype) = (&problem.sizes, problem.sizes.gqa_group_size(), problem.sizes.dtype);
        Self {
            query: self.query.heads_from(first * group, dtype),
            key: self.key.heads_from(first, dtype),
            value: self.value.heads_from(first, dtype),
            gates: self.gates.heads_from(first * group, dtype),
            parameters: [0, 1].map(|c| self.parameters[c].heads_from(first, problem, c)),
            saved: self.saved.heads_from(first, sizes),
            topk_indices: topk_from(&self.topk_indices, first, problem),
            grad_out: self.grad_out.heads_from(first * group, dtype),
            grad_query: self.grad_query.heads_from(first * group, dtype),
            grad_key: self.grad_key.heads_from(first, dtype),
            grad_value: self.grad_value.heads_from(first, dtype),
            grad_gates: self.grad_gates,
            grad_parameters: [0, 1].map(|c| self.grad_parameters[c].heads_from(first, problem, c)),
        }
    }

    /// What a launch takes of them.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let tensors =
            [&self.query, &self.key, &self.value, &self.grad_out, &self.grad_query, &self.grad_key, &self.grad_value];
        let mut numbers: Vec<u64> = tensors.into_iter().flat_map(TensorSpan::numbers).collect();
        numbers.extend(gate_numbers(&self.gates));
        numbers.extend(self.parameters.iter().chain(&self.grad_parameters).flat_map(NsaParameters::numbers));
        numbers.extend(self.saved.numbers());
        numbers.extend([self.topk_indices.address().0, self.grad_gates.address().0]);
        numbers
    }
}
