//! Wrong input is an error that names the argument, what was expected and what came, and the outputs
//! keep every bit that they had before.

mod fixture;
mod poison;

use fixture::{HEAD_DIM, Inputs, KV_HEADS, Q_HEADS, TOTAL, VALUE_DIM, engine, filled};
use fsa::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Batch, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, Compression, CompressionGrads, DType, Error, NsaArgs, NsaConfig,
    NsaGrads, NsaSaved, Rope, RopeArgs, SelectArgs, Selection, Tensor, TensorView, TensorViewMut,
};
use poison::Poisoned;

const OUT: [usize; 3] = [TOTAL, Q_HEADS, VALUE_DIM];
const LSE: [usize; 2] = [Q_HEADS, TOTAL];
const QUERY: [usize; 3] = [TOTAL, Q_HEADS, HEAD_DIM];
const KEY: [usize; 3] = [TOTAL, KV_HEADS, HEAD_DIM];
const VALUE: [usize; 3] = [TOTAL, KV_HEADS, VALUE_DIM];

#[track_caller]
fn assert_message(error: &Error, message: &str) {
    assert_eq!(error.to_string(), message);
}

/// Forward and backward of an attention stage refuse `args` with `message` and write nothing.
#[track_caller]
fn attention_refuses(stage: &AttentionStage<'_>, args: &AttentionArgs<'_>, message: &str) {
    let engine = engine();
    let [mut out, mut lse] = [Poisoned::new(&OUT), Poisoned::new(&LSE)];
    let mut output = AttentionOutput { out: out.view(), lse: lse.view() };
    assert_message(&engine.attention_into(stage, args, &mut output).expect_err(message), message);
    assert_message(&engine.attention(stage, args).expect_err(message), message);

    let [of_out, of_lse] = [filled("out", DType::F32, &OUT), filled("lse", DType::F32, &LSE)];
    let grad = AttentionGradArgs { out: of_out.view(), lse: of_lse.view(), grad_out: of_out.view(), grad_lse: None };
    let mut poisoned = [QUERY, KEY, VALUE].map(|shape| Poisoned::new(&shape));
    let [grad_query, grad_key, grad_value] = poisoned.each_mut().map(Poisoned::view);
    let mut grads = AttentionGrads { grad_query, grad_key, grad_value };
    assert_message(&engine.attention_backward_into(stage, args, &grad, &mut grads).expect_err(message), message);
    poisoned.iter().chain([&out, &lse]).for_each(Poisoned::assert_untouched);
}

/// Every attention stage over uncompressed keys refuses `args`.
#[track_caller]
fn stages_refuse(args: &AttentionArgs<'_>, message: &str) {
    let ids = Tensor::new("topk_indices", vec![0i32; KV_HEADS * TOTAL], &[KV_HEADS, TOTAL, 1]).expect("shape");
    let selected = AttentionStage::Selected { topk_indices: ids.view(), block_size: 16, validate: false };
    for stage in [AttentionStage::Dense, AttentionStage::Window { window_size: 4 }, selected] {
        attention_refuses(&stage, args, message);
    }
}

/// Forward and backward of the whole operation refuse `args` with `message` and write nothing.
#[track_caller]
fn nsa_refuses(args: &NsaArgs<'_>, message: &str) {
    let (engine, inputs) = (engine(), Inputs::new());
    let mut out = Poisoned::new(&OUT);
    assert_message(&engine.nsa_into(args, &mut out.view(), true).expect_err(message), message);
    assert_message(&engine.nsa(args, true).expect_err(message), message);
    out.assert_untouched();
    let (_, saved) = engine.nsa(&inputs.nsa(), true).expect("the unbroken call").into_parts();
    nsa_backward_refuses(args, &saved.expect("asked for"), &filled("grad_out", DType::F32, &OUT).view(), message);
}

/// The backward of the whole operation refuses its arguments with `message` and writes nothing.
#[track_caller]
fn nsa_backward_refuses(args: &NsaArgs<'_>, saved: &NsaSaved, grad_out: &TensorView<'_>, message: &str) {
    let mut poisoned = [&QUERY[..], &KEY, &VALUE, args.gates.shape()].map(Poisoned::new);
    let [grad_query, grad_key, grad_value, grad_gates] = poisoned.each_mut().map(Poisoned::view);
    let [key_compression, value_compression] = [CompressionGrads::default(), CompressionGrads::default()];
    let mut grads = NsaGrads { grad_query, grad_key, grad_value, grad_gates, key_compression, value_compression };
    let error = engine().nsa_backward_into(args, saved, grad_out, &mut grads).expect_err(message);
    assert_message(&error, message);
    poisoned.iter().for_each(Poisoned::assert_untouched);
}

#[test]
fn wrong_rank() {
    let inputs = Inputs::new();
    let flat = filled("flat", DType::F32, &[TOTAL, Q_HEADS * HEAD_DIM]);
    let message = "query: expected rank 3 [total_q, num_q_heads, head_dim], got shape [80, 32]";
    stages_refuse(&AttentionArgs { query: flat.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { query: flat.view(), ..inputs.nsa() }, message);
    let deep = filled("deep", DType::F32, &[1, TOTAL, KV_HEADS, HEAD_DIM]);
    let message = "key: expected rank 3 [total_kv, num_kv_heads, head_dim], got shape [1, 80, 2, 8]";
    stages_refuse(&AttentionArgs { key: deep.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { key: deep.view(), ..inputs.nsa() }, message);
}

#[test]
fn wrong_dtype() {
    let inputs = Inputs::new();
    let half = filled("key", DType::Bf16, &KEY);
    let message = "key: expected dtype f32, got dtype bf16";
    stages_refuse(&AttentionArgs { key: half.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { key: half.view(), ..inputs.nsa() }, message);
    let whole = Tensor::zeros("query", DType::I32, &QUERY).expect("small");
    let message = "query: expected dtype f32, bf16 or f16, got dtype i32";
    stages_refuse(&AttentionArgs { query: whole.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { query: whole.view(), ..inputs.nsa() }, message);
}

#[test]
fn heads_that_do_not_divide() {
    let inputs = Inputs::new();
    let query = filled("query", DType::F32, &[TOTAL, 3, HEAD_DIM]);
    let message = "query: expected a positive number of heads that is a multiple of num_kv_heads 2, got 3 heads";
    stages_refuse(&AttentionArgs { query: query.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { query: query.view(), ..inputs.nsa() }, message);
}

#[test]
fn unsupported_head_dim() {
    let inputs = Inputs::new();
    let [query, key] = [[TOTAL, Q_HEADS, 12], [TOTAL, KV_HEADS, 12]].map(|shape| filled("x", DType::F32, &shape));
    let message = "head_dim is not supported: got 12, supported: multiples of 8 up to 256";
    stages_refuse(&AttentionArgs { query: query.view(), key: key.view(), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { query: query.view(), key: key.view(), ..inputs.nsa() }, message);
}

#[test]
fn a_scale_that_is_no_number() {
    let inputs = Inputs::new();
    let message = "softmax_scale: expected a finite number, got NaN";
    stages_refuse(&AttentionArgs { softmax_scale: Some(f32::NAN), ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { softmax_scale: Some(f32::NAN), ..inputs.nsa() }, message);
}

#[test]
fn prefix_sums_that_decrease() {
    let error = Batch::from_cu_seqlens(&[0, 56, 40, 80], &[0, 56, 56, 80]).expect_err("decreases");
    assert_message(&error, "cu_seqlens_q: expected prefix sums that do not decrease, got 40 after 56 at index 2");
    let error = Batch::from_cu_seqlens(&[0, 56], &[0, 56, 80]).expect_err("lengths differ");
    assert_message(&error, "cu_seqlens_kv: expected 2 elements, as cu_seqlens_q, got 3");
}

#[test]
fn prefix_sums_that_do_not_end_at_the_total() {
    let inputs = Inputs::new();
    let short = Batch::from_cu_seqlens(&[0, 79], &[0, 80]).expect("valid by itself");
    let message = "query: expected 79 rows, the last element of cu_seqlens_q, got 80 rows";
    stages_refuse(&AttentionArgs { batch: &short, ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { batch: &short, ..inputs.nsa() }, message);
    let long = Batch::from_cu_seqlens(&[0, 80], &[0, 81]).expect("valid by itself");
    let message = "key: expected 81 rows, by cu_seqlens_kv, got 80 rows";
    stages_refuse(&AttentionArgs { batch: &long, ..inputs.attention() }, message);
    nsa_refuses(&NsaArgs { batch: &long, ..inputs.nsa() }, message);
}

#[test]
fn a_configuration_that_breaks_a_requirement() {
    let inputs = Inputs::new();
    let base = || inputs.config.clone();
    let broken = [
        (
            NsaConfig { kernel_size: 12, kernel_stride: 12, ..base() },
            "block_size: expected a multiple of kernel_stride 12, got 16",
        ),
        (NsaConfig { block_size: 24, ..base() }, "block_size: expected one of 16, 32, 64, 128, 256, got 24"),
        (
            NsaConfig { kernel_size: 10, ..base() },
            "kernel_size: expected a positive multiple of kernel_stride 4, got 10",
        ),
        (NsaConfig { kernel_stride: 0, ..base() }, "kernel_stride: expected at least 1, got 0"),
    ];
    for (config, message) in &broken {
        nsa_refuses(&NsaArgs { config, ..inputs.nsa() }, message);
        select_refuses(&inputs, config, message);
    }
    let config = NsaConfig { topk: 1, ..base() };
    let error = config.validate().expect_err("one forced block too many");
    assert!(error.to_string().starts_with("topk: expected at least"), "{error}");
    nsa_refuses(&NsaArgs { config: &config, ..inputs.nsa() }, &error.to_string());
    select_refuses(&inputs, &config, &error.to_string());
}

#[track_caller]
fn select_refuses(inputs: &Inputs, config: &NsaConfig, message: &str) {
    let engine = engine();
    let args = SelectArgs { attention: inputs.attention(), config };
    let [mut out, mut lse] = [Poisoned::new(&OUT), Poisoned::new(&LSE)];
    let mut ids = vec![i32::MIN; KV_HEADS * TOTAL * config.topk];
    let mut topk_indices =
        TensorViewMut::new("topk_indices", &mut ids, &[KV_HEADS, TOTAL, config.topk]).expect("shape");
    let mut output = AttentionOutput { out: out.view(), lse: lse.view() };
    assert_message(&engine.select_into(&args, &mut output, &mut topk_indices).expect_err(message), message);
    assert_message(&engine.select(&args).expect_err(message), message);
    [&out, &lse].into_iter().for_each(Poisoned::assert_untouched);
    assert!(ids.iter().all(|id| *id == i32::MIN));
}

#[test]
fn keys_that_are_not_compressed() {
    let inputs = Inputs::new();
    // 56 and 24 tokens hold 13 and 5 windows of 8 tokens, one every 4.
    let message = "key: expected 18 rows, by cu_seqlens_kv, got 80 rows";
    attention_refuses(&AttentionStage::Compressed { kernel_size: 8, kernel_stride: 4 }, &inputs.attention(), message);
    select_refuses(&inputs, &inputs.config, message);
}

#[test]
fn listed_blocks_that_break_the_contract_under_validation() {
    let inputs = Inputs::new();
    // Row 20 lies in block 1 of its sequence.
    let cases = [
        ([2, 0], "topk_indices: expected -1 or a block id in 0..=1 (the row's own block), got 2 in row [1, 20]"),
        ([0, -7], "topk_indices: expected -1 or a block id in 0..=1 (the row's own block), got -7 in row [1, 20]"),
        ([1, 1], "topk_indices: expected ids that are unique in a row, got block 1 in row [1, 20] twice"),
    ];
    for (row, message) in cases {
        let mut ids = vec![-1i32; KV_HEADS * TOTAL * 2];
        ids[(TOTAL + 20) * 2..][..2].copy_from_slice(&row);
        let topk_indices = Tensor::new("topk_indices", ids, &[KV_HEADS, TOTAL, 2]).expect("shape");
        let (topk_indices, block_size) = (topk_indices.view(), 16);
        let stage = AttentionStage::Selected { topk_indices, block_size, validate: true };
        attention_refuses(&stage, &inputs.attention(), message);
        let unchecked = Selection { topk_indices, block_size, validate: false };
        engine().selected(&inputs.attention(), &unchecked).expect("safe without validation");
    }
}

#[test]
fn listed_blocks_of_the_wrong_form() {
    let inputs = Inputs::new();
    let refuses = |ids: &Tensor, block_size, message: &str| {
        let stage = AttentionStage::Selected { topk_indices: ids.view(), block_size, validate: false };
        attention_refuses(&stage, &inputs.attention(), message);
    };
    let ids = |dtype, shape: &[usize]| Tensor::zeros("topk_indices", dtype, shape).expect("small");
    let shape = [KV_HEADS, TOTAL, 2];
    refuses(&ids(DType::F32, &shape), 16, "topk_indices: expected dtype i32, got dtype f32");
    let message = "topk_indices: expected shape [2, 80, topk], got shape [80, 2, 2]";
    refuses(&ids(DType::I32, &[TOTAL, KV_HEADS, 2]), 16, message);
    refuses(&ids(DType::I32, &shape), 48, "block_size: expected one of 16, 32, 64, 128, 256, got 48");
}

#[test]
fn overlapping_output() {
    let mut data = vec![f32::from_bits(0x7fa5_1234); OUT.iter().product()];
    let error = TensorViewMut::strided("out", &mut data, &OUT, &[Q_HEADS * VALUE_DIM, VALUE_DIM - 1, 1])
        .expect_err("rows share an element");
    let message = "out: expected strides under which no two elements overlap, \
                   got shape [80, 4, 16] with strides [64, 15, 1]";
    assert_message(&error, message);
    assert!(data.iter().all(|value| value.to_bits() == 0x7fa5_1234));
}

#[test]
fn outputs_of_the_wrong_shape_or_dtype() {
    let (engine, inputs) = (engine(), Inputs::new());
    let [mut out, mut lse] = [Poisoned::new(&[TOTAL, Q_HEADS, HEAD_DIM]), Poisoned::new(&LSE)];
    let mut output = AttentionOutput { out: out.view(), lse: lse.view() };
    let message = "out: expected shape [80, 4, 16], got shape [80, 4, 8]";
    assert_message(&engine.dense_into(&inputs.attention(), &mut output).expect_err(message), message);
    assert_message(&engine.nsa_into(&inputs.nsa(), &mut out.view(), false).expect_err(message), message);

    let [mut right, mut turned] = [Poisoned::new(&OUT), Poisoned::new(&[TOTAL, Q_HEADS])];
    let mut output = AttentionOutput { out: right.view(), lse: turned.view() };
    let message = "lse: expected shape [4, 80], got shape [80, 4]";
    assert_message(&engine.window_into(&inputs.attention(), 4, &mut output).expect_err(message), message);

    let half = filled("out", DType::Bf16, &OUT);
    let mut written = half.clone();
    let message = "out: expected dtype f32, got dtype bf16";
    assert_message(&engine.nsa_into(&inputs.nsa(), &mut written.view_mut(), false).expect_err(message), message);
    assert_eq!(written, half);
    [&out, &lse, &right, &turned].into_iter().for_each(Poisoned::assert_untouched);
}

#[test]
fn gradients_of_the_wrong_shape() {
    let (engine, inputs) = (engine(), Inputs::new());
    let [of_out, of_lse] = [filled("out", DType::F32, &OUT), filled("lse", DType::F32, &LSE)];
    let grad = AttentionGradArgs { out: of_out.view(), lse: of_lse.view(), grad_out: of_out.view(), grad_lse: None };
    let cases = [
        ([KEY, KEY, VALUE], "grad_query: expected shape [80, 4, 8], got shape [80, 2, 8]"),
        ([QUERY, KEY, KEY], "grad_value: expected shape [80, 2, 16], got shape [80, 2, 8]"),
    ];
    for (shapes, message) in cases {
        let mut poisoned = shapes.map(|shape| Poisoned::new(&shape));
        let [grad_query, grad_key, grad_value] = poisoned.each_mut().map(Poisoned::view);
        let mut grads = AttentionGrads { grad_query, grad_key, grad_value };
        let error = engine.dense_backward_into(&inputs.attention(), &grad, &mut grads).expect_err(message);
        assert_message(&error, message);
        poisoned.iter().for_each(Poisoned::assert_untouched);
    }
    let turned = AttentionGradArgs { grad_lse: Some(inputs.gates.view()), ..grad };
    let message = "grad_lse: expected shape [4, 80], got shape [80, 3]";
    assert_message(&engine.dense_backward(&inputs.attention(), &turned).expect_err(message), message);
}

#[test]
fn weights_of_the_wrong_shape() {
    let inputs = Inputs::new();
    let weight = filled("weight", DType::F32, &[KV_HEADS, 7]);
    let compression = Compression::Weighted { weight: weight.view() };
    let message = "key_compression.weight: expected shape [2, 8], got shape [2, 7]";
    nsa_refuses(&NsaArgs { key_compression: compression, ..inputs.nsa() }, message);
    compress_refuses(&inputs, compression, "weight: expected shape [2, 8], got shape [2, 7]");

    let weight = filled("weight", DType::F32, &[KV_HEADS, 8 * VALUE_DIM, VALUE_DIM]);
    let position = filled("position", DType::F32, &[1, 8, VALUE_DIM]);
    let compression = Compression::Linear { weight: weight.view(), position: Some(position.view()) };
    let message = "value_compression.position: expected shape [2, 8, 16], got shape [1, 8, 16]";
    nsa_refuses(&NsaArgs { value_compression: compression, ..inputs.nsa() }, message);
    compress_refuses(&inputs, compression, "position: expected shape [2, 8, 16], got shape [1, 8, 16]");

    // A window so long that the size of its weight overflows is refused like any other.
    let weight = filled("weight", DType::F32, &[KV_HEADS, 8 * HEAD_DIM, HEAD_DIM]);
    let compression = Compression::Linear { weight: weight.view(), position: None };
    let config = NsaConfig { kernel_size: 1 << 62, ..inputs.config.clone() };
    let message = "key_compression.weight: expected shape [2, 18446744073709551615, 8], got shape [2, 64, 8]";
    nsa_refuses(&NsaArgs { config: &config, key_compression: compression, ..inputs.nsa() }, message);

    let weight = filled("weight", DType::F16, &[KV_HEADS, 8]);
    let compression = Compression::Weighted { weight: weight.view() };
    compress_refuses(&inputs, compression, "weight: expected dtype f32, got dtype f16");
}

/// Compression of `value` refuses `compression` with `message`, forward and backward, and writes nothing.
#[track_caller]
fn compress_refuses(inputs: &Inputs, compression: Compression<'_>, message: &str) {
    let engine = engine();
    let (input, batch) = (inputs.value.view(), &inputs.batch);
    let args = CompressArgs { input, batch, kernel_size: 8, kernel_stride: 4, compression };
    let [mut out, mut grad_input] = [Poisoned::new(&[18, KV_HEADS, VALUE_DIM]), Poisoned::new(&VALUE)];
    assert_message(&engine.compress_into(&args, &mut out.view()).expect_err(message), message);
    let grad_out = filled("grad_out", DType::F32, &[18, KV_HEADS, VALUE_DIM]);
    let mut grads = CompressGrads { grad_input: grad_input.view(), grad_weight: None, grad_position: None };
    let error = engine.compress_backward_into(&args, &grad_out.view(), &mut grads).expect_err(message);
    assert_message(&error, message);
    [&out, &grad_input].into_iter().for_each(Poisoned::assert_untouched);
}

#[test]
fn a_gradient_of_a_weight_that_there_is_not() {
    let (engine, inputs) = (engine(), Inputs::new());
    let (input, batch, compression) = (inputs.value.view(), &inputs.batch, Compression::Mean);
    let args = CompressArgs { input, batch, kernel_size: 8, kernel_stride: 4, compression };
    let grad_out = filled("grad_out", DType::F32, &[18, KV_HEADS, VALUE_DIM]);
    let mut poisoned = [Poisoned::new(&VALUE), Poisoned::new(&[KV_HEADS, 8])];
    let [grad_input, grad_weight] = poisoned.each_mut().map(Poisoned::view);
    let mut grads = CompressGrads { grad_input, grad_weight: Some(grad_weight), grad_position: None };
    let message = "grad_weight: expected none: compression mean has no such parameter, got one";
    let error = engine.compress_backward_into(&args, &grad_out.view(), &mut grads).expect_err(message);
    assert_message(&error, message);
    poisoned.iter().for_each(Poisoned::assert_untouched);
}

#[test]
fn gates_of_the_wrong_shape_or_dtype() {
    let inputs = Inputs::new();
    let cases = [
        (filled("gates", DType::F32, &[TOTAL, 4]), "gates: expected shape [80, 3] or [80, 4, 3], got shape [80, 4]"),
        (
            filled("gates", DType::F32, &[TOTAL, 2, 3]),
            "gates: expected shape [80, 3] or [80, 4, 3], got shape [80, 2, 3]",
        ),
        (filled("gates", DType::F16, &[TOTAL, 3]), "gates: expected dtype f32, got dtype f16"),
    ];
    let branch = filled("out", DType::F32, &OUT);
    for (gates, message) in &cases {
        nsa_refuses(&NsaArgs { gates: gates.view(), ..inputs.nsa() }, message);
        let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
        combine_refuses(&args, message);
    }
    let (gates, other) = (inputs.gates.view(), filled("out", DType::F32, &[TOTAL, Q_HEADS, 8]));
    let args = CombineArgs { gates, branches: [branch.view(), other.view(), branch.view()] };
    combine_refuses(&args, "out_selected: expected shape [80, 4, 16], got shape [80, 4, 8]");
}

#[track_caller]
fn combine_refuses(args: &CombineArgs<'_>, message: &str) {
    let (engine, grad_out) = (engine(), filled("grad_out", DType::F32, &OUT));
    let mut out = Poisoned::new(&OUT);
    assert_message(&engine.combine_into(args, &mut out.view()).expect_err(message), message);
    let [mut grad_gates, mut a, mut b, mut c] = [&[TOTAL, 3][..], &OUT, &OUT, &OUT].map(Poisoned::new);
    let grad_branches = [a.view(), b.view(), c.view()];
    let mut grads = CombineGrads { grad_gates: grad_gates.view(), grad_branches };
    let error = engine.combine_backward_into(args, &grad_out.view(), &mut grads).expect_err(message);
    assert_message(&error, message);
    [out, grad_gates, a, b, c].iter().for_each(Poisoned::assert_untouched);
}

#[test]
fn rotation_with_wrong_positions_or_gradient() {
    let (engine, inputs) = (engine(), Inputs::new());
    let (rope, positions) = (Rope::default(), vec![0; TOTAL - 1]);
    let args = RopeArgs { input: inputs.query.view(), positions: &positions, rope: &rope, inverse: false };
    let mut out = Poisoned::new(&QUERY);
    let message = "positions: expected 80 positions, one per row, got 79";
    assert_message(&engine.rope_into(&args, &mut out.view()).expect_err(message), message);
    let bent = Rope { theta: -1.0, ..Rope::default() };
    let message = "rope.theta: expected a positive number, got -1";
    nsa_refuses(&NsaArgs { rope: Some(&bent), ..inputs.nsa() }, message);
    let message = "grad_out: expected shape [80, 4, 8] of f32, got shape [80, 2, 8] of f32";
    let error = engine.rope_backward_into(&args, &inputs.key.view(), &mut out.view()).expect_err(message);
    assert_message(&error, message);
    out.assert_untouched();
}

#[test]
fn saved_state_of_another_call() {
    let (engine, inputs) = (engine(), Inputs::new());
    let saved = |args: &NsaArgs<'_>| {
        let (_, saved) = engine.nsa(args, true).expect("valid").into_parts();
        saved.expect("asked for")
    };
    let (rope, grad_out) = (Rope::default(), filled("grad_out", DType::F32, &OUT));
    let rotated = saved(&NsaArgs { rope: Some(&rope), ..inputs.nsa() });
    let message = "saved.rotated: expected no rotated query and key, got rotated query and key";
    nsa_backward_refuses(&inputs.nsa(), &rotated, &grad_out.view(), message);

    let config = NsaConfig { topk: 2, ..inputs.config.clone() };
    let fewer = saved(&NsaArgs { config: &config, ..inputs.nsa() });
    let message = "saved.topk_indices: expected shape [2, 80, 3], got shape [2, 80, 2]";
    nsa_backward_refuses(&inputs.nsa(), &fewer, &grad_out.view(), message);

    let single = Batch::single(TOTAL);
    let joined = saved(&NsaArgs { batch: &single, ..inputs.nsa() });
    let message = "saved.key_compressed: expected shape [18, 2, 8], got shape [19, 2, 8]";
    nsa_backward_refuses(&inputs.nsa(), &joined, &grad_out.view(), message);

    let message = "grad_out: expected shape [80, 4, 16], got shape [80, 4, 8]";
    nsa_backward_refuses(&inputs.nsa(), &saved(&inputs.nsa()), &inputs.query.view(), message);
}

/// Strides of 0 describe a call whose inputs are a few bytes and whose output no machine holds.
#[test]
fn an_output_that_cannot_be_allocated_is_an_error() {
    let rows = 1usize << 46;
    let (small, batch) = (vec![0.0f32; 256], Batch::single(rows));
    let view = |heads, dim| TensorView::strided("x", &small, &[rows, heads, dim], &[0, 0, 1]).expect("repeats");
    let (query, key, value) = (view(64, 8), view(1, 8), view(1, 256));
    let args = AttentionArgs { query, key, value, batch: &batch, softmax_scale: None };
    let bytes = rows * 64 * 256 * 4;
    let expected = Error::OutOfMemory { what: "out".into(), bytes };
    assert_eq!(engine().dense(&args).expect_err("no machine has 4 EiB"), expected);
    assert_message(&expected, "out of memory: out needs 4611686018427387904 bytes");
    let gates = TensorView::strided("gates", &small, &[rows, 3], &[0, 1]).expect("repeats");
    let (config, mean) = (NsaConfig::default(), Compression::Mean);
    let args = NsaArgs {
        query,
        key,
        value,
        gates,
        batch: &batch,
        config: &config,
        key_compression: mean,
        value_compression: mean,
        rope: None,
        softmax_scale: None,
    };
    assert_eq!(engine().nsa(&args, true).expect_err("no machine has 4 EiB"), expected);
}
