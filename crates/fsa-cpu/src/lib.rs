//! CPU backend of Flash Sparse Attention.
#![forbid(unsafe_code)]

use fsa_core::*;

/// How the backend runs.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Worker threads; `None` takes one per core. Results do not depend on it.
    pub threads: Option<usize>,
}

/// The CPU backend.
#[derive(Debug)]
pub struct CpuBackend {
    threads: usize,
}

impl CpuBackend {
    /// Starts the worker threads.
    pub fn new(options: &CpuOptions) -> Result<Self> {
        Ok(Self { threads: options.threads.unwrap_or(1) })
    }
    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.threads
    }
}

/// Name of the vector instructions that the products use on this machine.
pub fn simd_name() -> &'static str {
    "scalar"
}

fn later() -> Result<()> {
    Err(Error::Backend { backend: "cpu".into(), message: "not written yet".into() })
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }
    fn attention(&self, _: &AttentionStage<'_>, _: &AttentionArgs<'_>, _: &mut AttentionOutput<'_>) -> Result<()> {
        later()
    }
    fn attention_backward(
        &self,
        _: &AttentionStage<'_>,
        _: &AttentionArgs<'_>,
        _: &AttentionGradArgs<'_>,
        _: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        later()
    }
    fn select(&self, _: &SelectArgs<'_>, _: &mut AttentionOutput<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        later()
    }
    fn compress(&self, _: &CompressArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        later()
    }
    fn compress_backward(&self, _: &CompressArgs<'_>, _: &TensorView<'_>, _: &mut CompressGrads<'_>) -> Result<()> {
        later()
    }
    fn rope(&self, _: &RopeArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        later()
    }
    fn combine(&self, _: &CombineArgs<'_>, _: &mut TensorViewMut<'_>) -> Result<()> {
        later()
    }
    fn combine_backward(&self, _: &CombineArgs<'_>, _: &TensorView<'_>, _: &mut CombineGrads<'_>) -> Result<()> {
        later()
    }
    fn nsa(&self, _: &NsaArgs<'_>, _: &mut TensorViewMut<'_>, _: bool) -> Result<NsaForward> {
        Err(Error::Backend { backend: "cpu".into(), message: "not written yet".into() })
    }
    fn nsa_backward(&self, _: &NsaArgs<'_>, _: &NsaSaved, _: &TensorView<'_>, _: &mut NsaGrads<'_>) -> Result<()> {
        later()
    }
    fn workspace_bytes(&self, _: &NsaArgs<'_>) -> Result<usize> {
        Ok(0)
    }
}
