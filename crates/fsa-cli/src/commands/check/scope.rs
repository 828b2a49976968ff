//! What a run of the suite covers, and what it leaves out and why.

use super::Flags;
use crate::failure::{Failure, Outcome};
use crate::options::Chosen;
use fsa::DType;
use fsa::cuda::CudaBackend;
use fsa_oracle::suite::CheckOptions;
use fsa_oracle::{Case, Pass};

/// What is run.
#[derive(Debug, Default)]
pub struct Scope {
    /// Stages, passes and dtypes, with the number of cases.
    pub options: CheckOptions,
    /// What the device lacks, in words. Empty where nothing was left out that was not asked to be.
    pub skipped: Vec<String>,
}

impl Scope {
    /// Everything that the flags leave and that the device has. What was asked for by name must be there.
    pub fn new(flags: &Flags, chosen: &Chosen) -> Outcome<Self> {
        let mut options = CheckOptions { cases: flags.cases, seed: flags.seed, ..CheckOptions::default() };
        if !flags.stage.is_empty() {
            options.stages.retain(|stage| flags.stage.contains(stage));
        }
        if !flags.dtype.is_empty() {
            options.dtypes.retain(|dtype| flags.dtype.contains(dtype));
        }
        options.passes.retain(|pass| flags.pass.is_none_or(|wanted| wanted == *pass));
        let mut scope = Self { options, skipped: Vec::new() };
        if let Some(backend) = &chosen.cuda {
            scope.leave_dtypes(backend, !flags.dtype.is_empty())?;
        }
        Ok(scope)
    }

    fn leave_dtypes(&mut self, backend: &CudaBackend, named: bool) -> Outcome {
        let (has, lacks): (Vec<DType>, Vec<DType>) =
            self.options.dtypes.iter().partition(|dtype| CudaBackend::DTYPES.contains(dtype));
        if let Some(dtype) = lacks.first().filter(|_| named) {
            backend.check_dtype(*dtype)?;
        }
        for dtype in lacks {
            let names = CudaBackend::DTYPES.map(|dtype| dtype.to_string());
            self.skipped.push(format!("dtype {dtype}: the CUDA kernels take {}", names.join(" and ")));
        }
        self.options.dtypes = has;
        Ok(())
    }
}

/// The case of a line, if the device has its stage and dtype.
pub fn case(line: &str, chosen: &Chosen) -> Outcome<Case> {
    let case: Case = line.trim().parse().map_err(named)?;
    case.validate().map_err(named)?;
    if let Some(backend) = &chosen.cuda {
        backend.check_stage(case.stage, case.pass == Pass::Backward)?;
        backend.check_dtype(case.dtype)?;
    }
    Ok(case)
}

/// An error in the line of a case names the flag, then the field.
fn named(error: fsa::Error) -> Failure {
    let fsa::Error::Input(mut input) = error else { return Failure::Library(error) };
    input.argument = format!("--case: {}", input.argument);
    Failure::Library(input.into())
}
