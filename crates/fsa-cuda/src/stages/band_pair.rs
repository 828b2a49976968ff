//! Stage `selected` by the dense route and Stage `window` in one walk of the keys, inside the whole operation.

use super::AttentionTensors;
use super::band::attention_params;
use super::select::ChosenMask;
use crate::band::step_keys;
use crate::band_pair::BandPairKernel;
use crate::driver::{DeviceBatch, DeviceSpan};
use crate::kernels::Kernels;
use crate::launch::{LaunchContext, TensorSpan};
use crate::params::{BandPairParams, Branch};
use crate::plan::{DensePlan, EarlyRows, Tables};
use crate::selected::MaskStep;
use crate::source::Specialisation;
use fsa_core::Result;
use std::sync::Arc;

/// Attention to the blocks that rows list and to their window, for calls that fill the tables themselves.
#[derive(Debug)]
pub(super) struct BandPairStep {
    plan: DensePlan,
    window_size: i32,
    mask: MaskStep,
    kernel: Arc<BandPairKernel>,
    specialisation: Specialisation,
    multiprocessors: usize,
    /// Position from which on tiles of rows are attended to; 0: all are. Whether they go ahead of the others.
    split: i32,
    ahead: bool,
}

impl BandPairStep {
    /// `plan` has a mask.
    pub(super) fn new(
        kernels: &Kernels,
        plan: DensePlan,
        window_size: usize,
        specialisation: Specialisation,
        early: Option<&EarlyRows>,
    ) -> Result<Self> {
        let (kernel, multiprocessors) = (kernels.one(&specialisation)?, kernels.device().facts().multiprocessors);
        let window_size = i32::try_from(window_size).unwrap_or(i32::MAX);
        let mask = MaskStep::new(kernels, &plan.problem, plan.band(), plan.mask)?.with_window(window_size);
        let (split, ahead) = early.map_or((0, false), |early| (early.end as i32, early.beside));
        Ok(Self { plan, window_size, mask, kernel, specialisation, multiprocessors, split, ahead })
    }

    /// The mask in the workspace, for those who choose the blocks of rows that attend to `value`.
    pub(super) fn mask(&self, workspace: &DeviceSpan<'_>, value: &TensorSpan<'_>) -> ChosenMask {
        ChosenMask { mask: self.mask.mask(workspace), value: value.device(), window: self.window_size }
    }

    /// What becomes of the blocks, then of the window: one sum of both and of `compressed`, the rows of compressed attention without their gates, which may lie
    /// in its place. The workspace is what the plan's scratch lies in. Without `topk_indices` the mask is there.
    pub(super) fn launch(
        &self,
        context: &LaunchContext<'_>,
        batch: &DeviceBatch<'_>,
        (tables, topk_indices): (&Tables, Option<DeviceSpan<'_>>),
        ([selected, (tensors, branch)], compressed): ([(&AttentionTensors<'_>, Branch); 2], &TensorSpan<'_>),
        softmax_scale: f32,
    ) -> Result<()> {
        let DensePlan { problem, tiles, workspace, .. } = &self.plan;
        workspace.check(&context.workspace)?;
        if problem.total_q == 0 {
            return Ok(());
        }
        let mask = match topk_indices {
            // Behind what makes the lists, or attends to compressed keys where they are given.
            Some(lists) => self.mask.launch(context, batch, (tiles, tables, true), &selected.0.selected(lists))?,
            None => self.mask.mask(&context.workspace),
        };
        let band = self.plan.band();
        let call = (&band, tiles, self.specialisation.set);
        let boxes = (step_keys(&self.specialisation), 1);
        let mut attention = attention_params(call, (batch, tables), selected, boxes, softmax_scale)?;
        attention.band.mask = mask;
        attention.band.split = self.split;
        let (out, lse) = (tensors.out.device(), branch.lse(tensors.lse.address()));
        let params =
            BandPairParams { attention, out, lse, branch, compressed: compressed.device(), window: self.window_size };
        Ok(self.kernel.launch(context.stream, tiles, (self.multiprocessors, self.ahead), &params)?)
    }
}
