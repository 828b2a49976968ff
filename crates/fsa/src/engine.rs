//! The engine: a backend and the methods over it.

use crate::environment::Environment;
use fsa_core::{Backend, NsaArgs, Result};
use fsa_cpu::{CpuBackend, CpuOptions};
use fsa_cuda::CudaBackend;
use std::fmt;
use std::sync::Arc;

/// Runs the stages on a backend. Cheap to clone; clones share the backend and its threads.
///
/// ```
/// # fn main() -> fsa::Result<()> {
/// let engine = fsa::Engine::cpu()?;
/// assert_eq!(engine.backend().name(), "cpu");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Engine {
    backend: Arc<dyn Backend>,
}

impl Engine {
    /// The CPU backend with one thread per core, or as many as the [`Environment`] asks for:
    /// `FSA_NUM_THREADS`, else `RAYON_NUM_THREADS`. The number changes the time, never a result.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) that names a variable which is not a number;
    /// [`Error::Backend`](crate::Error::Backend) if the threads cannot be started.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// let engine = fsa::Engine::cpu()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cpu() -> Result<Self> {
        let environment = Environment::read()?;
        Self::cpu_with(&CpuOptions { threads: environment.threads, ..CpuOptions::default() })
    }

    /// The CPU backend as `options` say; the environment is not read.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`](crate::Error::Backend) if the threads cannot be started.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// let engine = fsa::Engine::cpu_with(&fsa::CpuOptions { threads: Some(2), ..Default::default() })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cpu_with(options: &CpuOptions) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(CpuBackend::new(options)?)))
    }

    /// The CUDA backend on the GPU that [`cuda::Environment`](crate::cuda::Environment) asks for: `FSA_CUDA_DEVICE`,
    /// else the first. It has every stage and the whole operation, forward and backward, in bf16 and f16. Tensors are the
    /// caller's host tensors, copied in and out by every call; what is to be fast keeps them on the device and uses
    /// [`cuda::stages`](crate::cuda::stages) and [`cuda::selected`](crate::cuda::selected).
    ///
    /// Kernels are compiled when they are first used, and kept on disk.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) that names a variable which does not hold what it must;
    /// [`Error::Backend`](crate::Error::Backend) that says what is missing: the driver, a GPU of that number, one that
    /// is new enough.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// // On a machine without a GPU the error says so, and the CPU computes the same.
    /// let engine = match fsa::Engine::cuda() {
    ///     Ok(engine) => engine,
    ///     Err(missing) => {
    ///         eprintln!("{missing}");
    ///         fsa::Engine::cpu()?
    ///     }
    /// };
    /// assert!(["cuda", "cpu"].contains(&engine.backend().name()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn cuda() -> Result<Self> {
        Self::cuda_with(&fsa_cuda::Environment::read()?)
    }

    /// The CUDA backend as `environment` asks for; the variables of the process are not read.
    ///
    /// # Errors
    ///
    /// [`Error::Backend`](crate::Error::Backend) that says what is missing, as for [`Engine::cuda`].
    ///
    /// ```no_run
    /// # fn main() -> fsa::Result<()> {
    /// use fsa::cuda::{Environment, KernelSet};
    /// // The second GPU, with the kernels that run on every architecture.
    /// let environment = Environment { device: 1, kernels: Some(KernelSet::Sm80), ..Environment::read()? };
    /// let engine = fsa::Engine::cuda_with(&environment)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cuda_with(environment: &fsa_cuda::Environment) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(CudaBackend::with(environment)?)))
    }

    /// An engine over any backend.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// use std::sync::Arc;
    /// let backend = fsa::cpu::CpuBackend::new(&fsa::CpuOptions { threads: Some(1), ..Default::default() })?;
    /// let engine = fsa::Engine::from_backend(Arc::new(backend));
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_backend(backend: Arc<dyn Backend>) -> Self {
        Self { backend }
    }

    /// The backend that runs the stages.
    ///
    /// ```
    /// # fn main() -> fsa::Result<()> {
    /// assert_eq!(fsa::Engine::cpu()?.backend().name(), "cpu");
    /// # Ok(())
    /// # }
    /// ```
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Scratch memory in bytes that [`Engine::nsa`] takes at most for these arguments, besides inputs,
    /// outputs and saved state. Known from the shapes alone.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::nsa`] about `args`.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(64);
    /// # let tensor = Tensor::zeros("query", DType::F32, &[64, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[64, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &NsaConfig::default(), key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let bytes = Engine::cpu()?.workspace_bytes(&args)?;
    /// assert!(bytes < 256 << 20);
    /// # Ok(())
    /// # }
    /// ```
    pub fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize> {
        self.backend.workspace_bytes(args)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("backend", &self.backend.name()).finish()
    }
}
