//! Stage `nsa`: the whole operation, and its backward.

use crate::gradient::{GradInputs, GradSinks};
use crate::rows::{Rows, Sink};
use crate::simd::Isa;
use crate::tile::Operands;
use crate::{combine, compress, rope, run};
use fsa_core::ops::{compressed_positions, kv_positions, query_positions};
use fsa_core::plan::{Plan, PlanInput, SLAB_BYTES, slab_rows};
use fsa_core::{
    AttentionArgs, AttentionOutput, AttentionShape, AttentionStage, Batch, CombineArgs, CompressArgs, DType, NsaArgs,
    NsaForward, NsaGrads, NsaSaved, Result, Rope, RopeArgs, SelectArgs, Tensor, TensorView, TensorViewMut,
};
use std::ops::Range;

/// Forward.
pub(crate) fn nsa(args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool, isa: Isa) -> Result<NsaForward> {
    let shape = args.shape_with_output(out)?;
    // Everything that is allocated is allocated before the first write to the caller's output.
    let rows =
        if save { shape.total_q } else { slab_rows(shape.num_q_heads, shape.value_dim, shape.dtype.size_bytes()) };
    let mut branches = Branches::new(&shape, rows.min(shape.total_q))?;
    let topk_shape = [shape.num_kv_heads, shape.total_q, args.config.topk];
    let mut topk_indices = Tensor::zeros("topk_indices", DType::I32, &topk_shape)?;
    let inputs = Prepared::new(args, &shape, isa)?;
    for start in (0..shape.total_q).step_by(rows.max(1)) {
        let slab = start..(start + rows).min(shape.total_q);
        branches.run(args, &inputs, &mut topk_indices, slab, out, isa)?;
    }
    if !save {
        return Ok(NsaForward { topk_indices: Some(topk_indices), saved: None });
    }
    let Branches { out: branches, lse } = branches;
    let Prepared { rotated, compressed } = inputs;
    let saved = NsaSaved { rotated, compressed, branches, lse, topk_indices };
    Ok(NsaForward { topk_indices: None, saved: Some(saved) })
}

/// What the branches read besides the caller's tensors.
struct Prepared {
    rotated: Option<[Tensor; 2]>,
    compressed: [Tensor; 2],
}

impl Prepared {
    fn new(args: &NsaArgs<'_>, shape: &AttentionShape, isa: Isa) -> Result<Self> {
        let config = args.config;
        let compressed = |compress: CompressArgs<'_>, dim: usize| -> Result<Tensor> {
            let rows = args.batch.total_compressed(config.kernel_size, config.kernel_stride);
            let mut out = Tensor::zeros("compressed", shape.dtype, &[rows, shape.num_kv_heads, dim])?;
            compress::compress(&compress, &mut out.view_mut(), isa)?;
            Ok(out)
        };
        let mut key = compressed(args.compress_key(), shape.head_dim)?;
        let value = compressed(args.compress_value(), shape.value_dim)?;
        let mut rotated = None;
        if let Some(parameters) = args.rope {
            let positions = compressed_positions(args.batch, config.kernel_size, config.kernel_stride);
            key = rotate(parameters, &key.view(), &positions, false)?;
            let query = rotate(parameters, &args.query, &query_positions(args.batch), false)?;
            rotated = Some([query, rotate(parameters, &args.key, &kv_positions(args.batch), false)?]);
        }
        Ok(Self { rotated, compressed: [key, value] })
    }
}

fn rotate(parameters: &Rope, input: &TensorView<'_>, positions: &[usize], inverse: bool) -> Result<Tensor> {
    let mut out = Tensor::zeros("rotated", input.dtype(), input.shape())?;
    rope::rope(&RopeArgs { input: *input, positions, rope: parameters, inverse }, &mut out.view_mut())?;
    Ok(out)
}

/// Outputs of the three branches for all rows or for one slab of them.
struct Branches {
    out: [Tensor; 3],
    lse: [Tensor; 3],
}

impl Branches {
    fn new(shape: &AttentionShape, rows: usize) -> Result<Self> {
        let out = || Tensor::zeros("branch output", shape.dtype, &[rows, shape.num_q_heads, shape.value_dim]);
        let lse = || Tensor::zeros("branch lse", DType::F32, &[shape.num_q_heads, rows]);
        Ok(Self { out: [out()?, out()?, out()?], lse: [lse()?, lse()?, lse()?] })
    }

    /// The three branches and their sum for the rows `rows` of the query.
    fn run(
        &mut self,
        args: &NsaArgs<'_>,
        inputs: &Prepared,
        topk_indices: &mut Tensor,
        rows: Range<usize>,
        out: &mut TensorViewMut<'_>,
        isa: Isa,
    ) -> Result<()> {
        let batch = args.batch.slice_queries(rows.clone());
        let (query, key) = match &inputs.rotated {
            Some([query, key]) => (query.view(), key.view()),
            None => (args.query, args.key),
        };
        let query = query.slice_axis("query", 0, rows.clone())?;
        let whole = AttentionArgs { query, key, value: args.value, batch: &batch, softmax_scale: args.softmax_scale };
        let [key, value] = &inputs.compressed;
        let compressed = AttentionArgs { key: key.view(), value: value.view(), ..whole };
        let mut indices = topk_indices.view_mut();
        let mut indices = indices.slice_axis("topk_indices", 1, rows.clone())?;
        let select = SelectArgs { attention: compressed, config: args.config };
        self.write(0, rows.len(), |output| run::select(&select, output, &mut indices, isa))?;
        let stage = AttentionStage::Selected {
            topk_indices: indices.view(),
            block_size: args.config.block_size,
            validate: false,
        };
        self.write(1, rows.len(), |output| run::attention(&stage, &whole, output, isa))?;
        let stage = AttentionStage::Window { window_size: args.config.window_size };
        self.write(2, rows.len(), |output| run::attention(&stage, &whole, output, isa))?;
        let branch = |i: usize| self.out[i].view().slice_axis("branch output", 0, 0..rows.len());
        let gates = args.gates.slice_axis("gates", 0, rows.clone())?;
        let combine = CombineArgs { gates, branches: [branch(0)?, branch(1)?, branch(2)?] };
        combine::combine(&combine, &mut out.slice_axis("out", 0, rows)?, isa)
    }

    fn write(
        &mut self,
        branch: usize,
        rows: usize,
        stage: impl FnOnce(&mut AttentionOutput<'_>) -> Result<()>,
    ) -> Result<()> {
        let (mut out, mut lse) = (self.out[branch].view_mut(), self.lse[branch].view_mut());
        let out = out.slice_axis("branch output", 0, 0..rows)?;
        let lse = lse.slice_axis("branch lse", 1, 0..rows)?;
        stage(&mut AttentionOutput { out, lse })
    }
}

/// Backward. Gradients are summed over the branches in f32 and rounded once.
pub(crate) fn nsa_backward(
    args: &NsaArgs<'_>,
    saved: &NsaSaved,
    grad_out: &TensorView<'_>,
    grads: &mut NsaGrads<'_>,
    isa: Isa,
) -> Result<()> {
    let shape = grads.validate(args, saved, grad_out)?;
    let mut sums = Sums::new(args, saved)?;
    sums.branches(args, saved, grad_out, &shape, isa)?;
    sums.unrotate(args)?;
    let combine = CombineArgs { gates: args.gates, branches: saved.branches.each_ref().map(Tensor::view) };
    combine::grad_gates(&combine, grad_out, &mut grads.grad_gates, isa)?;
    let Sums { query, mut key, mut value, key_compressed, value_compressed } = sums;
    for (args, grad, target, parameters) in [
        (args.compress_key(), &key_compressed, &mut key, &mut grads.key_compression),
        (args.compress_value(), &value_compressed, &mut value, &mut grads.value_compression),
    ] {
        let mut target = target.view_mut();
        let sinks = compress::ParameterSinks::new(&mut parameters.grad_weight, &mut parameters.grad_position)?;
        let grad = Rows::new("grad_out", &grad.view())?;
        compress::gradients(&args, grad, (&Sink::new("grad_input", &mut target)?, true), &sinks, isa)?;
    }
    for (source, target) in [(query, &mut grads.grad_query), (key, &mut grads.grad_key), (value, &mut grads.grad_value)]
    {
        round(&source, target)?;
    }
    Ok(())
}

/// Writes an f32 tensor `[rows, heads, dim]` in the type of `target`.
fn round(source: &Tensor, target: &mut TensorViewMut<'_>) -> Result<()> {
    let (rows, view) = (Rows::new("sum", &source.view())?, source.shape().to_vec());
    let sink = Sink::new("gradient", target)?;
    let mut sink = sink.lock();
    let mut row = vec![0.0; view[2]];
    for i in 0..view[0] {
        for head in 0..view[1] {
            rows.load(&[i, head], &mut row);
            sink.store(&[i, head], &row);
        }
    }
    Ok(())
}

/// Gradients in f32, summed over the branches.
struct Sums {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_compressed: Tensor,
    value_compressed: Tensor,
}

impl Sums {
    fn new(args: &NsaArgs<'_>, saved: &NsaSaved) -> Result<Self> {
        let zeros = |name: &str, like: &[usize]| Tensor::zeros(name, DType::F32, like);
        Ok(Self {
            query: zeros("sum of grad_query", args.query.shape())?,
            key: zeros("sum of grad_key", args.key.shape())?,
            value: zeros("sum of grad_value", args.value.shape())?,
            key_compressed: zeros("grad of compressed keys", saved.compressed[0].shape())?,
            value_compressed: zeros("grad of compressed values", saved.compressed[1].shape())?,
        })
    }

    /// Adds the gradients of the three branches.
    fn branches(
        &mut self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        shape: &AttentionShape,
        isa: Isa,
    ) -> Result<()> {
        let config = args.config;
        let (query, key) = match &saved.rotated {
            Some([query, key]) => (query.view(), key.view()),
            None => (args.query, args.key),
        };
        let whole = AttentionArgs { query, key, ..args.attention() };
        let [key, value] = saved.compressed.each_ref().map(Tensor::view);
        let compressed = AttentionArgs { key, value, ..whole };
        let topk_indices = saved.topk_indices.view();
        let stages = [
            AttentionStage::Compressed { kernel_size: config.kernel_size, kernel_stride: config.kernel_stride },
            AttentionStage::Selected { topk_indices, block_size: config.block_size, validate: false },
            AttentionStage::Window { window_size: config.window_size },
        ];
        let gates = combine::Gates::new(&args.gates, shape)?;
        for (b, stage) in stages.iter().enumerate() {
            let (attention, key, value) = match b {
                0 => (compressed, &mut self.key_compressed, &mut self.value_compressed),
                _ => (whole, &mut self.key, &mut self.value),
            };
            let gate = |row: usize, head: usize| gates.get(row, head)[b];
            let inputs = GradInputs {
                out: Rows::new("out", &saved.branches[b].view())?,
                lse: Rows::new("lse", &saved.lse[b].view())?,
                grad_out: Rows::new("grad_out", grad_out)?,
                grad_lse: None,
                gate: Some(&gate),
            };
            let (mut query, mut key, mut value) = (self.query.view_mut(), key.view_mut(), value.view_mut());
            let sinks = GradSinks {
                query: &Sink::new("grad_query", &mut query)?,
                key: &Sink::new("grad_key", &mut key)?,
                value: &Sink::new("grad_value", &mut value)?,
                accumulate: true,
            };
            let shape = AttentionShape { total_keys: stage.total_keys(args.batch), ..*shape };
            let operands = Operands::new(&attention, shape, isa)?;
            run::gradients(stage, &operands, args.batch, &inputs, &sinks)?;
        }
        Ok(())
    }

    /// Takes the gradients back through the rotary embedding.
    fn unrotate(&mut self, args: &NsaArgs<'_>) -> Result<()> {
        let Some(parameters) = args.rope else { return Ok(()) };
        let (batch, config): (&Batch, _) = (args.batch, args.config);
        let windows = compressed_positions(batch, config.kernel_size, config.kernel_stride);
        self.query = rotate(parameters, &self.query.view(), &query_positions(batch), true)?;
        self.key = rotate(parameters, &self.key.view(), &kv_positions(batch), true)?;
        self.key_compressed = rotate(parameters, &self.key_compressed.view(), &windows, true)?;
        Ok(())
    }
}

/// Upper bound of the scratch memory of [`nsa`] without saved state.
pub(crate) fn workspace_bytes(args: &NsaArgs<'_>, workers: usize) -> Result<usize> {
    let shape = args.shape()?;
    let plan = Plan::new(&PlanInput {
        shape,
        batch: args.batch,
        config: args.config,
        linear_compression: PlanInput::is_linear(&args.key_compression, &args.value_compression),
        rope: args.rope.is_some(),
        workers,
    })?;
    let size = shape.dtype.size_bytes();
    let windows = args.batch.total_compressed(args.config.kernel_size, args.config.kernel_stride);
    let prepared = windows * shape.num_kv_heads * (shape.head_dim + shape.value_dim) * size;
    let rotated = (shape.total_q * shape.num_q_heads + shape.total_keys * shape.num_kv_heads) * shape.head_dim * size;
    let rotated = if args.rope.is_some() { rotated } else { 0 };
    let row = 3 * shape.num_q_heads * (shape.value_dim * size + 4);
    let slab = SLAB_BYTES.min(shape.total_q * row).max(row);
    Ok(plan.forward_workspace_bytes() + slab + prepared + rotated)
}
