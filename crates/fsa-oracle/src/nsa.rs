//! The whole operation: compression, rotation, three branches, combination; the selection is not differentiated.

use crate::arithmetic::{Arithmetic, Exact};
use crate::array::Array;
use crate::attention::{self, AttentionForward, AttentionInputs, AttentionRow, Place};
use crate::combine::{self, CombineInputs};
use crate::compress::{self, CompressGradients, CompressInputs, CompressionInputs};
use crate::{rope, select};
use fsa_core::ops::{compressed_positions, kv_positions, query_positions};
use fsa_core::{AttentionStage, Batch, NsaArgs, NsaConfig, Result, Rope, Tensor, TensorView};

/// Inputs of the whole operation, widened.
#[derive(Debug, Clone)]
pub struct NsaInputs<'a> {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: Array,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub key: Array,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub value: Array,
    /// `[total_q, 3]` or `[total_q, num_q_heads, 3]`.
    pub gates: Array,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// What is computed.
    pub config: &'a NsaConfig,
    /// How keys are compressed.
    pub key_compression: CompressionInputs,
    /// How values are compressed.
    pub value_compression: CompressionInputs,
    /// Rotary embedding, if any.
    pub rope: Option<&'a Rope>,
    /// Factor of the logits.
    pub scale: f64,
}

impl<'a> NsaInputs<'a> {
    /// Widens the arguments of a call.
    pub fn new(args: &NsaArgs<'a>) -> Self {
        Self {
            query: Array::from_view(&args.query),
            key: Array::from_view(&args.key),
            value: Array::from_view(&args.value),
            gates: Array::from_view(&args.gates),
            batch: args.batch,
            config: args.config,
            key_compression: CompressionInputs::new(&args.key_compression),
            value_compression: CompressionInputs::new(&args.value_compression),
            rope: args.rope,
            scale: f64::from(args.attention().scale()),
        }
    }

    fn compress(&self, input: &Array, compression: &CompressionInputs) -> CompressInputs<'a> {
        CompressInputs {
            input: input.clone(),
            batch: self.batch,
            kernel_size: self.config.kernel_size,
            kernel_stride: self.config.kernel_stride,
            compression: compression.clone(),
        }
    }

    /// Rotates, or rotates back, if there is a rotary embedding.
    fn rotate(&self, a: &dyn Arithmetic, array: Array, positions: &[usize], inverse: bool) -> Array {
        match self.rope {
            Some(rope) => rope::rotate(a, &array, positions, rope, inverse),
            None => array,
        }
    }

    fn compressed_positions(&self) -> Vec<usize> {
        compressed_positions(self.batch, self.config.kernel_size, self.config.kernel_stride)
    }
}

/// What the branches attend to.
#[derive(Debug, Clone)]
pub struct Prepared<'a> {
    /// Rotated query, rotated compressed keys, compressed values.
    pub compressed: AttentionInputs<'a>,
    /// Rotated query, rotated keys, values.
    pub tokens: AttentionInputs<'a>,
}

/// Compresses keys before they are rotated, then rotates query, keys and compressed keys.
pub fn prepare<'a>(a: &dyn Arithmetic, inputs: &NsaInputs<'a>) -> Prepared<'a> {
    let compressed_key = compress::forward(a, &inputs.compress(&inputs.key, &inputs.key_compression));
    let compressed_value = compress::forward(a, &inputs.compress(&inputs.value, &inputs.value_compression));
    let query = inputs.rotate(a, inputs.query.clone(), &query_positions(inputs.batch), false);
    let key = inputs.rotate(a, inputs.key.clone(), &kv_positions(inputs.batch), false);
    let compressed_key = inputs.rotate(a, compressed_key, &inputs.compressed_positions(), false);
    let (batch, scale) = (inputs.batch, inputs.scale);
    Prepared {
        compressed: AttentionInputs {
            query: query.clone(),
            key: compressed_key,
            value: compressed_value,
            batch,
            scale,
        },
        tokens: AttentionInputs { query, key, value: inputs.value.clone(), batch, scale },
    }
}

/// Result of the forward.
#[derive(Debug, Clone)]
pub struct NsaResult {
    /// `[total_q, num_q_heads, value_dim]`.
    pub out: Array,
    /// Compressed, selected, window.
    pub branches: [AttentionForward; 3],
}

/// Gradients of the whole operation; shapes of the inputs.
#[derive(Debug, Clone)]
pub struct NsaGradients {
    /// `[total_q, num_q_heads, head_dim]`.
    pub query: Array,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub key: Array,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub value: Array,
    /// Shape of the gates.
    pub gates: Array,
    /// Weight and position of the compression of keys (its `input` is already in `key`).
    pub key_compression: [Option<Array>; 2],
    /// Weight and position of the compression of values.
    pub value_compression: [Option<Array>; 2],
}

impl NsaGradients {
    /// Query, key, value, gates, then the parameters that exist: key weight, key position, value weight, value position.
    pub fn into_vec(self) -> Vec<Array> {
        let parameters = self.key_compression.into_iter().chain(self.value_compression).flatten();
        [self.query, self.key, self.value, self.gates].into_iter().chain(parameters).collect()
    }
}

/// The three branches in the order of the gates.
fn stages<'t>(config: &NsaConfig, topk_indices: TensorView<'t>) -> [AttentionStage<'t>; 3] {
    [
        fsa_core::backend::compressed_stage(config),
        AttentionStage::Selected { topk_indices, block_size: config.block_size, validate: false },
        AttentionStage::Window { window_size: config.window_size },
    ]
}

/// The forward with a given selection.
pub fn forward(
    a: &dyn Arithmetic,
    inputs: &NsaInputs<'_>,
    prepared: &Prepared<'_>,
    topk_indices: TensorView<'_>,
) -> Result<NsaResult> {
    let [compressed, selected, window] = stages(inputs.config, topk_indices);
    let attend = |stage: AttentionStage<'_>, inputs: &AttentionInputs<'_>| -> Result<AttentionForward> {
        Ok(attention::forward(a, inputs, &*attention::visible(&stage, inputs.batch)?))
    };
    let branches = [
        attend(compressed, &prepared.compressed)?,
        attend(selected, &prepared.tokens)?,
        attend(window, &prepared.tokens)?,
    ];
    let out = combine::forward(a, &combine_inputs(inputs, &branches));
    Ok(NsaResult { out, branches })
}

fn combine_inputs(inputs: &NsaInputs<'_>, branches: &[AttentionForward; 3]) -> CombineInputs {
    CombineInputs { gates: inputs.gates.clone(), branches: branches.each_ref().map(|branch| branch.out.clone()) }
}

/// The gradients, with the selection of `result`.
pub fn backward(
    a: &dyn Arithmetic,
    inputs: &NsaInputs<'_>,
    prepared: &Prepared<'_>,
    result: &NsaResult,
    grad_out: &Array,
) -> NsaGradients {
    let combined = combine::backward(a, &combine_inputs(inputs, &result.branches), grad_out);
    let branch = |b: usize, tokens: &AttentionInputs<'_>| {
        attention::backward(a, tokens, &result.branches[b], &combined.branches[b], None)
    };
    let compressed = branch(0, &prepared.compressed);
    let (selected, window) = (branch(1, &prepared.tokens), branch(2, &prepared.tokens));
    let add = |x: Array, y: &Array| x.zip(y, |x, y| a.op(x + y));
    let store = |mut array: Array| {
        a.store_all(array.data_mut());
        array
    };
    let query = store(add(add(compressed.query, &selected.query), &window.query));
    let key = store(add(selected.key, &window.key));
    let value = add(selected.value, &window.value);
    let query = inputs.rotate(a, query, &query_positions(inputs.batch), true);
    let key = inputs.rotate(a, key, &kv_positions(inputs.batch), true);
    let compressed_key = inputs.rotate(a, compressed.key, &inputs.compressed_positions(), true);
    let through = |input: &Array, compression: &CompressionInputs, grad: &Array| -> CompressGradients {
        compress::backward(a, &inputs.compress(input, compression), grad)
    };
    let keys = through(&inputs.key, &inputs.key_compression, &compressed_key);
    let values = through(&inputs.value, &inputs.value_compression, &compressed.value);
    NsaGradients {
        query,
        key: store(add(key, &keys.input)),
        value: store(add(value, &values.input)),
        gates: combined.gates,
        key_compression: [keys.weight, keys.position],
        value_compression: [values.weight, values.position],
    }
}

/// The selection that the whole operation makes, `[num_kv_heads, total_q, topk]` i32.
pub fn selection(a: &dyn Arithmetic, inputs: &NsaInputs<'_>, prepared: &Prepared<'_>) -> Result<Tensor> {
    let (heads, rows) = (inputs.key.shape()[1], inputs.query.shape()[0]);
    select::forward(a, &prepared.compressed, inputs.config)?.tensor(heads, rows, inputs.config.topk)
}

/// The whole operation of a call, in f64, with the given selection or its own.
pub fn nsa(args: &NsaArgs<'_>, topk_indices: Option<&TensorView<'_>>) -> Result<(NsaResult, Tensor)> {
    args.shape()?;
    let inputs = NsaInputs::new(args);
    let prepared = prepare(&Exact, &inputs);
    let topk = match topk_indices {
        Some(given) => given.to_tensor(),
        None => selection(&Exact, &inputs, &prepared)?,
    };
    Ok((forward(&Exact, &inputs, &prepared, topk.view())?, topk))
}

/// The gradients of a call, in f64, with the given selection.
pub fn nsa_backward(
    args: &NsaArgs<'_>,
    topk_indices: &TensorView<'_>,
    grad_out: &TensorView<'_>,
) -> Result<NsaGradients> {
    args.shape()?;
    let inputs = NsaInputs::new(args);
    let prepared = prepare(&Exact, &inputs);
    let result = forward(&Exact, &inputs, &prepared, *topk_indices)?;
    Ok(backward(&Exact, &inputs, &prepared, &result, &Array::from_view(grad_out)))
}

/// Single rows of the whole operation, in f64: keys are compressed and rotated once, then every sampled row costs
/// only the keys that it sees.
#[derive(Debug, Clone)]
pub struct NsaRows<'a> {
    inputs: NsaInputs<'a>,
    prepared: Prepared<'a>,
}

impl<'a> NsaRows<'a> {
    /// Checks the call, compresses and rotates.
    pub fn new(args: &NsaArgs<'a>) -> Result<Self> {
        args.shape()?;
        let inputs = NsaInputs::new(args);
        let prepared = prepare(&Exact, &inputs);
        Ok(Self { inputs, prepared })
    }

    /// Compressed, selected and window attention of a row and head, and the gated sum of their outputs.
    pub fn row(&self, topk_indices: TensorView<'_>, row: usize, head: usize) -> Result<([AttentionRow; 3], Vec<f64>)> {
        let group = self.prepared.tokens.gqa_group_size().max(1);
        let place = attention::places(self.inputs.batch, head / group).find(|place| place.row == row);
        let [compressed, selected, window] = stages(self.inputs.config, topk_indices);
        let attend = |stage: AttentionStage<'_>, inputs: &AttentionInputs<'_>| -> Result<AttentionRow> {
            let visible = attention::visible(&stage, self.inputs.batch)?;
            let keys = place.as_ref().map_or(Vec::new(), |place: &Place<'_>| visible(place));
            Ok(attention::one_row(&Exact, inputs, &keys, row, head))
        };
        let rows = [
            attend(compressed, &self.prepared.compressed)?,
            attend(selected, &self.prepared.tokens)?,
            attend(window, &self.prepared.tokens)?,
        ];
        let mut out = vec![0.0; self.inputs.value.shape()[2]];
        let gates = &self.inputs.gates;
        let gates = if gates.shape().len() == 2 { gates.row(&[row]) } else { gates.row(&[row, head]) };
        for (gate, branch) in gates.iter().zip(&rows) {
            Exact.add_scaled(&mut out, *gate, &branch.out);
        }
        Ok((rows, out))
    }
}
