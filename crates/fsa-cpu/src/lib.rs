//! CPU backend of Flash Sparse Attention: every stage, forward and backward, for f32, bf16 and f16
//! with sums in f32.
//!
//! One matrix-product kernel (`simd`) serves every stage. Above it, `attend` runs the stages whose rows
//! see a span of keys (`dense`, `window`, `compressed`) query-major with an online softmax; `selected` runs
//! FSA's order, KV block outside, rows gathered, local softmax, merge by log-sum-exp; `gradient` is the
//! KV-major backward of all four; `score` and `select` pick blocks out of compressed attention's own pass.
//!
//! Results do not depend on the number of threads, bit for bit: work is cut by shapes alone and every sum
//! has a fixed order. They do depend on the instruction set, whose registers hold 1 to 16 numbers.
#![forbid(unsafe_code)]

mod attend;
mod combine;
mod compress;
mod compressed;
mod dense;
mod gradient;
mod nsa;
mod rope;
mod rows;
mod run;
mod score;
mod select;
mod selected;
mod simd;
mod tile;
mod window;

pub use simd::Isa;

use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, Error, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result, RopeArgs,
    SelectArgs, TensorView, TensorViewMut,
};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// How the backend runs.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Worker threads; `None` takes one per core (or `RAYON_NUM_THREADS`). Results do not depend on it.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes the best that the machine has.
    pub isa: Option<Isa>,
}

/// The CPU backend: worker threads and an instruction set.
#[derive(Debug)]
pub struct CpuBackend {
    pool: ThreadPool,
    isa: Isa,
}

impl CpuBackend {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// `threads` is 0, or the threads do not start.
    pub fn new(options: &CpuOptions) -> Result<Self> {
        if options.threads == Some(0) {
            return Err(Error::input("threads", "at least 1", 0));
        }
        let pool = ThreadPoolBuilder::new()
            .num_threads(options.threads.unwrap_or(0))
            .thread_name(|i| format!("fsa-cpu-{i}"))
            .build()
            .map_err(|error| Error::Backend { backend: "cpu".into(), message: error.to_string() })?;
        Ok(Self { pool, isa: options.isa.unwrap_or_else(Isa::detect) })
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Name of the vector instructions that the products use on this machine.
pub fn simd_name() -> &'static str {
    Isa::detect().name()
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        self.pool.install(|| run::attention(stage, args, output, self.isa))
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.pool.install(|| run::attention_backward(stage, args, grad, grads, self.isa))
    }

    fn select(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        self.pool.install(|| run::select(args, output, topk_indices, self.isa))
    }

    fn compress(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.pool.install(|| compress::compress(args, out, self.isa))
    }

    fn compress_backward(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()> {
        self.pool.install(|| compress::compress_backward(args, grad_out, grads, self.isa))
    }

    fn rope(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.pool.install(|| rope::rope(args, out))
    }

    fn combine(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.pool.install(|| combine::combine(args, out, self.isa))
    }

    fn combine_backward(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()> {
        self.pool.install(|| combine::combine_backward(args, grad_out, grads, self.isa))
    }

    fn nsa(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward> {
        self.pool.install(|| nsa::nsa(args, out, save, self.isa))
    }

    fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()> {
        self.pool.install(|| nsa::nsa_backward(args, saved, grad_out, grads, self.isa))
    }

    fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize> {
        nsa::workspace_bytes(args, self.threads())
    }
}
