//! Results do not depend on the number of threads, nor on whether state is saved, bit for bit.

use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, Batch, Compression,
    CompressionGrads, DType, NsaArgs, NsaConfig, NsaGrads, Result, Rope, SelectArgs, Tensor,
};
use fsa_cpu::{CpuBackend, CpuOptions};

const HEADS: (usize, usize) = (6, 2);
const DIM: usize = 40;

/// Deterministic values in (-2, 2).
fn random(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect();
    Tensor::from_f32("random", &values, dtype, shape).expect("shape fits")
}

struct Inputs {
    batch: Batch,
    config: NsaConfig,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    weight: Tensor,
    grad_out: Tensor,
}

impl Inputs {
    fn new(dtype: DType) -> Self {
        // Long enough for several chunks, tiles and parts of every stage; packed, with q_len < kv_len.
        let batch = Batch::from_cu_seqlens(&[0, 3000, 3000, 3017], &[0, 3100, 3150, 3167]).expect("valid");
        let config = NsaConfig {
            kernel_size: 32,
            kernel_stride: 16,
            block_size: 32,
            topk: 6,
            window_size: 100,
            ..Default::default()
        };
        let (q, kv) = (batch.total_q(), batch.total_kv());
        Self {
            config,
            query: random(dtype, &[q, HEADS.0, DIM], 1),
            key: random(dtype, &[kv, HEADS.1, DIM], 2),
            value: random(dtype, &[kv, HEADS.1, DIM], 3),
            gates: random(dtype, &[q, HEADS.0, 3], 4),
            weight: random(dtype, &[HEADS.1, 32 * DIM, DIM], 5),
            grad_out: random(dtype, &[q, HEADS.0, DIM], 6),
            batch,
        }
    }

    fn nsa<'a>(&'a self, rope: &'a Rope) -> NsaArgs<'a> {
        NsaArgs {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            gates: self.gates.view(),
            batch: &self.batch,
            config: &self.config,
            key_compression: Compression::Linear { weight: self.weight.view(), position: None },
            value_compression: Compression::Mean,
            rope: Some(rope),
            softmax_scale: None,
        }
    }
}

fn zeros(like: &Tensor) -> Tensor {
    Tensor::zeros("zeros", like.dtype(), like.shape()).expect("fits")
}

/// Every output of the whole operation, forward and backward.
fn whole(backend: &CpuBackend, inputs: &Inputs, save: bool) -> Result<Vec<Tensor>> {
    let rope = Rope::default();
    let args = inputs.nsa(&rope);
    let mut out = zeros(&inputs.grad_out);
    let forward = backend.nsa(&args, &mut out.view_mut(), save)?;
    let indices = forward.topk_indices().expect("always returned").clone();
    let Some(saved) = forward.saved else { return Ok(vec![out, indices]) };
    let mut grads = [&inputs.query, &inputs.key, &inputs.value, &inputs.gates, &inputs.weight].map(zeros);
    let [grad_query, grad_key, grad_value, grad_gates, weight] = grads.each_mut().map(Tensor::view_mut);
    let key_compression = CompressionGrads { grad_weight: Some(weight), grad_position: None };
    let value_compression = CompressionGrads::default();
    let mut targets = NsaGrads { grad_query, grad_key, grad_value, grad_gates, key_compression, value_compression };
    backend.nsa_backward(&args, &saved, &inputs.grad_out.view(), &mut targets)?;
    let mut all = vec![out, indices];
    all.extend(grads);
    Ok(all)
}

/// Every output of one attention stage, forward and backward.
fn stage(
    backend: &CpuBackend,
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    grad: &Tensor,
) -> Result<Vec<Tensor>> {
    let shape = args.shape(stage)?;
    let mut out = Tensor::zeros("out", shape.dtype, &shape.out())?;
    let mut lse = Tensor::zeros("lse", DType::F32, &shape.lse())?;
    backend.attention(stage, args, &mut AttentionOutput { out: out.view_mut(), lse: lse.view_mut() })?;
    let mut grads = [args.query, args.key, args.value].map(|view| zeros(&view.to_tensor()));
    let [grad_query, grad_key, grad_value] = grads.each_mut().map(Tensor::view_mut);
    let inputs = AttentionGradArgs { out: out.view(), lse: lse.view(), grad_out: grad.view(), grad_lse: None };
    backend.attention_backward(stage, args, &inputs, &mut AttentionGrads { grad_query, grad_key, grad_value })?;
    let mut all = vec![out, lse];
    all.extend(grads);
    Ok(all)
}

fn backend(threads: usize) -> CpuBackend {
    CpuBackend::new(&CpuOptions { threads: Some(threads), isa: None }).expect("starts")
}

#[test]
fn one_two_and_five_threads_give_the_same_bits() -> Result<()> {
    for dtype in DType::FLOATS {
        let inputs = Inputs::new(dtype);
        let expected = whole(&backend(1), &inputs, true)?;
        for threads in [2, 5] {
            assert!(whole(&backend(threads), &inputs, true)? == expected, "{dtype}, {threads} threads");
        }
        let unsaved = whole(&backend(2), &inputs, false)?;
        assert!(unsaved[..] == expected[..2], "{dtype}: the slabs of a call without saved state change bits");
    }
    Ok(())
}

#[test]
fn every_attention_stage_repeats_bit_for_bit() -> Result<()> {
    let inputs = Inputs::new(DType::F32);
    let rope = Rope::default();
    let args = NsaArgs { key_compression: Compression::Mean, rope: None, ..inputs.nsa(&rope) };
    let mut out = zeros(&inputs.grad_out);
    let saved = backend(2).nsa(&args, &mut out.view_mut(), true)?.saved.expect("saved");
    let [key, value] = saved.compressed.each_ref().map(Tensor::view);
    let whole = args.attention();
    let compressed = AttentionArgs { key, value, ..whole };
    let topk_indices = saved.topk_indices.view();
    for (name, args) in [
        (AttentionStage::Dense, &whole),
        (AttentionStage::Window { window_size: 100 }, &whole),
        (AttentionStage::Selected { topk_indices, block_size: 32, validate: true }, &whole),
        (AttentionStage::Compressed { kernel_size: 32, kernel_stride: 16 }, &compressed),
    ] {
        let expected = stage(&backend(1), &name, args, &inputs.grad_out)?;
        for threads in [2, 2, 3] {
            assert!(stage(&backend(threads), &name, args, &inputs.grad_out)? == expected, "{}", name.stage());
        }
    }
    Ok(())
}

#[test]
fn scoring_does_not_change_compressed_attention() -> Result<()> {
    let inputs = Inputs::new(DType::F32);
    let rope = Rope::default();
    let args = NsaArgs { key_compression: Compression::Mean, rope: None, ..inputs.nsa(&rope) };
    let backend = backend(2);
    let mut out = zeros(&inputs.grad_out);
    let saved = backend.nsa(&args, &mut out.view_mut(), true)?.saved.expect("saved");
    let [key, value] = saved.compressed.each_ref().map(Tensor::view);
    let attention = AttentionArgs { key, value, ..args.attention() };
    let select = SelectArgs { attention, config: &inputs.config };
    let plain = stage(&backend, &select.stage(), &attention, &inputs.grad_out)?;
    assert!(plain[0] == saved.branches[0] && plain[1] == saved.lse[0]);
    Ok(())
}
