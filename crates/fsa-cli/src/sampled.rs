//! Results on long sequences against the f64 oracle, on a sample of the rows.
//!
//! The oracle's functions take any query rows together with the keys that each sees, so a sample is
//! evaluated as a small batch whose rows stand for rows of the long one. The bound is that of the conformance
//! suite: twice the error of naive evaluations in the same dtype, plus a few units in the last place.
//!
//! Gradients of keys and values sum over all rows. They are checked exactly with a `grad_out` that is zero
//! outside of the sample ([`Sample::grad_out`]): then only the sample contributes.

use crate::random::mix;
use fsa::{AttentionArgs, AttentionStage, Batch, DType, NsaArgs, NsaConfig, Sequence, Tensor, TensorView};
use fsa_oracle::arithmetic::{Arithmetic, Exact, Noisy, Rounded};
use fsa_oracle::array::{Array, read_row};
use fsa_oracle::attention::{self, AttentionForward, AttentionInputs, Place};
use fsa_oracle::combine::{self, CombineInputs};
use fsa_oracle::compress::CompressionInputs;
use fsa_oracle::nsa::{self, NsaInputs, NsaResult};
use fsa_oracle::select::{BoundedScores, Selection};
use fsa_oracle::{score, tolerance};
use serde::Serialize;

/// A tensor compared with the oracle: its worst element.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    /// Name of the tensor.
    pub tensor: String,
    /// Largest error.
    pub max_error: f64,
    /// Largest error that the tolerance rule allows.
    pub error_bound: f64,
}

impl Compared {
    /// True if the error is within its bound.
    pub fn passed(&self) -> bool {
        self.max_error <= self.error_bound
    }
}

/// Rows of a single sequence.
#[derive(Debug, Clone)]
pub struct Sample {
    rows: Vec<usize>,
    sequence: Sequence,
    batch: Batch,
}

impl Sample {
    /// `count` rows of the only sequence of `batch`, the first and the last among them.
    pub fn new(batch: &Batch, count: usize, seed: u64) -> fsa::Result<Self> {
        let [sequence] = batch.sequences() else {
            return Err(fsa::Error::input("batch", "one sequence", format!("{} sequences", batch.sequences().len())));
        };
        let len = sequence.query_len();
        let mut rows: Vec<usize> =
            (0..count as u64).map(|i| (mix(mix(seed) ^ i) % len.max(1) as u64) as usize).collect();
        rows.extend([0, len.saturating_sub(1)]);
        rows.retain(|row| *row < len);
        rows.sort_unstable();
        rows.dedup();
        let lengths = [0, rows.len() as i32];
        let batch = Batch::from_cu_seqlens(&lengths, &[0, batch.total_kv() as i32])?;
        Ok(Self { rows, sequence: sequence.clone(), batch })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// A gradient `[total_q, num_q_heads, value_dim]` of normal numbers in the sample and zeros elsewhere.
    pub fn grad_out(&self, dtype: DType, shape: &[usize], seed: u64) -> fsa::Result<Tensor> {
        let width = shape[1] * shape[2];
        let mut values = vec![0.0; shape[0] * width];
        for (row, numbers) in self.rows.iter().zip(crate::random::normal(seed, self.len() * width).chunks(width)) {
            values[row * width..][..width].copy_from_slice(numbers);
        }
        Tensor::from_f32("grad_out", &values, dtype, shape)
    }

    /// The sampled rows of a tensor `[total_q, ..]`.
    fn gather(&self, view: &TensorView<'_>) -> fsa::Result<Array> {
        let mut shape = view.shape().to_vec();
        shape[0] = self.rows.len();
        let mut data = Vec::with_capacity(shape.iter().product());
        for row in &self.rows {
            if shape.len() == 2 {
                data.extend(read_row("tensor", view, &[*row])?);
            } else {
                for head in 0..shape[1] {
                    data.extend(read_row("tensor", view, &[*row, head])?);
                }
            }
        }
        Ok(Array::new(&shape, data))
    }

    /// The sampled columns of a tensor `[num_q_heads, total_q]`.
    fn gather_lse(&self, view: &TensorView<'_>) -> fsa::Result<Array> {
        let heads = view.shape()[0];
        let mut data = Vec::with_capacity(heads * self.len());
        for head in 0..heads {
            let all = read_row("lse", view, &[head])?;
            data.extend(self.rows.iter().map(|row| all[*row]));
        }
        Ok(Array::new(&[heads, self.len()], data))
    }

    /// The real place of a row of the small batch; `row` stays the one of the small batch.
    fn place(&self, row: usize, kv_head: usize) -> Place<'_> {
        let position = self.sequence.first_position + self.rows[row];
        Place { sequence: &self.sequence, number: 0, row, position, kv_head }
    }

    /// `stage` on the sample. `inputs` hold the sampled queries and all keys.
    fn forward(
        &self,
        a: &dyn Arithmetic,
        stage: &AttentionStage<'_>,
        inputs: &AttentionInputs<'_>,
        batch: &Batch,
    ) -> fsa::Result<AttentionForward> {
        let real = attention::visible(stage, batch)?;
        let visible = |place: &Place<'_>| {
            // `selected` looks the row up in topk_indices, so here it must be the one of the long batch.
            let place = self.place(place.row, place.kv_head);
            real(&Place { row: self.rows[place.row], ..place })
        };
        Ok(attention::forward(a, inputs, &visible))
    }

    fn inputs<'a>(&'a self, args: &AttentionArgs<'_>) -> fsa::Result<AttentionInputs<'a>> {
        Ok(AttentionInputs {
            query: self.gather(&args.query)?,
            key: Array::from_view(&args.key),
            value: Array::from_view(&args.value),
            batch: &self.batch,
            scale: f64::from(args.scale()),
        })
    }

    /// `out` and `lse` of an attention stage.
    pub fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        [out, lse]: [TensorView<'_>; 2],
    ) -> fsa::Result<Vec<Compared>> {
        let inputs = self.inputs(args)?;
        let got = [self.gather(&out)?, self.gather_lse(&lse)?];
        compare(&["out", "lse"], [out.dtype(), DType::F32], &got, |a| {
            let forward = self.forward(a, stage, &inputs, args.batch)?;
            Ok(vec![forward.out, forward.lse])
        })
    }

    /// Gradients of query, key and value of an attention stage, for a `grad_out` of this sample.
    pub fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad_out: &TensorView<'_>,
        [grad_query, grad_key, grad_value]: [TensorView<'_>; 3],
    ) -> fsa::Result<Vec<Compared>> {
        let inputs = self.inputs(args)?;
        let grad_out = self.gather(grad_out)?;
        let got = [self.gather(&grad_query)?, Array::from_view(&grad_key), Array::from_view(&grad_value)];
        compare(&["grad_query", "grad_key", "grad_value"], [args.query.dtype(); 3], &got, |a| {
            let forward = self.forward(a, stage, &inputs, args.batch)?;
            let grads = attention::backward(a, &inputs, &forward, &grad_out, None);
            Ok(vec![grads.query, grads.key, grads.value])
        })
    }

    /// The whole operation without a rotary embedding, whose inputs stand for the sample.
    fn nsa_inputs<'a>(&'a self, args: &NsaArgs<'a>) -> fsa::Result<NsaInputs<'a>> {
        if args.rope.is_some() {
            return Err(fsa::Error::input("rope", "none in a sampled check", "one"));
        }
        Ok(NsaInputs {
            query: self.gather(&args.query)?,
            key: Array::from_view(&args.key),
            value: Array::from_view(&args.value),
            gates: self.gather(&args.gates)?,
            batch: &self.batch,
            config: args.config,
            key_compression: CompressionInputs::new(&args.key_compression),
            value_compression: CompressionInputs::new(&args.value_compression),
            rope: None,
            scale: f64::from(args.attention().scale()),
        })
    }

    /// Branches and output of the sample, with the selection given.
    fn nsa_forward(
        &self,
        a: &dyn Arithmetic,
        inputs: &NsaInputs<'_>,
        prepared: &nsa::Prepared<'_>,
        stages: &[AttentionStage<'_>; 3],
        batch: &Batch,
    ) -> fsa::Result<NsaResult> {
        let branches = [
            self.forward(a, &stages[0], &prepared.compressed, batch)?,
            self.forward(a, &stages[1], &prepared.tokens, batch)?,
            self.forward(a, &stages[2], &prepared.tokens, batch)?,
        ];
        let outputs = branches.each_ref().map(|branch| branch.out.clone());
        let out = combine::forward(a, &CombineInputs { gates: inputs.gates.clone(), branches: outputs });
        Ok(NsaResult { out, branches })
    }

    /// `out` of the whole operation and `lse` of its branches, with the selection that was made.
    pub fn nsa(
        &self,
        args: &NsaArgs<'_>,
        (out, [compressed, selected, window]): (&TensorView<'_>, [TensorView<'_>; 3]),
        topk_indices: TensorView<'_>,
    ) -> fsa::Result<Vec<Compared>> {
        let inputs = self.nsa_inputs(args)?;
        let stages = stages(args.config, topk_indices);
        let got =
            [self.gather(out)?, self.gather_lse(&compressed)?, self.gather_lse(&selected)?, self.gather_lse(&window)?];
        let names = ["out", "lse_compressed", "lse_selected", "lse_window"];
        let dtypes = [out.dtype(), DType::F32, DType::F32, DType::F32];
        compare(&names, dtypes, &got, |a| {
            let result = self.nsa_forward(a, &inputs, &nsa::prepare(a, &inputs), &stages, args.batch)?;
            let [compressed, selected, window] = result.branches.map(|branch| branch.lse);
            Ok(vec![result.out, compressed, selected, window])
        })
    }

    /// Gradients of the whole operation, for a `grad_out` of this sample.
    pub fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        topk_indices: TensorView<'_>,
        grad_out: &TensorView<'_>,
        [query, key, value, gates]: [TensorView<'_>; 4],
    ) -> fsa::Result<Vec<Compared>> {
        let inputs = self.nsa_inputs(args)?;
        let stages = stages(args.config, topk_indices);
        let grad_out = self.gather(grad_out)?;
        let got = [self.gather(&query)?, Array::from_view(&key), Array::from_view(&value), self.gather(&gates)?];
        let names = ["grad_query", "grad_key", "grad_value", "grad_gates"];
        compare(&names, [args.query.dtype(); 4], &got, |a| {
            let prepared = nsa::prepare(a, &inputs);
            let result = self.nsa_forward(a, &inputs, &prepared, &stages, args.batch)?;
            let grads = nsa::backward(a, &inputs, &prepared, &result, &grad_out);
            Ok(vec![grads.query, grads.key, grads.value, grads.gates])
        })
    }

    /// Rows and kv heads of the sample whose chosen blocks no rounding explains. `key` and `value` in `args` are the
    /// compressed ones.
    pub fn wrong_selections(
        &self,
        args: &AttentionArgs<'_>,
        config: &NsaConfig,
        topk_indices: &TensorView<'_>,
    ) -> fsa::Result<usize> {
        let inputs = self.inputs(args)?;
        let stage = compressed_stage(config);
        let forward = self.forward(&Exact, &stage, &inputs, args.batch)?;
        let places: Vec<Place<'_>> = (0..args.key.shape()[1])
            .flat_map(|kv_head| (0..self.len()).map(move |row| (row, kv_head)))
            .map(|(row, kv_head)| self.place(row, kv_head))
            .collect();
        let scores = places.iter().map(|place| score::row_scores(&Exact, &inputs, &forward, config, place)).collect();
        let selection = Selection { attention: forward, scores, topk_indices: Vec::new() };
        let ids = topk_indices.typed::<i32>("topk_indices")?;
        let mut wrong = 0;
        for place in &places {
            let verdicts = BoundedScores::new(&inputs, &selection, config, place).verdicts(config);
            let listed = |block: usize| {
                (0..config.topk).any(|slot| ids.at(&[place.kv_head, self.rows[place.row], slot]) == block as i32)
            };
            let contradicts = |(block, verdict): (usize, &Option<bool>)| verdict.is_some_and(|v| v != listed(block));
            wrong += usize::from(verdicts.iter().enumerate().any(contradicts));
        }
        Ok(wrong)
    }
}

fn compressed_stage(config: &NsaConfig) -> AttentionStage<'static> {
    AttentionStage::Compressed { kernel_size: config.kernel_size, kernel_stride: config.kernel_stride }
}

/// The branches in the order of the gates.
fn stages<'a>(config: &NsaConfig, topk_indices: TensorView<'a>) -> [AttentionStage<'a>; 3] {
    let block_size = config.block_size;
    [
        compressed_stage(config),
        AttentionStage::Selected { topk_indices, block_size, validate: false },
        AttentionStage::Window { window_size: config.window_size },
    ]
}

/// Compares every tensor with the exact evaluation, under the bound that the naive ones give.
pub fn compare<const N: usize>(
    names: &[&str; N],
    dtypes: [DType; N],
    got: &[Array; N],
    evaluate: impl Fn(&dyn Arithmetic) -> fsa::Result<Vec<Array>>,
) -> fsa::Result<Vec<Compared>> {
    let dtype = dtypes[0];
    let exact = evaluate(&Exact)?;
    let naive = [evaluate(&Rounded(dtype))?, evaluate(&Noisy::new(dtype, 1))?];
    let compared = |i: usize| {
        let error_bound = tolerance::bound(dtypes[i], &exact[i], naive.iter().map(|tensors| &tensors[i]));
        let pairs = got[i].data().iter().zip(exact[i].data());
        let error = |(got, exact): (&f64, &f64)| {
            let same = got == exact || (got.is_nan() && exact.is_nan());
            let error = (got - exact).abs();
            // A number where there should be none, or none where there should be one.
            if same {
                0.0
            } else if error.is_finite() {
                error
            } else {
                tolerance::UNBOUNDED
            }
        };
        let max_error = pairs.map(error).fold(0.0, f64::max);
        Compared { tensor: names[i].to_string(), max_error, error_bound }
    };
    Ok((0..N).map(compared).collect())
}
