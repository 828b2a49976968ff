//! Stage `compress`, kind linear: a matrix product over overlapping windows, forward and backward.
//!
//! Kernel file: `kernels/compress_linear.cuh`.

use crate::compress::cells;
use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{CompressBackwardParams, CompressParams, TILE_ROWS};
use crate::plan::tile_bytes;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("compress_bias", "CompressParams"),
    ("compress_linear", "CompressParams"),
    ("compress_linear_backward", "CompressBackwardParams"),
    ("compress_totals", "CompressBackwardParams"),
    ("compress_grad_weight", "CompressBackwardParams"),
    ("compress_grad_position", "CompressBackwardParams"),
];

/// Columns of a CTA of `compress_bias`, and its threads.
const BIAS_COLUMNS: usize = 32;
const BIAS_THREADS: usize = 512;
/// Threads of the small kernels.
const SMALL_THREADS: usize = 256;
/// Parts of the windows whose totals are taken side by side, at most.
const MAX_PIECES: usize = 32;

/// Threads of a CTA of the products.
fn threads(specialisation: &Specialisation) -> usize {
    if specialisation.head_dim <= 128 { 128 } else { 256 }
}

/// Shared memory of a CTA of the products: tiles of 64 rows and of 64 columns of the other factor, some stages of them.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let stages = match specialisation.head_dim {
        0..=64 => 4,
        65..=128 => 3,
        _ => 2,
    };
    stages * (tile_bytes(TILE_ROWS, 64) + tile_bytes(TILE_ROWS, specialisation.head_dim))
}

/// Parts of the windows whose totals `compress_totals` takes side by side.
pub(crate) fn pieces(total_compressed: usize) -> usize {
    total_compressed.div_ceil(TILE_ROWS).clamp(1, MAX_PIECES)
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![("LINEAR_THREADS", threads(specialisation)), ("LINEAR_SMEM", smem_bytes(specialisation))]
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct CompressLinearKernels {
    bias: Function<CompressParams>,
    linear: Function<CompressParams>,
    backward: Function<CompressBackwardParams>,
    totals: Function<CompressBackwardParams>,
    grad_weight: Function<CompressBackwardParams>,
    grad_position: Function<CompressBackwardParams>,
    specialisation: Specialisation,
}

fn dims(grid: [usize; 2], threads: usize, smem_bytes: usize) -> LaunchDims {
    let grid = [grid[0] as u32, grid[1] as u32, 1];
    LaunchDims { grid, threads: threads as u32, smem_bytes: smem_bytes as u32, overlaps: false }
}

impl CompressLinearKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            bias: module.function("compress_bias")?,
            linear: module.function("compress_linear")?,
            backward: module.function("compress_linear_backward")?,
            totals: module.function("compress_totals")?,
            grad_weight: module.function("compress_grad_weight")?,
            grad_position: module.function("compress_grad_position")?,
            specialisation: *specialisation,
        })
    }

    fn product(&self, grid: [usize; 2]) -> LaunchDims {
        dims(grid, threads(&self.specialisation), smem_bytes(&self.specialisation))
    }

    /// The compressed rows.
    pub(crate) fn forward(&self, stream: &Stream, params: &CompressParams) -> Result<()> {
        let (rows, heads) = (params.total_compressed as usize, params.num_kv_heads as usize);
        if params.position != Address::default() {
            let columns = self.specialisation.head_dim / BIAS_COLUMNS;
            self.bias.launch(stream, dims([columns, heads], BIAS_THREADS, 0), params)?;
        }
        self.linear.launch(stream, self.product([rows.div_ceil(TILE_ROWS), heads]), params)
    }

    /// The gradient of the input and, where they are wanted, of weight and position.
    pub(crate) fn backward(&self, stream: &Stream, params: &CompressBackwardParams) -> Result<()> {
        let forward = &params.forward;
        let (heads, kernel_size) = (forward.num_kv_heads as usize, forward.kernel_size as usize);
        let tiles = cells(forward).div_ceil(TILE_ROWS) * forward.kernel_stride as usize;
        self.backward.launch(stream, self.product([tiles, heads]), params)?;
        let none = Address::default();
        let (weight, position) = (params.grad_weight != none, params.grad_position != none);
        if forward.position != none && (weight || position) {
            self.totals.launch(stream, dims([params.pieces as usize, heads], SMALL_THREADS, 0), params)?;
        }
        let tiles = (kernel_size * self.specialisation.head_dim).div_ceil(TILE_ROWS);
        if weight {
            self.grad_weight.launch(stream, self.product([tiles, heads]), params)?;
        }
        if position {
            self.grad_position.launch(stream, dims([tiles, heads], SMALL_THREADS, 0), params)?;
        }
        Ok(())
    }
}
