//! Flags that several commands share, and what they resolve to.

use crate::failure::{Failure, Outcome};
use clap::{Args, ValueEnum};
use fsa::cuda::plan::Routing;
use fsa::cuda::{CudaBackend, KernelSet};
use fsa::{CpuOptions, DType, Engine, Environment, NsaConfig, Rope, RopeScaling, ScoreHeads};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

/// Parameters of native sparse attention.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Parameters (defaults: those of --config, else of the project)")]
pub struct ConfigFlags {
    /// JSON file with any of the parameters below, spelt with underscores
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Tokens in one compression window [32]
    #[arg(long, value_name = "N")]
    pub kernel_size: Option<usize>,
    /// Tokens between the starts of neighbouring windows [16]
    #[arg(long, value_name = "N")]
    pub kernel_stride: Option<usize>,
    /// Tokens in one selectable block: 16, 32, 64, 128 or 256 [64]
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// Blocks that a row may select [16]
    #[arg(long, value_name = "N")]
    pub topk: Option<usize>,
    /// Blocks at the start of a sequence that every row selects [1]
    #[arg(long, value_name = "N")]
    pub init_blocks: Option<usize>,
    /// Blocks up to and including its own that every row selects [2]
    #[arg(long, value_name = "N")]
    pub local_blocks: Option<usize>,
    /// Earlier keys that the sliding window shows, besides the row's own [512]
    #[arg(long, value_name = "N")]
    pub window_size: Option<usize>,
    /// Query heads of a group that vote for blocks: group_sum or first_head [group_sum]
    #[arg(long, value_name = "WHICH", value_parser = score_heads)]
    pub score_heads: Option<ScoreHeads>,
}

fn score_heads(text: &str) -> Result<ScoreHeads, String> {
    match text {
        "group_sum" => Ok(ScoreHeads::GroupSum),
        "first_head" => Ok(ScoreHeads::FirstHead),
        other => Err(format!("expected group_sum or first_head, got {other}")),
    }
}

impl ConfigFlags {
    /// The file's parameters, overridden by the flags, checked.
    pub fn resolve(&self) -> Outcome<NsaConfig> {
        let mut config = match &self.config {
            None => NsaConfig::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(Failure::file(path, "cannot be read"))?;
                serde_json::from_str(&text).map_err(|error| {
                    Failure::misuse(path.display().to_string(), "a JSON object of parameters", error)
                })?
            }
        };
        let fields = [
            (&mut config.kernel_size, self.kernel_size),
            (&mut config.kernel_stride, self.kernel_stride),
            (&mut config.block_size, self.block_size),
            (&mut config.topk, self.topk),
            (&mut config.init_blocks, self.init_blocks),
            (&mut config.local_blocks, self.local_blocks),
            (&mut config.window_size, self.window_size),
        ];
        for (field, flag) in fields {
            *field = flag.unwrap_or(*field);
        }
        config.score_heads = self.score_heads.unwrap_or(config.score_heads);
        config.validate()?;
        Ok(config)
    }
}

/// Rotary embedding.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Rotary embedding (none unless --rope-theta is given)")]
pub struct RopeFlags {
    /// Base of the wavelengths, such as 10000 or 500000
    #[arg(long, value_name = "THETA", allow_negative_numbers = true)]
    pub rope_theta: Option<f64>,
    /// Llama 3 scaling: FACTOR,LOW_FREQ_FACTOR,HIGH_FREQ_FACTOR,ORIGINAL_MAX_POSITION
    #[arg(long, value_name = "F,L,H,P", requires = "rope_theta", value_parser = numbers::<4>)]
    pub rope_llama3: Option<[f64; 4]>,
}

impl RopeFlags {
    /// The embedding, if there is one.
    pub fn resolve(&self) -> Option<Rope> {
        let theta = self.rope_theta?;
        let scaling = match self.rope_llama3 {
            Some([factor, low_freq_factor, high_freq_factor, position]) => RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position: position as usize,
            },
            None => RopeScaling::Default,
        };
        Some(Rope { theta, scaling })
    }
}

/// Parses `N` numbers with commas between them.
pub fn numbers<const N: usize>(text: &str) -> Result<[f64; N], String> {
    let parsed: Result<Vec<f64>, _> = text.split(',').map(|word| word.trim().parse()).collect();
    let list = parsed.map_err(|_| format!("expected {N} numbers with commas between them"))?;
    let got = list.len();
    list.try_into().map_err(|_| format!("expected {N} numbers with commas between them, got {got}"))
}

/// Number of worker threads, as given or as the environment or the machine says.
pub fn threads(flag: Option<usize>) -> Outcome<usize> {
    match flag {
        Some(0) => Err(Failure::misuse("--threads", "at least 1", 0)),
        Some(threads) => Ok(threads),
        None => Ok(Environment::read()?.threads.unwrap_or_else(crate::machine::cores)),
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor
    #[default]
    Cpu,
    /// An NVIDIA GPU of compute capability 8.0 or later; FSA_CUDA_DEVICE says which
    Cuda,
}

/// Where the stages run.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceFlags {
    /// Where the stages run
    #[arg(long, value_enum, default_value_t)]
    pub device: Device,
    /// Kernels for --device cuda: sm80 (any GPU) or sm90a (Hopper) [FSA_CUDA_ARCH, or those of the GPU]
    #[arg(long, value_name = "SET", value_parser = kernel_set)]
    pub kernels: Option<KernelSet>,
    /// How stage `selected` goes with --device cuda: kv_outer, dense_masked, both by turns, or the fastest [FSA_ROUTE]
    #[arg(long, value_name = "ROUTE", value_parser = routing)]
    pub route: Option<Routing>,
}

impl DeviceFlags {
    /// Kernels and routes can be chosen for a GPU only.
    pub fn check(&self) -> Outcome {
        let given = [("--kernels", self.kernels.is_some()), ("--route", self.route.is_some())];
        match (self.device, given.into_iter().find(|(_, given)| *given)) {
            (Device::Cpu, Some((flag, _))) => Err(Failure::misuse(flag, "--device cuda", "--device cpu")),
            _ => Ok(()),
        }
    }
}

fn routing(text: &str) -> Result<Routing, String> {
    text.parse().map_err(|error: fsa::Error| error.to_string())
}

fn kernel_set(text: &str) -> Result<KernelSet, String> {
    match text {
        "sm80" => Ok(KernelSet::Sm80),
        "sm90" | "sm90a" => Ok(KernelSet::Sm90),
        other => Err(format!("expected sm80 or sm90a, got {other}")),
    }
}

/// The engine of a run, and the GPU that it runs on, if it does.
#[derive(Debug, Clone)]
pub struct Chosen {
    pub engine: Engine,
    pub cuda: Option<Arc<CudaBackend>>,
}

/// The engine of this run. An error says what is missing; nothing has been read or written.
pub fn engine(flags: &DeviceFlags, threads: usize) -> Outcome<Chosen> {
    flags.check()?;
    match flags.device {
        Device::Cpu => Ok(Chosen { engine: cpu(threads)?, cuda: None }),
        Device::Cuda => {
            let backend = cuda(flags)?;
            backend.check_compiler()?;
            Ok(Chosen { engine: Engine::from_backend(backend.clone()), cuda: Some(backend) })
        }
    }
}

/// The CPU backend.
pub fn cpu(threads: usize) -> Outcome<Engine> {
    Ok(Engine::cpu_with(&CpuOptions { threads: Some(threads), ..CpuOptions::default() })?)
}

/// The CUDA backend, with other kernels and routes than the environment's if they are named.
pub fn cuda(DeviceFlags { kernels, route, .. }: &DeviceFlags) -> Outcome<Arc<CudaBackend>> {
    let mut environment = fsa::cuda::Environment::read()?;
    environment.kernels = kernels.or(environment.kernels);
    environment.routing = route.unwrap_or(environment.routing);
    let backend = CudaBackend::with(&environment)?;
    let (set, facts) = (backend.kernels().set(), backend.kernels().device().facts());
    match kernels {
        // Older kernels run on a newer device, but not the other way round.
        Some(asked) if *asked != set => {
            Err(Failure::misuse("--kernels", format!("{set}, the kernels that {} runs", facts.name), asked))
        }
        _ => Ok(Arc::new(backend)),
    }
}

/// Parses a floating-point element type.
pub fn float_dtype(text: &str) -> Result<DType, String> {
    match text.parse::<DType>() {
        Ok(dtype) if dtype.is_float() => Ok(dtype),
        _ => Err(format!("expected one of f32, bf16, f16, got {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_override_the_file() {
        let mut file = tempfile::NamedTempFile::new().expect("temporary file");
        std::io::Write::write_all(&mut file, b"{\"block_size\": 128, \"topk\": 8}").expect("written");
        let flags = ConfigFlags { config: Some(file.path().into()), topk: Some(12), ..ConfigFlags::default() };
        let config = flags.resolve().expect("valid");
        assert_eq!((config.block_size, config.topk, config.window_size), (128, 12, 512));
    }

    #[test]
    fn llama3_needs_all_four() {
        let flags = RopeFlags { rope_theta: Some(5e5), rope_llama3: numbers("8, 1,4,8192").ok() };
        assert!(numbers::<4>("8,1,4").is_err() && numbers::<3>("1,2,x").is_err());
        let RopeScaling::Llama3 { original_max_position, .. } = flags.resolve().expect("given").scaling else {
            panic!("llama3 scaling");
        };
        assert_eq!(original_max_position, 8192);
        assert!(RopeFlags::default().resolve().is_none());
    }
}
