//! Stage `window` and Stage `dense` in one walk, inside the whole operation at lengths at which rows list all blocks.

use super::AttentionTensors;
use super::band::attention_params;
use crate::band::{BandKernel, step_keys};
use crate::driver::{DeviceBatch, Stream};
use crate::kernels::Kernels;
use crate::params::{Band, BandBothParams, Branch};
use crate::plan::{BandProblem, RowTiles, Tables};
use crate::source::Specialisation;
use fsa_core::Result;
use std::sync::Arc;

/// Attention to the window and to all keys in one walk, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) struct BandBothStep {
    window: BandProblem,
    tiles: RowTiles,
    kernel: Arc<BandKernel>,
    specialisation: Specialisation,
    multiprocessors: usize,
}

impl BandBothStep {
    pub(super) fn new(
        kernels: &Kernels,
        window: &BandProblem,
        tiles: RowTiles,
        specialisation: Specialisation,
    ) -> Result<Self> {
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        Ok(Self { window: *window, tiles, kernel, specialisation, multiprocessors })
    }

    /// What becomes of the window, then of all keys: a row's sums of the one go on to be those of the other.
    pub(super) fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        [window, (tensors, branch)]: [(&AttentionTensors<'_>, Branch); 2],
        softmax_scale: f32,
    ) -> Result<()> {
        if self.window.sizes.total_q == 0 {
            return Ok(());
        }
        let call = (&self.window, &self.tiles, self.specialisation.set);
        let boxes = (step_keys(&self.specialisation), 1);
        let attention = attention_params(call, (batch, tables), window, boxes, softmax_scale)?;
        // Keys that lie before the window, as a band: those of which a compression of as many tokens and two more is complete.
        let kernel_size = attention.band.window.saturating_add(2);
        let before = Band { kernel_size, window: i32::MAX, ..attention.band };
        let (out, lse) = (tensors.out.device(), branch.lse(tensors.lse.address()));
        let params = BandBothParams { attention, before, out, lse, branch };
        Ok(self.kernel.launch_both(stream, &self.tiles, self.multiprocessors, &params)?)
    }
}
