//! The resource table: what every specialisation takes on an architecture, as text that can be committed.

use super::{Compiler, KernelReport};
use crate::arch::Arch;
use crate::source::Specialisation;
use fsa_core::Result;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Compiles specialisations for an architecture, with one thread per core, and lists their kernels.
///
/// # Errors
/// NVRTC is missing or refuses a kernel.
pub fn resource_table(compiler: &Compiler, arch: Arch, specialisations: &[Specialisation]) -> Result<String> {
    let mut text = String::from(
        "| specialisation | kernel | registers | stack | spills | dynamic smem | static smem | notes |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (specialisation, reports) in specialisations.iter().zip(reports(compiler, arch, specialisations)?) {
        for KernelReport { specialisation: name, kernel, resources } in reports {
            let is_main = kernel == specialisation.kernel.name() || specialisation.entry_points().len() == 1;
            let smem_bytes = if is_main { specialisation.smem_bytes(16) } else { 0 };
            let notes = if resources.serialised { "wgmma serialised" } else { "" };
            let _ = writeln!(
                text,
                "| {name} | {kernel} | {} | {} | {} | {smem_bytes} | {} | {notes} |",
                resources.registers, resources.stack_bytes, resources.spill_bytes, resources.static_smem_bytes,
            );
        }
    }
    Ok(text)
}

/// The reports of all specialisations, in their order.
fn reports(compiler: &Compiler, arch: Arch, all: &[Specialisation]) -> Result<Vec<Vec<KernelReport>>> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < all.len()) {
            let report = compiler.report(&all[number], arch);
            results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((number, report));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_by_key(|(number, _)| *number);
    results.into_iter().map(|(_, report)| report).collect()
}
