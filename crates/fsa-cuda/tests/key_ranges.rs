//! On a GPU: gradients do not depend on how many ranges of keys take turns, which the memory for their sums decides; and what the whole operation
//! asks of this backward beside them, statistics of gated rows and gradients that are added to; nor on how gradients of queries are added up,
//! whatever the magnitudes.

mod noise;

use fsa_core::{Batch, DType};
use fsa_cuda::driver::{DeviceBuffer, Stream, UploadedBatch};
use fsa_cuda::plan::{BackwardPlan, PlanOptions, Problem, QuerySums, Route};
use fsa_cuda::selected::{
    BackwardTensors, ForwardTensors, LaunchContext, SelectedBackward, SelectedForward, TensorSpan,
};
use fsa_cuda::{CudaBackend, Kernels};
use half::bf16;
use noise::noise;
use std::sync::Arc;

const HEADS: usize = 2;
const DIM: usize = 64;
const CU_SEQLENS: [usize; 4] = [0, 300, 300, 1001];

/// Every row lists the first block, and the two up to its own.
fn indices(cu_seqlens: &[usize], topk: usize, block_size: usize) -> Vec<i32> {
    let row = |position: usize| {
        let own = (position / block_size) as i32;
        let mut ids: Vec<i32> = [0, own - 1, own].into_iter().filter(|id| *id >= 0).collect();
        ids.dedup();
        ids.resize(topk, -1);
        ids
    };
    cu_seqlens.windows(2).flat_map(|pair| (0..pair[1] - pair[0]).flat_map(row)).collect()
}

fn uploaded(kernels: &Kernels, stream: &Stream, data: &[bf16]) -> DeviceBuffer {
    let buffer = DeviceBuffer::new(kernels.device(), "input", 2 * data.len()).expect("memory");
    let bits: Vec<u16> = data.iter().map(|x| x.to_bits()).collect();
    buffer.upload(&bits, stream).expect("uploads");
    buffer
}

/// What a backward is given beside the tensors of all calls.
#[derive(Default)]
struct Given<'a> {
    grad_out: Option<&'a DeviceBuffer>,
    row_stats: Option<&'a DeviceBuffer>,
    /// What the targets hold and the gradients are added to.
    before: Option<bf16>,
}

struct Call {
    kernels: Arc<Kernels>,
    stream: Stream,
    problem: Problem,
    batch: UploadedBatch,
    /// query, key, value, topk_indices, out, lse, grad_out.
    inputs: [DeviceBuffer; 7],
}

/// query, key, value, grad_out.
fn noises(rows: usize) -> [Vec<bf16>; 4] {
    let rows = rows * DIM;
    [noise(rows * HEADS, 1), noise(rows, 2), noise(rows, 3), noise(rows * HEADS, 4)]
}

impl Call {
    fn new() -> Self {
        Self::of(&CU_SEQLENS, &noises(CU_SEQLENS[3]))
    }

    fn of(cu_seqlens: &[usize], [query, key, value, grad_out]: &[Vec<bf16>; 4]) -> Self {
        let kernels = Arc::clone(CudaBackend::new().expect("a device").kernels());
        let device = kernels.device();
        let stream = Stream::new(device).expect("a stream");
        let rows = cu_seqlens[cu_seqlens.len() - 1];
        let problem = Problem {
            total_q: rows,
            total_kv: rows,
            sequences: cu_seqlens.len() - 1,
            num_q_heads: HEADS,
            num_kv_heads: 1,
            head_dim: DIM,
            block_size: 64,
            topk: 4,
            dtype: DType::Bf16,
        };
        let of_q = rows * HEADS * DIM;
        let upload = |data: &[bf16]| uploaded(&kernels, &stream, data);
        let ids = DeviceBuffer::new(device, "topk_indices", problem.topk_indices_bytes()).expect("memory");
        ids.upload(&indices(cu_seqlens, problem.topk, problem.block_size), &stream).expect("uploads");
        let lse = DeviceBuffer::new(device, "lse", 4 * rows * HEADS).expect("memory");
        let inputs =
            [upload(query), upload(key), upload(value), ids, upload(&vec![bf16::ZERO; of_q]), lse, upload(grad_out)];
        let cu: Vec<i32> = cu_seqlens.iter().map(|end| *end as i32).collect();
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
        let route = Some(Route::KvOuter);
        self.plan_with(&PlanOptions { budget_bytes, route, adds_to_grads: true, ..PlanOptions::default() })
    }

    fn plan_with(&self, options: &PlanOptions) -> SelectedBackward {
        SelectedBackward::plan(&self.kernels, &self.problem, options).expect("plans")
    }

    fn download(&self, buffer: &DeviceBuffer, size: usize) -> Vec<f32> {
        let mut bits = vec![0u16; size];
        buffer.download(&mut bits, &self.stream).expect("downloads");
        bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
    }

    /// Statistics of all rows for the gates, as `BackwardTensors` explains them.
    fn row_stats(&self, gates: &[f32]) -> DeviceBuffer {
        let rows = self.problem.total_q;
        let [.., out, lse, grad_out] = &self.inputs;
        let [out, grad_out] = [out, grad_out].map(|buffer| self.download(buffer, rows * HEADS * DIM));
        let mut lses = vec![0f32; rows * HEADS];
        lse.download(&mut lses, &self.stream).expect("downloads");
        let stats = (0..HEADS * rows).flat_map(|at| {
            let (head, row) = (at / rows, at % rows);
            let vector = (row * HEADS + head) * DIM..(row * HEADS + head + 1) * DIM;
            let delta: f32 = out[vector.clone()].iter().zip(&grad_out[vector]).map(|(x, y)| x * y).sum();
            let gate = gates[row * HEADS + head];
            let sign = u32::from(gate < 0.0);
            [lses[at] * std::f32::consts::LOG2_E - gate.abs().log2(), f32::from_bits(delta.to_bits() & !1 | sign)]
        });
        let bounds = (0..rows * HEADS).map(|at| {
            let gate = gates[at].abs();
            let vector = at * DIM..(at + 1) * DIM;
            let size: f32 = grad_out[vector.clone()].iter().map(|x| x.abs()).sum();
            let delta: f32 = out[vector.clone()].iter().zip(&grad_out[vector]).map(|(x, y)| x * y).sum();
            [gate * size, gate * delta.abs()]
        });
        let bounds = bounds.fold([0f32; 2], |most, bound| [most[0].max(bound[0]), most[1].max(bound[1])]);
        let stats: Vec<f32> = stats.chain(bounds).collect();
        let buffer = DeviceBuffer::new(self.kernels.device(), "row_stats", 4 * stats.len()).expect("memory");
        buffer.upload(&stats, &self.stream).expect("uploads");
        buffer
    }

    /// Gradients of query, key and value.
    fn gradients(&self, backward: &SelectedBackward, given: &Given<'_>) -> Vec<Vec<f32>> {
        let rows = self.problem.total_q;
        let sizes = [rows * HEADS * DIM, rows * DIM, rows * DIM];
        let grads = sizes.map(|size| {
            let buffer = DeviceBuffer::new(self.kernels.device(), "gradient", 2 * size).expect("memory");
            buffer.upload(&vec![given.before.map_or(0xffff, bf16::to_bits); size], &self.stream).expect("uploads");
            buffer
        });
        let workspace = self.workspace(backward.workspace_bytes());
        let tensors = BackwardTensors {
            forward: self.forward(),
            grad_out: TensorSpan::contiguous(given.grad_out.unwrap_or(&self.inputs[6]).span(), HEADS, DIM),
            grad_lse: None,
            grad_query: TensorSpan::contiguous(grads[0].span(), HEADS, DIM),
            grad_key: TensorSpan::contiguous(grads[1].span(), 1, DIM),
            grad_value: TensorSpan::contiguous(grads[2].span(), 1, DIM),
            row_stats: given.row_stats.map(DeviceBuffer::span),
            accumulate: given.before.is_some(),
        };
        let context = LaunchContext { stream: &self.stream, workspace: workspace.span() };
        backward.launch(&context, &self.batch.get(), &tensors, 0.125).expect("launches");
        grads.iter().zip(sizes).map(|(buffer, size)| self.download(buffer, size)).collect()
    }
}

/// Compares gradients of query, key and value with what is expected: other units, so another order of sums, and a few roundings to 8 bits.
fn compare(expected: &[Vec<f32>], got: &[Vec<f32>]) {
    for (name, (expected, got)) in ["query", "key", "value"].iter().zip(expected.iter().zip(got)) {
        let bound = |x: f32| (x.abs() + 0.25) / 64.0;
        let wrong = expected.iter().zip(got).position(|(x, y)| y.is_nan() || (x - y).abs() > bound(*x));
        assert_eq!(wrong, None, "grad_{name}: {:?}", wrong.map(|at| (at, expected[at], got[at])));
    }
}

fn kv_outer(planned: &SelectedBackward) -> &BackwardPlan {
    planned.plan_value().kv_outer().expect("the route that was asked for")
}

#[test]
#[ignore = "needs a CUDA device"]
fn ranges_of_keys_give_the_gradients_of_all_keys_at_once() {
    let call = Call::new();
    let whole = call.plan(usize::MAX / 2);
    assert_eq!(kv_outer(&whole).range_keys, call.problem.total_kv);
    // Too little for all sums of keys, 0.5 MB.
    let budget = whole.workspace_bytes() - call.problem.topk_indices_bytes() - (256 << 10);
    let parts = call.plan(budget);
    assert!(kv_outer(&parts).range_keys < call.problem.total_kv, "{}", parts.plan_value());
    compare(&call.gradients(&whole, &Given::default()), &call.gradients(&parts, &Given::default()));
}

#[test]
#[ignore = "needs a CUDA device"]
fn sums_in_place_give_the_gradients_of_sums_in_memory_of_their_own() {
    // So many rows that units take both heads in turn, where there is room for their sums.
    let cu_seqlens = [0, 60, 60, 33_001];
    let call = Call::of(&cu_seqlens, &noises(cu_seqlens[3]));
    let plan = |budget_bytes, adds_to_grads| {
        let route = Some(Route::KvOuter);
        call.plan_with(&PlanOptions { budget_bytes, adds_to_grads, route, ..PlanOptions::default() })
    };
    let apart = plan(usize::MAX / 2, false);
    let budget = apart.workspace_bytes() - call.problem.topk_indices_bytes() - 1;
    let (in_place, alone) = (plan(budget, false), plan(budget, true));
    let choices = |planned: &SelectedBackward| (kv_outer(planned).lanes_in_place, kv_outer(planned).unit_heads);
    assert_eq!([&apart, &in_place, &alone].map(choices), [(0, HEADS), (1, HEADS), (0, 1)]);
    assert_eq!(kv_outer(&in_place).range_keys, call.problem.total_kv);
    compare(&call.gradients(&apart, &Given::default()), &call.gradients(&in_place, &Given::default()));
}

#[test]
#[ignore = "needs a CUDA device"]
fn gates_in_the_statistics_of_rows_are_gates_of_grad_out_and_gradients_are_added() {
    let call = Call::new();
    // Powers of two, so that the gates of grad_out round nothing.
    let gates: Vec<f32> =
        (0..call.problem.total_q * HEADS).map(|at| [1.0, -0.25, 0.5, 0.0, 0.5, 2.0][at % 6]).collect();
    let gated: Vec<bf16> = noise(call.problem.total_q * HEADS * DIM, 4)
        .chunks(DIM)
        .zip(&gates)
        .flat_map(|(row, gate)| row.iter().map(move |x| bf16::from_f32(x.to_f32() * gate)))
        .collect();
    let (gated, stats) = (uploaded(&call.kernels, &call.stream, &gated), call.row_stats(&gates));
    for (deterministic, route) in [(false, Route::KvOuter), (true, Route::KvOuter), (false, Route::DenseMasked)] {
        let options = PlanOptions { deterministic, route: Some(route), adds_to_grads: true, ..PlanOptions::default() };
        let backward = call.plan_with(&options);
        assert_eq!(backward.plan_value().route(), route);
        let expected = call.gradients(&backward, &Given { grad_out: Some(&gated), ..Given::default() });
        compare(&expected, &call.gradients(&backward, &Given { row_stats: Some(&stats), ..Given::default() }));
        let sum: Vec<Vec<f32>> = expected.iter().map(|grad| grad.iter().map(|x| x + 3.0).collect()).collect();
        let added = Given { row_stats: Some(&stats), before: Some(bf16::from_f32(3.0)), ..Given::default() };
        compare(&sum, &call.gradients(&backward, &added));
    }
}

/// Gradients of queries in scaled f16 and in f32: equal but for roundings of the largest element of a row, and what is far below the largest of all;
/// and not finite in the same places.
fn compare_sums(name: &str, inputs: &[Vec<bf16>; 4]) {
    let call = Call::of(&CU_SEQLENS, inputs);
    let [scaled, exact] = [QuerySums::Scaled, QuerySums::F32].map(|query_sums| {
        let (query_sums, route) = (Some(query_sums), Some(Route::KvOuter));
        let planned = call.plan_with(&PlanOptions { query_sums, route, ..PlanOptions::default() });
        call.gradients(&planned, &Given::default()).swap_remove(0)
    });
    let largest = |row: &[f32]| row.iter().filter(|x| x.is_finite()).fold(0f32, |most, x| most.max(x.abs()));
    let floor = largest(&exact) / (1 << 26) as f32;
    for (row, (got, expected)) in scaled.chunks(DIM).zip(exact.chunks(DIM)).enumerate() {
        let most = largest(expected) / 64.0 + floor;
        let fits = |(x, y): (&f32, &f32)| (x - y).abs() <= most || x == y || x.is_nan() && y.is_nan();
        let wrong = got.iter().zip(expected).position(|pair| !fits(pair));
        assert_eq!(wrong, None, "{name}, row {row}: {:?}", wrong.map(|at| (got[at], expected[at])));
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn scaled_sums_are_those_in_f32_whatever_the_magnitudes() {
    let factors = [
        ("plain", [1.0; 4]),
        ("no gradient", [1.0, 1.0, 1.0, 0.0]),
        ("tiny gradient", [1.0, 1.0, 1.0, 1e-25]),
        ("huge gradient", [1.0, 1.0, 1.0, 1e25]),
        ("huge values and gradient", [1.0, 1.0, 1e15, 1e15]),
        ("tiny values, large keys", [1e-3, 1e3, 1e-20, 1.0]),
        ("tiny keys", [1.0, 1e-20, 1.0, 1.0]),
        ("large logits", [30.0, 30.0, 1.0, 1.0]),
    ];
    for (name, factors) in factors {
        let mut inputs = noises(CU_SEQLENS[3]);
        for (input, factor) in inputs.iter_mut().zip(factors) {
            input.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * factor));
        }
        compare_sums(name, &inputs);
    }
    // One row of grad_out and one value a thousand times as large as the others.
    let mut inputs = noises(CU_SEQLENS[3]);
    for (input, row) in [(3, 411 * HEADS), (2, 833)] {
        let large = |x: &mut bf16| *x = bf16::from_f32(x.to_f32() * 1e3);
        inputs[input][row * DIM..(row + 1) * DIM].iter_mut().for_each(large);
    }
    compare_sums("outliers", &inputs);
    // What later rows see, and what rows have themselves.
    let mut inputs = noises(CU_SEQLENS[3]);
    inputs[1][650 * DIM + 3] = bf16::NAN;
    inputs[2][130 * DIM] = bf16::INFINITY;
    inputs[0][720 * HEADS * DIM + 9] = bf16::NAN;
    inputs[3][40 * HEADS * DIM + 5] = bf16::NEG_INFINITY;
    compare_sums("not finite", &inputs);
    let mut inputs = noises(CU_SEQLENS[3]);
    inputs[2][900 * DIM + 1] = bf16::from_f32(1e36);
    compare_sums("near the end of the range", &inputs);
}

#[test]
#[ignore = "needs a CUDA device"]
fn units_that_take_heads_in_turn_give_the_gradients_of_heads_one_by_one() {
    let cu_seqlens = [0, 60, 60, 33_001];
    let call = Call::of(&cu_seqlens, &noises(cu_seqlens[3]));
    let [turns, alone] = [QuerySums::Scaled, QuerySums::F32].map(|query_sums| {
        let (query_sums, route) = (Some(query_sums), Some(Route::KvOuter));
        call.plan_with(&PlanOptions { query_sums, route, ..PlanOptions::default() })
    });
    assert_eq!((kv_outer(&turns).unit_heads, kv_outer(&alone).unit_heads), (HEADS, 1));
    // All rows of the last sequence list its first block: it has several units, and only such blocks have sums in memory.
    assert!(kv_outer(&turns).index.packs_sums && kv_outer(&turns).index.unit_entries < 32_000);
    compare(&call.gradients(&alone, &Given::default()), &call.gradients(&turns, &Given::default()));
}
