//! The commands and their flags. What was typed ends here: each command turns it into library calls.

mod attend;
mod bench;
mod check;
mod demo;
mod info;
mod kernels;
mod plan;

use crate::failure::Outcome;
use crate::options;
use crate::output::Output;
use clap::{Args, Parser, Subcommand};

const EXIT_CODES: &str = "Exit codes: 0 success, 1 a check or a run failed, 2 wrong flags, files or shapes.\n\
    NO_COLOR and --no-color turn colors off; progress shows on a terminal only.";

/// Block-sparse attention for long contexts: run, check, measure and plan.
#[derive(Debug, Parser)]
#[command(name = "fsa", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Common")]
pub struct Common {
    /// Print one JSON document instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Print without colors
    #[arg(long, global = true)]
    no_color: bool,
    /// Worker threads; results do not depend on it [FSA_NUM_THREADS, RAYON_NUM_THREADS, or one per core]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

/// What a command runs with.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// Where results go.
    pub output: Output,
    /// Worker threads.
    pub threads: usize,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Flags),
    Attend(Box<attend::Flags>),
    Check(check::Flags),
    Bench(bench::Flags),
    Plan(Box<plan::Flags>),
    Info(info::Flags),
    Kernels(kernels::Flags),
}

impl Arguments {
    /// Runs the command.
    pub fn run(self) -> Outcome {
        let output = Output::new(self.common.json, self.common.no_color);
        let context = Context { output, threads: options::threads(self.common.threads)? };
        match self.command {
            Command::Demo(flags) => demo::run(&flags, &context),
            Command::Attend(flags) => attend::run(&flags, &context),
            Command::Check(flags) => check::run(&flags, &context),
            Command::Bench(flags) => bench::run(&flags, &context),
            Command::Plan(flags) => plan::run(&flags, &context),
            Command::Info(flags) => info::run(&flags, &context),
            Command::Kernels(flags) => kernels::run(&flags, &context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Arguments::command().debug_assert();
    }
}
