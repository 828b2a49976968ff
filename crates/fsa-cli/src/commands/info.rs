//! `fsa info`: what runs here.

use super::Context;
use crate::failure::Outcome;
use crate::gpu::Setup;
use crate::machine::Machine;
use crate::options::{self, Device, DeviceFlags};
use crate::output::{self, Output, Report};
use clap::Args;
use serde::Serialize;

/// Version, machine, GPU, instructions in use, and the environment variables that are read
///
/// Without a GPU one line says why there is none; with --device cuda that is a failure.
#[derive(Debug, Args)]
pub struct Flags {
    #[command(flatten)]
    device: DeviceFlags,
}

#[derive(Debug, Serialize)]
struct Info {
    version: &'static str,
    backends: Vec<&'static str>,
    machine: Machine,
    cuda: Cuda,
    environment: Vec<Variable>,
}

/// The GPU, or why there is none.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Cuda {
    Found(Box<Setup>),
    Missing { missing: String },
}

#[derive(Debug, Serialize)]
struct Variable {
    name: &'static str,
    value: Option<String>,
    meaning: &'static str,
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    flags.device.check()?;
    let cuda = match options::cuda(&flags.device) {
        Ok(backend) => Cuda::Found(Box::new(Setup::describe(&backend))),
        Err(failure) if flags.device.device == Device::Cuda => return Err(failure),
        Err(failure) => Cuda::Missing { missing: failure.to_string() },
    };
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        backends: if matches!(cuda, Cuda::Found(_)) { vec!["cpu", "cuda"] } else { vec!["cpu"] },
        machine: Machine::describe(context.threads),
        cuda,
        environment: variables(),
    };
    context.output.report(&info)
}

fn variables() -> Vec<Variable> {
    let own = [("NO_COLOR", "any value turns colors off")];
    let all = fsa::VARIABLES.into_iter().chain(fsa::cuda::VARIABLES).chain(own);
    all.map(|(name, meaning)| {
        let value = std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Variable { name, value, meaning }
    })
    .collect()
}

impl Report for Info {
    fn show(&self, output: &Output) -> Outcome {
        let machine = &self.machine;
        let mut table = output.new_table(&["<", "<value"]);
        let rows = [
            ("version", self.version.to_string()),
            ("backends", self.backends.join(", ")),
            ("processor", machine.cpu.clone()),
            ("cores", machine.cores.to_string()),
            ("threads", machine.threads.to_string()),
            ("instructions in use", machine.simd.to_string()),
            ("instructions present", machine.features.join(" ")),
            ("memory", machine.memory_bytes.map_or("unknown".into(), output::bytes)),
            ("system", machine.system.clone()),
        ];
        for (name, value) in rows {
            table.add_row([name.to_string(), value]);
        }
        output.table(&table)?;
        self.cuda.show(output)?;
        let mut table = output.new_table(&["<environment variable", "<value", "<meaning"]);
        for variable in &self.environment {
            let value = variable.value.as_deref().unwrap_or("(unset)");
            table.add_row([variable.name, value, variable.meaning]);
        }
        output.table(&table)
    }
}

impl Cuda {
    fn show(&self, output: &Output) -> Outcome {
        let setup = match self {
            Self::Found(setup) => setup,
            Self::Missing { missing } => return output.line(missing),
        };
        let gpu = &setup.gpu;
        let free = setup.free_bytes.map_or(String::new(), |bytes| format!(", {} free", output::bytes(bytes)));
        let driver = gpu.driver.as_ref().map_or(String::new(), |release| format!("release {release}, "));
        let nvrtc = match (&gpu.nvrtc, &setup.nvrtc_path) {
            (Some(version), Some(path)) => format!("{version} at {}", path.display()),
            _ => setup.nvrtc_missing.clone().unwrap_or_default(),
        };
        let cache = match &setup.cache {
            Some(folder) => format!("{} ({} compiled kernels)", folder.display(), setup.cached_kernels),
            None => "disabled".into(),
        };
        let mut table = output.new_table(&["<", "<value"]);
        let rows = [
            ("GPU", gpu.name.clone()),
            ("compute capability", format!("{} ({})", gpu.capability, gpu.arch)),
            ("multiprocessors", gpu.multiprocessors.to_string()),
            ("device memory", format!("{}{free}", output::bytes(gpu.memory_bytes))),
            ("L2 cache", output::bytes(gpu.l2_bytes)),
            ("driver", format!("{driver}CUDA up to {}", gpu.cuda)),
            ("NVRTC", nvrtc),
            ("kernels in use", gpu.kernels.to_string()),
            ("kernel cache", cache),
        ];
        for (name, value) in rows {
            table.add_row([name.to_string(), value]);
        }
        output.table(&table)
    }
}
