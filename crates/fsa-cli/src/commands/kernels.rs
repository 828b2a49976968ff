//! `fsa kernels`: the CUDA kernels, compiled for an architecture on any machine.

use super::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, Report};
use crate::progress::Progress;
use crate::whole_file::WholeFile;
use clap::Args;
use fsa::cuda::jit::{Compiler, KernelReport};
use fsa::cuda::source::{Specialisation, tabled};
use fsa::cuda::{Arch, Environment};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// List the CUDA kernels, compile them for an architecture, and show what they take
///
/// Compiling needs NVRTC (from a CUDA toolkit, or `pip install nvidia-cuda-nvrtc`) and no GPU. Compiled kernels go to
/// the cache that launches use.
#[derive(Debug, Args)]
pub struct Flags {
    /// Architecture to compile for: sm_80 or later
    #[arg(long, value_name = "ARCH", default_value = "sm_90a", value_parser = arch)]
    arch: Arch,
    /// Only kernels whose line holds this text (may be repeated: all must match)
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Compile and show registers, spills and shared memory
    #[arg(long)]
    build: bool,
    /// Compile and write the PTX and the cubin of every kernel to this folder (SASS: `nvdisasm` on the cubin)
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
}

fn arch(text: &str) -> Result<Arch, String> {
    text.parse().map_err(|error: fsa::Error| error.to_string())
}

/// The JSON form is a list of rows.
#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Kernels {
    rows: Vec<Row>,
    #[serde(skip)]
    built: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    specialisation: String,
    /// Shared memory that a launch adds, at `topk` 16.
    dynamic_smem_bytes: usize,
    /// What the compiler says of each kernel, where it was asked.
    kernels: Vec<KernelReport>,
}

pub fn run(flags: &Flags, context: &Context) -> Outcome {
    let chosen = chosen(flags)?;
    let built = flags.build || flags.dump.is_some();
    let mut rows = Vec::with_capacity(chosen.len());
    if built {
        let compiler = Compiler::new(&Environment::read()?);
        let progress = Progress::new(chosen.len());
        for specialisation in &chosen {
            rows.push(progress.step(specialisation.to_string(), || build(flags, &compiler, specialisation))?);
        }
    } else {
        rows.extend(chosen.iter().map(|specialisation| row(specialisation, Vec::new())));
    }
    context.output.report(&Kernels { rows, built })
}

fn chosen(flags: &Flags) -> Outcome<Vec<Specialisation>> {
    let mut chosen = tabled(flags.arch.kernels());
    chosen.retain(|specialisation| {
        let name = specialisation.to_string();
        flags.filter.iter().all(|text| name.contains(text))
    });
    // A portable kernel that is not written has no file; it is not listed either.
    chosen.retain(|specialisation| specialisation.file().is_ok());
    if chosen.is_empty() {
        let expected = format!("text that a kernel for {} holds", flags.arch);
        return Err(Failure::misuse("--filter", expected, flags.filter.join(" and ")));
    }
    Ok(chosen)
}

fn row(specialisation: &Specialisation, kernels: Vec<KernelReport>) -> Row {
    let dynamic_smem_bytes = specialisation.smem_bytes(16);
    Row { specialisation: specialisation.to_string(), dynamic_smem_bytes, kernels }
}

fn build(flags: &Flags, compiler: &Compiler, specialisation: &Specialisation) -> Outcome<Row> {
    if let Some(folder) = &flags.dump {
        dump(folder, compiler, specialisation, flags.arch)?;
    }
    Ok(row(specialisation, compiler.report(specialisation, flags.arch)?))
}

fn dump(folder: &Path, compiler: &Compiler, specialisation: &Specialisation, arch: Arch) -> Outcome {
    std::fs::create_dir_all(folder).map_err(Failure::file(folder, "cannot be made"))?;
    let compiled = compiler.compile(specialisation, arch)?;
    let stem = format!("{specialisation} {arch}").replace(' ', "-");
    for (ending, bytes) in [("ptx", &compiled.ptx), ("cubin", &compiled.cubin)] {
        WholeFile::create(&folder.join(format!("{stem}.{ending}")))?.write(bytes)?;
    }
    Ok(())
}

impl Report for Kernels {
    fn show(&self, output: &Output) -> Outcome {
        if !self.built {
            for row in &self.rows {
                output.line(&row.specialisation)?;
            }
            return Ok(());
        }
        let mut table =
            output.new_table(&["<specialisation", "<kernel", "registers", "stack", "spills", "static smem"]);
        for row in &self.rows {
            for report in &row.kernels {
                let resources = &report.resources;
                table.add_row([
                    row.specialisation.clone(),
                    report.kernel.clone(),
                    resources.registers.to_string(),
                    resources.stack_bytes.to_string(),
                    resources.spill_bytes.to_string(),
                    resources.static_smem_bytes.to_string(),
                ]);
            }
        }
        output.table(&table)
    }
}
