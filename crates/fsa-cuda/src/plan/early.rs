//! Rows of one sequence that list all blocks that they see, apart from the others.

use super::{RowTiles, SelectProblem, Sizes};
use serde::Serialize;

/// Tokens up to which something is gained by it on the H200.
const MOST_TOKENS: usize = 2048;

/// The first rows of a sequence, for which nothing has to be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EarlyRows {
    /// Position of the first row that lists fewer blocks than it sees.
    pub end: usize,
    /// Tiles before it.
    pub tiles: RowTiles,
    /// Whether the others leave half of the multiprocessors to these, and go ahead of them: a CTA for each tile then, for whichever has a place.
    pub(crate) beside: bool,
}

impl EarlyRows {
    /// Of one sequence without rows before the call, if they are work for every multiprocessor.
    pub(crate) fn new(problem: &SelectProblem, tiles: &RowTiles, multiprocessors: usize) -> Option<Self> {
        let Sizes { total_q, total_kv, num_kv_heads, .. } = problem.sizes;
        let end = problem.topk * problem.block_size;
        let early = RowTiles { num_tiles: (end / tiles.tile_tokens).min(tiles.num_tiles), ..*tiles };
        let late = (tiles.ctas() - early.ctas()) * num_kv_heads;
        let pays = problem.has_few_keys()
            && total_kv <= MOST_TOKENS
            && total_q == total_kv
            && early.ctas() * num_kv_heads >= multiprocessors;
        pays.then_some(Self { end, tiles: early, beside: 2 * late <= multiprocessors })
    }
}
