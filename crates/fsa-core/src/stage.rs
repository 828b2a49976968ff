//! Names of the stages: one word each, the same in plans, backends, oracle, tests, benches and docs.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A stage of native sparse attention, the dense yardstick, or the whole operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Windows of keys and values to compressed keys and values.
    Compress,
    /// Rotary position embedding.
    Rope,
    /// Attention to the compressed keys.
    Compressed,
    /// Block scores from the compressed probabilities, and the top-k blocks of every row.
    Select,
    /// The inverse index: for every block the rows that chose it.
    Index,
    /// Attention to the chosen blocks, KV block outside.
    Selected,
    /// Attention to a sliding window.
    Window,
    /// The gated sum of the three branches.
    Combine,
    /// Dense causal attention, the yardstick.
    Dense,
    /// The whole operation.
    Nsa,
}

impl Stage {
    /// Every stage, in the order in which the whole operation runs them; the yardstick and the whole last.
    pub const ALL: [Stage; 10] = [
        Stage::Compress,
        Stage::Rope,
        Stage::Compressed,
        Stage::Select,
        Stage::Index,
        Stage::Selected,
        Stage::Window,
        Stage::Combine,
        Stage::Dense,
        Stage::Nsa,
    ];

    /// Lower-case name.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Compress => "compress",
            Stage::Rope => "rope",
            Stage::Compressed => "compressed",
            Stage::Select => "select",
            Stage::Index => "index",
            Stage::Selected => "selected",
            Stage::Window => "window",
            Stage::Combine => "combine",
            Stage::Dense => "dense",
            Stage::Nsa => "nsa",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Stage {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Stage::ALL.into_iter().find(|stage| stage.name() == text).ok_or_else(|| {
            let names: Vec<_> = Stage::ALL.iter().map(|stage| stage.name()).collect();
            Error::input("stage", format!("one of {}", names.join(", ")), text)
        })
    }
}
