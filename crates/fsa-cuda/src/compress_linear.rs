//! Stage `compress`, kind linear: a matrix product over overlapping windows, forward and backward.
//!
//! Kernel file: `kernels/compress_linear.cuh`.

use crate::arch::KernelSet;
use crate::compress::cells;
use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{CompressBackwardParams, CompressParams, TILE_ROWS};
use crate::plan::tile_bytes;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("compress_linear", "CompressParams"),
    ("compress_merge", "CompressParams"),
    ("compress_linear_backward", "CompressBackwardParams"),
    ("compress_totals", "CompressBackwardParams"),
    ("compress_grad_weight", "CompressBackwardParams"),
    ("compress_grad_position", "CompressBackwardParams"),
];

/// Threads of the small kernels.
const SMALL_THREADS: usize = 256;
/// Parts of the windows whose totals are taken side by side, at most.
const MAX_PIECES: usize = 32;
/// CTAs of a kv head that should share the contraction of a forward where it has fewer strips of windows, and windows of a strip.
/// Not a matter of the number of heads, so that passes over few of them round as one over all.
const BUSY_CTAS: usize = 15;
const STRIP_WINDOWS: usize = 127;

/// Whether the products are taken by `wgmma`.
pub(crate) fn takes_wgmma(specialisation: &Specialisation) -> bool {
    specialisation.set == KernelSet::Sm90 && specialisation.head_dim <= 128
}

/// Rows of a CTA of the products.
fn strip_rows(specialisation: &Specialisation) -> usize {
    if takes_wgmma(specialisation) { 128 } else { 64 }
}

/// Threads of a CTA of the products.
fn threads(specialisation: &Specialisation) -> usize {
    if takes_wgmma(specialisation) || specialisation.head_dim > 128 { 256 } else { 128 }
}

/// Shared memory of a CTA of the products: stages of a tile of the rows and one of the columns. Portable ones have room on devices
/// of 100 KB.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let stage = tile_bytes(strip_rows(specialisation), 64) + tile_bytes(TILE_ROWS, specialisation.head_dim);
    let most = if takes_wgmma(specialisation) { 96 } else { 95 } << 10;
    (most / stage).min(4) * stage
}

/// Parts of the contraction that CTAs of `compress_linear` take side by side.
pub(crate) fn parts(total_compressed: usize) -> usize {
    (BUSY_CTAS / total_compressed.div_ceil(STRIP_WINDOWS).max(1)).max(1)
}

/// Parts of the windows whose totals `compress_totals` takes side by side.
pub(crate) fn pieces(total_compressed: usize) -> usize {
    total_compressed.div_ceil(TILE_ROWS).clamp(1, MAX_PIECES)
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let (rows, threads) = (strip_rows(specialisation), threads(specialisation));
    vec![("LINEAR_THREADS", threads), ("STRIP_ROWS", rows), ("LINEAR_SMEM", smem_bytes(specialisation))]
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct CompressLinearKernels {
    linear: Function<CompressParams>,
    merge: Function<CompressParams>,
    backward: Function<CompressBackwardParams>,
    totals: Function<CompressBackwardParams>,
    grad_weight: Function<CompressBackwardParams>,
    grad_position: Function<CompressBackwardParams>,
    specialisation: Specialisation,
}

fn dims([x, y]: [usize; 2], z: usize, threads: usize, smem_bytes: usize) -> LaunchDims {
    let grid = [x, y, z].map(|ctas| ctas as u32);
    LaunchDims { grid, threads: threads as u32, smem_bytes: smem_bytes as u32, overlaps: false }
}

impl CompressLinearKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            linear: module.function("compress_linear")?,
            merge: module.function("compress_merge")?,
            backward: module.function("compress_linear_backward")?,
            totals: module.function("compress_totals")?,
            grad_weight: module.function("compress_grad_weight")?,
            grad_position: module.function("compress_grad_position")?,
            specialisation: *specialisation,
        })
    }

    fn product(&self, grid: [usize; 2], parts: usize) -> LaunchDims {
        dims(grid, parts, threads(&self.specialisation), smem_bytes(&self.specialisation))
    }

    /// The compressed rows.
    pub(crate) fn forward(&self, stream: &Stream, params: &CompressParams) -> Result<()> {
        let (rows, heads) = (params.total_compressed as usize, params.num_kv_heads as usize);
        let (head_dim, parts) = (self.specialisation.head_dim, params.pieces as usize);
        // With a position, one row of a strip is that.
        let windows = strip_rows(&self.specialisation) - usize::from(params.position != Address::default());
        let strips = rows.div_ceil(windows);
        self.linear.launch(stream, self.product([strips, heads], parts), params)?;
        if parts == 1 {
            return Ok(());
        }
        let ctas = (rows * heads * head_dim / 8).div_ceil(SMALL_THREADS);
        self.merge.launch(stream, dims([ctas, 1], 1, SMALL_THREADS, 0), params)
    }

    /// The gradient of the input.
    pub(crate) fn backward(&self, stream: &Stream, params: &CompressBackwardParams) -> Result<()> {
        let forward = &params.forward;
        let strips = cells(forward).div_ceil(strip_rows(&self.specialisation)) * forward.kernel_stride as usize;
        self.backward.launch(stream, self.product([strips, forward.num_kv_heads as usize], 1), params)
    }

    /// Those of weight and position, where they are wanted.
    pub(crate) fn backward_parameters(&self, stream: &Stream, params: &CompressBackwardParams) -> Result<()> {
        let (forward, head_dim, none) = (&params.forward, self.specialisation.head_dim, Address::default());
        let (heads, rows) = (forward.num_kv_heads as usize, forward.kernel_size as usize * head_dim);
        let (weight, position) = (params.grad_weight != none, params.grad_position != none);
        if forward.position != none && (weight || position) {
            self.totals.launch(stream, dims([params.pieces as usize, heads], 1, SMALL_THREADS, 0), params)?;
        }
        if weight {
            let strips = rows.div_ceil(strip_rows(&self.specialisation));
            self.grad_weight.launch(stream, self.product([strips, heads], 1), params)?;
        }
        if position {
            let ctas = rows.div_ceil(SMALL_THREADS / 4);
            self.grad_position.launch(stream, dims([ctas, heads], 1, SMALL_THREADS, 0), params)?;
        }
        Ok(())
    }
}
