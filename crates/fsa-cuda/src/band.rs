//! Forward of the attention whose rows see an interval of keys: Stage `window`, Stage `compressed`, Stage `dense`.
//!
//! Kernel files: `kernels/band_sm90.cuh`, `kernels/band_sm80.cuh`.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BandBothParams, BandParams, TILE_ROWS};
use crate::plan::{RowTiles, tile_bytes};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) fn entry_points(specialisation: &Specialisation) -> &'static [(&'static str, &'static str)] {
    if specialisation.window_too { &[("band", "BandBothParams")] } else { &[("band", "BandParams")] }
}

/// Keys of a step that Hopper's attention to a window may have instead.
pub(crate) const WINDOW_STEPS: [usize; 2] = [112, 144];
/// Keys of a step of attention to a window that goes on to the keys before it. More would leave a larger part of two last steps over.
pub(crate) const BOTH_STEPS: usize = 112;
/// Largest head_dim for which they may.
pub(crate) const MAX_WINDOW_STEPS_HEAD_DIM: usize = 128;

/// Shape of a CTA.
struct Cta {
    rows: usize,
    /// Keys of a step, and steps that there is room for.
    keys: usize,
    stages: usize,
    threads: usize,
}

impl Cta {
    fn of(specialisation: &Specialisation) -> Self {
        let is_small = specialisation.head_dim <= 128;
        match specialisation.set {
            KernelSet::Sm80 => Self { rows: TILE_ROWS, keys: if is_small { 64 } else { 32 }, stages: 1, threads: 128 },
            // Two warpgroups multiply, a third brings in what they need.
            KernelSet::Sm90 => {
                let keys = specialisation.step_keys.unwrap_or(if is_small { 128 } else { 64 });
                Self { rows: 2 * TILE_ROWS, keys, stages: 2, threads: 384 }
            }
        }
    }
}

/// Rows of a tile.
pub(crate) fn tile_rows(specialisation: &Specialisation) -> usize {
    Cta::of(specialisation).rows
}

/// Threads of a CTA.
pub(crate) fn threads(specialisation: &Specialisation) -> usize {
    Cta::of(specialisation).threads
}

/// Keys of a step.
pub(crate) fn step_keys(specialisation: &Specialisation) -> usize {
    Cta::of(specialisation).keys
}

/// Shared memory of a CTA: queries, keys, values; where a tile has three branches, rows on their way out, of one of them and of their sum.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let (Cta { rows, keys, stages, .. }, head_dim) = (Cta::of(specialisation), specialisation.head_dim);
    let staged = if specialisation.window_too { 2 } else { 0 };
    (1 + staged) * tile_bytes(rows, head_dim) + 2 * stages * tile_bytes(keys, head_dim)
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let Cta { rows, keys, threads, .. } = Cta::of(specialisation);
    let smem = smem_bytes(specialisation);
    match specialisation.set {
        KernelSet::Sm80 => vec![
            ("QueryTile::BYTES + 2 * KeyTile::BYTES", smem),
            ("STEP_KEYS", keys),
            ("TILE_ROWS", rows),
            ("WARPGROUP", threads),
        ],
        KernelSet::Sm90 => vec![("SMEM_BYTES", smem), ("STEP_KEYS", keys), ("CTA_ROWS", rows), ("THREADS", threads)],
    }
}

/// The loaded kernel, which takes the parameters of the one or of the other.
#[derive(Debug)]
pub(crate) struct BandKernel {
    band: Function<BandParams>,
    both: Function<BandBothParams>,
    specialisation: Specialisation,
}

impl BandKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { band: module.function("band")?, both: module.function("band")?, specialisation: *specialisation })
    }

    /// Writes `out` and `lse` of all rows. On Hopper, CTAs that take one tile after the other, as many as run at a time.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        tiles: &RowTiles,
        multiprocessors: usize,
        params: &BandParams,
    ) -> Result<()> {
        self.band.launch(stream, self.dims(tiles, multiprocessors, params.num_kv_heads as usize), params)
    }

    /// The same of a window, of all keys and of compressed keys. With `overlaps` from the end of the kernel ahead, which makes the compressed keys
    /// and nothing else that is read.
    pub(crate) fn launch_both(
        &self,
        stream: &Stream,
        tiles: &RowTiles,
        (multiprocessors, overlaps): (usize, bool),
        params: &BandBothParams,
    ) -> Result<()> {
        let heads = params.attention.num_kv_heads as usize;
        let dims = LaunchDims { overlaps, ..self.dims(tiles, multiprocessors, heads) };
        self.both.launch(stream, dims, params)
    }

    fn dims(&self, tiles: &RowTiles, multiprocessors: usize, heads: usize) -> LaunchDims {
        let ctas = tiles.ctas();
        let grid = match self.specialisation.set {
            KernelSet::Sm80 => [ctas as u32, heads as u32, 1],
            KernelSet::Sm90 => [(ctas * heads).min(multiprocessors) as u32, 1, 1],
        };
        LaunchDims {
            grid,
            threads: Cta::of(&self.specialisation).threads as u32,
            smem_bytes: smem_bytes(&self.specialisation) as u32,
            overlaps: false,
        }
    }
}
