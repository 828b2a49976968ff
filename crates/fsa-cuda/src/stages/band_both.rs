//! Stage `window`, Stage `dense` and Stage `compressed` in one kernel, inside the whole operation, for rows that list all blocks that they see.

use super::AttentionTensors;
use super::band::attention_params;
use crate::band::{BandKernel, step_keys};
use crate::driver::{Address, DeviceBatch, Stream};
use crate::kernels::Kernels;
use crate::params::{BandBothParams, Branch};
use crate::plan::{BandProblem, EarlyRows, NsaForwardPlan, RowTiles, Tables};
use crate::source::Specialisation;
use fsa_core::Result;
use std::sync::Arc;

/// Attention to the window, to all keys and to compressed keys, tile by tile, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) struct BandBothStep {
    window: BandProblem,
    compressed: BandProblem,
    kernel: Arc<BandKernel>,
    specialisation: Specialisation,
    multiprocessors: usize,
    /// Tiles of rows; those before a position alone, if it is not 0.
    tiles: RowTiles,
    split: i32,
}

impl BandBothStep {
    pub(super) fn new(kernels: &Kernels, plan: &NsaForwardPlan) -> Result<Self> {
        let pass = plan.pass();
        let specialisation = pass.window_too_kernel(kernels.set());
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        let (window, compressed) = (pass.window(), pass.select().attention());
        let (tiles, split) = (plan.attention, 0);
        Ok(Self { window, compressed, kernel, specialisation, multiprocessors, tiles, split })
    }

    /// Of the first rows of a sequence alone.
    pub(super) fn of(self, early: &EarlyRows) -> Self {
        let multiprocessors = if early.beside { usize::MAX } else { self.multiprocessors };
        Self { split: early.end as i32, tiles: early.tiles, multiprocessors, ..self }
    }

    /// What becomes of compressed keys, of all keys and of the window, in the order of the branches. With `overlaps` the kernel that is right ahead on the
    /// stream makes compressed keys, and nothing else that is read.
    pub(super) fn launch(
        &self,
        (stream, overlaps): (&Stream, bool),
        batch: &DeviceBatch<'_>,
        tables: &Tables,
        [compressed, all, window]: [(AttentionTensors<'_>, Branch); 3],
        softmax_scale: f32,
    ) -> Result<()> {
        if self.window.sizes.total_q == 0 {
            return Ok(());
        }
        let boxes = (step_keys(&self.specialisation), 1);
        let attention = |problem, (tensors, branch): &(AttentionTensors<'_>, Branch)| {
            let call = (problem, &self.tiles, self.specialisation.set);
            attention_params(call, (batch, tables), (tensors, *branch), boxes, softmax_scale)
        };
        let (tensors, branch) = all;
        let mut compressed = attention(&self.compressed, &compressed)?;
        if branch.discards != 0 {
            // No lists are made by it.
            compressed.lse = Address::default();
        }
        let mut params = BandBothParams {
            attention: attention(&self.window, &window)?,
            compressed,
            out: tensors.out.device(),
            lse: branch.lse(tensors.lse.address()),
            branch,
        };
        params.attention.band.split = -self.split;
        Ok(self.kernel.launch_both(stream, &self.tiles, (self.multiprocessors, overlaps), &params)?)
    }
}
