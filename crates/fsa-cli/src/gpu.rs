//! The GPU that stages run on: what a reader of a figure needs to know about it, and what its kernels come from.

use fsa::cuda::{Arch, CudaBackend, KernelSet};
use serde::Serialize;
use std::path::PathBuf;

/// A GPU and its kernels, as a record of figures keeps it.
#[derive(Debug, Clone, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Its architecture.
    pub arch: Arch,
    /// Compute capability.
    pub capability: String,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Device memory.
    pub memory_bytes: usize,
    /// L2 cache.
    pub l2_bytes: usize,
    /// Newest CUDA version that the driver supports.
    pub cuda: String,
    /// Release of the driver, where the system says.
    pub driver: Option<String>,
    /// Kernels in use.
    pub kernels: KernelSet,
    /// Version of the run-time compiler, if there is one.
    pub nvrtc: Option<String>,
}

/// A GPU with what this machine has for it now.
#[derive(Debug, Clone, Serialize)]
pub struct Setup {
    /// The GPU.
    #[serde(flatten)]
    pub gpu: Gpu,
    /// Device memory that nobody uses now, where the driver says.
    pub free_bytes: Option<usize>,
    /// Where the run-time compiler is.
    pub nvrtc_path: Option<PathBuf>,
    /// Why there is none.
    pub nvrtc_missing: Option<String>,
    /// Folder of compiled kernels; none if it is disabled.
    pub cache: Option<PathBuf>,
    /// Compiled kernels in it.
    pub cached_kernels: usize,
}

fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

impl Gpu {
    /// Looks at the GPU of `backend`.
    pub fn describe(backend: &CudaBackend) -> Self {
        let kernels = backend.kernels();
        let facts = kernels.device().facts();
        Self {
            name: facts.name.clone(),
            arch: facts.arch,
            capability: dotted(facts.arch.capability()),
            multiprocessors: facts.multiprocessors,
            memory_bytes: facts.memory_bytes,
            l2_bytes: facts.l2_bytes,
            cuda: dotted(facts.driver),
            driver: driver_release(),
            kernels: kernels.set(),
            nvrtc: kernels.compiler().nvrtc().ok().map(|nvrtc| dotted(nvrtc.version())),
        }
    }

    /// One line: the GPU and the kernels that it runs.
    pub fn line(&self) -> String {
        let Self { name, arch, kernels, cuda, .. } = self;
        let driver = self.driver.as_ref().map_or(String::new(), |release| format!(", driver {release}"));
        let nvrtc = self.nvrtc.as_deref().unwrap_or("missing");
        format!("{name}, {arch}, kernels {kernels}, CUDA {cuda}{driver}, NVRTC {nvrtc}")
    }
}

impl Setup {
    /// Looks at the GPU of `backend` and around it.
    pub fn describe(backend: &CudaBackend) -> Self {
        let (device, compiler) = (backend.kernels().device(), backend.kernels().compiler());
        let nvrtc = compiler.nvrtc();
        Self {
            gpu: Gpu::describe(backend),
            free_bytes: device.memory().ok().map(|(free, _)| free),
            nvrtc_path: nvrtc.as_ref().ok().map(|nvrtc| nvrtc.path().to_path_buf()),
            nvrtc_missing: nvrtc.err().map(|missing| missing.to_string()),
            cache: compiler.cache().folder().map(PathBuf::from),
            // A folder that cannot be read counts as empty, as it does for a launch.
            cached_kernels: compiler.cache().entries().map_or(0, |entries| entries.len()),
        }
    }
}

/// Release of the driver, as its kernel module tells it on Linux.
fn driver_release() -> Option<String> {
    release(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

/// The word after `Kernel Module`, perhaps with the architecture between.
fn release(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let words = line.split_whitespace().skip_while(|word| *word != "Module");
    let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    words.into_iter().find(is_release).map(str::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_of_the_driver_is_found() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC 12";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x)\n";
        assert_eq!(release(closed).as_deref(), Some("535.104.05"));
        assert_eq!(release(open).as_deref(), Some("580.65.06"));
        assert_eq!(release("something else"), None);
    }
}
