//! `fsa attend`: results are those of the library, bit for bit; what it writes and under which names.

mod common;

use common::{Folder, Stored, fsa, holds, numbers, read, tensor, write};
use fsa::{
    AttentionArgs, AttentionStage, Batch, Compression, CpuOptions, DType, Engine, NsaArgs, NsaConfig, Rope, RopeArgs,
    SelectArgs, Tensor, kv_positions, query_positions,
};

const PARAMETERS: [&str; 6] = ["--block-size", "16", "--topk", "4", "--window-size", "24"];

fn config() -> NsaConfig {
    NsaConfig { block_size: 16, topk: 4, window_size: 24, ..NsaConfig::default() }
}

fn engine() -> Engine {
    Engine::cpu_with(&CpuOptions { threads: Some(1), ..CpuOptions::default() }).expect("threads")
}

/// Two sequences of 70 and 50 tokens, 4 heads on 2 of 16.
struct Inputs {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    grad_out: Tensor,
    batch: Batch,
}

impl Inputs {
    fn new(dtype: DType) -> Self {
        Self {
            query: numbers(1, dtype, &[120, 4, 16]),
            key: numbers(2, dtype, &[120, 2, 16]),
            value: numbers(3, dtype, &[120, 2, 24]),
            gates: numbers(4, dtype, &[120, 3]),
            grad_out: numbers(5, dtype, &[120, 4, 24]),
            batch: Batch::from_lengths(&[70, 50]).expect("lengths"),
        }
    }

    fn stored(&self) -> Vec<(&'static str, Stored)> {
        vec![
            ("query", (&self.query).into()),
            ("key", (&self.key).into()),
            ("value", (&self.value).into()),
            ("grad_out", (&self.grad_out).into()),
            ("cu_seqlens", (&tensor(vec![0i32, 70, 120], &[3])).into()),
        ]
    }

    fn attention(&self) -> AttentionArgs<'_> {
        AttentionArgs {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            batch: &self.batch,
            softmax_scale: None,
        }
    }
}

fn attend(folder: &Folder, flags: &[&str]) -> serde_json::Value {
    let (input, output) = (folder.argument("in.safetensors"), folder.argument("out.safetensors"));
    let mut arguments = vec!["attend", &input, "-o", &output, "--json"];
    arguments.extend(PARAMETERS);
    arguments.extend(flags);
    let report = fsa(&arguments).json();
    assert_eq!(folder.names(), ["in.safetensors", "out.safetensors"]);
    report
}

#[test]
fn nsa_with_all_weights_and_gradients_equals_the_library() {
    for dtype in DType::FLOATS {
        let (folder, inputs, config) = (Folder::new(), Inputs::new(dtype), config());
        let weights =
            [numbers(6, dtype, &[2, 32 * 16, 16]), numbers(7, dtype, &[2, 32, 16]), numbers(8, dtype, &[2, 32])];
        let mut stored = inputs.stored();
        stored.push(("gates", (&inputs.gates).into()));
        stored.push(("key_weight", (&weights[0]).into()));
        stored.push(("key_position", (&weights[1]).into()));
        stored.push(("value_weight", (&weights[2]).into()));
        write(&folder.path("in.safetensors"), &stored);
        let flags = ["--backward", "--branches", "--rope-theta", "500", "--softmax-scale", "0.125"];
        let report = attend(&folder, &flags);
        let rope = Rope { theta: 500.0, ..Rope::default() };
        let args = NsaArgs {
            query: inputs.query.view(),
            key: inputs.key.view(),
            value: inputs.value.view(),
            gates: inputs.gates.view(),
            batch: &inputs.batch,
            config: &config,
            key_compression: Compression::Linear { weight: weights[0].view(), position: Some(weights[1].view()) },
            value_compression: Compression::Weighted { weight: weights[2].view() },
            rope: Some(&rope),
            softmax_scale: Some(0.125),
        };
        let (out, saved) = engine().nsa(&args, true).expect("valid").into_parts();
        let saved = saved.expect("asked for");
        let grads = engine().nsa_backward(&args, &saved, &inputs.grad_out.view()).expect("valid");
        let path = folder.path("out.safetensors");
        holds(&path, "out", &out);
        holds(&path, "topk_indices", &saved.topk_indices);
        for (branch, name) in ["compressed", "selected", "window"].iter().enumerate() {
            holds(&path, &format!("lse_{name}"), &saved.lse[branch]);
            holds(&path, &format!("out_{name}"), &saved.branches[branch]);
        }
        holds(&path, "grad_query", &grads.grad_query);
        holds(&path, "grad_key", &grads.grad_key);
        holds(&path, "grad_value", &grads.grad_value);
        holds(&path, "grad_gates", &grads.grad_gates);
        holds(&path, "grad_key_weight", grads.key_compression.grad_weight.as_ref().expect("linear"));
        holds(&path, "grad_key_position", grads.key_compression.grad_position.as_ref().expect("given"));
        holds(&path, "grad_value_weight", grads.value_compression.grad_weight.as_ref().expect("weighted"));
        assert_eq!(report["tensors"].as_array().expect("a list").len(), 15);
        assert!(report["time_ms"]["forward"].is_number() && report["time_ms"]["backward"].is_number());
        assert_eq!((&report["stage"], &report["config"]["topk"]), (&"nsa".into(), &4.into()));
    }
}

#[test]
fn constant_gates_stand_in_for_the_tensor() {
    let (folder, inputs, config) = (Folder::new(), Inputs::new(DType::F32), config());
    write(&folder.path("in.safetensors"), &inputs.stored());
    attend(&folder, &["--gates", "0.25,0.5,1"]);
    let gates = tensor([0.25f32, 0.5, 1.0].repeat(120), &[120, 3]);
    let args = NsaArgs {
        query: inputs.query.view(),
        key: inputs.key.view(),
        value: inputs.value.view(),
        gates: gates.view(),
        batch: &inputs.batch,
        config: &config,
        key_compression: Compression::Mean,
        value_compression: Compression::Mean,
        rope: None,
        softmax_scale: None,
    };
    holds(&folder.path("out.safetensors"), "out", &engine().nsa(&args, false).expect("valid").out);
}

#[test]
fn selected_takes_any_indices_and_64_bit_ones() {
    let (folder, inputs) = (Folder::new(), Inputs::new(DType::Bf16));
    let ids: Vec<i32> = (0..2 * 120 * 3).map(|i| [0, 1, 3, -1, 90_000][i % 5]).collect();
    let mut stored = inputs.stored();
    let wide: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    stored.push(("topk_indices", Stored::i64(&[2, 120, 3], &wide)));
    stored.push(("grad_lse", (&numbers(9, DType::F32, &[4, 120])).into()));
    write(&folder.path("in.safetensors"), &stored);
    attend(&folder, &["--stage", "selected", "--backward"]);
    let (ids, grad_lse) = (tensor(ids, &[2, 120, 3]), numbers(9, DType::F32, &[4, 120]));
    let stage = AttentionStage::Selected { topk_indices: ids.view(), block_size: 16, validate: false };
    let result = engine().attention(&stage, &inputs.attention()).expect("valid");
    let grad = fsa::AttentionGradArgs { grad_lse: Some(grad_lse.view()), ..result.grad_args(inputs.grad_out.view()) };
    let grads = engine().attention_backward(&stage, &inputs.attention(), &grad).expect("valid");
    let path = folder.path("out.safetensors");
    holds(&path, "out", &result.out);
    holds(&path, "lse", &result.lse);
    holds(&path, "grad_query", &grads.grad_query);
    holds(&path, "grad_key", &grads.grad_key);
    holds(&path, "grad_value", &grads.grad_value);
}

#[test]
fn dense_and_window_rotate_query_and_key() {
    let (folder, inputs) = (Folder::new(), Inputs::new(DType::F32));
    write(&folder.path("in.safetensors"), &inputs.stored());
    let rope = Rope::default();
    let rotated = |tensor: &Tensor, positions: &[usize], inverse| {
        engine().rope(&RopeArgs { input: tensor.view(), positions, rope: &rope, inverse }).expect("valid")
    };
    let (rows, keys) = (query_positions(&inputs.batch), kv_positions(&inputs.batch));
    let (query, key) = (rotated(&inputs.query, &rows, false), rotated(&inputs.key, &keys, false));
    let args = AttentionArgs { query: query.view(), key: key.view(), ..inputs.attention() };
    for (name, stage) in [("dense", AttentionStage::Dense), ("window", AttentionStage::Window { window_size: 24 })] {
        attend(&folder, &["--stage", name, "--rope-theta", "10000", "--backward"]);
        let result = engine().attention(&stage, &args).expect("valid");
        let grad = result.grad_args(inputs.grad_out.view());
        let grads = engine().attention_backward(&stage, &args, &grad).expect("valid");
        let path = folder.path("out.safetensors");
        holds(&path, "out", &result.out);
        holds(&path, "lse", &result.lse);
        holds(&path, "grad_query", &rotated(&grads.grad_query, &rows, true));
        holds(&path, "grad_key", &rotated(&grads.grad_key, &keys, true));
        holds(&path, "grad_value", &grads.grad_value);
    }
}

#[test]
fn compressed_compresses_attends_and_selects() {
    let (folder, inputs, config) = (Folder::new(), Inputs::new(DType::F32), config());
    write(&folder.path("in.safetensors"), &inputs.stored());
    attend(&folder, &["--stage", "compressed", "--backward"]);
    let compress = |input: &Tensor| {
        let args = fsa::CompressArgs {
            input: input.view(),
            batch: &inputs.batch,
            kernel_size: 32,
            kernel_stride: 16,
            compression: Compression::Mean,
        };
        engine().compress(&args).expect("valid")
    };
    let (key, value) = (compress(&inputs.key), compress(&inputs.value));
    let attention = AttentionArgs { key: key.view(), value: value.view(), ..inputs.attention() };
    let result = engine().select(&SelectArgs { attention, config: &config }).expect("valid");
    let path = folder.path("out.safetensors");
    holds(&path, "out", &result.attention.out);
    holds(&path, "lse", &result.attention.lse);
    holds(&path, "topk_indices", &result.topk_indices);
    holds(&path, "key_compressed", &key);
    holds(&path, "value_compressed", &value);
    assert_eq!(read(&path, "grad_key").1, [120, 2, 16]);
    assert_eq!(read(&path, "grad_value").1, [120, 2, 24]);
}

#[test]
fn fewer_queries_than_keys_need_no_cu_seqlens() {
    let (folder, inputs) = (Folder::new(), Inputs::new(DType::F32));
    let stored = vec![
        ("query", (&numbers(1, DType::F32, &[3, 4, 16])).into()),
        ("key", (&inputs.key).into()),
        ("value", (&inputs.value).into()),
    ];
    write(&folder.path("in.safetensors"), &stored);
    attend(&folder, &["--stage", "dense"]);
    assert_eq!(read(&folder.path("out.safetensors"), "out").1, [3, 4, 24]);
}
