//! The machine that a figure was measured on.

use crate::gpu::Gpu;
use serde::Serialize;

/// What a reader of a figure needs to know about the machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model name of the processor.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Worker threads of the backend.
    pub threads: usize,
    /// Vector instructions that the backend chose.
    pub simd: &'static str,
    /// Vector extensions of the processor that matter here.
    pub features: Vec<&'static str>,
    /// Main memory, where the system says.
    pub memory_bytes: Option<usize>,
    /// Operating system and architecture.
    pub system: String,
    /// The GPU that the stages ran on, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

impl Machine {
    /// Looks at the machine that runs this process.
    pub fn describe(threads: usize) -> Self {
        Self {
            cpu: cpu_model(),
            cores: cores(),
            threads,
            simd: fsa::cpu::simd_name(),
            features: features(),
            memory_bytes: memory_bytes(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            gpu: None,
        }
    }

    /// A directory name for this machine: the GPU, or the processor and the number of its cores.
    pub fn slug(&self) -> String {
        match &self.gpu {
            Some(gpu) => words(&gpu.name).join("-"),
            None => format!("{}-{}c", words(&self.cpu).join("-"), self.cores),
        }
    }
}

/// The words of a name that tell it from others, in lower case.
fn words(name: &str) -> Vec<String> {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let empty = ["r", "tm", "cpu", "processor", "core"];
    words.map(str::to_ascii_lowercase).filter(|word| !empty.contains(&word.as_str())).collect()
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpu_model() -> String {
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_string()).filter(|value| !value.is_empty())
    };
    let linux = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        field(&text, "model name").or_else(|| field(&text, "Hardware")).or_else(|| field(&text, "CPU part"))
    };
    let mac = || {
        let output = std::process::Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"]).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_string()).filter(|name| !name.is_empty())
    };
    linux().or_else(mac).unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

fn memory_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

fn features() -> Vec<&'static str> {
    #[allow(unused_mut)]
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! look {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        look!("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512fp16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! look {
            ($($name:tt),*) => { $(if std::arch::is_aarch64_feature_detected!($name) { found.push($name); })* };
        }
        look!("neon", "fp16", "bf16", "sve", "sve2");
    }
    found
}

/// Today, `YYYY-MM-DD`, in UTC.
pub fn today() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date_of_day(seconds / 86_400)
}

/// Date of a day counted from 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn date_of_day(day: u64) -> String {
    let shifted = day + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day_of_month:02}")
}

/// The commit of the working directory, with a `+` if it has changes, where git says.
pub fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = std::process::Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    Some(if changed { format!("{commit}+") } else { commit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        let dates = [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_453, "2025-12-31")];
        for (day, date) in dates {
            assert_eq!(date_of_day(day), date);
        }
    }

    #[test]
    fn a_slug_is_a_directory_name() {
        let machine = Machine {
            cpu: "AMD EPYC 7R13 Processor".into(),
            cores: 2,
            threads: 2,
            simd: "avx2",
            features: Vec::new(),
            memory_bytes: None,
            system: "linux x86_64".into(),
            gpu: None,
        };
        assert_eq!(machine.slug(), "amd-epyc-7r13-2c");
        assert_eq!(words("NVIDIA H100 80GB HBM3").join("-"), "nvidia-h100-80gb-hbm3");
    }
}
