//! Plans of the stages whose rows see an interval of keys, `dense`, `window` and `compressed`: tiles, splits and workspace.

use super::tables::{TablePlan, TableSpec};
use super::{BOUNDS_BYTES, Keys, PlanOptions, QuerySums, Sizes, Slot, Workspace, bound};
use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
use crate::source::{Kernel, Specialisation};
use crate::{band, band_backward};
use fsa_core::Result;
use serde::Serialize;
use std::fmt;

/// What a step of a window costs besides its keys, in keys: between sizes that leave equally much over, fewer steps.
const STEP_COST: usize = 4;
/// Parts into which the rows of a tile of keys are cut, at most.
const MAX_SPLITS: usize = 32;
/// Up to so many splits selected blocks and window in one pass have as many as are nearest to what is wanted: more CTAs, which are shorter,
/// cost more than they even out. Beyond, as all others, powers of two, of which one too many does less harm.
const MAX_EXACT_SPLITS: usize = 3;
/// Splits of compressed attention beside another attention for one of that: so a walk is over long before the longest of the other.
const BESIDE_SPLITS: usize = 2;
/// Rows that a split should walk of those that meet a tile of keys, on average.
const MIN_SPLIT_ROWS: usize = 256;
/// Most splits with which gradients of queries are added up in memory unless the caller asks for it: where more would be wanted the
/// call is too short to gain what clearing and converting them costs.
const MAX_SUMS_SPLITS: usize = 8;
/// Most tiles of keys whose parts of a gradient are added up in f16: the error grows with the root of their number, and would
/// exceed that of bf16.
const MAX_SUMMED_TILES: usize = 512;

/// A call of one of the stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BandProblem {
    /// Sizes of the tensors.
    pub sizes: Sizes,
    /// Which keys rows see.
    pub keys: Keys,
}

impl BandProblem {
    /// Rows that key and value have room for: for compressed keys the bound from shapes.
    pub fn total_keys(&self) -> usize {
        self.keys.bound(self.sizes.total_kv)
    }

    /// The kernel of the forward for tiles of rows. The steps of a window follow the first key that a tile sees, so their size is the
    /// one that leaves least of the last step over: 512 earlier keys and 32 tokens are five steps of 112 and not quite of 128.
    pub(crate) fn kernel(&self, set: KernelSet, tiles: &RowTiles) -> Specialisation {
        let kernel = self.sizes.specialisation(Kernel::Band, set, 64);
        let seen = self.keys.window_size().map(|window| window.saturating_add(tiles.tile_tokens));
        let Some(seen) = seen.filter(|seen| *seen < self.sizes.total_kv) else { return kernel };
        let steps =
            band::WINDOW_STEPS.map(|keys| kernel.with_step_keys(keys)).into_iter().filter(|kernel| kernel.exists(1));
        let cost = |kernel: &Specialisation| {
            let keys = band::step_keys(kernel);
            seen.div_ceil(keys) * (keys + STEP_COST)
        };
        std::iter::once(kernel).chain(steps).min_by_key(cost).unwrap_or(kernel)
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`fsa_core::Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts, kernels: &[Specialisation]) -> Result<()> {
        self.keys.windows().map_or(Ok(()), |windows| windows.check())?;
        self.sizes.check(facts, kernels)
    }
}

impl fmt::Display for BandProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.keys, self.sizes)
    }
}

/// How rows become tiles: some tokens of a sequence times some query heads of a kv head, so that rows that share keys share a
/// tile at any group size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RowTiles {
    /// Query heads of a tile.
    pub tile_heads: usize,
    /// Tokens of a tile.
    pub tile_tokens: usize,
    /// Tiles that share their tokens.
    pub head_tiles: usize,
    /// Bound on the tiles of tokens.
    pub num_tiles: usize,
}

impl RowTiles {
    /// Tiles of at most `rows` rows.
    pub(crate) fn new(sizes: &Sizes, rows: usize) -> Self {
        Self::of_heads(sizes, sizes.gqa_group_size(), rows)
    }

    /// The same for the first `heads` heads of every group.
    pub(crate) fn of_heads(sizes: &Sizes, heads: usize, rows: usize) -> Self {
        let heads = heads.max(1);
        let [tile_heads, tile_tokens] = Self::shape(heads, rows);
        let num_tiles = bound(sizes.total_q, sizes.sequences, tile_tokens);
        Self { tile_heads, tile_tokens, head_tiles: heads.div_ceil(tile_heads), num_tiles }
    }

    /// Rows of a tile of at most `rows` for groups of so many heads.
    pub(crate) fn filled_rows(heads: usize, rows: usize) -> usize {
        Self::shape(heads.max(1), rows).into_iter().product()
    }

    /// Heads and tokens of a tile.
    fn shape(heads: usize, rows: usize) -> [usize; 2] {
        let tile_heads = heads.div_ceil(heads.div_ceil(rows));
        [tile_heads, rows / tile_heads]
    }

    /// The same with fewer tokens in a tile.
    pub(crate) fn with_tokens(self, sizes: &Sizes, tile_tokens: usize) -> Self {
        Self { tile_tokens, num_tiles: bound(sizes.total_q, sizes.sequences, tile_tokens), ..self }
    }

    /// Tiles of one kv head.
    pub(crate) fn ctas(&self) -> usize {
        self.num_tiles * self.head_tiles
    }
}

/// Tiles and workspace of a forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BandPlan {
    /// The call.
    pub problem: BandProblem,
    /// Tiles of rows.
    pub tiles: RowTiles,
    pub(crate) tables: TablePlan,
    /// Scratch memory.
    pub workspace: Workspace,
}

impl BandPlan {
    /// Plans a checked problem for the kernel of a specialisation.
    pub fn new(problem: &BandProblem, kernel: &Specialisation) -> Self {
        let tiles = RowTiles::new(&problem.sizes, band::tile_rows(kernel));
        let mut workspace = Workspace::default();
        let spec = TableSpec { windows: problem.keys.windows(), tile_tokens: Some(tiles.tile_tokens), tile_keys: None };
        let tables = TablePlan::new(spec, problem.sizes.sequences, &mut workspace);
        Self { problem: *problem, tiles, tables, workspace }
    }
}

impl fmt::Display for BandPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "band forward: {}; {}; {}", self.problem, self.tiles, self.workspace)
    }
}

impl fmt::Display for RowTiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tile_heads, tile_tokens, head_tiles, num_tiles } = self;
        write!(f, "{num_tiles} tiles of {tile_tokens} tokens times {tile_heads} heads, {head_tiles} of a group")
    }
}

/// Tiles, splits and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BandBackwardPlan {
    /// The call.
    pub problem: BandProblem,
    /// Tiles of rows.
    pub tiles: RowTiles,
    /// Bound on the tiles of keys.
    pub num_key_tiles: usize,
    /// Bound on those that a row meets.
    pub row_key_tiles: usize,
    /// kv heads whose statistics and partial sums are under way; the others follow.
    pub kv_heads: usize,
    /// CTAs that share the rows of a tile of keys.
    pub splits: usize,
    /// How gradients of queries are added up: scaled in memory, in one pass, or in registers, in a pass of their own.
    pub query_sums: QuerySums,
    pub(crate) tables: TablePlan,
    pub(crate) scratch: BandScratch,
    /// Scratch memory.
    pub workspace: Workspace,
}

/// Where the scratch lies that is not a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct BandScratch {
    /// None where the caller has them.
    pub row_stats: Option<Slot>,
    /// Bounds of keys, then of rows where the caller has no statistics; none where gradients of queries are not scaled.
    pub bounds: Option<Slot>,
    pub partial_keys: Option<Slot>,
}

impl BandBackwardPlan {
    /// Plans a checked problem for the kernel of a specialisation.
    pub fn new(problem: &BandProblem, kernel: &Specialisation, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let head_bytes = problem.sizes.row_stats_bytes() / problem.sizes.num_kv_heads.max(1);
        Self::with(problem, kernel, facts, options, (head_bytes, MAX_SPLITS))
    }

    /// The same where the caller has the statistics of all rows.
    pub(crate) fn with_row_stats(
        problem: &BandProblem,
        kernel: &Specialisation,
        facts: &DeviceFacts,
        options: &PlanOptions,
    ) -> Self {
        Self::with(problem, kernel, facts, options, (0, MAX_SPLITS))
    }

    /// The same attention where it runs beside another one, whose CTAs fill the device: splits cost what starts and ends a CTA, and only
    /// have to end before those of the other.
    pub(crate) fn beside(
        &self,
        other: &Self,
        kernel: &Specialisation,
        facts: &DeviceFacts,
        options: &PlanOptions,
    ) -> Self {
        let options = PlanOptions { query_sums: Some(self.query_sums), ..*options };
        Self::with(&self.problem, kernel, facts, &options, (0, BESIDE_SPLITS * other.splits))
    }

    /// The kernels of the plan, without a mask.
    pub(crate) fn specialisation(&self, set: KernelSet) -> Specialisation {
        let sizes = &self.problem.sizes;
        kernel_of(&sizes.specialisation(Kernel::BandBackward, set, 64), sizes, self.query_sums)
    }

    /// `head_bytes` are the statistics of the rows of a kv head, where the plan has to make them.
    fn with(
        problem: &BandProblem,
        kernel: &Specialisation,
        facts: &DeviceFacts,
        options: &PlanOptions,
        (head_bytes, most_splits): (usize, usize),
    ) -> Self {
        let (sizes, tile_keys) = (&problem.sizes, band_backward::tile_keys(kernel));
        let num_key_tiles = bound(problem.total_keys(), sizes.sequences, tile_keys);
        let all = sizes.num_kv_heads.max(1);
        let kv_heads = options.budget_bytes.checked_div(head_bytes).map_or(all, |heads| heads.clamp(1, all));
        let split_rows = 2 * problem.total_keys() * kv_heads;
        // By f32, which may be twice of what they leave: how many fit is asked before the format is known.
        let split_bytes = split_rows * band_backward::split_row_bytes(sizes.head_dim, QuerySums::F32);
        let left = options.budget_bytes.saturating_sub(kv_heads * head_bytes);
        let (ctas, tiles) = (3 * facts.multiprocessors / 2, (num_key_tiles * kv_heads).max(1));
        let (wanted, nearest) = (ctas.div_ceil(tiles), (2 * ctas + tiles) / (2 * tiles));
        let fits = |splits: &usize| *splits == 1 || splits * split_bytes <= left;
        let is_exact = kernel.window_too && nearest <= MAX_EXACT_SPLITS;
        let exists = |splits: &usize| splits.is_power_of_two() || is_exact;
        // The largest that fits of those before enough, and before walks are too short: half of the rows meet a tile of keys, all the only one.
        let seen = problem.keys.window_size().map_or(usize::MAX, |window| window.saturating_add(tile_keys));
        let tokens = seen.min(sizes.total_q * (num_key_tiles + 1) / (2 * num_key_tiles).max(1));
        let walks = (tokens * sizes.gqa_group_size() / MIN_SPLIT_ROWS).max(1);
        let wanted = if is_exact { nearest.max(wanted.min(2)) } else { wanted.next_power_of_two() };
        let enough = wanted.min(1 << walks.ilog2()).min(most_splits);
        let splits = (1..=enough.min(MAX_SPLITS)).rfind(|splits| exists(splits) && fits(splits)).unwrap_or(1);
        let scaled = kernel_of(kernel, sizes, QuerySums::Scaled);
        let adds_up = options.query_sums.map_or(wanted <= MAX_SUMS_SPLITS, |sums| sums == QuerySums::Scaled);
        let row_key_tiles =
            problem.keys.window_size().map_or(num_key_tiles, |size| num_key_tiles.min(size / tile_keys + 2));
        let can_add_up = !options.deterministic && scaled.exists(1) && row_key_tiles <= MAX_SUMMED_TILES;
        let query_sums = if adds_up && can_add_up { QuerySums::Scaled } else { QuerySums::F32 };
        let tiles = RowTiles::new(sizes, band_backward::tile_rows(&kernel_of(kernel, sizes, query_sums)));
        let mut workspace = Workspace::default();
        let spec = TableSpec {
            windows: problem.keys.windows(),
            tile_tokens: Some(tiles.tile_tokens),
            tile_keys: Some(tile_keys),
        };
        let tables = TablePlan::new(spec, sizes.sequences, &mut workspace);
        let scratch = BandScratch {
            row_stats: (head_bytes > 0).then(|| workspace.add("row_stats", kv_heads * head_bytes)),
            bounds: (query_sums == QuerySums::Scaled).then(|| workspace.add("bounds", 2 * BOUNDS_BYTES)),
            partial_keys: (splits > 1).then(|| {
                let row_bytes = band_backward::split_row_bytes(sizes.head_dim, query_sums);
                workspace.add("partial_keys", splits * split_rows * row_bytes)
            }),
        };
        Self {
            problem: *problem,
            tiles,
            num_key_tiles,
            row_key_tiles,
            kv_heads,
            splits,
            query_sums,
            tables,
            scratch,
            workspace,
        }
    }

    /// Whether one scaled sum can be that of the gradients of queries of both attentions.
    pub(crate) fn can_share_sums(&self, other: &Self) -> bool {
        let scaled = [self, other].map(|plan| plan.query_sums) == [QuerySums::Scaled; 2];
        scaled && self.row_key_tiles + other.row_key_tiles <= MAX_SUMMED_TILES
    }
}

/// The specialisation of a kernel that adds up gradients of queries in a way.
fn kernel_of(kernel: &Specialisation, sizes: &Sizes, query_sums: QuerySums) -> Specialisation {
    match query_sums {
        QuerySums::Scaled => band_backward::one_pass(kernel, sizes.gqa_group_size()),
        _ => kernel.with_query_sums(query_sums),
    }
}

impl fmt::Display for BandBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, tiles, num_key_tiles, splits, kv_heads, query_sums, workspace, .. } = self;
        let passes = if *query_sums == QuerySums::Scaled { "one pass" } else { "two passes" };
        write!(
            f,
            "band backward: {problem}; {tiles}; {num_key_tiles} tiles of keys in {splits} splits, {passes}, \
             {kv_heads} kv heads a launch; {workspace}"
        )
    }
}
