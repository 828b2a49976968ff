//! Plans: tiles, chunks, grids and workspace, from shapes and facts about the device alone.
//!
//! Of stage `selected` the number of (row, block) pairs is known from shapes; which blocks are popular is not, and changes no size: long
//! lists are cut into units on the device, and the tables hold as many units as there could be.

mod backward;
mod band;
mod compress;
mod dense;
mod early;
mod explain;
mod forward;
mod index;
mod nsa;
mod route;
mod select;
mod selected;
mod sizes;
mod tables;
mod temporaries;
mod workspace;

#[cfg(test)]
mod route_tests;
#[cfg(test)]
mod stage_tests;
#[cfg(test)]
mod tests;

pub use backward::BackwardPlan;
pub(crate) use backward::LaneSums;
pub(crate) use band::BandScratch;
pub use band::{BandBackwardPlan, BandPlan, BandProblem, RowTiles};
pub(crate) use compress::CompressScratch;
pub use compress::{CompressPlan, CompressProblem, CompressionKind};
pub use dense::{DenseBackwardPlan, DensePlan};
pub(crate) use dense::{Lists, MaskPlan};
pub use early::EarlyRows;
pub use explain::{Explained, RouteReason};
pub use forward::ForwardPlan;
pub use index::IndexPlan;
pub(crate) use index::MOST_UNIT_GROWTH;
pub use nsa::{NsaBackwardPlan, NsaForwardPlan, NsaProblem};
pub use route::{Pass, Prediction, Route, Routing};
pub use select::{ChoicePlan, ListPlan, ScorePlan, SelectPlan, SelectProblem};
pub use selected::{SelectedBackwardPlan, SelectedPlan};
pub(crate) use sizes::BOUNDS_BYTES;
pub use sizes::{Keys, Sizes, Windows};
pub(crate) use tables::Tables;
pub(crate) use temporaries::ForwardTemporaries;
pub use workspace::{Slot, Workspace};

use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
pub use crate::source::QuerySums;
use crate::source::{Kernel, Specialisation};
use fsa_core::config::BLOCK_SIZES;
use fsa_core::{AttentionShape, DType, Error, Result};
use serde::Serialize;
use std::fmt;

/// Scratch memory besides one copy of `topk_indices`, if the caller does not say.
pub const DEFAULT_BUDGET_BYTES: usize = 256 << 20;

/// Most blocks that a row may list: an entry names a slot of the row in 6 bits.
pub const MAX_TOPK: usize = 64;

/// Most blocks of all sequences: an id has 18 bits in a row's word, two values are taken.
const MAX_BLOCKS: usize = (1 << 18) - 2;

/// Rows of a chunk that an entry can name: 24 bits.
const MAX_CHUNK_TILES: usize = (1 << 24) / crate::params::TILE_ROWS;

/// Shared memory of a CTA that is left alone: what kernels declare in their code, and the system's kilobyte.
const STATIC_SMEM_BYTES: usize = 3 << 10;

/// Dynamic shared memory that a CTA can have on Hopper.
pub(crate) const MAX_CTA_SMEM_BYTES: usize = (227 << 10) - STATIC_SMEM_BYTES;

/// Shared memory of a tile of `rows`: halves of 64 columns, 128 bytes a row.
pub(crate) fn tile_bytes(rows: usize, head_dim: usize) -> usize {
    rows * 128 * head_dim.div_ceil(64)
}

/// Sizes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Problem {
    /// Rows of `query`.
    pub total_q: usize,
    /// Rows of `key` and `value`.
    pub total_kv: usize,
    /// Sequences, empty ones included.
    pub sequences: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a query, key or value vector.
    pub head_dim: usize,
    /// Keys of a block.
    pub block_size: usize,
    /// Blocks that a row may list.
    pub topk: usize,
    /// Type of the tensors.
    pub dtype: DType,
}

impl Problem {
    /// The sizes of a checked call; `head_dim` is the kernels', which may be larger than the call's.
    pub fn new(shape: &AttentionShape, sequences: usize, head_dim: usize, block_size: usize, topk: usize) -> Self {
        Self {
            total_q: shape.total_q,
            total_kv: shape.total_keys,
            sequences,
            num_q_heads: shape.num_q_heads,
            num_kv_heads: shape.num_kv_heads,
            head_dim,
            block_size,
            topk,
            dtype: shape.dtype,
        }
    }

    /// What it shares with the other stages.
    pub fn sizes(&self) -> Sizes {
        let Self { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *self;
        Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype }
    }

    /// Query heads that share one kv head.
    pub fn gqa_group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    /// Whether no sequence can have more blocks than a row lists.
    pub(crate) fn has_few_blocks(&self) -> bool {
        self.total_kv <= self.topk * self.block_size
    }

    /// Size of `topk_indices`.
    pub fn topk_indices_bytes(&self) -> usize {
        self.num_kv_heads * self.total_q * self.topk * size_of::<i32>()
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts, kernels: &[Specialisation]) -> Result<()> {
        self.sizes().check(facts, &[])?;
        require(BLOCK_SIZES.contains(&self.block_size), "block_size", &self.block_size, "16, 32, 64, 128, 256")?;
        require((1..=MAX_TOPK).contains(&self.topk), "topk on CUDA", &self.topk, "1 to 64")?;
        let blocks = bound(self.total_kv, self.sequences, self.block_size);
        require(blocks <= MAX_BLOCKS, "blocks of all sequences", &blocks, &format!("at most {MAX_BLOCKS}"))?;
        kernels.iter().try_for_each(|kernel| sizes::check_smem(kernel, self.topk, facts))
    }

    /// The kernels of `set`, or the portable ones where those have none for this call: Hopper's hold a whole block of keys.
    pub(crate) fn first_that_exists<const N: usize>(
        &self,
        set: KernelSet,
        of: impl Fn(KernelSet) -> [Specialisation; N],
    ) -> [Specialisation; N] {
        let own = of(set);
        if own.iter().all(|specialisation| specialisation.exists(self.topk)) { own } else { of(KernelSet::Sm80) }
    }

    /// The kernels of the KV-outer forward: index, attend, reduce.
    pub(crate) fn forward_kernels(&self, set: KernelSet) -> [Specialisation; 3] {
        let names = [Kernel::Index, Kernel::Attend, Kernel::Reduce];
        self.first_that_exists(set, |set| names.map(|kernel| self.specialisation(kernel, set)))
    }

    /// The kernels of the KV-outer backward: index, backward.
    pub(crate) fn backward_kernels(
        &self,
        set: KernelSet,
        (query_sums, unit_heads): (QuerySums, usize),
    ) -> [Specialisation; 2] {
        self.first_that_exists(set, |set| {
            let backward = self.specialisation(Kernel::Backward, set).with_query_sums(query_sums);
            [self.specialisation(Kernel::Index, set), backward.with_unit_heads(unit_heads)]
        })
    }

    /// How the backward adds up gradients of queries: partials are merged in order, and not all kernels can scale.
    fn query_sums(&self, set: KernelSet, options: &PlanOptions) -> QuerySums {
        let asked = options.query_sums.unwrap_or(QuerySums::Scaled);
        match asked {
            _ if options.deterministic => QuerySums::Partials,
            QuerySums::Scaled
                if !self.specialisation(Kernel::Backward, set).with_query_sums(asked).exists(self.topk) =>
            {
                QuerySums::F32
            }
            _ => asked,
        }
    }

    /// The specialisation of a kernel for this call.
    pub fn specialisation(&self, kernel: Kernel, set: KernelSet) -> Specialisation {
        Specialisation::new(kernel, set, self.dtype, self.head_dim, self.block_size)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, block_size, topk, dtype } = self;
        write!(
            f,
            "{total_q} rows, {total_kv} keys in {sequences} sequences, {num_q_heads}/{num_kv_heads} heads, \
             head_dim {head_dim}, {dtype}; blocks of {block_size}, top {topk}"
        )
    }
}

fn require(holds: bool, constraint: &str, got: &dyn fmt::Display, supported: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Unsupported { constraint: constraint.into(), got: got.to_string(), supported: supported.into() })
}

/// Default of [`PlanOptions::beside_rows`]: below, launches are too short to share a device.
const DEFAULT_BESIDE_ROWS: usize = 1 << 20;

/// What a caller may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Scratch memory besides one copy of `topk_indices`.
    pub budget_bytes: usize,
    /// Backward: equal bits for equal input. Costs time: sums that could be taken in any order are taken in one.
    pub deterministic: bool,
    /// How a backward on Hopper that is not deterministic adds up gradients of queries; none leaves it to the plan: scaled
    /// where there are such kernels.
    pub query_sums: Option<QuerySums>,
    /// How stage `selected` goes; none leaves it to the plan. A route that has no room is not taken.
    pub route: Option<Route>,
    /// Whether one kernel attends to the compressed keys and makes the lists, where there is such a kernel; none leaves it to the plan,
    /// which takes it where there is something to choose and its scores of blocks fit the budget. `Some(true)` takes it even where they
    /// do not. With either answer blocks are chosen by scores even where rows list all of them.
    pub one_pass: Option<bool>,
    /// Backward: gradients may be added to what their targets hold, so that nothing else is kept there until then.
    pub adds_to_grads: bool,
    /// Whole operation: rows of all query heads from which on branches share the device instead of following one another.
    pub beside_rows: usize,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            budget_bytes: DEFAULT_BUDGET_BYTES,
            deterministic: false,
            query_sums: None,
            route: None,
            one_pass: None,
            adds_to_grads: false,
            beside_rows: DEFAULT_BESIDE_ROWS,
        }
    }
}

/// Most pieces of `size` that sequences of together `total` rows can have.
fn bound(total: usize, sequences: usize, size: usize) -> usize {
    if sequences <= 1 { total.div_ceil(size) } else { total / size + sequences }
}

/// Numbers of kv heads that share one index, most first: the fewer, the smaller its tables.
fn kv_heads_per_pass(num_kv_heads: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(num_kv_heads), |heads| (*heads > 1).then(|| heads.div_ceil(2)))
}

/// What a call may take at most: the budget and one copy of `topk_indices`.
fn most_bytes(problem: &Problem, options: &PlanOptions) -> usize {
    options.budget_bytes + problem.topk_indices_bytes()
}

/// Of the candidates with at most `most` bytes the one with the fewest launches, the first of equals. If none is as
/// small: of those that are at most a tenth larger than the smallest.
fn choose<P>(
    most: usize,
    candidates: impl Iterator<Item = P>,
    bytes: impl Fn(&P) -> usize,
    launches: impl Fn(&P) -> usize,
) -> Option<P> {
    let all: Vec<P> = candidates.collect();
    let smallest = all.iter().map(&bytes).min()?;
    let most = if smallest <= most { most } else { smallest + smallest / 10 };
    all.into_iter().filter(|plan| bytes(plan) <= most).min_by_key(launches)
}
