//! What ptxas says about a kernel: registers, spills, shared memory.

use serde::Serialize;
use std::collections::BTreeMap;

/// Resources of one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory that a thread's frame takes.
    pub stack_bytes: u32,
    /// Bytes of registers that are stored to and loaded from local memory, as instructions in the code.
    pub spill_bytes: u32,
    /// Shared memory that is declared in the code; what a launch adds is not in it.
    pub static_smem_bytes: u32,
    /// ptxas gave up on running matrix instructions asynchronously.
    pub serialised: bool,
}

/// Reads the log of a compilation with `--ptxas-options=-v`.
pub fn parse(log: &str) -> BTreeMap<String, Resources> {
    let mut kernels = BTreeMap::new();
    let (mut name, mut current) = (None, Resources::default());
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            name = rest.split('\'').next().map(str::to_string);
            current = Resources::default();
        }
        if line.contains("bytes stack frame") {
            current.stack_bytes = number_before(line, " bytes stack frame");
            current.spill_bytes =
                number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        }
        if line.contains("Used ") && line.contains(" registers") {
            current.registers = number_before(line, " registers");
            current.static_smem_bytes = number_before(line, " bytes smem");
            if let Some(name) = name.take() {
                kernels.insert(name, current);
            }
        }
    }
    // The warning names the function, before or after its resources.
    for line in log.lines().filter(|line| line.contains("wgmma") && line.contains("serialized")) {
        for (name, resources) in &mut kernels {
            resources.serialised |= line.contains(&format!("'{name}'"));
        }
    }
    kernels
}

/// The number that ends where `text` starts; 0 if there is none.
fn number_before(line: &str, text: &str) -> u32 {
    let before = line.split(text).next().filter(|before| before.len() < line.len()).unwrap_or_default();
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_of_ptxas_is_read() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in the function 'attend'
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 123.4 ms
ptxas info    : Compiling entry function 'reduce' for 'sm_90a'
ptxas info    : Function properties for reduce
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers";
        let kernels = parse(log);
        let attend =
            Resources { registers: 168, stack_bytes: 8, spill_bytes: 40, static_smem_bytes: 64, serialised: true };
        assert_eq!(kernels["attend"], attend);
        assert_eq!(kernels["reduce"], Resources { registers: 40, ..Resources::default() });
        assert_eq!(kernels.len(), 2);
    }
}
