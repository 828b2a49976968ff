//! From a specialisation to a cubin: generated source, NVRTC, the cache, and what the compiler reports.
//!
//! Nothing here needs a device. The architecture is a value, so any machine with NVRTC can compile for any.

mod resources;
mod table;

pub use resources::{Resources, parse as parse_resources};
pub use table::resource_table;

use crate::arch::Arch;
use crate::cache::KernelCache;
use crate::driver::{Compiled, Nvrtc};
use crate::environment::Environment;
use crate::error::{CudaError, Result};
use crate::source::{Specialisation, headers};
use serde::Serialize;
use std::sync::OnceLock;

/// A compiled specialisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cubin {
    /// The ELF image for the driver.
    pub image: Vec<u8>,
    /// The compiler's warnings, and the resources of every kernel.
    pub log: String,
}

/// One row of a resource table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelReport {
    /// The specialisation, in words.
    pub specialisation: String,
    /// Name of the kernel.
    pub kernel: String,
    /// What it takes.
    #[serde(flatten)]
    pub resources: Resources,
}

/// Options that do not depend on the specialisation. `-v` puts the resources into the log, which the cache keeps.
const OPTIONS: [&str; 4] = ["--std=c++17", "--ptxas-options=-v", "-lineinfo", "--device-as-default-execution-space"];

/// Compiles kernels, through the cache.
#[derive(Debug)]
pub struct Compiler {
    environment: Environment,
    cache: KernelCache,
    nvrtc: OnceLock<Result<Nvrtc>>,
}

impl Compiler {
    /// A compiler as the environment asks for it. NVRTC is looked for on the first use.
    pub fn new(environment: &Environment) -> Self {
        let cache = KernelCache::new(environment.cache_dir.clone());
        Self { environment: environment.clone(), cache, nvrtc: OnceLock::new() }
    }

    /// The compiler's library.
    ///
    /// # Errors
    /// [`CudaError::NvrtcMissing`].
    pub fn nvrtc(&self) -> Result<&Nvrtc> {
        self.nvrtc.get_or_init(|| Nvrtc::open(&self.environment)).as_ref().map_err(Clone::clone)
    }

    /// Compiled kernels on disk.
    pub fn cache(&self) -> &KernelCache {
        &self.cache
    }

    /// The cubin of a specialisation for an architecture, from the cache or compiled now.
    ///
    /// # Errors
    /// There is no such kernel file; NVRTC is missing, too old, or refuses the source.
    pub fn cubin(&self, specialisation: &Specialisation, arch: Arch) -> fsa_core::Result<Cubin> {
        let source = specialisation.translation_unit()?;
        // The cache must be usable without NVRTC, whose version is part of the key: a filled cache is asked under the
        // version that filled it.
        let version = match self.nvrtc() {
            Ok(nvrtc) => nvrtc.version(),
            Err(missing) => self.cache.last_compiler().ok_or(missing)?,
        };
        let options = options(arch);
        let key = KernelCache::key(&source, &headers(&source), &options, version);
        if let Some(cubin) = self.cache.get(&key) {
            return Ok(cubin);
        }
        let compiled = self.compile_source(specialisation, arch, &source)?;
        let cubin = Cubin { image: compiled.cubin, log: compiled.log };
        self.cache.put(&key, &cubin, version);
        Ok(cubin)
    }

    /// Cubin and PTX of a specialisation, compiled now.
    ///
    /// # Errors
    /// Those of [`Compiler::cubin`].
    pub fn compile(&self, specialisation: &Specialisation, arch: Arch) -> fsa_core::Result<Compiled> {
        Ok(self.compile_source(specialisation, arch, &specialisation.translation_unit()?)?)
    }

    fn compile_source(&self, specialisation: &Specialisation, arch: Arch, source: &str) -> Result<Compiled> {
        let nvrtc = self.nvrtc()?;
        let (version, (major, minor)) = (nvrtc.version(), arch.capability());
        let archs = nvrtc.supported_archs();
        if !archs.is_empty() && !archs.contains(&(major * 10 + minor)) {
            return Err(CudaError::ArchUnknown { version, arch });
        }
        let name = format!("{specialisation}.cu");
        nvrtc.compile(&name, source, &headers(source), &options(arch)).map_err(|(status, log)| CudaError::Compile {
            version,
            file: specialisation.to_string(),
            arch,
            status,
            log,
        })
    }

    /// Registers, spills and shared memory of every kernel of a specialisation.
    ///
    /// # Errors
    /// Those of [`Compiler::cubin`].
    pub fn report(&self, specialisation: &Specialisation, arch: Arch) -> fsa_core::Result<Vec<KernelReport>> {
        let cubin = self.cubin(specialisation, arch)?;
        let reports = parse_resources(&cubin.log).into_iter().map(|(kernel, resources)| KernelReport {
            specialisation: specialisation.to_string(),
            kernel,
            resources,
        });
        Ok(reports.collect())
    }
}

fn options(arch: Arch) -> Vec<String> {
    let target = format!("--gpu-architecture={arch}");
    std::iter::once(target).chain(OPTIONS.map(String::from)).collect()
}
