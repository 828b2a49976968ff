//! `fsa demo`: block-sparse attention on a real text, from bytes to predictions.

mod canvas;
mod codes;
mod heatmap;
mod measure;
mod predict;

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::options::{self, Device, DeviceFlags};
use crate::output::{self, Output, Report};
use crate::progress::Progress;
use crate::sampled::Compared;
use crate::whole_file::WholeFile;
use clap::Args;
use codes::{Coded, HEAD_DIM, NGRAMS, NUM_KV_HEADS, NUM_Q_HEADS};
use fsa::{DType, NsaConfig};
use heatmap::Heatmap;
use measure::TimeMs;
use serde::Serialize;
use std::path::PathBuf;

/// What is attended to without a file: the document that explains the operation.
const TEXT: &[u8] = include_bytes!("../../../../../docs/algorithm.md");

/// Tokens that are used of a longer text unless --tokens says otherwise: dense attention, the yardstick, is what
/// limits it. It takes half a minute for this many on 2 cores, and four times that for twice as many.
const DEFAULT_TOKENS: usize = 32_768;

/// Block-sparse attention on a real text: what it predicts, what it chose, how fast, and how exact
///
/// Every byte is a token. Queries, keys and values are made from the bytes without training: a query looks for earlier
/// places with the same recent bytes, and what followed there predicts the next byte. Reports the share of right
/// predictions of dense attention, of native sparse attention and of its window alone; times; the error against the f64
/// oracle on sampled rows; and draws which blocks each kv head chose. In f32; on a GPU in bf16, from and to host memory.
#[derive(Debug, Args)]
pub struct Flags {
    /// Any file [docs/algorithm.md of this version]
    file: Option<PathBuf>,
    /// Bytes of it that are used [all, at most 32768]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Where the heat map is written
    #[arg(long, value_name = "PATH", default_value = "fsa-demo.png")]
    png: PathBuf,
    /// Seed of the codes
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    device: DeviceFlags,
}

#[derive(Debug, Serialize)]
struct Demo {
    text: String,
    tokens: usize,
    num_q_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    config: NsaConfig,
    gates: [f32; 3],
    device: Device,
    dtype: DType,
    threads: usize,
    accuracy: Accuracy,
    selected_mass: f64,
    window_mass: f64,
    time_ms: TimeMs,
    speedup: f64,
    workspace_bytes: usize,
    sampled_rows: usize,
    max_error: f64,
    error_bound: f64,
    errors: Vec<Compared>,
    wrong_selections: usize,
    example: Option<predict::Example>,
    png: String,
}

/// Share of next bytes that are predicted right.
#[derive(Debug, Serialize)]
struct Accuracy {
    dense: f64,
    nsa: f64,
    window: f64,
    selected: f64,
    compressed: f64,
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let (name, text) = read(flags)?;
    let engine = options::engine(&flags.device, context.threads)?.engine;
    let png = WholeFile::create(&flags.png)?;
    let config = NsaConfig::default();
    let dtype = if flags.device.device == Device::Cuda { DType::Bf16 } else { DType::F32 };
    let progress = Progress::new(measure::STEPS + 2);
    let coded = progress.step("codes", || Coded::new(&text, &config, flags.seed, dtype))?;
    let args = coded.args(&config);
    let measured = measure::run(&engine, &args, flags.seed, &progress)?;
    progress.start("predictions");
    let predicted = |out| predict::next_bytes(&coded, &text, out);
    let [compressed, selected, window] = measured.branches.each_ref().map(predicted);
    let (dense, nsa, window) = (predicted(&measured.dense.out)?, predicted(&measured.out)?, window?);
    let accuracy = |bytes: &[u8]| predict::accuracy(bytes, &text);
    let topk_indices = &measured.topk_indices;
    let example = predict::example(&text, [&nsa, &window], topk_indices, config.block_size)?;
    png.write(&heatmap(&name, text.len(), topk_indices, &config).png()?)?;
    let worst = measured.worst();
    let demo = Demo {
        tokens: text.len(),
        num_q_heads: NUM_Q_HEADS,
        num_kv_heads: NUM_KV_HEADS,
        head_dim: HEAD_DIM,
        gates: codes::GATES,
        device: flags.device.device,
        dtype,
        threads: context.threads,
        accuracy: Accuracy {
            dense: accuracy(&dense),
            nsa: accuracy(&nsa),
            window: accuracy(&window),
            selected: accuracy(&selected?),
            compressed: accuracy(&compressed?),
        },
        selected_mass: predict::mass(&measured.lse[1], &measured.dense.lse)?,
        window_mass: predict::mass(&measured.lse[2], &measured.dense.lse)?,
        speedup: measured.time_ms.dense / measured.time_ms.nsa,
        workspace_bytes: engine.workspace_bytes(&args)?,
        sampled_rows: measured.sampled_rows,
        max_error: worst.max_error,
        error_bound: worst.error_bound,
        wrong_selections: measured.wrong_selections,
        time_ms: measured.time_ms,
        errors: measured.errors,
        example,
        png: flags.png.display().to_string(),
        text: name,
        config: config.clone(),
    };
    drop(progress);
    context.output.report(&demo)?;
    demo.verdict()
}

fn read(flags: &Flags) -> Outcome<(String, Vec<u8>)> {
    let (name, mut text) = match &flags.file {
        None => ("docs/algorithm.md".to_string(), TEXT.to_vec()),
        Some(path) => (path.display().to_string(), std::fs::read(path).map_err(Failure::file(path, "cannot be read"))?),
    };
    let tokens = flags.tokens.unwrap_or(text.len().min(DEFAULT_TOKENS));
    if text.len() < 2 {
        return Err(Failure::misuse(name, "at least 2 bytes", text.len()));
    }
    if tokens < 2 || tokens > text.len() {
        return Err(Failure::misuse("--tokens", format!("2 to {}, the bytes of {name}", text.len()), tokens));
    }
    text.truncate(tokens);
    Ok((name, text))
}

fn heatmap<'a>(name: &str, tokens: usize, topk_indices: &'a fsa::Tensor, config: &NsaConfig) -> Heatmap<'a> {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    Heatmap {
        topk_indices,
        block_size: config.block_size,
        title: format!("Blocks chosen by each row: {file}, {tokens} tokens, top {}", config.topk),
        panel_titles: (0..NUM_KV_HEADS)
            .map(|head| format!("kv head {head}: contexts of {}-grams", NGRAMS[head].0))
            .collect(),
    }
}

impl Demo {
    /// The demonstration is also a check: what it shows must be right.
    fn verdict(&self) -> Outcome {
        if let Some(wrong) = self.errors.iter().find(|compared| !compared.passed()) {
            let Compared { tensor, max_error, error_bound } = wrong;
            return Err(Failure::Check(format!("{tensor}: error {max_error:.3e} above its bound {error_bound:.3e}")));
        }
        if self.wrong_selections > 0 {
            let message = format!("topk_indices: {} rows differ from the oracle's", self.wrong_selections);
            return Err(Failure::Check(message));
        }
        Ok(())
    }

    fn show_results(&self, output: &Output) -> Outcome {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let (accuracy, time) = (&self.accuracy, &self.time_ms);
        let mut table = output.new_table(&["<attention", "next byte right", "dense mass seen", "time"]);
        let none = String::new();
        let rows = [
            ("dense", percent(accuracy.dense), percent(1.0), time.dense),
            ("native sparse (nsa)", percent(accuracy.nsa), none.clone(), time.nsa),
            ("  compress keys and values", none.clone(), none.clone(), time.compress),
            ("  compressed, and selection of blocks", percent(accuracy.compressed), none.clone(), time.select),
            ("  selected blocks", percent(accuracy.selected), percent(self.selected_mass), time.selected),
            ("  window", percent(accuracy.window), percent(self.window_mass), time.window),
            ("  combine", none.clone(), none, time.combine),
        ];
        for (name, right, mass, time) in rows {
            table.add_row([name.to_string(), right, mass, output::duration(time)]);
        }
        output.table(&table)
    }

    fn show_errors(&self, output: &Output) -> Outcome {
        let header = format!("<on {} sampled rows", self.sampled_rows);
        let mut table = output.new_table(&[&header, "largest error", "bound", "<"]);
        for compared in &self.errors {
            table.add_row(vec![
                compared.tensor.clone().into(),
                format!("{:.2e}", compared.max_error).into(),
                format!("{:.2e}", compared.error_bound).into(),
                output.verdict(compared.passed()),
            ]);
        }
        let wrong = self.wrong_selections;
        table.add_row(vec![
            "topk_indices".into(),
            format!("{wrong} wrong rows").into(),
            "0".into(),
            output.verdict(wrong == 0),
        ]);
        output.table(&table)
    }
}

impl Report for Demo {
    fn show(&self, output: &Output) -> Outcome {
        let Self { tokens, num_q_heads, num_kv_heads, head_dim, config, dtype, .. } = self;
        output.line(format!(
            "{}: {tokens} tokens, {num_q_heads} query heads on {num_kv_heads} kv heads of {head_dim}, {dtype}; \
             top {} blocks of {}, window {}; {} threads",
            self.text, config.topk, config.block_size, config.window_size, self.threads,
        ))?;
        self.show_results(output)?;
        output.line(format!(
            "nsa is {:.2}x as fast as dense and keeps {:.1} % of its accuracy; workspace {}",
            self.speedup,
            100.0 * self.accuracy.nsa / self.accuracy.dense.max(f64::MIN_POSITIVE),
            output::bytes(self.workspace_bytes),
        ))?;
        self.show_errors(output)?;
        if let Some(example) = &self.example {
            output.line(format!(
                "row {}: \"{}\" is followed by \"{}\"; the window alone predicts \"{}\".\n  \
                 kv head {} chose block {}, which holds \"{}\"",
                example.row,
                example.context,
                example.next,
                example.window_predicts,
                example.kv_head,
                example.block,
                example.passage,
            ))?;
        }
        output.line(format!("heat map of the chosen blocks: {}", self.png))
    }
}
