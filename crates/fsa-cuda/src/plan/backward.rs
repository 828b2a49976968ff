//! The plan of the backward: f32 sums per lane, one query head and chunk at a time.

use super::index::{IndexInput, max_tiles, slots, sub_tiles};
use super::{IndexPlan, PlanOptions, Problem, Slot, Workspace, choose, kv_heads_per_pass};
use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
use crate::params::TILE_ROWS;
use crate::source::Kernel;
use serde::Serialize;
use std::fmt;

/// kv heads under way: the tail of one runs beside the start of the next.
pub(crate) const MAX_LANES: usize = 2;
/// Rows of a full unit; its gradients of key and value are added to memory once.
const UNIT_ENTRIES: usize = 2048;
/// Gradients of queries that are under way in a lane, the largest that fit into the budget: long chunks fill tiles.
const QUERY_BYTES: [usize; 6] = [128 << 20, 64 << 20, 32 << 20, 16 << 20, 8 << 20, 4 << 20];
/// As f32 sums they are to stay in L2 (50 MB on Hopper).
const QUERY_SUM_BYTES: usize = 32 << 20;

/// Chunks and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackwardPlan {
    /// Sizes of the call.
    pub problem: Problem,
    /// kv heads that share one index; the others follow.
    pub kv_heads: usize,
    /// The index of one pass.
    pub index: IndexPlan,
    /// kv heads under way.
    pub lanes: usize,
    sums: [LaneSums; MAX_LANES],
    /// Scratch memory.
    pub workspace: Workspace,
}

/// What a lane sums into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct LaneSums {
    pub row_stats: Slot,
    /// f32 sums, or a partial per row and slot.
    pub grad_query: Slot,
    pub grad_key: Slot,
    pub grad_value: Slot,
}

impl BackwardPlan {
    /// Plans a checked problem.
    pub fn new(problem: &Problem, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let lanes = || (1..=MAX_LANES.min(problem.num_kv_heads)).rev();
        let candidates = kv_heads_per_pass(problem.num_kv_heads)
            .flat_map(|kv_heads| lanes().map(move |lanes| (kv_heads, lanes)))
            .flat_map(|(kv_heads, lanes)| QUERY_BYTES.map(|bytes| (kv_heads, lanes, bytes)))
            .map(|(kv_heads, lanes, bytes)| Self::with(problem, facts, kv_heads, lanes, bytes));
        let chosen = choose(problem, options, candidates, |plan| plan.workspace.size_bytes());
        chosen.unwrap_or_else(|| Self::with(problem, facts, 1, 1, QUERY_BYTES[QUERY_BYTES.len() - 1]))
    }

    fn with(problem: &Problem, facts: &DeviceFacts, kv_heads: usize, lanes: usize, query_bytes: usize) -> Self {
        let sum_bytes = problem.head_dim * size_of::<f32>();
        let (row_bytes, query_bytes) = if Self::has_partials(problem) {
            (slots(problem, false) * problem.head_dim * problem.dtype.size_bytes(), query_bytes)
        } else {
            (sum_bytes, query_bytes.min(QUERY_SUM_BYTES))
        };
        let chunk_tiles = (query_bytes / row_bytes / TILE_ROWS).max(1);
        let sub_tiles = sub_tiles(problem, kv_heads).min(1 << chunk_tiles.ilog2());
        let pieces = (chunk_tiles / sub_tiles).clamp(1, max_tiles(problem).div_ceil(sub_tiles));
        let mut workspace = Workspace::default();
        let input = IndexInput {
            has_dense: false,
            kv_heads,
            sub_tiles,
            chunk_tiles: pieces * sub_tiles,
            unit_entries: UNIT_ENTRIES,
        };
        let index = IndexPlan::new(problem, facts, &input, &mut workspace);
        let rows = index.chunk_rows(problem);
        let mut sums = [LaneSums::default(); MAX_LANES];
        for lane in &mut sums[..lanes] {
            lane.row_stats = workspace.add("row_stats", rows * 2 * size_of::<f32>());
            lane.grad_query = workspace.add("grad_query", rows * row_bytes);
            lane.grad_key = workspace.add("grad_key", problem.total_kv * sum_bytes);
            lane.grad_value = workspace.add("grad_value", problem.total_kv * sum_bytes);
        }
        Self { problem: *problem, kv_heads, index, lanes, sums, workspace }
    }

    /// Gradients of queries are merged from partials.
    pub(crate) fn has_partials(problem: &Problem) -> bool {
        problem.specialisation(Kernel::Backward, KernelSet::Sm90).query_partials()
    }

    /// What a lane sums into.
    pub(crate) fn sums(&self, lane: usize) -> &LaneSums {
        &self.sums[lane]
    }

    /// Kernels that a call launches.
    pub fn launches(&self) -> usize {
        let Problem { num_q_heads, num_kv_heads, .. } = self.problem;
        4 * num_kv_heads.div_ceil(self.kv_heads.max(1)) + 3 * num_q_heads * self.index.num_chunks + 2 * num_kv_heads
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "selected backward: {}; {} chunks of {} tiles, {} lanes, {} kv heads an index, {} launches; {}",
            self.problem,
            self.index.num_chunks,
            self.index.chunk_tiles,
            self.lanes,
            self.kv_heads,
            self.launches(),
            self.workspace,
        )
    }
}
