//! [`CudaBackend`]: stage `selected` over host tensors. It copies in and out, so that the conformance suite and the
//! command line can hold the kernels against the oracle; what is to be fast uses [`crate::selected`].

mod host;

use crate::arch::KernelSet;
use crate::driver::{Device, DeviceBuffer, Stream, UploadedBatch};
use crate::environment::Environment;
use crate::kernels::Kernels;
use crate::plan::{PlanOptions, Problem};
use crate::selected::{BackwardTensors, ForwardTensors, LaunchContext, SelectedBackward, SelectedForward, TensorSpan};
use crate::source::{HEAD_DIMS, Kernel, Specialisation};
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, Backend, Batch,
    CombineArgs, CombineGrads, CompressArgs, CompressGrads, DType, Error, NsaArgs, NsaForward, NsaGrads, NsaSaved,
    Result, RopeArgs, SelectArgs, Stage, TensorView, TensorViewMut,
};
use host::{Rows, fetch, store, upload, upload_plain};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Runs stage `selected` on a GPU.
#[derive(Debug)]
pub struct CudaBackend {
    kernels: Arc<Kernels>,
    /// Calls run one after another: each has the device's memory to itself.
    stream: Mutex<Stream>,
}

/// A call of stage `selected`, checked.
struct Call<'a> {
    args: &'a AttentionArgs<'a>,
    topk_indices: TensorView<'a>,
    shape: AttentionShape,
    problem: Problem,
    /// The kernels take no negative factor: it goes into the query.
    sign: f32,
}

/// Tensors of a call on the device.
struct Uploaded {
    batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    topk_indices: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
}

fn unsupported<T>(stage: Stage) -> Result<T> {
    let names: Vec<_> = CudaBackend::STAGES.iter().map(|stage| stage.name()).collect();
    Err(Error::Unsupported {
        constraint: "stage on CUDA".into(),
        got: stage.to_string(),
        supported: format!("{}; the other stages run on the CPU backend", names.join(", ")),
    })
}

fn unsupported_dtype<T>(dtype: DType) -> Result<T> {
    Err(Error::Unsupported {
        constraint: "dtype on CUDA".into(),
        got: dtype.to_string(),
        supported: CudaBackend::DTYPES.map(|dtype| dtype.to_string()).join(", "),
    })
}

/// Checks that `set` has the kernels of a stage. That every specialisation fits a device is asked per call.
fn check_kernels(set: KernelSet, stage: Stage, backward: bool) -> Result<()> {
    if !CudaBackend::STAGES.contains(&stage) {
        return unsupported(stage);
    }
    let forward = [Kernel::Index, Kernel::Attend, Kernel::Reduce];
    let kernels = if backward { &[Kernel::Index, Kernel::Backward][..] } else { &forward[..] };
    let specialisation = |kernel| Specialisation::new(kernel, set, DType::Bf16, 128, 64);
    kernels.iter().try_for_each(|kernel| specialisation(*kernel).file().map(drop))
}

impl CudaBackend {
    /// Stages that it has, each forward and backward.
    pub const STAGES: [Stage; 1] = [Stage::Selected];

    /// Types of the tensors that its kernels take.
    pub const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];

    /// Opens the device as the environment asks for.
    ///
    /// # Errors
    /// [`Error::Backend`] that says what is missing: the driver, a device, one that is new enough.
    pub fn new() -> Result<Self> {
        Self::with(&Environment::read()?)
    }

    /// Opens the device as `environment` asks for.
    ///
    /// # Errors
    /// Those of [`CudaBackend::new`].
    pub fn with(environment: &Environment) -> Result<Self> {
        let kernels = Kernels::open(environment)?;
        let stream = Mutex::new(Stream::new(kernels.device())?);
        Ok(Self { kernels, stream })
    }

    /// The device's kernels.
    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// Checks that a stage can run: that this backend has it, and its kernels for the set in use.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names the stage or the kernel.
    pub fn check_stage(&self, stage: Stage, backward: bool) -> Result<()> {
        check_kernels(self.kernels.set(), stage, backward)
    }

    /// Checks a type of tensors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names the types that the kernels take.
    pub fn check_dtype(&self, dtype: DType) -> Result<()> {
        if Self::DTYPES.contains(&dtype) { Ok(()) } else { unsupported_dtype(dtype) }
    }

    /// Checks that kernels can be had: NVRTC is there, or kernels that it compiled before lie in the cache.
    ///
    /// # Errors
    /// [`Error::Backend`] that says where NVRTC was looked for and how to get it.
    pub fn check_compiler(&self) -> Result<()> {
        let compiler = self.kernels.compiler();
        match compiler.nvrtc() {
            Err(missing) if compiler.cache().last_compiler().is_none() => Err(missing.into()),
            _ => Ok(()),
        }
    }

    fn device(&self) -> &Arc<Device> {
        self.kernels.device()
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory whose every byte is 0xff: floats of it are NaN, so what a kernel reads without having written it shows.
    fn poisoned(&self, what: &str, bytes: usize, stream: &Stream) -> Result<DeviceBuffer> {
        let buffer = DeviceBuffer::new(self.device(), what, bytes)?;
        let _bound = self.device().bind()?;
        buffer.span().fill(0xff, stream)?;
        Ok(buffer)
    }

    fn upload(&self, call: &Call<'_>, stream: &Stream) -> Result<Uploaded> {
        let (device, args, problem) = (self.device(), call.args, &call.problem);
        let dim = problem.head_dim;
        let rows = problem.total_q * problem.num_q_heads;
        let lse_bytes = rows * size_of::<f32>();
        Ok(Uploaded {
            batch: UploadedBatch::new(device, args.batch, stream)?,
            query: upload("query", &args.query, dim, call.sign, device, stream)?,
            key: upload("key", &args.key, dim, 1.0, device, stream)?,
            value: upload("value", &args.value, dim, 1.0, device, stream)?,
            topk_indices: upload_plain::<i32>("topk_indices", &call.topk_indices, device, stream)?,
            out: self.poisoned("out", rows * dim * problem.dtype.size_bytes(), stream)?,
            lse: self.poisoned("lse", lse_bytes, stream)?,
        })
    }

    fn forward(&self, call: &Call<'_>, output: &mut AttentionOutput<'_>) -> Result<()> {
        let planned = SelectedForward::plan(&self.kernels, &call.problem, &PlanOptions::default())?;
        let stream = self.stream();
        let tensors = self.upload(call, &stream)?;
        let workspace = self.poisoned("workspace", planned.workspace_bytes(), &stream)?;
        let context = LaunchContext { stream: &stream, workspace: workspace.span() };
        planned.launch(&context, &tensors.batch.get(), &tensors.forward(&call.problem), call.scale())?;
        // Everything that can fail comes before the first write to the caller's tensors.
        let out = fetch("out", &tensors.out, call.problem.dtype, &stream)?;
        let lse = fetch("lse", &tensors.lse, DType::F32, &stream)?;
        store(&out, call.rows(), &mut output.out, 1.0)?;
        store(&lse, Rows::plain(call.problem.total_q), &mut output.lse, 1.0)
    }

    fn backward(&self, call: &Call<'_>, grad: &AttentionGradArgs<'_>, grads: &mut AttentionGrads<'_>) -> Result<()> {
        // Results of this backend never depend on chance, whatever that costs.
        let options = PlanOptions { deterministic: true, ..PlanOptions::default() };
        let planned = SelectedBackward::plan(&self.kernels, &call.problem, &options)?;
        let (stream, device, problem) = (self.stream(), self.device(), &call.problem);
        let mut tensors = self.upload(call, &stream)?;
        tensors.out = upload("out", &grad.out, problem.head_dim, 1.0, device, &stream)?;
        tensors.lse = upload_plain::<f32>("lse", &grad.lse, device, &stream)?;
        let grad_out = upload("grad_out", &grad.grad_out, problem.head_dim, 1.0, device, &stream)?;
        let grad_lse = grad.grad_lse.as_ref().map(|grad| upload_plain::<f32>("grad_lse", grad, device, &stream));
        let grad_lse = grad_lse.transpose()?;
        let like = |name, buffer: &DeviceBuffer| self.poisoned(name, buffer.span().size_bytes(), &stream);
        let grad_query = like("grad_query", &tensors.query)?;
        let (grad_key, grad_value) = (like("grad_key", &tensors.key)?, like("grad_value", &tensors.value)?);
        let workspace = self.poisoned("workspace", planned.workspace_bytes(), &stream)?;
        let [of_q, of_kv] = [problem.num_q_heads, problem.num_kv_heads]
            .map(|heads| move |buffer| span(buffer, heads, problem.head_dim));
        let backward = BackwardTensors {
            forward: tensors.forward(problem),
            grad_out: of_q(&grad_out),
            grad_lse: grad_lse.as_ref().map(DeviceBuffer::span),
            grad_query: of_q(&grad_query),
            grad_key: of_kv(&grad_key),
            grad_value: of_kv(&grad_value),
        };
        let context = LaunchContext { stream: &stream, workspace: workspace.span() };
        planned.launch(&context, &tensors.batch.get(), &backward, call.scale())?;
        let outputs = [("grad_query", grad_query), ("grad_key", grad_key), ("grad_value", grad_value)];
        let fetched: Result<Vec<_>> =
            outputs.iter().map(|(name, buffer)| fetch(name, buffer, problem.dtype, &stream)).collect();
        let AttentionGrads { grad_query, grad_key, grad_value } = grads;
        let targets = [(grad_query, call.sign), (grad_key, 1.0), (grad_value, 1.0)];
        fetched?.iter().zip(targets).try_for_each(|(data, (target, factor))| store(data, call.rows(), target, factor))
    }
}

fn span<'a>(buffer: &'a DeviceBuffer, heads: usize, head_dim: usize) -> TensorSpan<'a> {
    TensorSpan::contiguous(buffer.span(), heads, head_dim)
}

impl Uploaded {
    fn forward(&self, problem: &Problem) -> ForwardTensors<'_> {
        let Problem { num_q_heads, num_kv_heads, head_dim, .. } = *problem;
        ForwardTensors {
            query: span(&self.query, num_q_heads, head_dim),
            key: span(&self.key, num_kv_heads, head_dim),
            value: span(&self.value, num_kv_heads, head_dim),
            topk_indices: self.topk_indices.span(),
            out: span(&self.out, num_q_heads, head_dim),
            lse: self.lse.span(),
        }
    }
}

/// The kernels read positions and keys from prefix sums, which say less than a batch can hold.
fn check_batch(batch: &Batch) -> Result<()> {
    let (mut q, mut kv) = (0, 0);
    for (number, sequence) in batch.sequences().iter().enumerate() {
        let packed = sequence.query_rows.start == q && sequence.kv_rows.start == kv;
        let aligned = sequence.first_position + sequence.query_len() == sequence.kv_len();
        if !packed || (!aligned && sequence.query_len() > 0) {
            return Err(Error::Unsupported {
                constraint: format!("sequence {number} on CUDA"),
                got: format!("{sequence:?}"),
                supported: "packed sequences whose query rows are the last of their keys".into(),
            });
        }
        (q, kv) = (sequence.query_rows.end, sequence.kv_rows.end);
    }
    Ok(())
}

impl<'a> Call<'a> {
    /// Checks the arguments. Rows are padded with zeros to the next dimension that the kernels have.
    fn new(stage: &'a AttentionStage<'a>, args: &'a AttentionArgs<'a>) -> Result<Self> {
        let AttentionStage::Selected { topk_indices, block_size, .. } = stage else {
            return unsupported(stage.stage());
        };
        let shape = args.shape(stage)?;
        check_batch(args.batch)?;
        let larger = shape.head_dim.max(shape.value_dim);
        // `shape` refuses more than the largest.
        let dim = HEAD_DIMS.into_iter().find(|dim| *dim >= larger).unwrap_or(larger);
        let problem = Problem::new(&shape, args.batch.sequences().len(), dim, *block_size, topk_indices.shape()[2]);
        let sign = if args.scale() < 0.0 { -1.0 } else { 1.0 };
        Ok(Self { args, topk_indices: *topk_indices, shape, problem, sign })
    }

    fn scale(&self) -> f32 {
        self.args.scale().abs()
    }

    /// Vectors on the device are padded to the kernels' dimension.
    fn rows(&self) -> Rows {
        Rows::padded(self.problem.head_dim)
    }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        let call = Call::new(stage, args)?;
        output.validate(&call.shape)?;
        self.forward(&call, output)
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        let call = Call::new(stage, args)?;
        grad.validate(&call.shape)?;
        grads.validate(&call.shape)?;
        self.backward(&call, grad, grads)
    }

    fn select(&self, _: &SelectArgs<'_>, _: &mut AttentionOutput<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unsupported(Stage::Select)
    }

    fn compress(&self, _: &CompressArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unsupported(Stage::Compress)
    }

    fn compress_backward(&self, _: &CompressArgs<'_>, _: &TensorView<'_>, _: &mut CompressGrads<'_>) -> Result<()> {
        unsupported(Stage::Compress)
    }

    fn rope(&self, _: &RopeArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unsupported(Stage::Rope)
    }

    fn combine(&self, _: &CombineArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        unsupported(Stage::Combine)
    }

    fn combine_backward(&self, _: &CombineArgs<'_>, _: &TensorView<'_>, _: &mut CombineGrads<'_>) -> Result<()> {
        unsupported(Stage::Combine)
    }

    fn nsa(&self, _: &NsaArgs<'_>, _: &mut TensorViewMut<'_>, _: bool) -> Result<NsaForward> {
        unsupported(Stage::Nsa)
    }

    fn nsa_backward(&self, _: &NsaArgs<'_>, _: &NsaSaved, _: &TensorView<'_>, _: &mut NsaGrads<'_>) -> Result<()> {
        unsupported(Stage::Nsa)
    }

    fn workspace_bytes(&self, _: &NsaArgs<'_>) -> Result<usize> {
        unsupported(Stage::Nsa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_prefix_sums_cannot_say_is_refused() {
        let batch = Batch::from_cu_seqlens(&[0, 3, 3, 8], &[0, 10, 10, 15]).expect("valid");
        assert!(check_batch(&batch).is_ok());
        assert!(check_batch(&batch.slice_queries(2..8)).is_ok(), "the last rows of each sequence");
        let error = check_batch(&batch.slice_queries(2..5)).expect_err("the first rows of the last sequence");
        assert!(error.to_string().contains("sequence 2 on CUDA"), "{error}");
    }

    #[test]
    fn ids_are_validated_on_the_host_where_that_is_asked_for() {
        let (batch, ids) = (Batch::single(32), vec![1; 32]);
        let query = fsa_core::Tensor::zeros("query", DType::Bf16, &[32, 1, 8]).expect("small");
        let (query, softmax_scale) = (query.view(), None);
        let args = AttentionArgs { query, key: query, value: query, batch: &batch, softmax_scale };
        let topk_indices = TensorView::new("topk_indices", &ids, &[1, 32, 1]).expect("shape");
        let call = |validate| {
            let stage = AttentionStage::Selected { topk_indices, block_size: 16, validate };
            Call::new(&stage, &args).map(|call| call.problem)
        };
        assert_eq!(call(false).expect("any i32 is safe").head_dim, HEAD_DIMS[0]);
        let error = call(true).expect_err("block 1 is in the future of row 0");
        assert_eq!(error.argument(), Some("topk_indices"));
        assert!(error.to_string().contains("1 in row [0, 0]"), "{error}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        for backward in [false, true] {
            assert_eq!(check_kernels(KernelSet::Sm90, Stage::Selected, backward), Ok(()));
            let error = check_kernels(KernelSet::Sm90, Stage::Dense, backward).expect_err("not yet");
            assert!(matches!(&error, Error::Unsupported { got, .. } if got == "dense"), "{error}");
        }
        let error = unsupported_dtype::<()>(DType::F32).expect_err("no kernel").to_string();
        assert_eq!(error, "dtype on CUDA is not supported: got f32, supported: bf16, f16");
    }
}
