//! Architectures as values: any machine can compile for any of them, and a device says which it runs.

use fsa_core::Error;
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// A target of the compiler, such as `sm_90a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arch {
    major: u32,
    minor: u32,
}

impl Arch {
    /// Ampere, the oldest that is supported.
    pub const SM80: Arch = Arch { major: 8, minor: 0 };
    /// Hopper with its own instructions (wgmma).
    pub const SM90: Arch = Arch { major: 9, minor: 0 };

    /// The architecture of a device; `None` before compute capability 8.0.
    pub fn of_capability((major, minor): (u32, u32)) -> Option<Self> {
        (major >= 8).then_some(Self { major, minor })
    }

    /// Compute capability.
    pub fn capability(self) -> (u32, u32) {
        (self.major, self.minor)
    }

    /// The kernels that are written for this architecture.
    pub fn kernels(self) -> KernelSet {
        if self == Self::SM90 { KernelSet::Sm90 } else { KernelSet::Sm80 }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Hopper's own instructions exist under the suffixed name only; the portable kernels use none.
        let suffix = if *self == Self::SM90 { "a" } else { "" };
        f.pad(&format!("sm_{}{}{suffix}", self.major, self.minor))
    }
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let error = || Error::input("arch", "an architecture from sm_80 on, such as sm_90a", format!("{text:?}"));
        let digits = text.strip_prefix("sm_").ok_or_else(error)?;
        let number: u32 = digits.trim_end_matches(['a', 'f']).parse().map_err(|_| error())?;
        let arch = Self::of_capability((number / 10, number % 10)).filter(|_| number < 1000).ok_or_else(error)?;
        Ok(arch)
    }
}

impl Serialize for Arch {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Which of the kernel files of a stage is taken: the suffix of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelSet {
    /// Portable: mma.sync and cp.async, every device from sm_80 on.
    Sm80,
    /// Hopper: wgmma.
    Sm90,
}

impl KernelSet {
    /// Suffix of the kernel files.
    pub fn name(self) -> &'static str {
        match self {
            KernelSet::Sm80 => "sm80",
            KernelSet::Sm90 => "sm90",
        }
    }
}

impl fmt::Display for KernelSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_compiler() {
        for (text, shown) in [("sm_90a", "sm_90a"), ("sm_90", "sm_90a"), ("sm_80", "sm_80"), ("sm_120", "sm_120")] {
            assert_eq!(text.parse::<Arch>().expect(text).to_string(), shown);
        }
        for text in ["", "sm_", "sm_75", "90a", "sm_9x", "sm_1000"] {
            assert_eq!(text.parse::<Arch>().expect_err(text).argument(), Some("arch"));
        }
    }

    #[test]
    fn only_hopper_takes_hopper_kernels() {
        let set = |text: &str| text.parse::<Arch>().expect(text).kernels();
        assert_eq!(set("sm_90a"), KernelSet::Sm90);
        for text in ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"] {
            assert_eq!(set(text), KernelSet::Sm80, "{text}");
        }
        assert_eq!(Arch::of_capability((7, 5)), None);
    }
}
