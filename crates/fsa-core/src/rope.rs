//! Rotary position embedding: frequencies and their scaling.
//!
//! The pairs are `(x[k], x[k + head_dim / 2])`, as in Llama. Angles are computed in f64 and only
//! their sine and cosine are rounded to f32: an angle computed in f32 is wrong by 4e-3 at position 65,536.

use crate::error::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::f64::consts::TAU;

/// How the base frequencies are stretched for contexts longer than those trained on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "rope_type")]
pub enum RopeScaling {
    /// Frequencies `base^(-2k / head_dim)` as they are.
    #[default]
    Default,
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// Stretch of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before scaling.
        original_max_position: usize,
    },
}

/// Parameters of a rotary embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling for long contexts.
    pub scaling: RopeScaling,
}

impl Default for Rope {
    fn default() -> Self {
        Self { theta: 10_000.0, scaling: RopeScaling::Default }
    }
}

impl Rope {
    /// Checks the parameters against the head dimension they will rotate.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        ensure(
            self.theta.is_finite() && self.theta > 0.0,
            "rope.theta",
            || "a positive number".into(),
            || self.theta.to_string(),
        )?;
        ensure(
            head_dim.is_multiple_of(2),
            "head_dim",
            || "an even number under rotary embedding".into(),
            || head_dim.to_string(),
        )?;
        if let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } = self.scaling {
            ensure(factor >= 1.0, "rope.factor", || "at least 1".into(), || factor.to_string())?;
            ensure(
                low_freq_factor > 0.0 && high_freq_factor > low_freq_factor,
                "rope.high_freq_factor",
                || format!("above low_freq_factor {low_freq_factor}, both positive"),
                || high_freq_factor.to_string(),
            )?;
            ensure(
                original_max_position > 0,
                "rope.original_max_position",
                || "at least 1".into(),
                || original_max_position.to_string(),
            )?;
        }
        Ok(())
    }

    /// Angular frequency of each of the `head_dim / 2` pairs.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|k| {
                let base = self.theta.powf(-2.0 * k as f64 / head_dim as f64);
                self.scale(base)
            })
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } = self.scaling
        else {
            return frequency;
        };
        let turns = original_max_position as f64 * frequency / TAU;
        if turns > high_freq_factor {
            frequency
        } else if turns < low_freq_factor {
            frequency / factor
        } else {
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let scaled = Rope { theta: 500_000.0, scaling }.frequencies(128);
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.frequencies(128);
        assert_eq!(scaled[0], 1.0);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]));
        // Wavelengths between 2048 and 8192 tokens are interpolated.
        let k = plain.iter().position(|f| TAU / f > 4096.0).expect("exists");
        assert!(scaled[k] < plain[k] && scaled[k] > plain[k] / 8.0);
    }
}
