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

/// What `cargo run -p fsa-cuda --example resources` prints, with `sm_80` as its argument for the second.
const TABLES: [(Arch, &str); 2] =
    [(Arch::SM90, include_str!("../resources.md")), (Arch::SM80, include_str!("../resources_sm80.md"))];

#[test]
#[ignore = "needs NVRTC"]
fn the_committed_resource_tables_are_what_the_compiler_says() {
    for (arch, committed) in TABLES {
        let table = resource_table(&compiler(), arch, &tabled(arch.kernels())).expect("compiles");
        let differences: Vec<_> = table.lines().zip(committed.lines()).filter(|(new, old)| new != old).collect();
        assert!(differences.is_empty(), "{arch}: (compiled, committed): {differences:#?}");
        assert_eq!(table.lines().count(), committed.lines().count(), "{arch}");
    }
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
    assert_eq!(parse_resources(&again.log).len(), 5);
    assert_eq!(again.image, first.image);

    // Another process without a compiler is served from the same folder.
    let nowhere =
        Environment { nvrtc_path: Some("/nowhere".into()), cache_dir: Some(folder.path().into()), ..environment };
    assert_eq!(Compiler::new(&nowhere).cubin(&specialisation, Arch::SM90).expect("cached").image, first.image);
}

#[test]
fn the_tables_show_no_spill_at_head_dim_128() {
    for (arch, table) in TABLES {
        let rows: Vec<&str> = table.lines().filter(|line| line.contains("head_dim 128")).collect();
        assert!(!rows.is_empty(), "{arch}");
        for row in rows {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            assert_eq!((cells[4], cells[5], cells[8]), ("0", "0", ""), "{arch}: {row}");
        }
    }
}
