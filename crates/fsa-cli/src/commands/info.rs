//! `fsa info`: what runs here.

use super::Context;
use crate::failure::Outcome;
use crate::machine::Machine;
use crate::output::{self, Output, Report};
use clap::Args;
use serde::Serialize;

/// Version, machine, instructions in use, and the environment variables that are read
#[derive(Debug, Args)]
pub struct Flags {}

#[derive(Debug, Serialize)]
struct Info {
    version: &'static str,
    backends: Vec<&'static str>,
    machine: Machine,
    environment: Vec<Variable>,
}

#[derive(Debug, Serialize)]
struct Variable {
    name: &'static str,
    value: Option<String>,
    meaning: &'static str,
}

pub fn run(_: &Flags, context: &Context) -> Outcome {
    let own = [("NO_COLOR", "any value turns colors off")];
    let environment = fsa::VARIABLES
        .into_iter()
        .chain(fsa::cuda::VARIABLES)
        .chain(own)
        .map(|(name, meaning)| {
            let value = std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
            Variable { name, value, meaning }
        })
        .collect();
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        backends: vec!["cpu"],
        machine: Machine::describe(context.threads),
        environment,
    };
    context.output.report(&info)
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
        let mut table = output.new_table(&["<environment variable", "<value", "<meaning"]);
        for variable in &self.environment {
            let value = variable.value.as_deref().unwrap_or("(unset)");
            table.add_row([variable.name, value, variable.meaning]);
        }
        output.table(&table)
    }
}
