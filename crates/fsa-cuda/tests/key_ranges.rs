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
/// So many rows that units take several heads of a group, where there is room for their sums.
const LONG: [usize; 4] = [0, 60, 60, 33_001];

#[derive(Clone, Copy)]
struct Shape {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    block_size: usize,
}
const SMALL: Shape = Shape { q_heads: HEADS, kv_heads: 1, dim: DIM, block_size: 64 };

/// Every row lists the first block, the two up to its own and, of other kv heads than the first, one between.
fn indices(cu_seqlens: &[usize], topk: usize, shape: Shape) -> Vec<i32> {
    let row = |kv_head: usize, position: usize| {
        let own = (position / shape.block_size) as i32;
        let between = if kv_head > 0 { own / (1 + kv_head as i32) } else { 0 };
        let mut ids: Vec<i32> = [0, between, own - 1, own].into_iter().filter(|id| *id >= 0).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.resize(topk, -1);
        ids
    };
    let rows = |kv_head| {
        cu_seqlens.windows(2).flat_map(move |pair| (0..pair[1] - pair[0]).flat_map(move |at| row(kv_head, at)))
    };
    (0..shape.kv_heads).flat_map(rows).collect()
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
    shape: Shape,
    kernels: Arc<Kernels>,
    stream: Stream,
    problem: Problem,
    batch: UploadedBatch,
    /// query, key, value, topk_indices, out, lse, grad_out.
    inputs: [DeviceBuffer; 7],
}

/// query, key, value, grad_out.
fn noises(shape: Shape, rows: usize) -> [Vec<bf16>; 4] {
    let (of_q, of_kv) = (rows * shape.q_heads * shape.dim, rows * shape.kv_heads * shape.dim);
    [noise(of_q, 1), noise(of_kv, 2), noise(of_kv, 3), noise(of_q, 4)]
}

impl Call {
    fn new() -> Self {
        Self::of(SMALL, &CU_SEQLENS, &noises(SMALL, CU_SEQLENS[3]))
    }

    fn of(shape: Shape, cu_seqlens: &[usize], [query, key, value, grad_out]: &[Vec<bf16>; 4]) -> Self {
        let kernels = Arc::clone(CudaBackend::new().expect("a device").kernels());
        let device = kernels.device();
        let stream = Stream::new(device).expect("a stream");
        let rows = cu_seqlens[cu_seqlens.len() - 1];
        let problem = Problem {
            total_q: rows,
            total_kv: rows,
            sequences: cu_seqlens.len() - 1,
            num_q_heads: shape.q_heads,
            num_kv_heads: shape.kv_heads,
            head_dim: shape.dim,
            block_size: shape.block_size,
            topk: 4,
            dtype: DType::Bf16,
        };
        let of_q = rows * shape.q_heads * shape.dim;
        let upload = |data: &[bf16]| uploaded(&kernels, &stream, data);
        let ids = DeviceBuffer::new(device, "topk_indices", problem.topk_indices_bytes()).expect("memory");
        ids.upload(&indices(cu_seqlens, problem.topk, shape), &stream).expect("uploads");
        let lse = DeviceBuffer::new(device, "lse", 4 * rows * shape.q_heads).expect("memory");
        let inputs =
            [upload(query), upload(key), upload(value), ids, upload(&vec![bf16::ZERO; of_q]), lse, upload(grad_out)];
        let cu: Vec<i32> = cu_seqlens.iter().map(|end| *end as i32).collect();
        let batch = Batch::from_cu_seqlens(&cu, &cu).expect("valid");
        let batch = UploadedBatch::new(device, &batch, &stream).expect("uploads");
        let call = Self { shape, kernels, stream, problem, batch, inputs };
        let forward = SelectedForward::plan(&call.kernels, &problem, &PlanOptions::default()).expect("plans");
        let workspace = call.workspace(forward.workspace_bytes());
        let context = LaunchContext { stream: &call.stream, workspace: workspace.span() };
        forward.launch(&context, &call.batch.get(), &call.forward(), 0.125).expect("launches");
        call.stream.synchronize().expect("runs");
        call
    }

    fn of_q<'a>(&self, buffer: &'a DeviceBuffer) -> TensorSpan<'a> {
        TensorSpan::contiguous(buffer.span(), self.shape.q_heads, self.shape.dim)
    }

    fn of_kv<'a>(&self, buffer: &'a DeviceBuffer) -> TensorSpan<'a> {
        TensorSpan::contiguous(buffer.span(), self.shape.kv_heads, self.shape.dim)
    }

    fn workspace(&self, bytes: usize) -> DeviceBuffer {
        DeviceBuffer::new(self.kernels.device(), "workspace", bytes).expect("memory")
    }

    fn forward(&self) -> ForwardTensors<'_> {
        let [query, key, value, ids, out, lse, _] = &self.inputs;
        ForwardTensors {
            query: self.of_q(query),
            key: self.of_kv(key),
            value: self.of_kv(value),
            topk_indices: ids.span(),
            out: self.of_q(out),
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
        let (rows, Shape { q_heads: heads, dim, .. }) = (self.problem.total_q, self.shape);
        let [.., out, lse, grad_out] = &self.inputs;
        let [out, grad_out] = [out, grad_out].map(|buffer| self.download(buffer, rows * heads * dim));
        let mut lses = vec![0f32; rows * heads];
        lse.download(&mut lses, &self.stream).expect("downloads");
        let stats = (0..heads * rows).flat_map(|at| {
            let (head, row) = (at / rows, at % rows);
            let vector = (row * heads + head) * dim..(row * heads + head + 1) * dim;
            let delta: f32 = out[vector.clone()].iter().zip(&grad_out[vector]).map(|(x, y)| x * y).sum();
            let gate = gates[row * heads + head];
            let sign = u32::from(gate < 0.0);
            [lses[at] * std::f32::consts::LOG2_E - gate.abs().log2(), f32::from_bits(delta.to_bits() & !1 | sign)]
        });
        let bounds = (0..rows * heads).map(|at| {
            let gate = gates[at].abs();
            let vector = at * dim..(at + 1) * dim;
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
        let (rows, Shape { q_heads, kv_heads, dim, .. }) = (self.problem.total_q, self.shape);
        let sizes = [q_heads, kv_heads, kv_heads].map(|heads| rows * heads * dim);
        let grads = sizes.map(|size| {
            let buffer = DeviceBuffer::new(self.kernels.device(), "gradient", 2 * size).expect("memory");
            buffer.upload(&vec![given.before.map_or(0xffff, bf16::to_bits); size], &self.stream).expect("uploads");
            buffer
        });
        let workspace = self.workspace(backward.workspace_bytes());
        let tensors = BackwardTensors {
            forward: self.forward(),
            grad_out: self.of_q(given.grad_out.unwrap_or(&self.inputs[6])),
            grad_lse: None,
            grad_query: self.of_q(&grads[0]),
            grad_key: self.of_kv(&grads[1]),
            grad_value: self.of_kv(&grads[2]),
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
    let call = Call::of(SMALL, &LONG, &noises(SMALL, LONG[3]));
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
    let call = Call::of(SMALL, &CU_SEQLENS, inputs);
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
        let mut inputs = noises(SMALL, CU_SEQLENS[3]);
        for (input, factor) in inputs.iter_mut().zip(factors) {
            input.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * factor));
        }
        compare_sums(name, &inputs);
    }
    // One row of grad_out and one value a thousand times as large as the others.
    let mut inputs = noises(SMALL, CU_SEQLENS[3]);
    for (input, row) in [(3, 411 * HEADS), (2, 833)] {
        let large = |x: &mut bf16| *x = bf16::from_f32(x.to_f32() * 1e3);
        inputs[input][row * DIM..(row + 1) * DIM].iter_mut().for_each(large);
    }
    compare_sums("outliers", &inputs);
    // What later rows see, and what rows have themselves.
    let mut inputs = noises(SMALL, CU_SEQLENS[3]);
    inputs[1][650 * DIM + 3] = bf16::NAN;
    inputs[2][130 * DIM] = bf16::INFINITY;
    inputs[0][720 * HEADS * DIM + 9] = bf16::NAN;
    inputs[3][40 * HEADS * DIM + 5] = bf16::NEG_INFINITY;
    compare_sums("not finite", &inputs);
    let mut inputs = noises(SMALL, CU_SEQLENS[3]);
    inputs[2][900 * DIM + 1] = bf16::from_f32(1e36);
    compare_sums("near the end of the range", &inputs);
}

#[test]
#[ignore = "needs a CUDA device"]
fn units_that_take_several_heads_give_the_gradients_of_heads_one_by_one() {
    let call = Call::of(SMALL, &LONG, &noises(SMALL, LONG[3]));
    let [several, alone] = [QuerySums::Scaled, QuerySums::F32].map(|query_sums| {
        let (query_sums, route) = (Some(query_sums), Some(Route::KvOuter));
        call.plan_with(&PlanOptions { query_sums, route, ..PlanOptions::default() })
    });
    assert_eq!((kv_outer(&several).unit_heads, kv_outer(&alone).unit_heads), (HEADS, 1));
    // All rows of the last sequence list its first block: it has several units, and only such blocks have sums in memory.
    assert!(kv_outer(&several).index.packs_sums && kv_outer(&several).index.unit_entries < 32_000);
    compare(&call.gradients(&alone, &Given::default()), &call.gradients(&several, &Given::default()));
}

/// Heads of a group side by side in tiles, and one by one, whose sums are f32: of given statistics, too, where gradients are added.
fn compare_heads(shape: Shape, unit_heads: usize) {
    let cu_seqlens = [0, 60, 60, 8_333];
    let call = Call::of(shape, &cu_seqlens, &noises(shape, cu_seqlens[3]));
    let gates: Vec<f32> = (0..cu_seqlens[3] * shape.q_heads).map(|at| [1.0, -0.25, 0.5, 2.0, 0.5][at % 5]).collect();
    let stats = call.row_stats(&gates);
    for adds_to_grads in [false, true] {
        let [several, alone] = [QuerySums::Scaled, QuerySums::F32].map(|query_sums| {
            let (query_sums, route) = (Some(query_sums), Some(Route::KvOuter));
            call.plan_with(&PlanOptions { query_sums, route, adds_to_grads, ..PlanOptions::default() })
        });
        assert_eq!((kv_outer(&several).unit_heads, kv_outer(&alone).unit_heads), (unit_heads, 1));
        let before = adds_to_grads.then(|| bf16::from_f32(1.0));
        for row_stats in [None, Some(&stats)] {
            let [one, other] = [&alone, &several]
                .map(|planned| call.gradients(planned, &Given { row_stats, before, ..Given::default() }));
            compare(&one, &other);
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn heads_side_by_side_in_tiles_of_any_kind_give_the_gradients_of_heads_one_by_one() {
    let shapes = [
        ((8, 2), (128, 64), 4),
        ((4, 1), (96, 64), 4),
        ((4, 1), (192, 64), 4),
        ((8, 2), (128, 128), 4),
        ((4, 1), (64, 256), 4),
        ((16, 1), (128, 64), 4),
        ((6, 1), (64, 32), 2),
        ((12, 2), (128, 16), 2),
    ];
    for ((q_heads, kv_heads), (dim, block_size), unit_heads) in shapes {
        compare_heads(Shape { q_heads, kv_heads, dim, block_size }, unit_heads);
    }
}
