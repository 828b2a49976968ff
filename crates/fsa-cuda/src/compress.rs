//! Stage `compress`, kinds mean and weighted, forward and backward.
//!
//! Kernel file: `kernels/compress.cuh`.

use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{CompressBackwardParams, CompressParams};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("compress_sum", "CompressParams"),
    ("compress_sum_backward", "CompressBackwardParams"),
    ("compress_factors", "CompressBackwardParams"),
    ("compress_factors_merge", "CompressBackwardParams"),
];

/// Threads of a CTA.
const THREADS: usize = 256;
/// Threads of a multiprocessor that should have work before a thread takes more than one window.
const BUSY_THREADS: usize = 1024;
/// Windows that a thread takes at most.
const MAX_WINDOWS: usize = 8;
/// Windows of a piece of the sums of `compress_factors`, at least, and pieces at most.
const PIECE_WINDOWS: usize = 16;
const MAX_PIECES: usize = 256;
/// Warps of a CTA: each takes a factor of `compress_factors_merge`.
const WARPS: usize = THREADS / 32;

/// What the kernel file must agree with.
pub(crate) fn constants(_: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("CTA_THREADS", THREADS)]
}

/// Shared memory of a CTA: the factors of a head.
pub(crate) fn smem_bytes(kernel_size: usize) -> usize {
    kernel_size * size_of::<f32>()
}

/// Parts of the windows whose sums `compress_factors` takes side by side.
pub(crate) fn pieces(total_compressed: usize) -> usize {
    total_compressed.div_ceil(PIECE_WINDOWS).clamp(1, MAX_PIECES)
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct CompressKernels {
    sum: Function<CompressParams>,
    sum_backward: Function<CompressBackwardParams>,
    factors: Function<CompressBackwardParams>,
    factors_merge: Function<CompressBackwardParams>,
    specialisation: Specialisation,
}

fn dims(grid: [usize; 2], smem_bytes: usize) -> LaunchDims {
    let grid = [grid[0] as u32, grid[1] as u32, 1];
    LaunchDims { grid, threads: THREADS as u32, smem_bytes: smem_bytes as u32, overlaps: false }
}

impl CompressKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            sum: module.function("compress_sum")?,
            sum_backward: module.function("compress_sum_backward")?,
            factors: module.function("compress_factors")?,
            factors_merge: module.function("compress_factors_merge")?,
            specialisation: *specialisation,
        })
    }

    /// Pieces of 16 bytes of a row, and rows that the threads of a CTA have side by side.
    fn runs(&self) -> (usize, usize) {
        let chunks = self.specialisation.head_dim / 8;
        (chunks, THREADS / chunks)
    }

    /// The compressed rows.
    pub(crate) fn forward(&self, stream: &Stream, multiprocessors: usize, params: &CompressParams) -> Result<()> {
        let (rows, heads) = (params.total_compressed as usize, params.num_kv_heads as usize);
        let (chunks, runs) = self.runs();
        let per_run = (rows * heads * chunks / (multiprocessors * BUSY_THREADS)).clamp(1, MAX_WINDOWS);
        let ctas = rows.div_ceil(per_run).div_ceil(runs) * heads;
        self.sum.launch(stream, dims([ctas, 1], smem_bytes(params.kernel_size as usize)), params)
    }

    /// The gradient of the input. Ahead of what runs beside it, which is larger.
    pub(crate) fn backward(&self, stream: &Stream, params: &CompressBackwardParams) -> Result<()> {
        let forward = &params.forward;
        let ctas = cells(forward).div_ceil(self.runs().1) * forward.num_kv_heads as usize;
        self.sum_backward.launch_ahead(stream, dims([ctas, 1], smem_bytes(forward.kernel_size as usize)), params)
    }

    /// That of the weight, where it is wanted.
    pub(crate) fn backward_parameters(&self, stream: &Stream, params: &CompressBackwardParams) -> Result<()> {
        let (heads, kernel_size) = (params.forward.num_kv_heads as usize, params.forward.kernel_size as usize);
        if params.grad_weight == Address::default() {
            return Ok(());
        }
        self.factors.launch(stream, dims([params.pieces as usize, heads], 0), params)?;
        self.factors_merge.launch(stream, dims([(heads * kernel_size).div_ceil(WARPS), 1], 0), params)
    }
}

/// Bound on the groups of kernel_stride tokens: every token lies in one.
pub(crate) fn cells(params: &CompressParams) -> usize {
    let ratio = params.kernel_size / params.kernel_stride;
    params.total_compressed as usize + params.batch as usize * ratio as usize
}
