//! The plan of the forward: partials through a ring of buffers, chunk by chunk.

use super::index::{IndexInput, max_tiles, slots, sub_tiles};
use super::{IndexPlan, PlanOptions, Problem, Slot, Workspace, choose, kv_heads_per_pass, most_bytes};
use crate::arch::KernelSet;
use crate::attend::PartialBytes;
use crate::driver::DeviceFacts;
use crate::params::TILE_ROWS;
use serde::Serialize;
use std::fmt;

/// Chunks under way: one is attended while the one before is reduced.
pub(crate) const MAX_BUFFERS: usize = 2;
/// Rows of a full unit, at least: long enough to hide the load of its block, short enough to balance popular blocks.
const UNIT_ENTRIES: usize = 1024;

/// Chunks and workspace of a forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForwardPlan {
    /// Sizes of the call.
    pub problem: Problem,
    /// kv heads that share one index; the others follow.
    pub kv_heads: usize,
    /// The index of one pass.
    pub index: IndexPlan,
    /// Query heads of one launch.
    pub heads: usize,
    /// Buffers of partials.
    pub buffers: usize,
    partial: [Slot; MAX_BUFFERS],
    partial_lse: [Slot; MAX_BUFFERS],
    /// Scratch memory.
    pub workspace: Workspace,
}

impl ForwardPlan {
    /// Plans a checked problem.
    pub fn new(problem: &Problem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let most = most_bytes(problem, options);
        // Chunks that overlap first: one buffer is for what has no room for two.
        let mut plans = (1..=MAX_BUFFERS).rev().filter_map(|buffers| {
            let candidates = kv_heads_per_pass(problem.num_kv_heads)
                .map(|kv_heads| Self::with(problem, set, facts, options, (kv_heads, buffers)));
            choose(most, candidates, |plan| plan.workspace.size_bytes(), Self::launches)
        });
        let fits = |plan: &Self| plan.workspace.size_bytes() <= most;
        plans.find(fits).unwrap_or_else(|| Self::with(problem, set, facts, options, (1, 1)))
    }

    /// The plan for a number of kv heads per pass. How much memory the tables leave for partials depends on the
    /// number of chunks, and that on the memory: two rounds settle it.
    fn with(
        problem: &Problem,
        set: KernelSet,
        facts: &DeviceFacts,
        options: &PlanOptions,
        (kv_heads, buffers): (usize, usize),
    ) -> Self {
        let partial = PartialBytes::of(&problem.forward_kernels(set)[1]);
        let with = |bytes| Self::for_partials(problem, partial, facts, bytes, (kv_heads, buffers));
        let mut plan = with(options.budget_bytes);
        for _ in 0..2 {
            let left = options.budget_bytes.saturating_sub(plan.tables_bytes());
            plan = with(left);
        }
        plan
    }

    /// Scratch that is neither a partial nor of the size of `topk_indices`.
    fn tables_bytes(&self) -> usize {
        let counted = |name: &str| !matches!(name, "entries" | "row_info" | "partial" | "partial_lse");
        let regions = self.workspace.regions().iter().filter(|(name, _)| counted(name));
        // Every region may be rounded up.
        regions.map(|(_, slot)| slot.bytes).sum::<usize>() + 256 * self.workspace.regions().len()
    }

    fn for_partials(
        problem: &Problem,
        size: PartialBytes,
        facts: &DeviceFacts,
        bytes: usize,
        (kv_heads, buffers): (usize, usize),
    ) -> Self {
        let row_bytes = slots(problem, true) * (size.elements + size.numbers);
        let limit = (bytes / buffers / (TILE_ROWS * row_bytes)).max(1);
        let sub_tiles = sub_tiles(problem, kv_heads, false).min(1 << limit.ilog2());
        let (tiles, limit) = (max_tiles(problem), limit / sub_tiles * sub_tiles);
        let pass_heads = kv_heads * problem.gqa_group_size();
        let whole = tiles.next_multiple_of(sub_tiles);
        // Chunks of equal size, and launches of equal size: the last is not a small one.
        let (heads, chunk_tiles) = if whole > limit {
            (1, tiles.div_ceil(tiles.div_ceil(limit)).next_multiple_of(sub_tiles))
        } else {
            (pass_heads.div_ceil(pass_heads.div_ceil(limit / whole)), whole)
        };
        let mut workspace = Workspace::default();
        let input = IndexInput {
            has_dense: true,
            ordered: false,
            kv_heads,
            sub_tiles,
            chunk_tiles,
            unit_entries: UNIT_ENTRIES,
        };
        let mut index = IndexPlan::new(problem, facts, &input, &mut workspace);
        index.let_units_grow();
        let rows = heads * index.chunk_tiles * TILE_ROWS * index.slots;
        let (mut partial, mut partial_lse) = ([Slot::default(); MAX_BUFFERS], [Slot::default(); MAX_BUFFERS]);
        for buffer in 0..buffers {
            partial[buffer] = workspace.add("partial", rows * size.elements);
            partial_lse[buffer] = workspace.add("partial_lse", rows * size.numbers);
        }
        Self { problem: *problem, kv_heads, index, heads, buffers, partial, partial_lse, workspace }
    }

    /// Where the partials of a buffer lie, and the numbers beside them.
    pub(crate) fn buffer(&self, buffer: usize) -> (Slot, Slot) {
        (self.partial[buffer], self.partial_lse[buffer])
    }

    /// Query heads of the pass that starts at a kv head.
    pub(crate) fn pass(&self, first_kv_head: usize) -> (usize, std::ops::Range<usize>) {
        let kv_heads = self.kv_heads.min(self.problem.num_kv_heads - first_kv_head);
        let group = self.problem.gqa_group_size();
        (kv_heads, first_kv_head * group..(first_kv_head + kv_heads) * group)
    }

    /// Pairs of an attending and a reducing launch in one pass of `heads` query heads.
    pub(crate) fn steps(&self, heads: usize) -> usize {
        heads.div_ceil(self.heads) * self.index.num_chunks
    }

    /// Kernels that a call launches.
    pub fn launches(&self) -> usize {
        let passes = (0..self.problem.num_kv_heads).step_by(self.kv_heads.max(1));
        let of_index = self.index.launches(passes.len());
        of_index + passes.map(|first| 2 * self.steps(self.pass(first).1.len())).sum::<usize>()
    }
}

impl fmt::Display for ForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "selected forward: {}; {} chunks of {} tiles, {} query heads a launch, {} kv heads an index, {} launches; {}",
            self.problem,
            self.index.num_chunks,
            self.index.chunk_tiles,
            self.heads,
            self.kv_heads,
            self.launches(),
            self.workspace,
        )
    }
}
