//! Stage `compress`, kinds mean and weighted, forward and backward.
//!
//! Kernel file: `kernels/compress.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{CompressBackwardParams, CompressParams, CompressSumParams};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("compress_sum", "CompressSumParams"),
    ("compress_windows", "CompressSumParams"),
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
/// Windows of a CTA of `compress_windows`, and shared memory that it takes at most: two CTAs fit a multiprocessor of 100 KB.
const CTA_WINDOWS: usize = 8;
const MAX_WINDOW_BYTES: usize = 48 << 10;
/// Windows of a piece of the sums of `compress_factors`, at least, and pieces at most.
const PIECE_WINDOWS: usize = 16;
const MAX_PIECES: usize = 256;
/// Warps of a CTA: each takes a factor of `compress_factors_merge`.
const WARPS: usize = THREADS / 32;

/// What the kernel file must agree with.
pub(crate) fn constants(_: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("CTA_THREADS", THREADS), ("CTA_WINDOWS", CTA_WINDOWS)]
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
    sum: Function<CompressSumParams>,
    windows: Function<CompressSumParams>,
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
            windows: module.function("compress_windows")?,
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

    /// The compressed rows of one input, or of two that differ in tensors alone. `follows`: right ahead on the stream is the kernel that
    /// fills the tables, under which tokens are read already.
    pub(crate) fn forward(
        &self,
        stream: &Stream,
        multiprocessors: usize,
        inputs: &[CompressParams],
        follows: bool,
    ) -> Result<()> {
        let (Some(params), Some(last)) = (inputs.first(), inputs.last()) else { return Ok(()) };
        let (rows, heads) = (params.total_compressed as usize, params.num_kv_heads as usize);
        let (chunks, runs) = self.runs();
        let per_run = (rows * heads * chunks / (multiprocessors * BUSY_THREADS)).clamp(1, MAX_WINDOWS);
        let (kernel_size, stride) = (params.kernel_size as usize, params.kernel_stride as usize);
        let tokens = (CTA_WINDOWS - 1) * stride + kernel_size;
        let window_bytes = smem_bytes(kernel_size).next_multiple_of(16) + tokens * chunks * 16;
        let is_short = per_run == 1 && window_bytes <= MAX_WINDOW_BYTES;
        let (kernel, ctas, smem_bytes) = if is_short {
            (&self.windows, rows.div_ceil(CTA_WINDOWS), window_bytes)
        } else {
            (&self.sum, rows.div_ceil(per_run).div_ceil(runs), smem_bytes(kernel_size))
        };
        let overlaps = follows && self.specialisation.set == KernelSet::Sm90;
        let dims = LaunchDims { overlaps, ..dims([ctas * heads, inputs.len()], smem_bytes) };
        kernel.launch(stream, dims, &CompressSumParams { inputs: [*params, *last] })
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
