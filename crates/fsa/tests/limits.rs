//! Facts that follow from the definition and need no reference to compare with.

mod fixture;

use fixture::{HEAD_DIM, Inputs, KV_HEADS, LENGTHS, Q_HEADS, TOTAL, VALUE_DIM, engine, filled};
use fsa::{Batch, CpuOptions, DType, Engine, NsaArgs, NsaResult, Rope, Selection, Tensor, TensorView};

/// The rows `rows` of the first axis.
fn rows(tensor: &Tensor, rows: std::ops::Range<usize>) -> Tensor {
    let width: usize = tensor.shape()[1..].iter().product();
    let data = tensor.as_slice::<f32>("tensor").expect("f32")[rows.start * width..rows.end * width].to_vec();
    let shape: Vec<usize> = std::iter::once(rows.len()).chain(tensor.shape()[1..].iter().copied()).collect();
    Tensor::new("rows", data, &shape).expect("shape holds the rows")
}

/// The values are of the size of 1, and f32 sums of some dozens of them are good to 1e-5.
#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor) {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (a.view().to_f64(), b.view().to_f64());
    let far = a.iter().zip(&b).position(|(x, y)| (x - y).is_nan() || (x - y).abs() > 1e-5);
    assert_eq!(far, None, "elements {:?} and {:?}", far.map(|i| a[i]), far.map(|i| b[i]));
}

fn nsa(args: &NsaArgs<'_>) -> NsaResult {
    engine().nsa(args, false).expect("valid")
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (inputs, rope) = (Inputs::new(), Rope::default());
    let args = NsaArgs { rope: Some(&rope), ..inputs.nsa() };
    let run = |threads| {
        let engine = Engine::cpu_with(&CpuOptions { threads: Some(threads), ..Default::default() }).expect("starts");
        let (out, saved) = engine.nsa(&args, true).expect("valid").into_parts();
        let saved = saved.expect("asked for");
        let grads = engine.nsa_backward(&args, &saved, &out.view()).expect("valid");
        (out, saved.topk_indices, grads)
    };
    let one = run(1);
    assert!((2..5).all(|threads| run(threads) == one));
}

#[test]
fn permuting_the_sequences_permutes_the_result() {
    let mut inputs = Inputs::new();
    let [first, second] = [0..LENGTHS[0], LENGTHS[0]..TOTAL];
    let straight = nsa(&inputs.nsa()).out;
    let swap = |tensor: &Tensor| {
        let width = tensor.shape()[1..].iter().product::<usize>();
        let mut data = tensor.as_slice::<f32>("tensor").expect("f32").to_vec();
        data.rotate_left(first.end * width);
        Tensor::new("swapped", data, tensor.shape()).expect("same shape")
    };
    let (query, key, value) = (swap(&inputs.query), swap(&inputs.key), swap(&inputs.value));
    inputs = Inputs { query, key, value, gates: swap(&inputs.gates), ..inputs };
    inputs.batch = Batch::from_lengths(&[LENGTHS[1], LENGTHS[0]]).expect("valid");
    let swapped = nsa(&inputs.nsa()).out;
    assert_close(&rows(&swapped, 0..second.len()), &rows(&straight, second.clone()));
    assert_close(&rows(&swapped, second.len()..TOTAL), &rows(&straight, first));
}

#[test]
fn a_chunk_of_a_prompt_gives_the_rows_of_the_whole() {
    let (mut inputs, rope) = (Inputs::new(), Rope::default());
    inputs.batch = Batch::single(TOTAL);
    let whole = nsa(&NsaArgs { rope: Some(&rope), ..inputs.nsa() });
    for chunk in [0..1, 0..50, 47..80, 79..80] {
        let (query, gates) = (rows(&inputs.query, chunk.clone()), rows(&inputs.gates, chunk.clone()));
        let (key, value) = (rows(&inputs.key, 0..chunk.end), rows(&inputs.value, 0..chunk.end));
        let (q_len, kv_len) = (chunk.len() as i32, chunk.end as i32);
        let batch = Batch::from_cu_seqlens(&[0, q_len], &[0, kv_len]).expect("valid");
        let [query, gates, key, value] = [&query, &gates, &key, &value].map(Tensor::view);
        let args = NsaArgs { query, gates, key, value, batch: &batch, rope: Some(&rope), ..inputs.nsa() };
        assert_close(&nsa(&args).out, &rows(&whole.out, chunk));
    }
}

#[test]
fn no_row_depends_on_the_future() {
    let mut inputs = Inputs::new();
    inputs.batch = Batch::single(TOTAL);
    let before = nsa(&inputs.nsa());
    let poison = |tensor: &Tensor, from: usize| {
        let mut data = tensor.as_slice::<f32>("tensor").expect("f32").to_vec();
        let width = data.len() / TOTAL;
        data[from * width..].fill(f32::NAN);
        Tensor::new("poisoned", data, tensor.shape()).expect("same shape")
    };
    for from in [1, 17, 48, 79] {
        let (key, value) = (poison(&inputs.key, from), poison(&inputs.value, from));
        let after = nsa(&NsaArgs { key: key.view(), value: value.view(), ..inputs.nsa() });
        assert_close(&rows(&after.out, 0..from), &rows(&before.out, 0..from));
    }
}

#[test]
fn one_gate_gives_one_branch() {
    let inputs = Inputs::new();
    let (engine, attention) = (engine(), inputs.attention());
    let with_gates = |gates: [f32; 3]| {
        let gates = Tensor::new("gates", gates.repeat(TOTAL), &[TOTAL, 3]).expect("shape");
        nsa(&NsaArgs { gates: gates.view(), ..inputs.nsa() })
    };
    let window = engine.window(&attention, inputs.config.window_size).expect("valid");
    assert_close(&with_gates([0.0, 0.0, 1.0]).out, &window.out);
    let whole = with_gates([0.0, 1.0, 0.0]);
    let topk_indices = whole.topk_indices().view();
    let selection = Selection { topk_indices, block_size: inputs.config.block_size, validate: true };
    let selected = engine.selected(&attention, &selection).expect("lists of stage select are valid");
    assert_close(&whole.out, &selected.out);
}

#[test]
fn what_shows_every_key_is_dense() {
    let inputs = Inputs::new();
    let (engine, attention) = (engine(), inputs.attention());
    let dense = engine.dense(&attention).expect("valid");
    let window = engine.window(&attention, TOTAL).expect("valid");
    // 56 keys are 4 blocks of 16; the one list of all of them, repeated by strides of 0, in falling order.
    let every = [3i32, 2, 1, 0];
    let topk_indices = TensorView::strided("topk_indices", &every, &[KV_HEADS, TOTAL, 4], &[0, 0, 1]).expect("fits");
    let selected = engine.selected(&attention, &Selection { topk_indices, block_size: 16, validate: false });
    for result in [window, selected.expect("valid")] {
        assert_close(&result.out, &dense.out);
        assert_close(&result.lse, &dense.lse);
    }
}

#[test]
fn scaling_the_value_scales_the_result_and_keeps_the_lists() {
    let inputs = Inputs::new();
    let doubled: Vec<f32> = inputs.value.as_slice::<f32>("value").expect("f32").iter().map(|v| 2.0 * v).collect();
    let value = Tensor::new("value", doubled, inputs.value.shape()).expect("same shape");
    let (once, twice) = (nsa(&inputs.nsa()), nsa(&NsaArgs { value: value.view(), ..inputs.nsa() }));
    assert_eq!(once.topk_indices(), twice.topk_indices());
    // A factor of 2 changes exponents only: not a bit of the mantissas.
    let expected: Vec<f32> = once.out.as_slice::<f32>("out").expect("f32").iter().map(|v| 2.0 * v).collect();
    assert_eq!(twice.out.as_slice::<f32>("out").expect("f32"), expected);
}

#[test]
fn gradients_of_values_are_weights() {
    // With grad_out of ones every element of grad_value is the sum of the weights that its key received, and
    // all of them together are the number of rows and heads that see a key.
    let inputs = Inputs::new();
    let ones =
        Tensor::from_f32("grad_out", &[1.0; TOTAL * Q_HEADS * VALUE_DIM], DType::F32, &[TOTAL, Q_HEADS, VALUE_DIM]);
    let (engine, attention) = (engine(), inputs.attention());
    let forward = engine.dense(&attention).expect("valid");
    let grads = engine.dense_backward(&attention, &forward.grad_args(ones.expect("shape").view())).expect("valid");
    let sum: f64 = grads.grad_value.view().to_f64().iter().sum();
    assert!((sum - (TOTAL * Q_HEADS * VALUE_DIM) as f64).abs() < 1e-2, "{sum}");
    // Adding a constant to all logits of a row changes nothing, so the gradient of a query is orthogonal to any
    // direction in which all keys agree; with equal keys that is every direction.
    let equal = filled("key", DType::F32, &[1, KV_HEADS, HEAD_DIM]);
    let data = equal.as_slice::<f32>("key").expect("f32");
    let key = TensorView::strided("key", data, inputs.key.shape(), &[0, HEAD_DIM, 1]).expect("repeats");
    let args = fsa::AttentionArgs { key, ..attention };
    let forward = engine.dense(&args).expect("valid");
    let grads = engine.dense_backward(&args, &forward.grad_args(forward.out.view())).expect("valid");
    assert!(grads.grad_query.view().to_f64().iter().all(|value| value.abs() < 1e-5));
}
