//! Stage `rope`: rotary embedding of query, key and compressed key, and its inverse.
//!
//! Kernel file: `kernels/rope.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::RopeParams;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("rope", "RopeParams")];

/// Threads of a CTA.
const THREADS: usize = 256;
/// Threads of a row, at least and at most.
const MIN_ROW_THREADS: usize = 8;
const MAX_ROW_THREADS: usize = 64;

/// Threads of a row: one for each of its groups of eight pairs of a head, so that rows of few heads leave none idle.
pub(crate) fn row_threads(head_dim: usize, heads: usize) -> usize {
    (head_dim / 16 * heads).next_power_of_two().clamp(MIN_ROW_THREADS, MAX_ROW_THREADS)
}

/// What the kernel file must agree with.
pub(crate) fn constants(_: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("CTA_THREADS", THREADS)]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct RopeKernel {
    rope: Function<RopeParams>,
    specialisation: Specialisation,
}

impl RopeKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { rope: module.function("rope")?, specialisation: *specialisation })
    }

    /// Rotates the rows.
    pub(crate) fn launch(&self, stream: &Stream, params: &RopeParams) -> Result<()> {
        let cta_rows = THREADS / params.row_threads as usize;
        let grid = [(params.rows as usize).div_ceil(cta_rows) as u32, 1, 1];
        // Sine and cosine of every pair.
        let smem_bytes = cta_rows * self.specialisation.head_dim * size_of::<f32>();
        let dims = LaunchDims { grid, threads: THREADS as u32, smem_bytes: smem_bytes as u32, overlaps: false };
        self.rope.launch(stream, dims, params)
    }
}
