//! On a GPU: gradients of attention to an interval of keys in one pass, where those of queries are added up in memory, are those
//! in two, whatever the magnitudes; and not finite in the same rows.

mod noise;

use fsa_core::{Batch, DType};
use fsa_cuda::driver::{DeviceBuffer, DeviceSpan, Stream, UploadedBatch};
use fsa_cuda::plan::{BandProblem, Keys, PlanOptions, QuerySums, Sizes, Windows};
use fsa_cuda::stages::{AttentionGradTensors, AttentionTensors, BandBackward, BandForward, LaunchContext, TensorSpan};
use fsa_cuda::{CudaBackend, KernelSet};
use half::bf16;
use noise::noise;

const DIM: usize = 128;
const SCALE: f32 = 0.088;

fn tensor(span: DeviceSpan<'_>, heads: usize) -> TensorSpan<'_> {
    TensorSpan::contiguous(span, heads, DIM)
}

/// A problem, its batch and its inputs: query, key, value, grad_out.
struct Case {
    problem: BandProblem,
    batch: Batch,
    inputs: [Vec<bf16>; 4],
}

impl Case {
    /// Three sequences, one without rows, one with fewer rows than keys.
    fn new(keys: Keys, [num_q_heads, num_kv_heads]: [usize; 2]) -> Self {
        let batch = Batch::from_cu_seqlens(&[0, 210, 210, 420], &[0, 210, 250, 750]).expect("valid");
        let (total_q, total_kv, sequences) = (batch.total_q(), batch.total_kv(), batch.sequences().len());
        let sizes =
            Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim: DIM, dtype: DType::Bf16 };
        let problem = BandProblem { sizes, keys };
        let (of_q, of_keys) = (total_q * num_q_heads * DIM, problem.total_keys() * num_kv_heads * DIM);
        Self { problem, batch, inputs: [noise(of_q, 1), noise(of_keys, 2), noise(of_keys, 3), noise(of_q, 4)] }
    }

    fn scaled(mut self, factors: [f32; 4]) -> Self {
        for (input, factor) in self.inputs.iter_mut().zip(factors) {
            input.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * factor));
        }
        self
    }

    /// Gradients of query, key and value, added up in either way.
    fn gradients(&self, backend: &CudaBackend, sums: [QuerySums; 2]) -> [[Vec<f32>; 3]; 2] {
        let (kernels, problem) = (backend.kernels(), &self.problem);
        let Sizes { total_q, num_q_heads, num_kv_heads, .. } = problem.sizes;
        let stream = Stream::new(kernels.device()).expect("a stream");
        let memory = |bytes: usize| DeviceBuffer::new(kernels.device(), "memory", bytes.max(256)).expect("memory");
        let upload = |data: &Vec<bf16>| {
            let buffer = memory(2 * data.len());
            buffer.upload(&data.iter().map(|x| x.to_bits()).collect::<Vec<u16>>(), &stream).expect("uploads");
            buffer
        };
        let buffers = self.inputs.each_ref().map(upload);
        let [query, key, value, grad_out] = buffers.each_ref().map(DeviceBuffer::span);
        let (out, lse) = (memory(2 * self.inputs[0].len()), memory(4 * total_q * num_q_heads));
        let forward = AttentionTensors {
            query: tensor(query, num_q_heads),
            key: tensor(key, num_kv_heads),
            value: tensor(value, num_kv_heads),
            out: tensor(out.span(), num_q_heads),
            lse: lse.span(),
        };
        let batch = UploadedBatch::new(kernels.device(), &self.batch, &stream).expect("uploads");
        let planned = BandForward::plan(kernels, problem).expect("plans");
        let workspace = memory(planned.workspace_bytes());
        let context = LaunchContext { stream: &stream, workspace: workspace.span() };
        planned.launch(&context, &batch.get(), &forward, SCALE).expect("launches");
        sums.map(|query_sums| {
            let options = PlanOptions { query_sums: Some(query_sums), ..PlanOptions::default() };
            let planned = BandBackward::plan(kernels, problem, &options).expect("plans");
            let hopper = kernels.set() == KernelSet::Sm90;
            assert_eq!(planned.plan_value().query_sums, if hopper { query_sums } else { QuerySums::F32 });
            // Zeros: rows of keys that no sequence has are not written.
            let grads = [0, 1, 2].map(|i: usize| upload(&vec![bf16::ZERO; self.inputs[i].len()]));
            let workspace = memory(planned.workspace_bytes());
            let context = LaunchContext { stream: &stream, workspace: workspace.span() };
            let tensors = AttentionGradTensors {
                forward,
                grad_out: tensor(grad_out, num_q_heads),
                grad_lse: None,
                grad_query: tensor(grads[0].span(), num_q_heads),
                grad_key: tensor(grads[1].span(), num_kv_heads),
                grad_value: tensor(grads[2].span(), num_kv_heads),
            };
            planned.launch(&context, &batch.get(), &tensors, SCALE).expect("launches");
            [0, 1, 2].map(|i: usize| {
                let mut bits = vec![0u16; self.inputs[i].len()];
                grads[i].download(&mut bits, &stream).expect("downloads");
                bits.into_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
            })
        })
    }

    /// Requires both ways to agree but for roundings of the largest element of a row, and what is far below the largest of all.
    fn check(&self, name: &str, backend: &CudaBackend) {
        let [scaled, exact] = self.gradients(backend, [QuerySums::Scaled, QuerySums::F32]);
        let largest = |row: &[f32]| row.iter().filter(|x| x.is_finite()).fold(0f32, |most, x| most.max(x.abs()));
        for (i, of) in ["query", "key", "value"].iter().enumerate() {
            let floor = largest(&exact[i]) / (1 << 26) as f32;
            for (row, (got, expected)) in scaled[i].chunks(DIM).zip(exact[i].chunks(DIM)).enumerate() {
                let most = largest(expected) / 64.0 + floor;
                let fits = |(x, y): (&f32, &f32)| (x - y).abs() <= most || x == y || !x.is_finite() && !y.is_finite();
                let wrong = got.iter().zip(expected).position(|pair| !fits(pair));
                assert_eq!(wrong, None, "{name}, grad_{of}, row {row}: {:?}", wrong.map(|at| (got[at], expected[at])));
            }
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn sums_in_memory_are_those_in_registers() {
    let backend = CudaBackend::new().expect("a device");
    let window = || Case::new(Keys::Window { window_size: 70 }, [6, 2]);
    let compressed = Keys::Compressed(Windows { kernel_size: 32, kernel_stride: 16 });
    Case::new(compressed, [8, 2]).check("compressed", &backend);
    Case::new(Keys::Dense, [5, 1]).check("dense", &backend);
    Case::new(Keys::Dense, [160, 1]).check("a group larger than a tile", &backend);
    for heads in [64, 80] {
        Case::new(Keys::Dense, [heads, 1]).check("rows that see all keys of a tile that is not full", &backend);
    }
    for (name, factors) in [
        ("plain", [1.0; 4]),
        ("no gradient", [1.0, 1.0, 1.0, 0.0]),
        ("tiny gradient", [1.0, 1.0, 1.0, 1e-25]),
        ("huge values and gradient", [1.0, 1.0, 1e15, 1e15]),
        ("tiny keys", [1.0, 1e-20, 1.0, 1.0]),
        ("large logits", [30.0, 30.0, 1.0, 1.0]),
    ] {
        window().scaled(factors).check(name, &backend);
    }
    // One row of grad_out, and one value, a thousand times as large as the others.
    let mut case = window();
    for (input, row) in [(3, 311), (2, 433)] {
        case.inputs[input][row * DIM..(row + 1) * DIM].iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * 1e3));
    }
    case.check("outliers", &backend);
    // What later rows see, what rows have themselves, and keys that no row sees.
    let mut case = window();
    for (input, row, x) in [
        (1, 300, bf16::NAN),
        (1, 1200, bf16::NAN),
        (2, 1000, bf16::INFINITY),
        (0, 900, bf16::NAN),
        (3, 40, bf16::NEG_INFINITY),
    ] {
        case.inputs[input][row * DIM + 5] = x;
    }
    case.check("not finite", &backend);
}
