//! The plan of the backward: sums per lane, some heads and one chunk at a time.

use super::index::{IndexInput, max_tiles, slots, sub_tiles};
use super::{
    BOUNDS_BYTES, IndexPlan, PlanOptions, Problem, QuerySums, Slot, Workspace, choose, kv_heads_per_pass, most_bytes,
};
use crate::arch::KernelSet;
use crate::backward::{UNIT_HEADS, finishes_sums};
use crate::driver::DeviceFacts;
use crate::params::TILE_ROWS;
use crate::source::Specialisation;

use serde::Serialize;
use std::fmt;
use std::ops::Range;

/// Launches of several kv heads that are under way: the tail of one runs beside the start of the next. A third where the sums of gradients
/// of queries of all lanes nearly stay in L2.
pub(crate) const MAX_LANES: usize = 3;
const THREE_LANES_BYTES: usize = 64 << 20;
/// Pairs of a full unit per key of its block, and the fewest: 3072 rows of 64 keys, 4096 of 128. With 2048 of 64 keys the
/// pass took 3 % longer; longer units were no faster.
const UNIT_ENTRIES_PER_KEY: usize = 32;
const LEAST_UNIT_ENTRIES: usize = 3072;
/// Units that several heads share have fewer where they would be few: this part of the rows of a head, and the fewest.
const SHARED_UNITS: usize = 16;
const LEAST_SHARED_ENTRIES: usize = 1024;
/// Four heads side by side are a working set four times as large: units that end sooner find more of it in L2 (1 % of the pass).
const LEAST_ENTRIES_OF_FOUR: usize = 2048;
/// Sums of gradients of queries that are under way in a lane, the largest that fit: they are to stay in L2 (50 MB on Hopper), except where
/// heads share units, which is worth more. The first is for these alone.
const QUERY_SUM_BYTES: [usize; 5] = [64 << 20, 32 << 20, 16 << 20, 8 << 20, 4 << 20];
/// The same as partials, which pass through memory anyway.
const QUERY_PARTIAL_BYTES: [usize; 4] = [128 << 20, 64 << 20, 32 << 20, 16 << 20];
/// Rows of a head from which on several heads share units: keys come once, sums of keys leave once, and tiles of rows are fuller. With fewer
/// rows there would be too few units for the device.
const SHARED_ROWS: usize = 1 << 13;
/// Rows of a head that keep the device busy in a launch of its own, and where heads share units, of the heads of a unit: sums of keys are then
/// its own, which at 64K rows is worth 2 %.
const FULL_LAUNCH_ROWS: usize = 1 << 16;
const FULL_SHARED_ROWS: usize = 1 << 15;
/// f32 gradients of keys and values of one launch.
const KEY_SUM_BYTES: usize = 64 << 20;

/// Rows of a chunk below which ranges of keys are better.
const LEAST_CHUNK_ROWS: usize = 1 << 16;
/// Most ranges of keys that take turns where the sums of all keys have no room: each adds a rounding to the gradient of a query.
const MAX_KEY_RANGES: usize = 8;

/// Chunks and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackwardPlan {
    /// Sizes of the call.
    pub problem: Problem,
    /// Every sum has one order.
    pub deterministic: bool,
    /// How gradients of queries are added up.
    pub query_sums: QuerySums,
    /// kv heads that share one index; the others follow.
    pub kv_heads: usize,
    /// The index of one pass.
    pub index: IndexPlan,
    /// kv heads whose sums are under way in a lane.
    pub kv_heads_per_launch: usize,
    /// Query heads of one launch.
    pub heads: usize,
    /// Of these, those that share units.
    pub unit_heads: usize,
    /// Keys whose sums are under way: all, or a range of whole blocks where the next ranges follow.
    pub range_keys: usize,
    /// Rows of the sums of one kv head.
    pub sum_rows: usize,
    /// No two query heads of a launch share sums of keys.
    pub owns_sums: bool,
    /// The launches of a kv head have the same units, one per block for most blocks: the last of them finishes their sums.
    pub finishes_sums: bool,
    /// Lanes.
    pub lanes: usize,
    /// Of these, those whose sums of gradients of queries are where the gradients will be, the last ones.
    pub lanes_in_place: usize,
    sums: Vec<LaneSums>,
    /// Bounds of keys, a pair per kv head, then of rows, a pair per query head: the scale of sums follows from them.
    pub(crate) bounds: Slot,
    /// Bounds of the keys of every block, a pair each, of the kv heads that share an index.
    pub(crate) block_bounds: Slot,
    /// Scratch memory.
    pub workspace: Workspace,
}

/// What a lane sums into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct LaneSums {
    pub row_stats: Slot,
    /// Sums, or a partial per row and slot.
    pub grad_query: Slot,
    /// The sums have no memory of their own: they are in `grad_query` of the caller.
    pub in_place: bool,
    pub grad_key: Slot,
    pub grad_value: Slot,
}

impl LaneSums {
    fn new(in_place: bool, [stats, query, key]: [usize; 3], workspace: &mut Workspace) -> Self {
        Self {
            row_stats: workspace.add("row_stats", stats),
            grad_query: workspace.add("grad_query", if in_place { 0 } else { query }),
            in_place,
            grad_key: workspace.add("grad_key", key),
            grad_value: workspace.add("grad_value", key),
        }
    }
}

/// What is tried.
#[derive(Clone, Copy)]
struct Choice {
    kv_heads: usize,
    lanes: usize,
    query_bytes: usize,
    lanes_in_place: usize,
    key_ranges: usize,
    /// Whether the main kernel can finish sums of keys.
    main_finishes: bool,
}

impl BackwardPlan {
    /// Plans a checked problem.
    pub fn new(problem: &Problem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let query_sums = problem.query_sums(set, options);
        let options = &PlanOptions { query_sums: Some(query_sums), ..*options };
        let apart = Self::best(problem, set, facts, options, false);
        // Scaled sums are as large as the gradients, whose memory nobody needs before, unless something is in it. Rows that lie apart cost
        // up to 1 %, and more lanes alone gain nothing, so that is for units that more heads share.
        if query_sums != QuerySums::Scaled || options.adds_to_grads {
            return apart;
        }
        let in_place = Self::best(problem, set, facts, options, true);
        if in_place.unit_heads > apart.unit_heads { in_place } else { apart }
    }

    /// The best plan without, or also of those with sums in place.
    fn best(problem: &Problem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions, in_place: bool) -> Self {
        let query_sums = options.query_sums.unwrap_or(QuerySums::F32);
        let [_, main] = problem.backward_kernels(set, (query_sums, 1));
        let main_finishes = finishes_sums(&main);
        let bytes = match options.query_sums {
            Some(QuerySums::Partials) => &QUERY_PARTIAL_BYTES[..],
            Some(QuerySums::Scaled) => &QUERY_SUM_BYTES[..],
            _ => &QUERY_SUM_BYTES[1..],
        };
        let most = most_bytes(problem, options);
        let least = Choice {
            kv_heads: 1,
            lanes: 1,
            query_bytes: bytes[bytes.len() - 1],
            lanes_in_place: 0,
            key_ranges: 1,
            main_finishes,
        };
        let plans = |lanes: usize| {
            let in_place = 0..=if in_place { lanes } else { 0 };
            let choices = kv_heads_per_pass(problem.num_kv_heads)
                .filter(|kv_heads| *kv_heads >= lanes)
                .flat_map(|kv_heads| bytes.iter().map(move |bytes| (kv_heads, *bytes)))
                .flat_map(|(kv_heads, query_bytes)| {
                    let choice = Choice { kv_heads, lanes, query_bytes, ..least };
                    in_place.clone().map(move |lanes_in_place| Choice { lanes_in_place, ..choice })
                });
            let plans = choices.map(|choice| Self::with(problem, facts, options, choice));
            choose(most, plans, |plan| plan.workspace.size_bytes(), Self::launches)
        };
        let fits = |plan: &Self| plan.workspace.size_bytes() <= most;
        let of_lanes = |lanes: usize| plans(lanes.min(problem.num_kv_heads)).filter(fits);
        let two = of_lanes(2);
        let three = of_lanes(MAX_LANES).filter(|three| {
            let is_small = three.lanes * three.query_bytes() <= THREE_LANES_BYTES;
            is_small && two.as_ref().is_none_or(|two| three.launches() <= two.launches())
        });
        let several = three.or(two);
        let one = || plans(1).unwrap_or_else(|| Self::with(problem, facts, options, least));
        let best = match several {
            Some(plan) if options.deterministic || plan.index.num_chunks == 1 => plan,
            // Halves of chunks cost more than the second lane is worth.
            Some(plan) => {
                Some(one()).filter(|one| fits(one) && 2 * one.index.num_chunks <= plan.index.num_chunks).unwrap_or(plan)
            }
            None => one(),
        };
        let is_short = best.index.chunk_rows(problem) < problem.total_q.min(LEAST_CHUNK_ROWS);
        if options.deterministic || (fits(&best) && !is_short) {
            return best;
        }
        // The longest chunks that fit, and of these as few ranges of keys: chunks of a sixteenth of the rows took five times as long,
        // because a unit is what one chunk has of a block, and each range goes through all rows again that see it.
        let choices = QUERY_SUM_BYTES[1..].iter().flat_map(|query_bytes| {
            let ranges = std::iter::successors(Some(2), |ranges| Some(2 * ranges));
            let ranges = ranges.take_while(|ranges| *ranges <= MAX_KEY_RANGES);
            ranges.map(move |key_ranges| Choice { query_bytes: *query_bytes, key_ranges, ..least })
        });
        let mut plans = choices.map(|choice| Self::with(problem, facts, options, choice));
        plans.find(fits).unwrap_or(best)
    }

    fn with(problem: &Problem, facts: &DeviceFacts, options: &PlanOptions, choice: Choice) -> Self {
        let Choice { kv_heads, lanes, query_bytes, lanes_in_place, key_ranges, main_finishes } = choice;
        let query_sums = options.query_sums.unwrap_or(QuerySums::F32);
        let row_bytes = Self::row_bytes(problem, query_sums);
        let [sub_tiles, chunk_tiles] = Self::chunk(problem, query_sums, (kv_heads, query_bytes));
        let rows = (chunk_tiles * TILE_ROWS).min(problem.total_q);
        let [kv_heads_per_launch, heads, unit_heads] =
            Self::heads(problem, (query_sums, rows), (kv_heads, query_bytes));
        let unit_entries = if options.deterministic {
            // One unit per block and chunk: what adds to a key's gradient is one CTA per launch, in order of launches.
            chunk_tiles * TILE_ROWS * slots(problem, false) + 1
        } else {
            Self::unit_entries(problem, rows, unit_heads)
        };
        let mut workspace = Workspace::default();
        let input = IndexInput {
            has_dense: false,
            ordered: options.deterministic,
            kv_heads,
            sub_tiles,
            chunk_tiles,
            unit_entries,
        };
        let mut index = IndexPlan::new(problem, facts, &input, &mut workspace);
        let range_keys =
            problem.total_kv.div_ceil(key_ranges).next_multiple_of(problem.block_size).min(problem.total_kv);
        let owns_sums = unit_heads == heads.min(problem.gqa_group_size());
        let finishes_sums = main_finishes && owns_sums && index.num_chunks == 1 && range_keys == problem.total_kv;
        if finishes_sums {
            // Where one launch has all heads of a group, only blocks of several units pass through memory.
            index.find_sums(kv_heads, heads == kv_heads_per_launch * problem.gqa_group_size(), &mut workspace);
        }
        let sum_rows = Self::sum_rows(problem, &index, range_keys);
        let mut add_bounds =
            |name, pairs| workspace.add(name, if query_sums == QuerySums::Scaled { pairs * BOUNDS_BYTES } else { 0 });
        let bounds = add_bounds("bounds", problem.num_kv_heads + problem.num_q_heads);
        let block_bounds = add_bounds("block_bounds", kv_heads * index.max_blocks);
        let lanes = lanes.min(kv_heads.div_ceil(kv_heads_per_launch)).max(1);
        let lanes_in_place = lanes_in_place.min(lanes);
        let key_bytes = kv_heads_per_launch * sum_rows * problem.head_dim * size_of::<f32>();
        let lane_bytes = [heads * rows * 2 * size_of::<f32>(), heads * rows * row_bytes, key_bytes];
        let lane = |lane| LaneSums::new(lane + lanes_in_place >= lanes, lane_bytes, &mut workspace);
        let sums = (0..lanes).map(lane).collect();
        Self {
            problem: *problem,
            deterministic: options.deterministic,
            query_sums,
            kv_heads,
            index,
            kv_heads_per_launch,
            heads,
            unit_heads,
            range_keys,
            sum_rows,
            owns_sums,
            finishes_sums,
            lanes,
            lanes_in_place,
            sums,
            bounds,
            block_bounds,
            workspace,
        }
    }

    /// The kernels that it launches.
    pub(crate) fn kernels(&self, set: KernelSet) -> [Specialisation; 2] {
        self.problem.backward_kernels(set, (self.query_sums, self.unit_heads))
    }

    /// Tiles of a piece of the index and of a chunk.
    fn chunk(problem: &Problem, query_sums: QuerySums, (kv_heads, query_bytes): (usize, usize)) -> [usize; 2] {
        let is_merged = query_sums == QuerySums::Partials;
        let head_bytes = if is_merged { query_bytes } else { query_bytes.min(QUERY_SUM_BYTES[1]) };
        let chunk_tiles = (head_bytes / Self::row_bytes(problem, query_sums) / TILE_ROWS).max(1);
        let sub_tiles = sub_tiles(problem, kv_heads, is_merged).min(1 << chunk_tiles.ilog2());
        let pieces = (chunk_tiles / sub_tiles).clamp(1, max_tiles(problem).div_ceil(sub_tiles));
        [sub_tiles, pieces * sub_tiles]
    }

    /// Rows of the sums of one kv head.
    fn sum_rows(problem: &Problem, index: &IndexPlan, range_keys: usize) -> usize {
        if index.packs_sums {
            return index.max_split_blocks() * problem.block_size;
        }
        // A block of packed sequences may start at the last key of a range.
        (range_keys + problem.block_size - 1).min(problem.total_kv)
    }

    /// Entries of a full unit.
    fn unit_entries(problem: &Problem, rows: usize, unit_heads: usize) -> usize {
        let least = if unit_heads < 4 { LEAST_UNIT_ENTRIES } else { LEAST_ENTRIES_OF_FOUR };
        let most = (UNIT_ENTRIES_PER_KEY * problem.block_size).max(least);
        if unit_heads == 1 { most } else { (rows / SHARED_UNITS).clamp(LEAST_SHARED_ENTRIES, most) }
    }

    /// What a row of a head has as gradient of its query while it is added up.
    fn row_bytes(problem: &Problem, query_sums: QuerySums) -> usize {
        problem.head_dim
            * match query_sums {
                QuerySums::F32 => size_of::<f32>(),
                QuerySums::Scaled => size_of::<u16>(),
                QuerySums::Partials => slots(problem, false) * problem.dtype.size_bytes(),
            }
    }

    /// The ranges of keys, by their first rows.
    pub(crate) fn key_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let Problem { total_kv, .. } = self.problem;
        let step = self.range_keys.max(1);
        (0..total_kv).step_by(step).map(move |first| first..(first + step).min(total_kv))
    }

    /// kv heads and query heads of a launch, and of these those that share units: where sums of queries have `query_bytes`, a
    /// part of a group or whole groups, at most `kv_heads` of them.
    fn heads(
        problem: &Problem,
        (query_sums, rows): (QuerySums, usize),
        (kv_heads, query_bytes): (usize, usize),
    ) -> [usize; 3] {
        let (group, head_bytes) = (problem.gqa_group_size(), (rows * Self::row_bytes(problem, query_sums)).max(1));
        let can_share = |heads: &usize| rows >= SHARED_ROWS && group % heads == 0 && heads * head_bytes <= query_bytes;
        let unit_heads = match query_sums {
            QuerySums::Partials => return [1, 1, 1],
            QuerySums::Scaled => UNIT_HEADS.into_iter().find(can_share).unwrap_or(1),
            QuerySums::F32 => 1,
        };
        let full_rows = if unit_heads > 1 { FULL_SHARED_ROWS } else { FULL_LAUNCH_ROWS };
        let fit = if rows < full_rows { query_bytes.min(QUERY_SUM_BYTES[1]) / head_bytes } else { unit_heads };
        let fit = (fit / unit_heads).max(1) * unit_heads;
        if fit < group {
            return [1, fit, unit_heads];
        }
        let keys_fit = KEY_SUM_BYTES / (2 * problem.total_kv * problem.head_dim * size_of::<f32>()).max(1);
        let kv_heads = (fit / group).min(keys_fit).min(kv_heads).max(1);
        [kv_heads, kv_heads * group, unit_heads]
    }

    /// Sums of gradients of queries that are under way in a lane, wherever they are.
    fn query_bytes(&self) -> usize {
        self.heads * self.index.chunk_rows(&self.problem) * Self::row_bytes(&self.problem, self.query_sums)
    }

    /// What a lane sums into.
    pub(crate) fn sums(&self, lane: usize) -> &LaneSums {
        &self.sums[lane]
    }

    /// Kernels and fills that a call gives to the device.
    pub fn launches(&self) -> usize {
        let Problem { num_kv_heads, .. } = self.problem;
        let group = self.problem.gqa_group_size();
        let turns = num_kv_heads.div_ceil(self.kv_heads_per_launch);
        let of_queries = (self.kv_heads_per_launch * group).div_ceil(self.heads) * self.index.num_chunks;
        let passes = num_kv_heads.div_ceil(self.kv_heads);
        let of_bounds = if self.query_sums == QuerySums::Scaled { 1 + passes } else { 0 };
        let of_keys = turns * self.key_ranges().count();
        self.index.launches(passes) + of_bounds + 3 * of_keys * of_queries
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "selected backward{}: {}; {} chunks of {} tiles, {} query heads a launch, {} ranges of keys, {} lanes, \
             {} of them in place, {} kv heads an index, {} launches; {}",
            if self.deterministic { ", deterministic" } else { "" },
            self.problem,
            self.index.num_chunks,
            self.index.chunk_tiles,
            self.heads,
            self.key_ranges().count(),
            self.lanes,
            self.lanes_in_place,
            self.kv_heads,
            self.launches(),
            self.workspace,
        )
    }
}
