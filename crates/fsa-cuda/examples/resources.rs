//! Prints the resource table: `cargo run -p fsa-cuda --example resources > crates/fsa-cuda/resources.md`.
//!
//! Needs NVRTC and no GPU. With an architecture as argument the table is of that; `tests/compile.rs` compares the
//! committed one.
#![allow(clippy::print_stdout, reason = "printing is what it does")]

use fsa_cuda::jit::{Compiler, resource_table};
use fsa_cuda::source::tabled;
use fsa_cuda::{Arch, Environment};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arch: Arch = std::env::args().nth(1).as_deref().unwrap_or("sm_90a").parse()?;
    let compiler = Compiler::new(&Environment::read()?);
    eprintln!("{:?}", compiler.nvrtc()?);
    print!("{}", resource_table(&compiler, arch, &tabled(arch.kernels()))?);
    Ok(())
}
