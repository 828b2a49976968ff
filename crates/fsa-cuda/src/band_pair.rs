//! Stage `selected` by the dense route and Stage `window` in one walk of the keys, as branches of the whole.
//!
//! Kernel file: `kernels/band_pair_sm90.cuh`.

use crate::band;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::BandPairParams;
use crate::plan::RowTiles;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("band_pair", "BandPairParams")];

/// Longest vectors of which two sums fit in registers.
pub(crate) const MAX_HEAD_DIM: usize = 128;

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct BandPairKernel {
    band_pair: Function<BandPairParams>,
    specialisation: Specialisation,
}

impl BandPairKernel {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self { band_pair: module.function("band_pair")?, specialisation: *specialisation })
    }

    /// Writes the rows of both branches and adds them to their sum: CTAs that take one tile after the other, as many as run at a time,
    /// ahead of what runs beside them or not.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        tiles: &RowTiles,
        (multiprocessors, ahead): (usize, bool),
        params: &BandPairParams,
    ) -> Result<()> {
        let heads = params.attention.num_kv_heads as usize;
        let dims = LaunchDims {
            grid: [(tiles.ctas() * heads).min(multiprocessors) as u32, 1, 1],
            threads: band::threads(&self.specialisation) as u32,
            smem_bytes: band::smem_bytes(&self.specialisation) as u32,
            overlaps: false,
        };
        if ahead {
            self.band_pair.launch_ahead(stream, dims, params)
        } else {
            self.band_pair.launch(stream, dims, params)
        }
    }
}
