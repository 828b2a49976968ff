//! On a GPU: gradients do not depend on how many ranges of keys take turns, which the memory for their sums decides.

use fsa_core::{Batch, DType};
use fsa_cuda::driver::{DeviceBuffer, Stream, UploadedBatch};
use fsa_cuda::plan::{PlanOptions, Problem};
use fsa_cuda::selected::{
    BackwardTensors, ForwardTensors, LaunchContext, SelectedBackward, SelectedForward, TensorSpan,
};
use fsa_cuda::{CudaBackend, Kernels};
use half::bf16;
use std::sync::Arc;

const HEADS: usize = 2;
const DIM: usize = 64;
const CU_SEQLENS: [usize; 4] = [0, 300, 300, 1001];

/// Pseudo-random numbers between -1 and 1, the same in every run.
fn noise(count: usize, seed: u32) -> Vec<bf16> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Every row lists the first block, and the two up to its own.
fn indices(topk: usize, block_size: usize) -> Vec<i32> {
    let row = |position: usize| {
        let own = (position / block_size) as i32;
        let mut ids: Vec<i32> = [0, own - 1, own].into_iter().filter(|id| *id >= 0).collect();
        ids.dedup();
        ids.resize(topk, -1);
        ids
    };
    CU_SEQLENS.windows(2).flat_map(|pair| (0..pair[1] - pair[0]).flat_map(row)).collect()
}

struct Call {
    kernels: Arc<Kernels>,
    stream: Stream,
    problem: Problem,
    batch: UploadedBatch,
    /// query, key, value, topk_indices, out, lse, grad_out.
    inputs: [DeviceBuffer; 7],
}

impl Call {
    fn new() -> Self {
        let kernels = Arc::clone(CudaBackend::new().expect("a device").kernels());
        let device = kernels.device();
        let stream = Stream::new(device).expect("a stream");
        let rows = CU_SEQLENS[3];
        let problem = Problem {
            total_q: rows,
            total_kv: rows,
            sequences: 3,
            num_q_heads: HEADS,
            num_kv_heads: 1,
            head_dim: DIM,
            block_size: 64,
            topk: 4,
            dtype: DType::Bf16,
        };
        let of_q = rows * HEADS * DIM;
        let upload = |data: &[bf16]| {
            let buffer = DeviceBuffer::new(device, "input", 2 * data.len()).expect("memory");
            let bits: Vec<u16> = data.iter().map(|x| x.to_bits()).collect();
            buffer.upload(&bits, &stream).expect("uploads");
            buffer
        };
        let ids = DeviceBuffer::new(device, "topk_indices", problem.topk_indices_bytes()).expect("memory");
        ids.upload(&indices(problem.topk, problem.block_size), &stream).expect("uploads");
        let lse = DeviceBuffer::new(device, "lse", 4 * rows * HEADS).expect("memory");
        let inputs = [
            upload(&noise(of_q, 1)),
            upload(&noise(rows * DIM, 2)),
            upload(&noise(rows * DIM, 3)),
            ids,
            upload(&vec![bf16::ZERO; of_q]),
            lse,
            upload(&noise(of_q, 4)),
        ];
        let cu: Vec<i32> = CU_SEQLENS.iter().map(|end| *end as i32).collect();
        let batch = Batch::from_cu_seqlens(&cu, &cu).expect("valid");
        let batch = UploadedBatch::new(device, &batch, &stream).expect("uploads");
        let call = Self { kernels, stream, problem, batch, inputs };
        let forward = SelectedForward::plan(&call.kernels, &problem, &PlanOptions::default()).expect("plans");
        let workspace = call.workspace(forward.workspace_bytes());
        let context = LaunchContext { stream: &call.stream, workspace: workspace.span() };
        forward.launch(&context, &call.batch.get(), &call.forward(), 0.125).expect("launches");
        call.stream.synchronize().expect("runs");
        call
    }

    fn workspace(&self, bytes: usize) -> DeviceBuffer {
        DeviceBuffer::new(self.kernels.device(), "workspace", bytes).expect("memory")
    }

    fn forward(&self) -> ForwardTensors<'_> {
        let [query, key, value, ids, out, lse, _] = &self.inputs;
        ForwardTensors {
            query: TensorSpan::contiguous(query.span(), HEADS, DIM),
            key: TensorSpan::contiguous(key.span(), 1, DIM),
            value: TensorSpan::contiguous(value.span(), 1, DIM),
            topk_indices: ids.span(),
            out: TensorSpan::contiguous(out.span(), HEADS, DIM),
            lse: lse.span(),
        }
    }

    fn plan(&self, budget_bytes: usize) -> SelectedBackward {
        let options = PlanOptions { budget_bytes, ..PlanOptions::default() };
        SelectedBackward::plan(&self.kernels, &self.problem, &options).expect("plans")
    }

    /// Gradients of query, key and value.
    fn gradients(&self, backward: &SelectedBackward) -> Vec<Vec<f32>> {
        let rows = self.problem.total_q;
        let sizes = [rows * HEADS * DIM, rows * DIM, rows * DIM];
        let grads = sizes.map(|size| {
            let buffer = DeviceBuffer::new(self.kernels.device(), "gradient", 2 * size).expect("memory");
            buffer.upload(&vec![0xffffu16; size], &self.stream).expect("uploads");
            buffer
        });
        let workspace = self.workspace(backward.workspace_bytes());
        let tensors = BackwardTensors {
            forward: self.forward(),
            grad_out: TensorSpan::contiguous(self.inputs[6].span(), HEADS, DIM),
            grad_lse: None,
            grad_query: TensorSpan::contiguous(grads[0].span(), HEADS, DIM),
            grad_key: TensorSpan::contiguous(grads[1].span(), 1, DIM),
            grad_value: TensorSpan::contiguous(grads[2].span(), 1, DIM),
        };
        let context = LaunchContext { stream: &self.stream, workspace: workspace.span() };
        backward.launch(&context, &self.batch.get(), &tensors, 0.125).expect("launches");
        let download = |(buffer, size): (&DeviceBuffer, usize)| {
            let mut bits = vec![0u16; size];
            buffer.download(&mut bits, &self.stream).expect("downloads");
            bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
        };
        grads.iter().zip(sizes).map(download).collect()
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn ranges_of_keys_give_the_gradients_of_all_keys_at_once() {
    let call = Call::new();
    let whole = call.plan(usize::MAX / 2);
    assert_eq!(whole.plan_value().range_keys, call.problem.total_kv);
    // Too little for all sums of keys, 0.5 MB.
    let budget = whole.workspace_bytes() - call.problem.topk_indices_bytes() - (256 << 10);
    let parts = call.plan(budget);
    assert!(parts.plan_value().range_keys < call.problem.total_kv, "{}", parts.plan_value());
    let (expected, got) = (call.gradients(&whole), call.gradients(&parts));
    for (name, (expected, got)) in ["query", "key", "value"].iter().zip(expected.iter().zip(&got)) {
        // Other units, so another order of sums, and a rounding to 8 bits per range.
        let bound = |x: f32| (x.abs() + 0.25) / 64.0;
        let wrong = expected.iter().zip(got).position(|(x, y)| y.is_nan() || (x - y).abs() > bound(*x));
        assert_eq!(wrong, None, "grad_{name}: {:?}", wrong.map(|at| (at, expected[at], got[at])));
    }
}
