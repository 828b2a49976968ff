//! The CUDA engine: what is missing is said, and with a GPU it computes what the CPU does.

use fsa::{AttentionArgs, Batch, DType, Engine, Error, Selection, Tensor, cuda};

const TOTAL: usize = 80;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 24;

#[test]
fn a_gpu_that_is_not_there_is_an_error_of_the_backend() {
    let environment = cuda::Environment { device: 4096, ..cuda::Environment::default() };
    let error = Engine::cuda_with(&environment).expect_err("nobody has as many");
    assert!(matches!(&error, Error::Backend { backend, .. } if backend == "cuda"), "{error}");
    let text = error.to_string();
    assert!(text.contains("no CUDA driver") || text.contains("no CUDA device 4096"), "{text}");
}

/// Smooth numbers.
fn numbers(seed: f32, heads: usize) -> Tensor {
    let values: Vec<f32> = (0..TOTAL * heads * HEAD_DIM).map(|i| (i as f32 * 0.37 + seed).sin()).collect();
    Tensor::from_f32("numbers", &values, DType::Bf16, &[TOTAL, heads, HEAD_DIM]).expect("shape")
}

#[test]
#[ignore = "needs a CUDA device"]
fn both_engines_compute_the_same() {
    let (query, key, value) = (numbers(0.0, 2 * KV_HEADS), numbers(1.0, KV_HEADS), numbers(2.0, KV_HEADS));
    let batch = Batch::single(TOTAL);
    let args =
        AttentionArgs { query: query.view(), key: key.view(), value: value.view(), batch: &batch, softmax_scale: None };
    let ids: Vec<i32> = (0..KV_HEADS * TOTAL).flat_map(|row| [0, ((row % TOTAL) / 16) as i32]).collect();
    let topk_indices = Tensor::new("topk_indices", ids, &[KV_HEADS, TOTAL, 2]).expect("shape");
    let selection = Selection { topk_indices: topk_indices.view(), block_size: 16, validate: false };
    let run = |engine: Engine| {
        let forward = engine.selected(&args, &selection).expect("valid");
        let grads = engine.selected_backward(&args, &selection, &forward.grad_args(query.view())).expect("valid");
        [forward.out, forward.lse, grads.grad_query, grads.grad_key, grads.grad_value]
    };
    let (gpu, cpu) = (run(Engine::cuda().expect("a device")), run(Engine::cpu().expect("starts")));
    for (gpu, cpu) in gpu.iter().zip(&cpu) {
        let (gpu, cpu) = (gpu.view().to_f64(), cpu.view().to_f64());
        let most = cpu.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        // Two roundings to bf16, at the size of the largest element.
        let far = gpu.iter().zip(&cpu).find(|(gpu, cpu)| (**gpu - **cpu).abs() > most / 64.0);
        assert_eq!(far, None);
    }
}
