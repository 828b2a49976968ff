//! On a GPU: `cargo test --release -p fsa-cuda -- --ignored`. `fsa check --device cuda` runs more and shows numbers.

use fsa_core::{DType, Error, NsaConfig, Stage};
use fsa_cuda::driver::{DeviceBuffer, Event, Graph, Stream, UploadedBatch};
use fsa_cuda::plan::{PlanOptions, Problem, Route, Routing};
use fsa_cuda::selected::{ForwardTensors, LaunchContext, SelectedForward, TensorSpan};
use fsa_cuda::{CudaBackend, CudaError, Environment, KernelSet};
use fsa_oracle::suite::{self, CheckOptions};
use fsa_oracle::{Case, Pass};

fn conform(backend: &CudaBackend, stages: &[Stage], pass: Pass, cases: usize) {
    let options = CheckOptions {
        cases,
        stages: stages.to_vec(),
        dtypes: vec![DType::Bf16, DType::F16],
        passes: vec![pass],
        ..CheckOptions::default()
    };
    for report in suite::run(backend, &options, &mut |_| {}) {
        assert_eq!(report.failures, 0, "{:#?}", report.failed.first());
        assert_eq!(report.cases, cases);
    }
}

/// The backend with both routes of stage `selected` and both ways to the lists, one for half of the cases.
fn both_routes() -> CudaBackend {
    let environment = Environment { routing: Routing::Both, ..Environment::read().expect("valid") };
    CudaBackend::with(&environment).expect("a device")
}

/// The attention stages but `selected`, which differs in more than the keys that a row sees.
const BANDS: [Stage; 3] = [Stage::Dense, Stage::Window, Stage::Compressed];
const AROUND: [Stage; 3] = [Stage::Compress, Stage::Rope, Stage::Combine];

#[test]
#[ignore = "needs a CUDA device"]
fn the_forward_conforms() {
    conform(&both_routes(), &[Stage::Selected], Pass::Forward, 150);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_backward_conforms() {
    conform(&both_routes(), &[Stage::Selected], Pass::Backward, 150);
}

#[test]
#[ignore = "needs a CUDA device"]
fn attention_to_intervals_of_keys_conforms() {
    let backend = CudaBackend::new().expect("a device");
    conform(&backend, &BANDS, Pass::Forward, 100);
    conform(&backend, &BANDS, Pass::Backward, 100);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_selection_conforms() {
    conform(&both_routes(), &[Stage::Select], Pass::Forward, 150);
}

/// 325 blocks, which take several segments, or many times as many as a token has candidates; also where all blocks score alike, where few
/// score at all, and with as many places as there can be.
#[test]
#[ignore = "needs a CUDA device"]
fn the_selection_of_long_rows_conforms() {
    let backend = CudaBackend::new().expect("a device");
    let config = NsaConfig { kernel_size: 8, kernel_stride: 4, block_size: 16, ..NsaConfig::default() };
    let heads_and_scales =
        [(1, None), (2, None), (4, None), (5, None), (1, Some(0.0)), (1, Some(40.0)), (4, Some(0.0))];
    let usual = heads_and_scales.map(|(num_q_heads, softmax_scale)| (num_q_heads, softmax_scale, config.topk));
    for (num_q_heads, softmax_scale, topk) in usual.into_iter().chain([1, 4, 5].map(|heads| (heads, None, 27))) {
        let case = Case {
            query_lens: vec![300],
            kv_lens: vec![5200],
            num_q_heads,
            num_kv_heads: 1,
            config: NsaConfig { topk, ..config.clone() },
            softmax_scale,
            ..Case::new(Stage::Select, Pass::Forward, DType::Bf16)
        };
        let outcome = suite::run_case(&backend, &case);
        assert!(outcome.passed(), "{outcome:#?}");
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_stands_around_attention_conforms() {
    let backend = CudaBackend::new().expect("a device");
    conform(&backend, &AROUND, Pass::Forward, 60);
    conform(&backend, &AROUND, Pass::Backward, 60);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_whole_conforms() {
    let backend = both_routes();
    conform(&backend, &[Stage::Nsa], Pass::Forward, 100);
    conform(&backend, &[Stage::Nsa], Pass::Backward, 100);
}

#[test]
#[ignore = "needs a CUDA device"]
fn the_portable_kernels_conform() {
    let (kernels, routing) = (Some(KernelSet::Sm80), Routing::Both);
    let environment = Environment { kernels, routing, ..Environment::read().expect("valid") };
    let backend = CudaBackend::with(&environment).expect("a device");
    conform(&backend, &[Stage::Selected], Pass::Forward, 150);
    conform(&backend, &[Stage::Selected], Pass::Backward, 150);
    conform(&backend, &BANDS, Pass::Forward, 60);
    conform(&backend, &BANDS, Pass::Backward, 60);
    conform(&backend, &[Stage::Select], Pass::Forward, 100);
    conform(&backend, &[Stage::Nsa], Pass::Forward, 40);
    conform(&backend, &[Stage::Nsa], Pass::Backward, 40);
}

#[test]
#[ignore = "needs a CUDA device"]
fn memory_that_cannot_be_had_is_an_error() {
    let backend = CudaBackend::new().expect("a device");
    let bytes = backend.kernels().device().facts().memory_bytes * 2;
    let error = DeviceBuffer::new(backend.kernels().device(), "key", bytes).expect_err("twice the memory");
    assert_eq!(error, CudaError::OutOfMemory { what: "key".into(), bytes });
}

/// A small forward on zeros, with everything that it needs.
struct Small {
    problem: Problem,
    forward: SelectedForward,
    batch: UploadedBatch,
    tensors: [DeviceBuffer; 6],
}

impl Small {
    fn new(backend: &CudaBackend, stream: &Stream, options: &PlanOptions) -> Self {
        let problem = Problem {
            total_q: 256,
            total_kv: 256,
            sequences: 1,
            num_q_heads: 2,
            num_kv_heads: 1,
            head_dim: 64,
            block_size: 64,
            topk: 4,
            dtype: DType::Bf16,
        };
        let kernels = backend.kernels();
        let sizes = [65536, 32768, 32768, 65536, problem.topk_indices_bytes(), 2 * 256 * 4];
        let tensors = sizes.map(|bytes| {
            let buffer = DeviceBuffer::new(kernels.device(), "tensor", bytes).expect("small");
            let _bound = kernels.device().bind().expect("binds");
            buffer.span().fill(0, stream).expect("fills");
            buffer
        });
        let ids = [0, -1, -1, -1].repeat(problem.total_q);
        tensors[4].upload(&ids, stream).expect("uploads");
        Self {
            problem,
            forward: SelectedForward::plan(kernels, &problem, options).expect("plans"),
            batch: UploadedBatch::new(kernels.device(), &fsa_core::Batch::single(256), stream).expect("uploads"),
            tensors,
        }
    }

    fn launch(&self, context: &LaunchContext<'_>) -> fsa_core::Result<()> {
        let [query, key, value, out, ids, lse] = &self.tensors;
        let (q, kv) = (self.problem.num_q_heads, self.problem.num_kv_heads);
        let tensors = ForwardTensors {
            query: TensorSpan::contiguous(query.span(), q, 64),
            key: TensorSpan::contiguous(key.span(), kv, 64),
            value: TensorSpan::contiguous(value.span(), kv, 64),
            topk_indices: ids.span(),
            out: TensorSpan::contiguous(out.span(), q, 64),
            lse: lse.span(),
        };
        self.forward.launch(context, &self.batch.get(), &tensors, 0.125)
    }

    fn lse(&self, stream: &Stream) -> Vec<f32> {
        let mut lse = vec![f32::NAN; 512];
        self.tensors[5].download(&mut lse, stream).expect("downloads");
        lse
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_recorded_call_repeats_and_a_small_workspace_is_refused() {
    let backend = CudaBackend::new().expect("a device");
    let stream = Stream::new(backend.kernels().device()).expect("a stream");
    for route in Route::ALL {
        recorded_and_refused(&backend, &stream, &PlanOptions { route: Some(route), ..PlanOptions::default() });
    }
}

fn recorded_and_refused(backend: &CudaBackend, stream: &Stream, options: &PlanOptions) {
    let device = backend.kernels().device();
    let small = Small::new(backend, stream, options);
    assert_eq!(Some(small.forward.plan_value().route()), options.route);
    let workspace = DeviceBuffer::new(device, "workspace", small.forward.workspace_bytes()).expect("memory");
    let context = LaunchContext { stream, workspace: workspace.span() };
    small.launch(&context).expect("launches");
    // All logits are 0 and every row lists block 0 alone: ln of the keys at or before the row, 64 at most.
    let direct = small.lse(stream);
    for (row, lse) in direct[..256].iter().enumerate() {
        assert!((lse - ((row + 1).min(64) as f32).ln()).abs() < 1e-5, "row {row}: {lse}");
    }
    let graph = Graph::capture(stream, || small.launch(&context)).expect("records");
    small.tensors[5].upload(&vec![0.0f32; 512], stream).expect("uploads");
    graph.launch(stream).expect("launches");
    assert_eq!(small.lse(stream), direct);

    let few = workspace.span().part(0, small.forward.workspace_bytes() - 1);
    let error = small.launch(&LaunchContext { stream, workspace: few }).expect_err("too small");
    assert!(matches!(&error, Error::Input(error) if error.argument == "workspace"), "{error}");
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_call_that_comes_again_is_replayed_on_the_data_of_the_day() {
    let backend = CudaBackend::new().expect("a device");
    let device = backend.kernels().device();
    let stream = Stream::new(device).expect("a stream");
    // So little memory that every head is a launch of its own: calls of many launches are replayed.
    let options = PlanOptions { budget_bytes: 1, route: Some(Route::KvOuter), ..PlanOptions::default() };
    let small = Small::new(&backend, &stream, &options);
    assert!(small.forward.plan_value().launches() >= 8, "{}", small.forward.plan_value());
    let workspaces =
        [(); 20].map(|()| DeviceBuffer::new(device, "workspace", small.forward.workspace_bytes()).expect("memory"));
    let run = |workspace: &DeviceBuffer| {
        small.tensors[5].upload(&vec![7.0f32; 512], &stream).expect("uploads");
        small.launch(&LaunchContext { stream: &stream, workspace: workspace.span() }).expect("launches");
        small.lse(&stream)
    };
    let direct = run(&workspaces[0]);
    // Launched, recorded, replayed; more calls than are kept; the first again.
    for workspace in [&workspaces[0]; 3].into_iter().chain(&workspaces).chain(&workspaces).chain([&workspaces[0]]) {
        assert_eq!(run(workspace), direct);
    }
    // Planned anew, and with another plan in between.
    let other = PlanOptions { budget_bytes: 1 << 30, ..options };
    for options in [options, other, options, other, options, other] {
        let again = Small::new(&backend, &stream, &options);
        let workspace = DeviceBuffer::new(device, "workspace", again.forward.workspace_bytes()).expect("memory");
        again.launch(&LaunchContext { stream: &stream, workspace: workspace.span() }).expect("launches");
        assert_eq!(again.lse(&stream), direct);
    }
    let none = vec![-1i32; 4 * small.problem.total_q];
    small.tensors[4].upload(&none, &stream).expect("uploads");
    assert!(run(&workspaces[0]).iter().all(|lse| *lse == f32::NEG_INFINITY), "rows that list nothing");
}

/// Of memory and of kernels, which are loaded, run and dropped by the other thread while the capture is open.
#[test]
#[ignore = "needs a CUDA device"]
fn what_another_thread_loads_and_drops_leaves_a_capture_whole() {
    let backend = CudaBackend::new().expect("a device");
    let device = backend.kernels().device();
    let stream = Stream::new(device).expect("a stream");
    let buffer = DeviceBuffer::new(device, "memory", 4096).expect("small");
    let elsewhere = |work: fn()| std::thread::scope(|scope| scope.spawn(work).join().expect("passes"));
    let graph = Graph::capture(&stream, || {
        buffer.span().fill(1, &stream)?;
        elsewhere(|| {
            let backend = CudaBackend::new().expect("a device");
            drop(DeviceBuffer::new(backend.kernels().device(), "other memory", 1 << 20).expect("small"));
            conform(&backend, &[Stage::Combine], Pass::Forward, 2);
        });
        buffer.span().fill(2, &stream)
    });
    graph.expect("records").launch(&stream).expect("launches");
    let mut bytes = [0u8; 4096];
    buffer.download(&mut bytes, &stream).expect("downloads");
    assert!(bytes.iter().all(|&byte| byte == 2));
}

#[test]
#[ignore = "needs a CUDA device"]
fn timed_events_measure_the_device_and_others_are_refused() {
    let backend = CudaBackend::new().expect("a device");
    let device = backend.kernels().device();
    let stream = Stream::new(device).expect("a stream");
    let buffer = DeviceBuffer::new(device, "buffer", 64 << 20).expect("memory");
    let _bound = device.bind().expect("binds");
    let [start, middle, stop] = [(); 3].map(|()| Event::timed(device).expect("a new driver"));
    start.record(&stream).expect("records");
    buffer.span().fill(1, &stream).expect("fills");
    middle.record(&stream).expect("records");
    buffer.span().fill(2, &stream).expect("fills");
    stop.record(&stream).expect("records");
    let (half, whole) = (middle.elapsed_ms(&start).expect("timed"), stop.elapsed_ms(&start).expect("timed"));
    // No GPU writes 64 MiB in a microsecond.
    assert!(half > 0.001 && whole > half, "{half} ms of {whole} ms");
    let without = Event::new(device).expect("an event");
    without.record(&stream).expect("records");
    assert!(without.elapsed_ms(&start).is_err(), "it has no time");
}
