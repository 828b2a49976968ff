//! Softmax attention over the set of visible keys of a row.
//!
//! `dense`, `window`, `compressed` and `selected` differ in that set and in nothing else; each defines it in the
//! file of its name. A key outside of the set is never touched: not multiplied by 0, not read.

use crate::arithmetic::{Arithmetic, Exact};
use crate::array::{Array, read_row};
use crate::{compressed, dense, selected, window};
use fsa_core::{AttentionArgs, AttentionStage, Batch, Result, Sequence, TensorView};

/// Where a query row lies.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Its sequence.
    pub sequence: &'a Sequence,
    /// The number of its sequence.
    pub number: usize,
    /// Its row in `query`.
    pub row: usize,
    /// Its absolute position in the sequence.
    pub position: usize,
    /// The kv head that its head reads.
    pub kv_head: usize,
}

/// The rows of `key` that a row sees, ascending.
pub type Visible<'v> = dyn Fn(&Place<'_>) -> Vec<usize> + 'v;

/// The definition of the visible keys of `stage`. Fails only if `topk_indices` is not an i32 tensor.
pub fn visible<'v>(stage: &AttentionStage<'v>, batch: &Batch) -> Result<Box<Visible<'v>>> {
    Ok(match *stage {
        AttentionStage::Dense => Box::new(dense::visible_keys),
        AttentionStage::Window { window_size } => Box::new(move |place| window::visible_keys(place, window_size)),
        AttentionStage::Compressed { kernel_size, kernel_stride } => {
            let offsets = batch.compressed_offsets(kernel_size, kernel_stride);
            Box::new(move |place| compressed::visible_keys(place, &offsets, kernel_size, kernel_stride))
        }
        AttentionStage::Selected { topk_indices, block_size, .. } => {
            let ids = topk_indices.typed::<i32>("topk_indices")?;
            Box::new(move |place| selected::visible_keys(place, &ids, block_size))
        }
    })
}

/// Every query row of a batch, for one head.
pub fn places(batch: &Batch, kv_head: usize) -> impl Iterator<Item = Place<'_>> {
    batch.sequences().iter().enumerate().flat_map(move |(number, sequence)| {
        sequence.query_rows.clone().enumerate().map(move |(t, row)| Place {
            sequence,
            number,
            row,
            position: sequence.first_position + t,
            kv_head,
        })
    })
}

/// Inputs of an attention stage, widened.
#[derive(Debug, Clone)]
pub struct AttentionInputs<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: Array,
    /// `[total_keys, num_kv_heads, head_dim]`.
    pub key: Array,
    /// `[total_keys, num_kv_heads, value_dim]`.
    pub value: Array,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// Factor of the logits.
    pub scale: f64,
}

impl<'a> AttentionInputs<'a> {
    /// Widens the arguments of a call.
    pub fn new(args: &AttentionArgs<'a>) -> Self {
        Self {
            query: Array::from_view(&args.query),
            key: Array::from_view(&args.key),
            value: Array::from_view(&args.value),
            batch: args.batch,
            scale: f64::from(args.scale()),
        }
    }

    /// Query heads.
    pub fn num_q_heads(&self) -> usize {
        self.query.shape()[1]
    }

    /// Query heads that share one kv head.
    pub fn gqa_group_size(&self) -> usize {
        self.num_q_heads() / self.key.shape()[1].max(1)
    }

    /// Every query head with every query row.
    pub fn heads_and_places(&self) -> impl Iterator<Item = (usize, Place<'_>)> {
        let group = self.gqa_group_size().max(1);
        (0..self.num_q_heads()).flat_map(move |head| places(self.batch, head / group).map(move |place| (head, place)))
    }
}

/// What one row and head sees and computes.
#[derive(Debug, Clone)]
pub struct AttentionRow {
    /// Rows of `key` that it sees.
    pub keys: Vec<usize>,
    /// Their scaled logits.
    pub logits: Vec<f64>,
    /// `[value_dim]`.
    pub out: Vec<f64>,
    /// Natural logarithm of the softmax denominator; `-inf` without keys.
    pub lse: f64,
}

/// Result of the forward of an attention stage.
#[derive(Debug, Clone)]
pub struct AttentionForward {
    /// `[total_q, num_q_heads, value_dim]`.
    pub out: Array,
    /// `[num_q_heads, total_q]`.
    pub lse: Array,
    /// Visible keys and logits of every row: row `r` of head `h` is number `h * total_q + r`.
    pub rows: Vec<AttentionRow>,
}

/// Gradients of an attention stage; shapes of the inputs.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct AttentionGradients {
    pub query: Array,
    pub key: Array,
    pub value: Array,
}

/// One row and head: `query` sees `keys`, of which number k has the vectors `key(k)` and `value(k)`.
fn attend_row<'k>(
    a: &dyn Arithmetic,
    (query, scale, value_dim): (&[f64], f64, usize),
    keys: &[usize],
    key: impl Fn(usize) -> &'k [f64],
    value: impl Fn(usize) -> &'k [f64],
) -> AttentionRow {
    let mut out = vec![0.0; value_dim];
    if keys.is_empty() {
        return AttentionRow { keys: Vec::new(), logits: Vec::new(), out, lse: f64::NEG_INFINITY };
    }
    let logits: Vec<f64> = (0..keys.len()).map(|k| a.store(a.op(scale * a.dot(query, key(k))))).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|x| a.op(a.op(x - max).exp())).collect();
    let sum = weights.iter().fold(0.0, |sum, w| a.op(sum + w));
    for (k, weight) in weights.iter().enumerate() {
        a.add_scaled(&mut out, a.store(a.op(weight / sum)), value(k));
    }
    a.store_all(&mut out);
    AttentionRow { keys: keys.to_vec(), logits, out, lse: a.op(max + a.op(sum.ln())) }
}

/// Row `row` of head `head`, which sees `keys`.
pub fn one_row(
    a: &dyn Arithmetic,
    inputs: &AttentionInputs<'_>,
    keys: &[usize],
    row: usize,
    head: usize,
) -> AttentionRow {
    let kv_head = head / inputs.gqa_group_size().max(1);
    let what = (inputs.query.row(&[row, head]), inputs.scale, inputs.value.shape()[2]);
    let key = |k: usize| inputs.key.row(&[keys[k], kv_head]);
    attend_row(a, what, keys, key, |k| inputs.value.row(&[keys[k], kv_head]))
}

/// `out` and `lse` of every row.
pub fn forward(a: &dyn Arithmetic, inputs: &AttentionInputs<'_>, visible: &Visible<'_>) -> AttentionForward {
    let (total_q, heads) = (inputs.query.shape()[0], inputs.num_q_heads());
    let mut out = Array::zeros(&[total_q, heads, inputs.value.shape()[2]]);
    let mut lse = Array::filled(&[heads, total_q], f64::NEG_INFINITY);
    let mut rows = Vec::with_capacity(heads * total_q);
    for (head, place) in inputs.heads_and_places() {
        let row = one_row(a, inputs, &visible(&place), place.row, head);
        out.row_mut(&[place.row, head]).copy_from_slice(&row.out);
        *lse.at_mut(&[head, place.row]) = row.lse;
        rows.push(row);
    }
    AttentionForward { out, lse, rows }
}

/// Gradients of query, key and value, given those of `out` and, if any, of `lse`.
///
/// With `P = exp(x - lse)`, `dP = grad_out . v`, `delta = grad_out . out`:
/// `dx = P * (dP - delta + grad_lse)`, because `d lse / dx = P`.
pub fn backward(
    a: &dyn Arithmetic,
    inputs: &AttentionInputs<'_>,
    forward: &AttentionForward,
    grad_out: &Array,
    grad_lse: Option<&Array>,
) -> AttentionGradients {
    let mut grads = AttentionGradients {
        query: Array::zeros(inputs.query.shape()),
        key: Array::zeros(inputs.key.shape()),
        value: Array::zeros(inputs.value.shape()),
    };
    for ((head, place), row) in inputs.heads_and_places().zip(&forward.rows) {
        let grad = grad_out.row(&[place.row, head]);
        let grad_lse = grad_lse.map_or(0.0, |grad| grad.at(&[head, place.row]));
        let delta = a.dot(&row.out, grad);
        let query = inputs.query.row(&[place.row, head]);
        let mut grad_query = vec![0.0; query.len()];
        for (key_row, logit) in row.keys.iter().zip(&row.logits) {
            let index = [*key_row, place.kv_head];
            let p = a.store(a.op(a.op(logit - row.lse).exp()));
            let grad_p = a.store(a.dot(grad, inputs.value.row(&index)));
            let grad_logit = a.store(a.op(p * a.op(a.op(grad_p - delta) + grad_lse)));
            let factor = a.op(inputs.scale * grad_logit);
            a.add_scaled(&mut grad_query, factor, inputs.key.row(&index));
            a.add_scaled(grads.key.row_mut(&index), factor, query);
            a.add_scaled(grads.value.row_mut(&index), p, grad);
        }
        grads.query.row_mut(&[place.row, head]).copy_from_slice(&grad_query);
    }
    let store = |mut array: Array| {
        a.store_all(array.data_mut());
        array
    };
    AttentionGradients { query: store(grads.query), key: store(grads.key), value: store(grads.value) }
}

/// `out` and `lse` of a call, in f64.
pub fn attention(stage: &AttentionStage<'_>, args: &AttentionArgs<'_>) -> Result<AttentionForward> {
    args.shape(stage)?;
    Ok(forward(&Exact, &AttentionInputs::new(args), &*visible(stage, args.batch)?))
}

/// Gradients of a call, in f64. Takes no `out` or `lse`: it computes its own.
pub fn attention_backward(
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    grad_out: &TensorView<'_>,
    grad_lse: Option<&TensorView<'_>>,
) -> Result<AttentionGradients> {
    args.shape(stage)?;
    let inputs = AttentionInputs::new(args);
    let forward = forward(&Exact, &inputs, &*visible(stage, args.batch)?);
    let grad_lse = grad_lse.map(Array::from_view);
    Ok(backward(&Exact, &inputs, &forward, &Array::from_view(grad_out), grad_lse.as_ref()))
}

/// One row and head of a call, in f64, reading only what it sees: for sampled checks of long sequences.
/// `row` counts the rows of `query`.
pub fn attention_row(
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    row: usize,
    head: usize,
) -> Result<AttentionRow> {
    let shape = args.shape(stage)?;
    let kv_head = head / shape.gqa_group_size().max(1);
    let query = read_row("query", &args.query, &[row, head])?;
    let keys = match places(args.batch, kv_head).find(|place| place.row == row) {
        Some(place) => visible(stage, args.batch)?(&place),
        None => Vec::new(),
    };
    let load = |argument: &str, view: &TensorView<'_>| -> Result<Vec<Vec<f64>>> {
        keys.iter().map(|key| read_row(argument, view, &[*key, kv_head])).collect()
    };
    let (key_rows, value_rows) = (load("key", &args.key)?, load("value", &args.value)?);
    let scale = f64::from(args.scale());
    let what = (&query[..], scale, shape.value_dim);
    Ok(attend_row(&Exact, what, &keys, |k| &key_rows[k], |k| &value_rows[k]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One head, one component: key j has the logit `logits[j]` for a query of 1.
    fn inputs<'a>(batch: &'a Batch, logits: &[f64], values: &[f64]) -> AttentionInputs<'a> {
        let shape = [logits.len(), 1, 1];
        AttentionInputs {
            query: Array::filled(&[batch.total_q(), 1, 1], 1.0),
            key: Array::new(&shape, logits.to_vec()),
            value: Array::new(&shape, values.to_vec()),
            batch,
            scale: 1.0,
        }
    }

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        let near = got.iter().zip(expected).all(|(g, e)| (g - e).abs() <= 1e-15 * (1.0 + e.abs()) || g == e);
        assert!(near, "got {got:?}, expected {expected:?}");
    }

    #[test]
    fn two_keys_by_hand() {
        // Row 1 sees logits ln 2 and 0: weights 2/3 and 1/3 of the values 9 and 3, denominator 2 + 1.
        let batch = Batch::single(2);
        let inputs = inputs(&batch, &[2.0f64.ln(), 0.0], &[9.0, 3.0]);
        let forward = forward(&Exact, &inputs, &dense::visible_keys);
        close(forward.out.data(), &[9.0, 7.0]);
        close(forward.lse.data(), &[2.0f64.ln(), 3.0f64.ln()]);
        // Gradient 1 of row 1's output: dP = 9, 3; delta = 7; dx = 2/3 * 2, 1/3 * -4; the query gets dx . k.
        let grads = backward(&Exact, &inputs, &forward, &Array::new(&[2, 1, 1], vec![0.0, 1.0]), None);
        close(grads.query.data(), &[0.0, 4.0 / 3.0 * 2.0f64.ln()]);
        close(grads.key.data(), &[4.0 / 3.0, -4.0 / 3.0]);
        close(grads.value.data(), &[2.0 / 3.0, 1.0 / 3.0]);
        // Gradient 1 of row 1's lse: dx = P.
        let grad_lse = Array::new(&[1, 2], vec![0.0, 1.0]);
        let grads = backward(&Exact, &inputs, &forward, &Array::zeros(&[2, 1, 1]), Some(&grad_lse));
        close(grads.key.data(), &[2.0 / 3.0, 1.0 / 3.0]);
        close(grads.value.data(), &[0.0, 0.0]);
    }

    #[test]
    fn a_row_without_keys_is_zero_and_never_reads_nan() {
        let batch = Batch::single(3);
        let inputs = inputs(&batch, &[f64::NAN; 3], &[f64::NAN, f64::INFINITY, f64::NAN]);
        let forward = forward(&Exact, &inputs, &|_: &Place<'_>| Vec::new());
        close(forward.out.data(), &[0.0; 3]);
        close(forward.lse.data(), &[f64::NEG_INFINITY; 3]);
        let grads = backward(&Exact, &inputs, &forward, &Array::filled(&[3, 1, 1], 1.0), None);
        for grad in [grads.query, grads.key, grads.value] {
            close(grad.data(), &[0.0; 3]);
        }
    }

    #[test]
    fn visible_keys_by_hand() {
        // Two sequences: 2 rows over 5 keys, then 3 rows over 3. Row 1 of the first sits at position 4.
        let batch = Batch::from_cu_seqlens(&[0, 2, 5], &[0, 5, 8]).expect("valid");
        let rows: Vec<_> = places(&batch, 0).collect();
        assert_eq!(rows.iter().map(|place| place.position).collect::<Vec<_>>(), [3, 4, 0, 1, 2]);
        assert_eq!(dense::visible_keys(&rows[0]), [0, 1, 2, 3]);
        assert_eq!(dense::visible_keys(&rows[3]), [5, 6]);
        assert_eq!(window::visible_keys(&rows[1], 2), [2, 3, 4]);
        assert_eq!(window::visible_keys(&rows[3], 2), [5, 6]);
        assert_eq!(window::visible_keys(&rows[4], 0), [7]);
        // Windows of 2 every 1: 4 compressed keys, then 2. Position 3 sees those that end at 1, 2, 3.
        let offsets = batch.compressed_offsets(2, 1);
        assert_eq!(compressed::visible_keys(&rows[0], &offsets, 2, 1), [0, 1, 2]);
        assert_eq!(compressed::visible_keys(&rows[2], &offsets, 2, 1), [0usize; 0]);
        assert_eq!(compressed::visible_keys(&rows[4], &offsets, 2, 1), [4, 5]);
        let ids = [-1, 1, 2, 0, i32::MAX, -7, 1, 1, 0, 9];
        let view = TensorView::new("topk_indices", &ids, &[1, 5, 2]).expect("shape");
        let ids = view.typed::<i32>("topk_indices").expect("i32");
        // Blocks of 2: row 0 lists block 1; row 1 blocks 2 and 0; row 2 nothing real; row 3 a future one.
        assert_eq!(selected::visible_keys(&rows[0], &ids, 2), [2, 3]);
        assert_eq!(selected::visible_keys(&rows[1], &ids, 2), [0, 1, 4]);
        assert_eq!(selected::visible_keys(&rows[2], &ids, 2), [0usize; 0]);
        assert_eq!(selected::visible_keys(&rows[3], &ids, 2), [0usize; 0]);
        assert_eq!(selected::visible_keys(&rows[4], &ids, 2), [5, 6]);
    }
}
