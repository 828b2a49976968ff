//! The `fsa` command: run, check, measure and plan block-sparse attention.
//!
//! One file or folder per command under `commands`. A command turns its flags into the arguments of
//! the library, builds a report that serialises, and hands it to [`output::Output`], which prints it
//! as a table or as JSON; nothing else prints. Exit codes: 0 success, 1 a check or a run that failed,
//! 2 misuse (flags, files, shapes).

mod commands;
mod failure;
mod gpu;
mod machine;
mod options;
mod output;
mod progress;
mod random;
mod sampled;
mod tensor_file;
mod whole_file;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = commands::Arguments::parse();
    match arguments.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::error(&failure);
            failure.exit_code()
        }
    }
}
