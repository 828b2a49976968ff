//! What the compiler makes of the kernels. No GPU, but NVRTC: `FSA_NVRTC_PATH` or `pip install nvidia-cuda-nvrtc`, then
//! `cargo test -p fsa-cuda --test compile -- --ignored`.

use fsa_core::DType;
use fsa_cuda::jit::{Compiler, parse_resources, resource_table};
use fsa_cuda::source::{Kernel, Specialisation, specialisations, tabled};
use fsa_cuda::{Arch, Environment, KernelSet};

/// The environment's compiler without a cache: every kernel is compiled now.
fn compiler() -> Compiler {
    let environment = Environment::read().expect("valid variables");
    Compiler::new(&Environment { cache_dir: None, ..environment })
}

/// Its output is `cargo run -p fsa-cuda --example resources`.
const TABLE: &str = include_str!("../resources.md");

#[test]
#[ignore = "needs NVRTC"]
fn the_committed_resource_table_is_what_the_compiler_says() {
    let table = resource_table(&compiler(), Arch::SM90, &tabled(KernelSet::Sm90)).expect("compiles");
    let differences: Vec<_> = table.lines().zip(TABLE.lines()).filter(|(new, old)| new != old).collect();
    assert!(differences.is_empty(), "(compiled, committed): {differences:#?}");
    assert_eq!(table.lines().count(), TABLE.lines().count());
}

#[test]
#[ignore = "needs NVRTC"]
fn every_specialisation_compiles_for_its_oldest_architecture() {
    for arch in [Arch::SM90, Arch::SM80] {
        let all = specialisations(arch.kernels());
        assert!(!all.is_empty());
        resource_table(&compiler(), arch, &all).unwrap_or_else(|error| panic!("{arch}: {error}"));
    }
}

#[test]
#[ignore = "needs NVRTC"]
fn a_damaged_cache_entry_is_compiled_again() {
    let folder = tempfile::tempdir().expect("folder");
    let environment = Environment::read().expect("valid variables");
    let compiler = Compiler::new(&Environment { cache_dir: Some(folder.path().into()), ..environment.clone() });
    let specialisation = Specialisation::new(Kernel::Index, KernelSet::Sm90, DType::Bf16, 128, 64);
    let first = compiler.cubin(&specialisation, Arch::SM90).expect("compiles");
    let path = compiler.cache().entries().expect("readable")[0].0.clone();
    std::fs::write(&path, b"damaged").expect("writable");
    let again = compiler.cubin(&specialisation, Arch::SM90).expect("compiles again");
    assert_eq!(parse_resources(&again.log).len(), 4);
    assert_eq!(again.image, first.image);

    // Another process without a compiler is served from the same folder.
    let nowhere =
        Environment { nvrtc_path: Some("/nowhere".into()), cache_dir: Some(folder.path().into()), ..environment };
    assert_eq!(Compiler::new(&nowhere).cubin(&specialisation, Arch::SM90).expect("cached").image, first.image);
}

#[test]
fn the_table_shows_no_spill_at_head_dim_128() {
    let rows: Vec<&str> = TABLE.lines().filter(|line| line.contains("head_dim 128")).collect();
    assert!(!rows.is_empty());
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!((cells[4], cells[5], cells[8]), ("0", "0", ""), "{row}");
    }
}
