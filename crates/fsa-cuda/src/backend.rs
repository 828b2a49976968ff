//! [`CudaBackend`]: every stage over host tensors. It copies in and out, so that the conformance suite and the command line can
//! hold the kernels against the oracle; what is to be fast uses [`crate::stages`] and [`crate::selected`].

mod attention;
mod combine;
mod compress;
mod host;
mod nsa;
mod rope;
mod select;

use crate::arch::KernelSet;
use crate::driver::{Device, DeviceBuffer, Stream};
use crate::environment::Environment;
use crate::kernels::Kernels;
use crate::plan::{PlanOptions, Sizes};
use crate::source::{HEAD_DIMS, Kernel, Specialisation};
use crate::stages::TensorSpan;
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, Batch, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, DType, Error, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result, RopeArgs,
    SelectArgs, Stage, TensorView, TensorViewMut,
};
use host::Transfer;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Runs the stages on a GPU.
#[derive(Debug)]
pub struct CudaBackend {
    kernels: Arc<Kernels>,
    /// Calls run one after another: each has the device's memory to itself.
    stream: Mutex<Stream>,
    /// Sums of a backward have one order.
    deterministic: bool,
}

fn unsupported_dtype<T>(dtype: DType) -> Result<T> {
    Err(Error::Unsupported {
        constraint: "dtype on CUDA".into(),
        got: dtype.to_string(),
        supported: CudaBackend::DTYPES.map(|dtype| dtype.to_string()).join(", "),
    })
}

/// The kernels of a stage besides those that only prepare it.
fn kernels_of(stage: Stage, backward: bool) -> &'static [Kernel] {
    match (stage, backward) {
        (Stage::Compress, _) => &[Kernel::Compress, Kernel::CompressLinear],
        (Stage::Rope, _) => &[Kernel::Rope],
        (Stage::Combine, _) => &[Kernel::Combine],
        (Stage::Dense | Stage::Window | Stage::Compressed, false) => &[Kernel::Band],
        (Stage::Dense | Stage::Window | Stage::Compressed, true) => &[Kernel::BandBackward],
        (Stage::Select, _) => &[Kernel::Band, Kernel::Select],
        (Stage::Index, _) => &[Kernel::Index],
        (Stage::Selected, false) => &[Kernel::Index, Kernel::Attend, Kernel::Reduce, Kernel::BlockMask, Kernel::Band],
        (Stage::Selected, true) => &[Kernel::Index, Kernel::Backward, Kernel::BlockMask, Kernel::BandBackward],
        (Stage::Nsa, false) => &[Kernel::Compress, Kernel::Band, Kernel::Select, Kernel::Attend, Kernel::Combine],
        (Stage::Nsa, true) => &[Kernel::Combine, Kernel::BandBackward, Kernel::Backward, Kernel::Compress],
    }
}

/// Checks that `set` has the kernels of a stage. That every specialisation fits a device is asked per call.
fn check_kernels(set: KernelSet, stage: Stage, backward: bool) -> Result<()> {
    if !CudaBackend::STAGES.contains(&stage) {
        let names: Vec<_> = CudaBackend::STAGES.iter().map(|stage| stage.name()).collect();
        let (constraint, got) = ("stage with an operation of its own".into(), stage.to_string());
        return Err(Error::Unsupported { constraint, got, supported: names.join(", ") });
    }
    let specialisation = |kernel| Specialisation::new(kernel, set, DType::Bf16, 128, 64).or_portable(1);
    kernels_of(stage, backward).iter().try_for_each(|kernel| specialisation(*kernel).file().map(drop))
}

/// The dimension of the kernels for vectors of `dim` elements: they are padded with zeros.
fn padded_dim(dim: usize) -> Result<usize> {
    HEAD_DIMS.into_iter().find(|padded| *padded >= dim).ok_or_else(|| Error::Unsupported {
        constraint: "head_dim on CUDA".into(),
        got: dim.to_string(),
        supported: format!("up to {}", HEAD_DIMS[HEAD_DIMS.len() - 1]),
    })
}

/// A factor of the logits. The kernels take no negative one: its sign goes into the query.
#[derive(Debug, Clone, Copy)]
struct Scale {
    sign: f32,
    size: f32,
}

impl Scale {
    fn of(args: &AttentionArgs<'_>) -> Self {
        let scale = args.scale();
        Self { sign: if scale < 0.0 { -1.0 } else { 1.0 }, size: scale.abs() }
    }
}

impl CudaBackend {
    /// Stages that it has, each forward and backward.
    pub const STAGES: [Stage; 9] = [
        Stage::Compress,
        Stage::Rope,
        Stage::Compressed,
        Stage::Select,
        Stage::Selected,
        Stage::Window,
        Stage::Combine,
        Stage::Dense,
        Stage::Nsa,
    ];

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
        Self::over(Kernels::open(environment)?, true)
    }

    fn over(kernels: Arc<Kernels>, deterministic: bool) -> Result<Self> {
        let stream = Mutex::new(Stream::new(kernels.device())?);
        Ok(Self { kernels, stream, deterministic })
    }

    /// The same with backwards whose sums may come in any order, as callers get them who do not ask for `deterministic`: faster,
    /// with other bits at every call. A backend of its own, because results of this one never depend on chance.
    ///
    /// # Errors
    /// [`Error::Backend`] if the driver makes no stream.
    pub fn unordered(&self) -> Result<Arc<Self>> {
        Self::over(self.kernels.clone(), false).map(Arc::new)
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

    fn options(&self) -> PlanOptions {
        PlanOptions { deterministic: self.deterministic, ..PlanOptions::default() }
    }

    fn device(&self) -> &Arc<Device> {
        self.kernels.device()
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn transfer<'a>(&'a self, stream: &'a Stream) -> Transfer<'a> {
        Transfer { device: self.device(), stream }
    }
}

/// A packed tensor `[rows, heads, head_dim]` in `buffer`.
fn span<'a>(buffer: &'a DeviceBuffer, heads: usize, sizes: &Sizes) -> TensorSpan<'a> {
    TensorSpan::contiguous(buffer.span(), heads, sizes.head_dim)
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
        attention::forward(self, stage, args, output)
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        attention::backward(self, stage, args, grad, grads)
    }

    fn select(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        select::forward(self, args, output, topk_indices)
    }

    fn compress(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        compress::forward(self, args, out)
    }

    fn compress_backward(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()> {
        compress::backward(self, args, grad_out, grads)
    }

    fn rope(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        rope::rotate(self, args, out)
    }

    fn combine(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        combine::forward(self, args, out)
    }

    fn combine_backward(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()> {
        combine::backward(self, args, grad_out, grads)
    }

    fn nsa(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward> {
        nsa::forward(self, args, out, save)
    }

    fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()> {
        nsa::backward(self, args, saved, grad_out, grads)
    }

    fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize> {
        nsa::workspace_bytes(self, args)
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
    fn every_stage_has_kernels_and_what_is_not_there_is_named() {
        for set in [KernelSet::Sm80, KernelSet::Sm90] {
            for backward in [false, true] {
                for stage in CudaBackend::STAGES {
                    assert_eq!(check_kernels(set, stage, backward), Ok(()), "{stage}");
                }
                let error = check_kernels(set, Stage::Index, backward).expect_err("a step of another stage");
                assert!(matches!(&error, Error::Unsupported { got, .. } if got == "index"), "{error}");
            }
        }
        let error = unsupported_dtype::<()>(DType::F32).expect_err("no kernel").to_string();
        assert_eq!(error, "dtype on CUDA is not supported: got f32, supported: bf16, f16");
        assert_eq!((padded_dim(8), padded_dim(200)), (Ok(64), Ok(256)));
        assert!(padded_dim(264).expect_err("too long").to_string().contains("head_dim on CUDA"));
    }
}
