//! The plan of stage `selected` by the kernels of the stages with an interval of keys: all earlier keys, with a mask of the blocks
//! that a row lists, or without one where it lists them all.

use super::tables::{TablePlan, TableSpec};
use super::{
    BandBackwardPlan, BandProblem, Keys, PlanOptions, Problem, QuerySums, RowTiles, Slot, Workspace, most_bytes,
};
use crate::arch::KernelSet;
use crate::block_mask::VALUE_ROWS;
use crate::driver::{DeviceFacts, DeviceSpan};
use crate::params::BlockMask;
use crate::source::{Kernel, Specialisation};
use crate::{band, band_backward};
use serde::Serialize;
use std::fmt;

/// Blocks of a word of a row's mask.
const WORD_BLOCKS: usize = u32::BITS as usize;

/// Where the lists of a call come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Lists {
    /// From anywhere: any i32 may stand in them.
    Given,
    /// From stage `select`: a row lists every block that it sees, if they are not more than `topk`.
    Selected,
}

impl Lists {
    /// Whether every row lists all blocks that it sees.
    pub(super) fn are_complete(self, problem: &Problem) -> bool {
        self == Self::Selected && problem.has_few_blocks()
    }
}

/// Tiles and workspace of a forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DensePlan {
    /// The call.
    pub problem: Problem,
    /// Tiles of rows.
    pub tiles: RowTiles,
    /// What the mask takes; none where every row lists all its blocks.
    pub(crate) mask: Option<MaskPlan>,
    pub(crate) tables: TablePlan,
    /// Scratch memory.
    pub workspace: Workspace,
}

/// Sizes and places of a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct MaskPlan {
    /// Words of a row.
    words: usize,
    /// Bound on the steps of a tile, and keys of a step.
    max_steps: usize,
    pub step_keys: usize,
    num_tiles: usize,
    value_groups: usize,
    rows: Slot,
    steps: Slot,
    step_counts: Slot,
    nonfinite: Slot,
}

impl DensePlan {
    /// Plans a checked problem; `None` where the mask would take more than a copy of the lists, or than there is.
    pub(crate) fn new(problem: &Problem, set: KernelSet, options: &PlanOptions, lists: Lists) -> Option<Self> {
        let kernel = problem.sizes().specialisation(Kernel::Band, set, problem.block_size);
        let sizes = problem.sizes();
        let tiles = RowTiles::new(&sizes, band::tile_rows(&kernel));
        let mut workspace = Workspace::default();
        let spec = TableSpec { windows: None, tile_tokens: Some(tiles.tile_tokens), tile_keys: None };
        let tables = TablePlan::new(spec, problem.sequences, &mut workspace);
        let masked = !lists.are_complete(problem);
        let mask = masked.then(|| MaskPlan::new(problem, &tiles, band::step_keys(&kernel), &mut workspace));
        let fits = mask.is_none_or(|mask| mask.words <= problem.topk);
        let plan = Self { problem: *problem, tiles, mask, tables, workspace };
        (fits && plan.workspace.size_bytes() <= most_bytes(problem, options)).then_some(plan)
    }

    /// All kernels of the plan.
    pub(crate) fn kernels(&self, set: KernelSet) -> Vec<Specialisation> {
        kernels(&self.problem, set, Kernel::Band, self.mask.is_some())
    }

    /// Attention to all earlier keys.
    pub(crate) fn band(&self) -> BandProblem {
        dense(&self.problem)
    }

    /// Kernels that a call launches.
    pub fn launches(&self) -> usize {
        if self.mask.is_some() { 3 } else { 2 }
    }
}

/// Attention to all earlier keys.
fn dense(problem: &Problem) -> BandProblem {
    BandProblem { sizes: problem.sizes(), keys: Keys::Dense }
}

/// The kernels of a pass, `main` being that of the attention.
fn kernels(problem: &Problem, set: KernelSet, main: Kernel, masked: bool) -> Vec<Specialisation> {
    let of = |kernel| problem.sizes().specialisation(kernel, set, problem.block_size);
    if masked {
        vec![of(Kernel::Prepare), of(Kernel::BlockMask), of(main).with_block_mask(problem.block_size)]
    } else {
        vec![of(Kernel::Prepare), of(main)]
    }
}

/// Tiles, splits and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DenseBackwardPlan {
    /// The call.
    pub problem: Problem,
    /// The gradients of dense attention.
    pub attention: BandBackwardPlan,
    /// Earlier keys of the sliding window, if its gradients are added in the same pass.
    pub window_size: Option<usize>,
    /// Where its scratch lies.
    pub(crate) scratch: Slot,
    /// What the mask takes; none where every row lists all its blocks.
    pub(crate) mask: Option<MaskPlan>,
    /// Scratch memory.
    pub workspace: Workspace,
}

impl DenseBackwardPlan {
    /// Plans a checked problem; `None` where the mask would take more than a copy of the lists, or than there is. `window_size` is
    /// that of the whole, if the stage is a branch of it: one pass for both attentions, where that is possible.
    pub(crate) fn new(
        problem: &Problem,
        (set, facts): (KernelSet, &DeviceFacts),
        options: &PlanOptions,
        window_size: Option<usize>,
    ) -> Option<Self> {
        let kernel = problem.sizes().specialisation(Kernel::BandBackward, set, problem.block_size);
        let band = dense(problem);
        let of_both = |options: &PlanOptions| {
            let query_sums = options.query_sums.or(Some(QuerySums::Scaled));
            let options = PlanOptions { query_sums, ..*options };
            let masked = !Lists::Selected.are_complete(problem);
            let kernel = if masked { kernel.with_block_mask(problem.block_size) } else { kernel };
            let plan = BandBackwardPlan::with_row_stats(&band, &kernel.with_window_too(), facts, &options);
            (plan.query_sums == QuerySums::Scaled).then_some(plan)
        };
        // By itself in two passes without atomics.
        let repeatable = PlanOptions { deterministic: true, ..*options };
        let (attention, window_size, lists) = match window_size {
            None => (BandBackwardPlan::new(&band, &kernel, facts, &repeatable), None, Lists::Given),
            Some(_) => match of_both(options) {
                Some(plan) => (plan, window_size, Lists::Selected),
                None => {
                    let plan = BandBackwardPlan::with_row_stats(&band, &kernel, facts, &repeatable);
                    (plan, None, Lists::Selected)
                }
            },
        };
        let mut workspace = Workspace::default();
        let scratch = workspace.add("attention", attention.workspace.size_bytes());
        let masked = !lists.are_complete(problem);
        let step_keys = band_backward::step_keys(&kernel);
        let mask = masked.then(|| MaskPlan::new(problem, &attention.tiles, step_keys, &mut workspace));
        let fits = mask.is_none_or(|mask| mask.words <= problem.topk);
        let plan = Self { problem: *problem, attention, window_size, scratch, mask, workspace };
        (fits && plan.workspace.size_bytes() <= most_bytes(problem, options)).then_some(plan)
    }

    /// Whether gradients of selected blocks and window can be those of one pass.
    pub(crate) fn takes_window(problem: &Problem, set: KernelSet, options: &PlanOptions) -> bool {
        let kernel = problem.sizes().specialisation(Kernel::BandBackward, set, problem.block_size);
        let f32_sums = options.deterministic || options.query_sums == Some(QuerySums::F32);
        !f32_sums && kernel.with_window_too().exists(problem.topk)
    }

    /// All kernels of the plan.
    pub(crate) fn kernels(&self, set: KernelSet) -> Vec<Specialisation> {
        let mut kernels = kernels(&self.problem, set, Kernel::BandBackward, self.mask.is_some());
        kernels.pop();
        kernels.push(self.specialisation(set));
        kernels
    }

    /// The kernels of the gradients.
    pub(crate) fn specialisation(&self, set: KernelSet) -> Specialisation {
        let kernel = self.attention.specialisation(set);
        let kernel = if self.mask.is_some() { kernel.with_block_mask(self.problem.block_size) } else { kernel };
        match self.window_size {
            None => kernel,
            Some(_) => band_backward::one_pass(&kernel.with_window_too(), self.problem.gqa_group_size()),
        }
    }

    /// Kernels that a call launches.
    pub fn launches(&self) -> usize {
        let passes = self.problem.num_kv_heads.div_ceil(self.attention.kv_heads);
        1 + usize::from(self.mask.is_some()) + passes * (3 + usize::from(self.attention.splits > 1))
    }
}

impl fmt::Display for DenseBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mask = if self.mask.is_some() { " with a mask of blocks" } else { "" };
        let window = if self.window_size.is_some() { " and window" } else { "" };
        write!(f, "selected backward, dense{mask}{window}: {}; {}", self.problem, self.attention)
    }
}

impl MaskPlan {
    fn new(problem: &Problem, tiles: &RowTiles, step_keys: usize, workspace: &mut Workspace) -> Self {
        let (heads, num_tiles, word) = (problem.num_kv_heads, tiles.num_tiles, size_of::<u32>());
        // One of the sequences may have all keys.
        let words = problem.total_kv.div_ceil(WORD_BLOCKS * problem.block_size);
        let max_steps = problem.total_kv.div_ceil(step_keys);
        let value_groups = problem.total_kv.div_ceil(VALUE_ROWS);
        Self {
            words,
            max_steps,
            step_keys,
            num_tiles,
            value_groups,
            rows: workspace.add("block_mask", heads * problem.total_q * words * word),
            steps: workspace.add("steps", heads * num_tiles * max_steps * word),
            step_counts: workspace.add("step_counts", heads * num_tiles * word),
            nonfinite: workspace.add("nonfinite", heads * value_groups * word),
        }
    }

    /// The kernels' view.
    pub(crate) fn device(&self, workspace: &DeviceSpan<'_>) -> BlockMask {
        BlockMask {
            rows: self.rows.address(workspace),
            steps: self.steps.address(workspace),
            step_counts: self.step_counts.address(workspace),
            nonfinite: self.nonfinite.address(workspace),
            words: self.words as i32,
            max_steps: self.max_steps as i32,
            num_tiles: self.num_tiles as i32,
            value_groups: self.value_groups as i32,
        }
    }
}

impl fmt::Display for DensePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mask = if self.mask.is_some() { " with a mask of blocks" } else { "" };
        write!(f, "selected forward, dense{mask}: {}; {}; {}", self.problem, self.tiles, self.workspace)
    }
}
