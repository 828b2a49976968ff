//! What can go wrong between a call and a device, with what the driver or the compiler said.

use crate::arch::Arch;
use fsa_core::Error;

/// Result of the crate's own functions.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// A failure of the driver, the compiler or the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library cannot be loaded.
    #[error("no CUDA driver: libcuda.so.1 (Windows: nvcuda.dll) cannot be loaded; it comes with the NVIDIA driver")]
    NoDriver,
    /// The driver is older than the functions that this crate calls.
    #[error(
        "the CUDA driver is too old: it supports CUDA {}.{}, needed is {}.{} or later (driver {release})",
        found.0, found.1, needed.0, needed.1
    )]
    DriverTooOld {
        /// Newest CUDA version that it supports.
        found: (u32, u32),
        /// Oldest CUDA version that is enough.
        needed: (u32, u32),
        /// First release of the driver that supports it.
        release: u32,
    },
    /// There is no device of that number.
    #[error("no CUDA device {ordinal}: the driver shows {count} (CUDA_VISIBLE_DEVICES can hide devices)")]
    NoDevice {
        /// Which was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The device lacks what the kernels are built on.
    #[error("{name} has compute capability {}.{}, needed is 8.0 or later (Ampere)", capability.0, capability.1)]
    DeviceTooOld {
        /// Name of the device.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// A driver call failed.
    #[error("{call}: {name}: {text}")]
    Driver {
        /// The function.
        call: &'static str,
        /// Name of the error, such as `CUDA_ERROR_INVALID_VALUE`.
        name: String,
        /// What the driver says about it.
        text: String,
    },
    /// Device memory could not be had.
    #[error("out of device memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// The object.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// The run-time compiler's library cannot be loaded.
    #[error(
        "no NVRTC, the CUDA run-time compiler, which builds the kernels on first use. Get it with \
         `pip install nvidia-cuda-nvrtc`, or point FSA_NVRTC_PATH to libnvrtc or its folder. Looked for: {}",
        searched.join(", ")
    )]
    NvrtcMissing {
        /// Every place that was tried.
        searched: Vec<String>,
    },
    /// The run-time compiler does not know the architecture.
    #[error("NVRTC {}.{} cannot compile for {arch}; update it with `pip install -U nvidia-cuda-nvrtc`", version.0, version.1)]
    ArchUnknown {
        /// Version of the compiler.
        version: (u32, u32),
        /// What was asked for.
        arch: Arch,
    },
    /// The run-time compiler refused a kernel.
    #[error("NVRTC {}.{} failed on {file} for {arch}: {status}\n{log}", version.0, version.1)]
    Compile {
        /// Version of the compiler.
        version: (u32, u32),
        /// The kernel file.
        file: String,
        /// The architecture.
        arch: Arch,
        /// Name of the error.
        status: String,
        /// Its log.
        log: String,
    },
    /// A compiled module does not hold what it must.
    #[error("{file} for {arch} has no kernel `{kernel}`")]
    NoKernel {
        /// The kernel file.
        file: String,
        /// The architecture.
        arch: Arch,
        /// Name of the kernel.
        kernel: String,
    },
}

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { what, bytes } => {
                Error::OutOfMemory { what: format!("{what} on the device"), bytes }
            }
            other => Error::Backend { backend: "cuda".into(), message: other.to_string() },
        }
    }
}
