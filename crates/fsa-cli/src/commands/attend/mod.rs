//! `fsa attend`: attention over the tensors of a file.

mod inputs;
mod stages;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::options::{self, ConfigFlags, Device, DeviceFlags, RopeFlags, numbers};
use crate::output::{self, Output, Report};
use crate::progress::Progress;
use crate::tensor_file::{self, TensorFile};
use crate::whole_file::WholeFile;
use clap::{Args, ValueEnum};
use fsa::{DType, NsaConfig, Stage, Tensor};
use inputs::Inputs;
use serde::Serialize;
use std::collections::HashMap;
use std::path::PathBuf;

/// Which operation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageFlag {
    /// The whole operation: compressed, selected and window attention, gated.
    Nsa,
    /// Attention to the blocks that topk_indices lists.
    Selected,
    /// Attention to a sliding window.
    Window,
    /// Compression of keys and values, attention to them, and the selection of blocks.
    Compressed,
    /// Dense causal attention.
    Dense,
}

impl StageFlag {
    fn stage(self) -> Stage {
        match self {
            Self::Nsa => Stage::Nsa,
            Self::Selected => Stage::Selected,
            Self::Window => Stage::Window,
            Self::Compressed => Stage::Compressed,
            Self::Dense => Stage::Dense,
        }
    }
}

/// Attention over the tensors of a safetensors file
///
/// Reads query [total_q, num_q_heads, head_dim], key [total_kv, num_kv_heads, head_dim] and value [total_kv,
/// num_kv_heads, value_dim], of dtype f32, bf16 or f16. Optional: cu_seqlens, or cu_seqlens_q and cu_seqlens_kv
/// (without them there is one sequence); gates [total_q, 3] or [total_q, num_q_heads, 3]; key_weight and value_weight
/// (rank 2: weighted sum, rank 3: matrix product) with key_position and value_position; topk_indices [num_kv_heads,
/// total_q, topk]; grad_out and grad_lse. Other tensors are ignored.
///
/// Writes out and lse; for nsa lse_compressed, lse_selected and lse_window instead of lse; topk_indices where blocks were chosen; with
/// --backward the gradient of every input, under its name with grad_ before it.
#[derive(Debug, Args)]
pub struct Flags {
    /// Tensors to read
    #[arg(value_name = "IN.safetensors")]
    input: PathBuf,
    /// File to write; it appears whole or not at all
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    /// Operation to run
    #[arg(long, value_enum, default_value_t = StageFlag::Nsa)]
    stage: StageFlag,
    /// Also compute gradients, from the tensor grad_out (and grad_lse, except for nsa)
    #[arg(long)]
    backward: bool,
    /// Constant gates of the compressed, selected and window branch, for a file without the tensor gates
    #[arg(long, value_name = "C,S,W", value_parser = numbers::<3>, allow_hyphen_values = true)]
    gates: Option<[f64; 3]>,
    /// Factor of the logits [head_dim^-0.5]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    softmax_scale: Option<f32>,
    /// Refuse topk_indices that are out of range or repeated in a row, instead of ignoring the former
    #[arg(long)]
    validate: bool,
    /// Also write the output of every branch of nsa
    #[arg(long)]
    branches: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    config: ConfigFlags,
    #[command(flatten)]
    rope: RopeFlags,
}

/// What a stage produced.
#[derive(Debug, Default)]
pub struct Produced {
    tensors: Vec<(String, Tensor)>,
    forward_ms: f64,
    backward_ms: Option<f64>,
}

impl Produced {
    fn add(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.tensors.push((name.into(), tensor));
    }

    fn add_optional(&mut self, name: &str, tensor: Option<Tensor>) {
        self.tensors.extend(tensor.map(|tensor| (name.to_string(), tensor)));
    }
}

#[derive(Debug, Serialize)]
struct Attended {
    input: String,
    output: String,
    stage: StageFlag,
    backward: bool,
    config: NsaConfig,
    device: Device,
    threads: usize,
    time_ms: TimeMs,
    tensors: Vec<Described>,
}

#[derive(Debug, Serialize)]
struct TimeMs {
    forward: f64,
    backward: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Described {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let config = flags.config.resolve()?;
    let rope = flags.rope.resolve();
    if flags.validate && flags.stage != StageFlag::Selected {
        return Err(Failure::misuse("--validate", "--stage selected", "another stage"));
    }
    if flags.branches && flags.stage != StageFlag::Nsa {
        return Err(Failure::misuse("--branches", "--stage nsa", "another stage"));
    }
    let chosen = options::engine(&flags.device, context.threads)?;
    if let Some(backend) = &chosen.cuda {
        backend.check_stage(flags.stage.stage(), flags.backward)?;
        rope.as_ref().map_or(Ok(()), |_| backend.check_stage(Stage::Rope, flags.backward))?;
    }
    let mut file = TensorFile::open(&flags.input)?;
    let inputs = Inputs::read(&mut file, flags)?;
    let target = WholeFile::create(&flags.output)?;
    let progress = Progress::new(if flags.backward { 2 } else { 1 });
    let call = stages::Call {
        engine: chosen.engine,
        flags,
        config: &config,
        rope: rope.as_ref(),
        inputs: &inputs,
        progress: &progress,
    };
    let produced = call.run()?;
    drop(progress);
    let report = Attended {
        input: flags.input.display().to_string(),
        output: flags.output.display().to_string(),
        stage: flags.stage,
        backward: flags.backward,
        device: flags.device.device,
        threads: context.threads,
        time_ms: TimeMs { forward: produced.forward_ms, backward: produced.backward_ms },
        tensors: produced.tensors.iter().map(|(name, tensor)| describe(name, tensor)).collect(),
        config,
    };
    tensor_file::write(target, &produced.tensors, notes(&report))?;
    context.output.report(&report)
}

/// What the file says about how it was made.
fn notes(report: &Attended) -> HashMap<String, String> {
    let config = serde_json::to_string(&report.config).unwrap_or_default();
    let stage = serde_json::to_value(report.stage).ok().and_then(|name| name.as_str().map(str::to_string));
    [("fsa_version", env!("CARGO_PKG_VERSION").to_string()), ("config", config), ("stage", stage.unwrap_or_default())]
        .into_iter()
        .map(|(name, text)| (name.to_string(), text))
        .collect()
}

fn describe(name: &str, tensor: &Tensor) -> Described {
    Described { name: name.to_string(), dtype: tensor.dtype(), shape: tensor.shape().to_vec() }
}

impl Report for Attended {
    fn show(&self, output: &Output) -> Outcome {
        let mut table = output.new_table(&["<tensor", "<dtype", "<shape"]);
        for tensor in &self.tensors {
            table.add_row([tensor.name.clone(), tensor.dtype.to_string(), format!("{:?}", tensor.shape)]);
        }
        output.table(&table)?;
        let backward = self.time_ms.backward.map(|ms| format!(", backward {}", output::duration(ms)));
        output.line(format!(
            "{}: forward {}{}",
            self.output,
            output::duration(self.time_ms.forward),
            backward.unwrap_or_default()
        ))
    }
}
