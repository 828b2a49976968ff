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

/// Rows of a CTA, and its threads.
const CTA_ROWS: usize = 4;
const THREADS: usize = 256;

/// What the kernel file must agree with.
pub(crate) fn constants(_: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("CTA_ROWS", CTA_ROWS), ("CTA_THREADS", THREADS)]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct RopeKernel {
    rope: Function<RopeParams>,
}

impl RopeKernel {
    pub(crate) fn load(module: &Arc<Module>, _: &Specialisation) -> Result<Self> {
        Ok(Self { rope: module.function("rope")? })
    }

    /// Rotates the rows.
    pub(crate) fn launch(&self, stream: &Stream, params: &RopeParams) -> Result<()> {
        let grid = [(params.rows as usize).div_ceil(CTA_ROWS) as u32, 1, 1];
        self.rope.launch(stream, LaunchDims { grid, threads: THREADS as u32, smem_bytes: 0, overlaps: false }, params)
    }
}
