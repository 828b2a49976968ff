//! Analytic gradients of the oracle against central finite differences of the oracle.

use fsa_core::ops::compressed_positions;
use fsa_core::{AttentionStage, Batch, NsaConfig, Rope, RopeScaling, Tensor};
use fsa_oracle::arithmetic::Exact;
use fsa_oracle::array::Array;
use fsa_oracle::attention::{self, AttentionInputs};
use fsa_oracle::combine::{self, CombineInputs};
use fsa_oracle::compress::{self, CompressInputs, CompressionInputs};
use fsa_oracle::nsa::{self, NsaInputs};
use fsa_oracle::random::Random;
use fsa_oracle::rope;

const STEP: f64 = 1e-4;

fn normal(seed: u64, shape: &[usize]) -> Array {
    let mut random = Random::new(&[seed]);
    Array::new(shape, (0..shape.iter().product()).map(|_| random.normal()).collect())
}

fn inner(a: &Array, b: &Array) -> f64 {
    assert_eq!(a.shape(), b.shape());
    a.data().iter().zip(b.data()).map(|(x, y)| x * y).sum()
}

/// Compares `analytic` with differences of `loss` in up to 60 elements of `at`. The error of a central difference is
/// of the order of STEP^2 = 1e-8 times the third derivative.
fn check(name: &str, at: &Array, analytic: &Array, loss: impl Fn(&Array) -> f64) {
    assert_eq!(at.shape(), analytic.shape(), "{name}");
    let mut random = Random::new(&[at.data().len() as u64]);
    let magnitude = analytic.magnitude().max(1e-3);
    let len = at.data().len();
    for k in 0..len.min(60) {
        let place = if len <= 60 { k } else { random.below(len) };
        let moved = |by: f64| {
            let mut moved = at.clone();
            moved.data_mut()[place] += by;
            loss(&moved)
        };
        let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        let got = analytic.data()[place];
        assert!(
            (got - difference).abs() < 2e-6 * magnitude,
            "{name}[{place}]: analytic {got}, difference {difference}"
        );
    }
}

fn batch() -> Batch {
    Batch::from_cu_seqlens(&[0, 21, 21, 25], &[0, 21, 26, 45]).expect("valid")
}

fn attention_gradients(stage: &AttentionStage<'_>, scale: f64) {
    let batch = batch();
    let keys = stage.total_keys(&batch);
    let inputs = AttentionInputs {
        query: normal(1, &[25, 6, 8]),
        key: normal(2, &[keys, 2, 8]),
        value: normal(3, &[keys, 2, 16]),
        batch: &batch,
        scale,
    };
    let (grad_out, mut grad_lse) = (normal(4, &[25, 6, 16]), normal(5, &[6, 25]));
    let visible = attention::visible(stage, &batch).expect("i32");
    let forward = attention::forward(&Exact, &inputs, &*visible);
    // The lse of a row without keys is -inf and has no gradient.
    grad_lse = grad_lse.zip(&forward.lse, |grad, lse| if lse.is_finite() { grad } else { 0.0 });
    let grads = attention::backward(&Exact, &inputs, &forward, &grad_out, Some(&grad_lse));
    let loss = |inputs: &AttentionInputs<'_>| {
        let forward = attention::forward(&Exact, inputs, &*visible);
        let lse = forward.lse.map(|lse| if lse.is_finite() { lse } else { 0.0 });
        inner(&forward.out, &grad_out) + inner(&lse, &grad_lse)
    };
    let name = stage.stage().name();
    let with = |change: &dyn Fn(&mut AttentionInputs<'_>)| {
        let mut inputs = inputs.clone();
        change(&mut inputs);
        loss(&inputs)
    };
    check(&format!("{name} query"), &inputs.query, &grads.query, |x| with(&|i| i.query = x.clone()));
    check(&format!("{name} key"), &inputs.key, &grads.key, |x| with(&|i| i.key = x.clone()));
    check(&format!("{name} value"), &inputs.value, &grads.value, |x| with(&|i| i.value = x.clone()));
}

fn lists(total_q: usize, heads: usize, topk: usize) -> Tensor {
    let mut random = Random::new(&[9]);
    let ids = (0..heads * total_q)
        .flat_map(|_| {
            let mut ids = vec![0, 1, -1, 5];
            random.shuffle(&mut ids);
            ids.into_iter().take(topk)
        })
        .collect();
    Tensor::new("topk_indices", ids, &[heads, total_q, topk]).expect("shape")
}

#[test]
fn attention_stages() {
    attention_gradients(&AttentionStage::Dense, 0.35);
    attention_gradients(&AttentionStage::Window { window_size: 3 }, -0.5);
    attention_gradients(&AttentionStage::Compressed { kernel_size: 4, kernel_stride: 2 }, 0.35);
    let ids = lists(25, 2, 2);
    attention_gradients(&AttentionStage::Selected { topk_indices: ids.view(), block_size: 16, validate: false }, 0.35);
}

fn compressions(heads: usize, size: usize, dim: usize) -> Vec<CompressionInputs> {
    let weight = normal(21, &[heads, size * dim, dim]);
    vec![
        CompressionInputs::Mean,
        CompressionInputs::Weighted { weight: normal(20, &[heads, size]) },
        CompressionInputs::Linear { weight: weight.clone(), position: None },
        CompressionInputs::Linear { weight, position: Some(normal(22, &[heads, size, dim])) },
    ]
}

/// The compression with its weight (`0`) or its position embedding (`1`) replaced.
fn replaced(compression: &CompressionInputs, parameter: usize, by: &Array) -> CompressionInputs {
    match (compression, parameter) {
        (CompressionInputs::Weighted { .. }, 0) => CompressionInputs::Weighted { weight: by.clone() },
        (CompressionInputs::Linear { position, .. }, 0) => {
            CompressionInputs::Linear { weight: by.clone(), position: position.clone() }
        }
        (CompressionInputs::Linear { weight, .. }, 1) => {
            CompressionInputs::Linear { weight: weight.clone(), position: Some(by.clone()) }
        }
        _ => panic!("no such parameter"),
    }
}

fn parameters(compression: &CompressionInputs) -> [Option<Array>; 2] {
    match compression {
        CompressionInputs::Mean => [None, None],
        CompressionInputs::Weighted { weight } => [Some(weight.clone()), None],
        CompressionInputs::Linear { weight, position } => [Some(weight.clone()), position.clone()],
    }
}

#[test]
fn compress_stage() {
    let batch = batch();
    for compression in compressions(2, 4, 8) {
        let input = normal(30, &[45, 2, 8]);
        let inputs = CompressInputs { input, batch: &batch, kernel_size: 4, kernel_stride: 2, compression };
        let grad_out = normal(31, compress::forward(&Exact, &inputs).shape());
        let grads = compress::backward(&Exact, &inputs, &grad_out);
        let loss = |inputs: &CompressInputs<'_>| inner(&compress::forward(&Exact, inputs), &grad_out);
        check("compress input", &inputs.input, &grads.input, |x| {
            loss(&CompressInputs { input: x.clone(), ..inputs.clone() })
        });
        let analytic = [&grads.weight, &grads.position];
        for (number, at) in parameters(&inputs.compression).iter().enumerate() {
            assert_eq!(at.is_some(), analytic[number].is_some());
            let (Some(at), Some(analytic)) = (at, analytic[number]) else { continue };
            check(["compress weight", "compress position"][number], at, analytic, |x| {
                let compression = replaced(&inputs.compression, number, x);
                loss(&CompressInputs { compression, ..inputs.clone() })
            });
        }
    }
}

fn llama3() -> Rope {
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 128 };
    Rope { theta: 10_000.0, scaling }
}

#[test]
fn rope_stage() {
    let positions = compressed_positions(&batch(), 4, 2);
    for rope in [Rope::default(), llama3()] {
        let input = normal(40, &[positions.len(), 2, 16]);
        let grad_out = normal(41, input.shape());
        for inverse in [false, true] {
            let grad = rope::rotate(&Exact, &grad_out, &positions, &rope, !inverse);
            check("rope", &input, &grad, |x| inner(&rope::rotate(&Exact, x, &positions, &rope, inverse), &grad_out));
        }
        // And there is a way back.
        let there = rope::rotate(&Exact, &input, &positions, &rope, false);
        let back = rope::rotate(&Exact, &there, &positions, &rope, true);
        let error = back.zip(&input, |a, b| (a - b).abs()).magnitude();
        assert!(error < 1e-14, "{error}");
    }
}

#[test]
fn combine_stage() {
    for gates in [vec![5, 3], vec![5, 4, 3]] {
        let branch = |seed| normal(seed, &[5, 4, 8]);
        let inputs = CombineInputs { gates: normal(50, &gates), branches: [branch(51), branch(52), branch(53)] };
        let grad_out = branch(54);
        let grads = combine::backward(&Exact, &inputs, &grad_out);
        let loss = |inputs: &CombineInputs| inner(&combine::forward(&Exact, inputs), &grad_out);
        check("combine gates", &inputs.gates, &grads.gates, |x| {
            loss(&CombineInputs { gates: x.clone(), ..inputs.clone() })
        });
        for b in 0..3 {
            check("combine branch", &inputs.branches[b], &grads.branches[b], |x| {
                let mut inputs = inputs.clone();
                inputs.branches[b] = x.clone();
                loss(&inputs)
            });
        }
    }
}

fn nsa_gradients(inputs: &NsaInputs<'_>) {
    let ids = lists(25, 2, inputs.config.topk);
    let run = |inputs: &NsaInputs<'_>| {
        let prepared = nsa::prepare(&Exact, inputs);
        nsa::forward(&Exact, inputs, &prepared, ids.view()).expect("i32")
    };
    let result = run(inputs);
    let grad_out = normal(60, result.out.shape());
    let grads = nsa::backward(&Exact, inputs, &nsa::prepare(&Exact, inputs), &result, &grad_out);
    let with = |change: &dyn Fn(&mut NsaInputs<'_>)| {
        let mut inputs = inputs.clone();
        change(&mut inputs);
        inner(&run(&inputs).out, &grad_out)
    };
    check("nsa query", &inputs.query, &grads.query, |x| with(&|i| i.query = x.clone()));
    check("nsa key", &inputs.key, &grads.key, |x| with(&|i| i.key = x.clone()));
    check("nsa value", &inputs.value, &grads.value, |x| with(&|i| i.value = x.clone()));
    check("nsa gates", &inputs.gates, &grads.gates, |x| with(&|i| i.gates = x.clone()));
    for number in 0..2 {
        if let (Some(at), Some(grad)) = (&parameters(&inputs.key_compression)[number], &grads.key_compression[number]) {
            let changed = |x: &Array| replaced(&inputs.key_compression, number, x);
            check("nsa key parameter", at, grad, |x| with(&|i| i.key_compression = changed(x)));
        }
        let at = &parameters(&inputs.value_compression)[number];
        if let (Some(at), Some(grad)) = (at, &grads.value_compression[number]) {
            let changed = |x: &Array| replaced(&inputs.value_compression, number, x);
            check("nsa value parameter", at, grad, |x| with(&|i| i.value_compression = changed(x)));
        }
    }
}

#[test]
fn whole_operation() {
    let (batch, llama3) = (batch(), llama3());
    let config = NsaConfig {
        kernel_size: 4,
        kernel_stride: 2,
        block_size: 16,
        topk: 2,
        init_blocks: 0,
        local_blocks: 1,
        window_size: 5,
        ..NsaConfig::default()
    };
    let kinds = compressions(2, 4, 8).into_iter().zip(compressions(2, 4, 8).into_iter().rev());
    for (number, (key_compression, value_compression)) in kinds.enumerate() {
        let gates = if number % 2 == 0 { vec![25, 3] } else { vec![25, 4, 3] };
        nsa_gradients(&NsaInputs {
            query: normal(61, &[25, 4, 8]),
            key: normal(62, &[45, 2, 8]),
            value: normal(63, &[45, 2, 8]),
            gates: normal(64, &gates),
            batch: &batch,
            config: &config,
            key_compression,
            value_compression,
            rope: [None, Some(&llama3)][number / 2 % 2],
            scale: 0.3,
        });
    }
}
