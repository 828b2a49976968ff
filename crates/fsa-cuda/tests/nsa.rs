//! The whole operation on device tensors, on a GPU: passes of heads, recorded and repeated calls, what is refused.

use fsa_core::{Batch, DType, Error, NsaConfig, Rope, bf16};
use fsa_cuda::driver::{DeviceBuffer, Graph, Stream, UploadedBatch};
use fsa_cuda::plan::{CompressionKind, NsaProblem, PlanOptions, Sizes};
use fsa_cuda::stages::{
    Gates, LaunchContext, NsaBackward, NsaBackwardTensors, NsaForward, NsaForwardTensors, NsaParameters,
    NsaSavedTensors, Recompute, TensorSpan,
};
use fsa_cuda::{CudaBackend, KernelSet};

const HEADS: [usize; 2] = [8, 4];
const DIM: usize = 128;
const SCALE: f32 = 0.125;

/// Three sequences, one without rows, one with fewer rows than keys.
fn batch() -> Batch {
    Batch::from_cu_seqlens(&[0, 150, 150, 210], &[0, 150, 190, 330]).expect("valid")
}

fn problem() -> NsaProblem {
    let batch = batch();
    let sizes = Sizes {
        total_q: batch.total_q(),
        total_kv: batch.total_kv(),
        sequences: batch.sequences().len(),
        num_q_heads: HEADS[0],
        num_kv_heads: HEADS[1],
        head_dim: DIM,
        dtype: DType::Bf16,
    };
    let windows = NsaConfig { kernel_size: 16, kernel_stride: 8, window_size: 8, ..NsaConfig::default() };
    let config = NsaConfig { block_size: 32, topk: 3, init_blocks: 0, local_blocks: 1, ..windows };
    NsaProblem::new(&sizes, &config, [CompressionKind::Weighted, CompressionKind::Linear { position: true }], true)
}

/// The same with lists that have room for all blocks.
fn few_blocks() -> NsaProblem {
    NsaProblem { topk: 11, ..problem() }
}

/// The same without rotation and parameters: attention starts under the compression.
fn few_blocks_of_means() -> NsaProblem {
    NsaProblem { compressions: [CompressionKind::Mean; 2], rope: false, ..few_blocks() }
}

/// What a call takes besides its plan.
struct Call {
    problem: NsaProblem,
    stream: Stream,
    backend: CudaBackend,
    batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    gates: DeviceBuffer,
    grad_out: DeviceBuffer,
    parameters: [[Option<DeviceBuffer>; 2]; 2],
}

/// Numbers between -1 and 1 that look random.
fn numbers(seed: u64, count: usize) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

fn memory(backend: &CudaBackend, stream: &Stream, bytes: usize) -> DeviceBuffer {
    let buffer = DeviceBuffer::new(backend.kernels().device(), "memory", bytes).expect("small");
    let _bound = backend.kernels().device().bind().expect("binds");
    buffer.span().fill(0xff, stream).expect("fills");
    buffer
}

impl Call {
    fn new() -> Self {
        Self::of(problem())
    }

    fn of(problem: NsaProblem) -> Self {
        let backend = CudaBackend::new().expect("a device");
        let stream = Stream::new(backend.kernels().device()).expect("a stream");
        let upload = |seed, bytes: usize| {
            let buffer = memory(&backend, &stream, bytes);
            buffer.upload(&numbers(seed, bytes / 2), &stream).expect("uploads");
            buffer
        };
        let Sizes { total_q, total_kv, .. } = problem.sizes;
        let rows = |seed, rows: usize, heads: usize| upload(seed, rows * heads * DIM * 2);
        let parameters = problem.compress().map(|compress| {
            [compress.weight_bytes(), compress.position_bytes()].map(|bytes| (bytes > 0).then(|| upload(7, bytes)))
        });
        Self {
            problem,
            batch: UploadedBatch::new(backend.kernels().device(), &batch(), &stream).expect("uploads"),
            query: rows(1, total_q, HEADS[0]),
            key: rows(2, total_kv, HEADS[1]),
            value: rows(3, total_kv, HEADS[1]),
            gates: upload(4, total_q * HEADS[0] * 3 * 2),
            grad_out: rows(5, total_q, HEADS[0]),
            parameters,
            stream,
            backend,
        }
    }

    fn memory(&self, bytes: usize) -> DeviceBuffer {
        memory(&self.backend, &self.stream, bytes)
    }

    fn context<'a>(&'a self, workspace: &'a DeviceBuffer) -> LaunchContext<'a> {
        LaunchContext { stream: &self.stream, workspace: workspace.span() }
    }

    fn forward_tensors<'a>(
        &'a self,
        outputs: &'a [DeviceBuffer; 2],
        saved: Option<&'a Saved>,
    ) -> NsaForwardTensors<'a> {
        NsaForwardTensors {
            query: of_q(&self.query),
            key: of_kv(&self.key),
            value: of_kv(&self.value),
            gates: Gates::per_head(self.gates.span(), HEADS[0]),
            parameters: spans(&self.parameters),
            out: of_q(&outputs[0]),
            topk_indices: outputs[1].span(),
            saved: saved.map(Saved::tensors),
        }
    }

    /// `out` and `topk_indices`.
    fn outputs(&self) -> [DeviceBuffer; 2] {
        [self.memory(self.query.span().size_bytes()), self.memory(self.problem.topk_indices_bytes())]
    }

    fn plan_forward(&self, budget_bytes: usize, saves: bool) -> NsaForward {
        self.plan_forward_with(&PlanOptions { budget_bytes, ..PlanOptions::default() }, saves)
    }

    fn plan_forward_with(&self, options: &PlanOptions, saves: bool) -> NsaForward {
        let rope = Rope::default();
        let rope = self.problem.rope.then_some((&rope, DIM));
        NsaForward::plan(self.backend.kernels(), &self.problem, rope, options, saves).expect("plans")
    }

    /// Bits of `out` and `topk_indices`.
    fn bits(&self, outputs: &[DeviceBuffer; 2]) -> Vec<Vec<u16>> {
        outputs.iter().map(|buffer| self.words(buffer)).collect()
    }

    fn words(&self, buffer: &DeviceBuffer) -> Vec<u16> {
        let mut words = vec![0; buffer.span().size_bytes() / 2];
        buffer.download(&mut words, &self.stream).expect("downloads");
        words
    }
}

fn of_q(buffer: &DeviceBuffer) -> TensorSpan<'_> {
    TensorSpan::contiguous(buffer.span(), HEADS[0], DIM)
}

fn of_kv(buffer: &DeviceBuffer) -> TensorSpan<'_> {
    TensorSpan::contiguous(buffer.span(), HEADS[1], DIM)
}

fn spans(parameters: &[[Option<DeviceBuffer>; 2]; 2]) -> [NsaParameters<'_>; 2] {
    parameters.each_ref().map(|[weight, position]| NsaParameters {
        weight: weight.as_ref().map(DeviceBuffer::span),
        position: position.as_ref().map(DeviceBuffer::span),
    })
}

/// Memory for what the backward needs.
struct Saved {
    rope: bool,
    rotated: [DeviceBuffer; 2],
    compressed: [DeviceBuffer; 2],
    branches: [DeviceBuffer; 3],
    lse: [DeviceBuffer; 3],
}

impl Saved {
    fn new(call: &Call) -> Self {
        let (query, key) = (call.query.span().size_bytes(), call.key.span().size_bytes());
        Self {
            rope: call.problem.rope,
            rotated: [call.memory(query), call.memory(key)],
            compressed: [(); 2].map(|()| call.memory(problem().total_compressed() * HEADS[1] * DIM * 2)),
            branches: [(); 3].map(|()| call.memory(query)),
            lse: [(); 3].map(|()| call.memory(HEADS[0] * problem().sizes.total_q * 4)),
        }
    }

    fn tensors(&self) -> NsaSavedTensors<'_> {
        NsaSavedTensors {
            rotated: self.rope.then(|| [of_q(&self.rotated[0]), of_kv(&self.rotated[1])]),
            compressed: self.compressed.each_ref().map(of_kv),
            branches: self.branches.each_ref().map(of_q),
            lse: self.lse.each_ref().map(DeviceBuffer::span),
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn passes_of_heads_recorded_and_repeated_calls_give_the_same_bits() {
    for (problem, one_pass) in ways_to_list() {
        same_bits(problem, PlanOptions::default().beside_rows, one_pass);
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn branches_that_share_the_device_give_the_same_bits() {
    for (problem, one_pass) in ways_to_list() {
        same_bits(problem, 0, one_pass);
    }
}

/// Lists that are made in one pass with compressed attention, where there is such a kernel, in their own, or without scores.
fn ways_to_list() -> [(NsaProblem, Option<bool>); 4] {
    [(problem(), Some(true)), (problem(), Some(false)), (few_blocks(), None), (few_blocks_of_means(), None)]
}

fn same_bits(problem: NsaProblem, beside_rows: usize, one_pass: Option<bool>) {
    let call = Call::of(problem);
    let (outputs, saved) = (call.outputs(), Saved::new(&call));
    let plan = |budget_bytes, saves| {
        call.plan_forward_with(&PlanOptions { budget_bytes, beside_rows, one_pass, ..PlanOptions::default() }, saves)
    };
    let whole = plan(256 << 20, true);
    let hopper = call.backend.kernels().set() == KernelSet::Sm90;
    let lists = whole.plan_value().lists;
    assert_eq!(lists.is_one_pass(), one_pass == Some(true) && hopper, "{}", whole.plan_value());
    assert_eq!(lists.is_all_blocks(), one_pass.is_none(), "{}", whole.plan_value());
    let shares = beside_rows == 0 && hopper;
    assert_eq!(whole.plan_value().window_multiprocessors.is_some(), shares, "{}", whole.plan_value());
    let workspace = call.memory(whole.workspace_bytes());
    let tensors = call.forward_tensors(&outputs, Some(&saved));
    let launch = || whole.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE);
    launch().expect("launches");
    let expected = call.bits(&outputs);
    assert!(!expected[0].contains(&0xffff), "every element is written");
    // Again, then from a graph of the plan's own, then from the caller's.
    for _ in 0..2 {
        launch().expect("launches");
        assert_eq!(call.bits(&outputs), expected);
    }
    let graph = Graph::capture(&call.stream, launch).expect("records");
    outputs[0].upload(&vec![0u16; expected[0].len()], &call.stream).expect("uploads");
    graph.launch(&call.stream).expect("launches");
    assert_eq!(call.bits(&outputs), expected);
    // All heads at once, one a pass, and few a pass after the compression of all.
    let compressed = problem.total_compressed() * HEADS[1] * DIM * 2;
    let all = HEADS[1];
    // Where nothing is rotated all fit.
    let few = if problem.rope { 2 } else { all };
    for (budget_bytes, heads, at_once) in [(256 << 20, all..=all, all), (0, 1..=1, 1), (16 * compressed, 1..=few, all)]
    {
        let part = plan(budget_bytes, false);
        assert!(heads.contains(&part.plan_value().kv_heads), "{}", part.plan_value());
        assert_eq!(part.plan_value().compress_heads, at_once, "{}", part.plan_value());
        let (outputs, workspace) = (call.outputs(), call.memory(part.workspace_bytes()));
        let tensors = call.forward_tensors(&outputs, None);
        // Twice: the first branch does not add to what was there.
        for _ in 0..2 {
            part.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE).expect("launches");
            assert_eq!(call.bits(&outputs), expected, "{}", part.plan_value());
        }
    }
}

/// Rows list all blocks that they see, in every head.
#[test]
#[ignore = "needs a CUDA device"]
fn lists_have_all_blocks_where_there_are_few() {
    let call = Call::of(few_blocks());
    let NsaProblem { topk, block_size, .. } = call.problem;
    let mut rows = Vec::new();
    for sequence in batch().sequences() {
        let first = sequence.first_position;
        rows.extend((0..sequence.query_rows.len()).map(|row| (first + row) / block_size));
    }
    let id = |own: usize, place: usize| if place <= own { place as i32 } else { -1 };
    let head: Vec<i32> = rows.iter().flat_map(|&own| (0..topk).map(move |place| id(own, place))).collect();
    for (budget_bytes, saves) in [(256 << 20, true), (256 << 20, false), (0, false)] {
        let (outputs, saved) = (call.outputs(), Saved::new(&call));
        let planned = call.plan_forward(budget_bytes, saves);
        assert!(planned.plan_value().lists.is_all_blocks(), "{}", planned.plan_value());
        let workspace = call.memory(planned.workspace_bytes());
        let tensors = call.forward_tensors(&outputs, saves.then_some(&saved));
        planned.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE).expect("launches");
        let mut lists = vec![0i32; HEADS[1] * head.len()];
        outputs[1].download(&mut lists, &call.stream).expect("downloads");
        for (kv_head, list) in lists.chunks(head.len()).enumerate() {
            assert_eq!(list, head, "kv head {kv_head}");
        }
    }
}

/// Everything that a backward reads, as bits.
fn state_bits(call: &Call, saved: &Saved) -> Vec<Vec<u16>> {
    let buffers = saved.rotated.iter().chain(&saved.compressed).chain(&saved.branches).chain(&saved.lse);
    buffers.map(|buffer| call.words(buffer)).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_state_that_is_computed_again_is_the_same() {
    for (problem, one_pass) in ways_to_list() {
        computed_again(problem, one_pass);
    }
}

fn computed_again(problem: NsaProblem, one_pass: Option<bool>) {
    let call = Call::of(problem);
    let (outputs, saved) = (call.outputs(), Saved::new(&call));
    let planned = call.plan_forward_with(&PlanOptions { one_pass, ..PlanOptions::default() }, true);
    let workspace = call.memory(planned.workspace_bytes());
    let tensors = call.forward_tensors(&outputs, Some(&saved));
    planned.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE).expect("launches");
    let (expected, lists) = (state_bits(&call, &saved), call.words(&outputs[1]));
    for recompute in [Recompute::Rotated, Recompute::All] {
        let (spare, again) = (call.outputs(), Saved::new(&call));
        spare[1].upload(&lists, &call.stream).expect("uploads");
        let tensors = call.forward_tensors(&spare, Some(&again));
        // Then from a graph of the plan's own.
        for _ in 0..3 {
            planned
                .launch_again(&call.context(&workspace), &call.batch.get(), &tensors, SCALE, recompute)
                .expect("launches");
            let got = state_bits(&call, &again);
            let written = if recompute == Recompute::All { got.len() } else { saved.rotated.len() };
            assert_eq!(got[..written], expected[..written], "{recompute:?}");
            assert_eq!(call.words(&spare[1]), lists, "the lists are read");
        }
    }
}

/// Gradients of query, key, value, gates and of the parameters.
fn backward(call: &Call, saved: &Saved, ids: &DeviceBuffer, options: PlanOptions) -> Vec<Vec<f32>> {
    let rope = Rope::default();
    let planned = NsaBackward::plan(call.backend.kernels(), &problem(), Some((&rope, DIM)), &options).expect("plans");
    assert_eq!(planned.plan_value().kv_heads == 1, options.budget_bytes == 0, "{}", planned.plan_value());
    let workspace = call.memory(planned.workspace_bytes());
    let like = |buffer: &DeviceBuffer| call.memory(buffer.span().size_bytes());
    let gradients = [&call.key, &call.value, &call.gates].map(like);
    let parameters = call.parameters.each_ref().map(|both| both.each_ref().map(|buffer| buffer.as_ref().map(like)));
    let [grad_key, grad_value, grad_gates] = &gradients;
    // Its rows have gaps.
    let row = (HEADS[0] + 1) * DIM;
    let grad_query = call.memory(problem().sizes.total_q * row * 2);
    let tensors = NsaBackwardTensors {
        query: of_q(&call.query),
        key: of_kv(&call.key),
        value: of_kv(&call.value),
        gates: Gates::per_head(call.gates.span(), HEADS[0]),
        parameters: spans(&call.parameters),
        saved: saved.tensors(),
        topk_indices: ids.span(),
        grad_out: of_q(&call.grad_out),
        grad_query: TensorSpan { row_stride: row, ..of_q(&grad_query) },
        grad_key: of_kv(grad_key),
        grad_value: of_kv(grad_value),
        grad_gates: grad_gates.span(),
        grad_parameters: spans(&parameters),
    };
    planned.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE).expect("launches");
    let mut rows = call.words(&grad_query);
    assert!(
        rows.chunks(row).all(|row| row[HEADS[0] * DIM..].iter().all(|word| *word == 0xffff)),
        "gaps are left alone"
    );
    let mut number = 0..;
    rows.retain(|_| number.next().is_some_and(|number| number % row < HEADS[0] * DIM));
    let others = gradients.iter().chain(parameters.iter().flatten().flatten()).map(|buffer| call.words(buffer));
    let numbers = |words: Vec<u16>| words.into_iter().map(|word| bf16::from_bits(word).to_f32()).collect();
    std::iter::once(rows).chain(others).map(numbers).collect()
}

#[test]
#[ignore = "needs a CUDA device"]
fn a_backward_head_by_head_or_in_any_order_is_that_of_all_heads() {
    let call = Call::new();
    let (outputs, saved) = (call.outputs(), Saved::new(&call));
    let forward = call.plan_forward(256 << 20, true);
    let workspace = call.memory(forward.workspace_bytes());
    let tensors = call.forward_tensors(&outputs, Some(&saved));
    forward.launch(&call.context(&workspace), &call.batch.get(), &tensors, SCALE).expect("launches");
    let gradients = |budget_bytes, deterministic| {
        let options = PlanOptions { budget_bytes, deterministic, ..PlanOptions::default() };
        backward(&call, &saved, &outputs[1], options)
    };
    let whole = gradients(256 << 20, true);
    assert_eq!(whole.len(), 4 + 3, "a weight, and a weight with a position");
    for other in [gradients(0, true), gradients(256 << 20, false), gradients(0, false)] {
        for (number, (whole, other)) in whole.iter().zip(&other).enumerate() {
            let largest = whole.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            assert!(largest > 0.0 && largest.is_finite(), "gradient {number}");
            // Sums of chunks of another size, or in another order, are rounded elsewhere.
            let worst = whole.iter().zip(other).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst <= largest / 64.0, "gradient {number}: {worst} of {largest}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA device"]
fn what_is_not_as_planned_is_refused_before_anything_runs() {
    let call = Call::new();
    let (outputs, saved) = (call.outputs(), Saved::new(&call));
    let planned = call.plan_forward(256 << 20, true);
    let workspace = call.memory(planned.workspace_bytes());
    let refused = |tensors: &NsaForwardTensors<'_>, scale| {
        let error = planned.launch(&call.context(&workspace), &call.batch.get(), tensors, scale).expect_err("refused");
        match error {
            Error::Input(error) => error.argument,
            other => other.to_string(),
        }
    };
    let good = call.forward_tensors(&outputs, Some(&saved));
    assert_eq!(refused(&NsaForwardTensors { saved: None, ..good }, SCALE), "saved");
    assert_eq!(refused(&NsaForwardTensors { query: of_q(&call.key), ..good }, SCALE), "query");
    assert_eq!(refused(&NsaForwardTensors { key: TensorSpan { row_stride: 4, ..good.key }, ..good }, SCALE), "key");
    assert_eq!(refused(&NsaForwardTensors { parameters: Default::default(), ..good }, SCALE), "key_compression.weight");
    assert_eq!(
        refused(&NsaForwardTensors { topk_indices: call.gates.span().part(0, 32), ..good }, SCALE),
        "topk_indices"
    );
    assert!(refused(&good, -1.0).contains("negate query instead"));
    let few = LaunchContext { stream: &call.stream, workspace: workspace.span().part(0, 256) };
    let error = planned.launch(&few, &call.batch.get(), &good, SCALE).expect_err("a small workspace");
    assert_eq!(error.argument(), Some("workspace"));
    let other = UploadedBatch::new(call.backend.kernels().device(), &Batch::single(8), &call.stream).expect("uploads");
    let error = planned.launch(&call.context(&workspace), &other.get(), &good, SCALE).expect_err("another batch");
    assert_eq!(error.argument(), Some("cu_seqlens_q"));
    assert!(call.bits(&outputs).iter().flatten().all(|word| *word == 0xffff), "an output was written");
    let without = NsaForward::plan(call.backend.kernels(), &problem(), None, &PlanOptions::default(), true);
    assert_eq!(without.expect_err("the problem has a rotary embedding").argument(), Some("rope"));
}
