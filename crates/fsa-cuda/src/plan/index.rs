//! The tables of the inverse index.

use super::{MAX_CHUNK_TILES, Problem, STATIC_SMEM_BYTES, Slot, Workspace, bound};
use crate::driver::{Address, DeviceBatch, DeviceFacts, DeviceSpan};
use crate::params::{Index, Layout, RECORD_BYTES, TILE_ROWS};
use serde::Serialize;

/// Least and most tiles of a piece, what one CTA of the index handles; the plane of counts has a row per piece.
const MIN_SUB_TILES: usize = 8;
/// Tiles of a larger piece, and how many of these are enough for a device.
const LARGE_SUB_TILES: usize = 16;
const LARGE_PIECES: usize = 256;
/// The plane is kept below this: larger pieces mean fewer rows of it, and fewer CTAs.
const PLANE_BYTES: usize = 12 << 20;
/// Blocks that one CTA counts at most: 192 KB of counters on Hopper.
const MAX_WINDOW_BLOCKS: usize = 48 << 10;
/// Warps of a scattering CTA; in order, each has counters of its own.
const MAX_SCATTER_WARPS: usize = 8;
/// Ids that a lane of the kernel that does it all loads at once, how many times, and the most threads of its CTAs.
const IDS_AHEAD: usize = 16;
const HELD_PARTS: usize = 2;
const MAX_BUILD_THREADS: usize = 512;
/// Its static shared memory, and what the system takes of every CTA's.
const BUILD_STATIC_SMEM_BYTES: usize = 1024;
const SYSTEM_SMEM_BYTES: usize = 1024;
/// Blocks whose counters have 16-bit offsets, besides a word a lane.
const MAX_BUILD_BLOCKS: usize = (1 << 14) - 32;
/// How many times its least size a full unit may have.
pub(crate) const MOST_UNIT_GROWTH: usize = 2;

/// Sizes of the index of some kv heads and all chunks of query tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct IndexPlan {
    /// The first block and the local ones are left to the reduce kernel.
    pub has_dense: bool,
    /// The order of a block's entries follows from the input.
    pub ordered: bool,
    /// Partials that a row has room for.
    pub slots: usize,
    /// Bound on query tiles.
    pub max_tiles: usize,
    /// Bound on blocks.
    pub max_blocks: usize,
    /// Tiles of a piece.
    pub sub_tiles: usize,
    /// Pieces.
    pub num_subs: usize,
    /// Tiles of a chunk, a multiple of `sub_tiles`.
    pub chunk_tiles: usize,
    /// Chunks.
    pub num_chunks: usize,
    /// Entries of a full unit, at least.
    pub unit_entries: usize,
    /// Units beyond one a block that a launch has CTAs for. Where there would be more, full units are up to twice as large.
    pub spare_units: usize,
    /// Bound on the full units of a chunk.
    pub full_units: usize,
    /// Blocks that one CTA counts.
    pub window_blocks: usize,
    /// Warps of a scattering CTA.
    pub scatter_warps: usize,
    /// A scattering CTA puts its entries in order in shared memory first.
    pub staged: bool,
    /// One kernel counts, scans and scatters.
    pub builds: bool,
    /// Threads of its CTAs: a lane holds two rows, or one that is longer.
    pub build_threads: usize,
    /// Only blocks of several units have sums of their keys, side by side.
    pub packs_sums: bool,
    regions: Regions,
}

/// Places of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
struct Regions {
    tile_base: Slot,
    block_base: Slot,
    chunk_token: Slot,
    tiles: Slot,
    plane: Slot,
    entries: Slot,
    row_info: Slot,
    units: Slot,
    unit_counts: Slot,
    block_sums: Slot,
    split_blocks: Slot,
}

/// What the passes choose.
#[derive(Debug, Clone, Copy)]
pub(super) struct IndexInput {
    pub has_dense: bool,
    pub ordered: bool,
    pub kv_heads: usize,
    pub sub_tiles: usize,
    pub chunk_tiles: usize,
    pub unit_entries: usize,
}

/// Tiles of a piece such that the plane of `kv_heads` kv heads stays small, a power of two. More than the least where one kernel builds the index
/// and still fills the device: what its CTAs do for every block costs as much for small pieces.
pub(super) fn sub_tiles(problem: &Problem, kv_heads: usize, ordered: bool) -> usize {
    let tiles = max_tiles(problem);
    let is_large = !ordered && problem.topk <= IDS_AHEAD && kv_heads * tiles >= LARGE_PIECES * LARGE_SUB_TILES;
    let least = if is_large { LARGE_SUB_TILES } else { MIN_SUB_TILES };
    let row_bytes = kv_heads * bound(problem.total_kv, problem.sequences, problem.block_size) * size_of::<i32>();
    let fits = |sub: &usize| *sub >= tiles || tiles.div_ceil(*sub) * row_bytes <= PLANE_BYTES;
    std::iter::successors(Some(least), |sub| Some(2 * sub)).find(fits).unwrap_or(least)
}

/// Bound on the query tiles, at least 1 so that tables have a size.
pub(super) fn max_tiles(problem: &Problem) -> usize {
    bound(problem.total_q, problem.sequences, TILE_ROWS).max(1)
}

/// Partials of a row: one of its blocks is dense, if there are such, as the own block is among them.
pub(super) fn slots(problem: &Problem, has_dense: bool) -> usize {
    if has_dense { (problem.topk - 1).max(1) } else { problem.topk }
}

impl IndexPlan {
    pub(super) fn new(problem: &Problem, facts: &DeviceFacts, input: &IndexInput, workspace: &mut Workspace) -> Self {
        let IndexInput { has_dense, ordered, kv_heads, sub_tiles, chunk_tiles, unit_entries } = *input;
        let (max_tiles, slots) = (max_tiles(problem), slots(problem, has_dense));
        let max_blocks = bound(problem.total_kv, problem.sequences, problem.block_size).max(1);
        let chunk_tiles = chunk_tiles.min(MAX_CHUNK_TILES / sub_tiles * sub_tiles);
        let smem_bytes = facts.smem_per_cta_bytes.saturating_sub(STATIC_SMEM_BYTES);
        let counters = smem_bytes / size_of::<i32>();
        let window_blocks = max_blocks.min(MAX_WINDOW_BLOCKS).min(counters.next_multiple_of(8192) - 8192);
        // In order, each warp counts for itself.
        let counter_sets = if ordered { counters / window_blocks } else { MAX_SCATTER_WARPS };
        let mut plan = Self {
            has_dense,
            ordered,
            slots,
            max_tiles,
            max_blocks,
            sub_tiles,
            num_subs: max_tiles.div_ceil(sub_tiles),
            chunk_tiles,
            num_chunks: max_tiles.div_ceil(chunk_tiles),
            unit_entries,
            spare_units: 0,
            full_units: 0,
            window_blocks,
            scatter_warps: counter_sets.clamp(1, MAX_SCATTER_WARPS.min(sub_tiles)),
            staged: false,
            builds: false,
            build_threads: sub_tiles * TILE_ROWS * problem.topk.div_ceil(IDS_AHEAD) / HELD_PARTS,
            packs_sums: false,
            regions: Regions::default(),
        };
        plan.full_units = plan.chunk_entries() / unit_entries;
        plan.spare_units = plan.full_units;
        // Two CTAs to a multiprocessor at least.
        plan.staged = plan.scatter_smem_bytes() + plan.stage_bytes() <= smem_bytes / 2;
        plan.builds = plan.staged && !ordered && plan.can_build(problem, facts);
        plan.regions = plan.place(problem, kv_heads, workspace);
        plan
    }

    /// Whether one kernel can do it all: its CTAs hold their ids, count all blocks, and those of a chunk wait for each other. CTAs start in order, so of a launch one
    /// chunk at most is there in part. All of it have places beside those of two more calls that wait at the same time; and one on each multiprocessor
    /// is enough, however the driver divides its memory.
    fn can_build(&self, problem: &Problem, facts: &DeviceFacts) -> bool {
        let pieces = self.num_subs.min(self.chunk_tiles / self.sub_tiles);
        problem.topk <= HELD_PARTS * IDS_AHEAD
            && self.build_threads <= MAX_BUILD_THREADS
            && self.window_blocks == self.max_blocks
            && self.max_blocks <= MAX_BUILD_BLOCKS
            && pieces <= facts.multiprocessors
            && 3 * pieces <= self.build_ctas(facts) * facts.multiprocessors
    }

    /// CTAs of that kernel on a multiprocessor: by their registers, and by shared memory, of which each has static variables and what the system takes besides.
    fn build_ctas(&self, facts: &DeviceFacts) -> usize {
        let each = self.build_smem_bytes().next_multiple_of(128) + BUILD_STATIC_SMEM_BYTES + SYSTEM_SMEM_BYTES;
        (2 * MAX_BUILD_THREADS / self.build_threads).min((facts.smem_per_cta_bytes + SYSTEM_SMEM_BYTES) / each)
    }

    /// Shared memory of a CTA of that kernel: as one that scatters, and a word a lane.
    pub(crate) fn build_smem_bytes(&self) -> usize {
        self.scatter_smem_bytes() + 32 * size_of::<i32>()
    }

    /// Kernels that make the indices of all passes.
    pub(crate) fn launches(&self, passes: usize) -> usize {
        if self.builds { 2 * passes } else { 1 + 3 * passes }
    }

    /// Full units are larger where they are many, so that a launch needs fewer CTAs, most of which never have a unit.
    pub(super) fn let_units_grow(&mut self) {
        self.spare_units = self.chunk_entries() / (MOST_UNIT_GROWTH * self.unit_entries);
    }

    /// The index is to say which blocks have several units, and where the sums of their keys are: those of all keys are in one piece, or
    /// with `packs` these alone are.
    pub(super) fn find_sums(&mut self, kv_heads: usize, packs: bool, workspace: &mut Workspace) {
        let word = size_of::<i32>();
        self.packs_sums = packs;
        self.regions.block_sums = workspace.add("block_sums", kv_heads * self.max_blocks * word);
        if packs {
            self.regions.split_blocks = workspace.add("split_blocks", kv_heads * self.max_split_blocks() * word);
        }
    }

    fn place(&self, problem: &Problem, kv_heads: usize, workspace: &mut Workspace) -> Regions {
        let word = size_of::<i32>();
        let rows = kv_heads * problem.total_q;
        let lists = kv_heads * self.num_chunks;
        Regions {
            tile_base: workspace.add("tile_base", (problem.sequences + 1) * word),
            block_base: workspace.add("block_base", (problem.sequences + 1) * word),
            chunk_token: workspace.add("chunk_token", (self.num_chunks + 1) * word),
            tiles: workspace.add("tiles", self.max_tiles * RECORD_BYTES),
            plane: workspace.add("plane", kv_heads * self.plane_words() * word),
            entries: workspace.add("entries", rows * self.slots * word),
            row_info: workspace.add("row_info", rows * word),
            units: workspace.add("units", lists * self.unit_records() * RECORD_BYTES),
            unit_counts: workspace.add("unit_counts", 2 * lists * word),
            block_sums: Slot::default(),
            split_blocks: Slot::default(),
        }
    }

    /// Words of the plane of a kv head: a count per block of each piece, or the blocks' sums of each chunk and how many pieces have added theirs.
    fn plane_words(&self) -> usize {
        if self.builds { self.num_chunks * (self.max_blocks + 1) } else { self.num_subs * self.max_blocks }
    }

    /// Records of units of a chunk: full ones, and a remainder per block.
    fn unit_records(&self) -> usize {
        self.full_units + self.max_blocks
    }

    /// Bound on the units of a chunk.
    pub(crate) fn max_units(&self) -> usize {
        self.spare_units + self.max_blocks
    }

    /// Bound on the units of one chunk. Rows list blocks of their past, so the chunks of a single sequence list few at first; where the
    /// sequences of a batch end is known on the device only.
    pub(crate) fn units_of(&self, problem: &Problem, chunk: usize) -> usize {
        if problem.sequences != 1 {
            return self.max_units();
        }
        let rows = ((chunk + 1) * self.chunk_tiles * TILE_ROWS).min(problem.total_q);
        let keys = (rows + problem.total_kv).saturating_sub(problem.total_q);
        self.spare_units + keys.div_ceil(problem.block_size).clamp(1, self.max_blocks)
    }

    /// Bound on the blocks of a kv head that have several units, however their entries spread over them.
    pub(crate) fn max_split_blocks(&self) -> usize {
        (self.chunk_entries() / (self.unit_entries + 1)).min(self.max_blocks)
    }

    /// Bound on the blocks of a kv head that have sums in memory.
    pub(crate) fn blocks_with_sums(&self) -> usize {
        if self.packs_sums { self.max_split_blocks() } else { self.max_blocks }
    }

    /// Bound on the entries of a chunk.
    fn chunk_entries(&self) -> usize {
        self.chunk_tiles * TILE_ROWS * self.slots
    }

    /// Shared memory of a CTA that scatters: a set of counters per warp where the order matters, else one; and the stage.
    pub(crate) fn scatter_smem_bytes(&self) -> usize {
        let sets = if self.ordered { self.scatter_warps } else { 1 };
        sets * self.window_blocks * size_of::<i32>() + if self.staged { self.stage_bytes() } else { 0 }
    }

    /// A word per block, and the entries of a piece.
    fn stage_bytes(&self) -> usize {
        (self.window_blocks + self.sub_tiles * TILE_ROWS * self.slots) * size_of::<i32>()
    }

    /// Rows of a chunk, at most.
    pub(crate) fn chunk_rows(&self, problem: &Problem) -> usize {
        (self.chunk_tiles * TILE_ROWS).min(problem.total_q)
    }

    /// The kernels' view of the layout.
    pub(crate) fn layout(&self, problem: &Problem, batch: &DeviceBatch<'_>, workspace: &DeviceSpan<'_>) -> Layout {
        let [cu_seqlens_q, cu_seqlens_kv] = batch.spans().map(|span| span.address());
        let regions = &self.regions;
        Layout {
            cu_seqlens_q,
            cu_seqlens_kv,
            tile_base: regions.tile_base.address(workspace),
            block_base: regions.block_base.address(workspace),
            chunk_token: self.chunk_token(0, workspace),
            tiles: regions.tiles.address(workspace),
            batch: problem.sequences as i32,
            total_q: problem.total_q as i32,
            num_chunks: self.num_chunks as i32,
            chunk_tiles: self.chunk_tiles as i32,
            max_tiles: self.max_tiles as i32,
        }
    }

    /// Where the first token of a chunk stands.
    pub(crate) fn chunk_token(&self, chunk: usize, workspace: &DeviceSpan<'_>) -> Address {
        self.regions.chunk_token.address(workspace).offset(chunk * size_of::<i32>())
    }

    /// The kernels' view of the index of the kv heads from `first_kv_head` on.
    ///
    /// The kernels number kv heads from 0, the tables hold those of one pass: each is given where the part of kv head
    /// 0 would start. No address before a table is ever used.
    pub(crate) fn index(
        &self,
        problem: &Problem,
        topk_indices: &DeviceSpan<'_>,
        first_kv_head: usize,
        workspace: &DeviceSpan<'_>,
    ) -> Index {
        let (regions, word) = (&self.regions, size_of::<i32>());
        let table = |slot: Slot, head_bytes: usize| {
            Address(slot.address(workspace).0.wrapping_sub((first_kv_head * head_bytes) as u64))
        };
        Index {
            topk_indices: topk_indices.address(),
            plane: table(regions.plane, self.plane_words() * word),
            entries: table(regions.entries, problem.total_q * self.slots * word),
            row_info: table(regions.row_info, problem.total_q * word),
            units: table(regions.units, self.num_chunks * self.unit_records() * RECORD_BYTES),
            unit_counts: table(regions.unit_counts, 2 * self.num_chunks * word),
            block_sums: if regions.block_sums.bytes == 0 {
                Address::default()
            } else {
                table(regions.block_sums, self.max_blocks * word)
            },
            split_blocks: table(regions.split_blocks, self.max_split_blocks() * word),
            topk: problem.topk as i32,
            slots: self.slots as i32,
            has_dense: i32::from(self.has_dense),
            num_subs: self.num_subs as i32,
            sub_tiles: self.sub_tiles as i32,
            max_blocks: self.max_blocks as i32,
            window_blocks: self.window_blocks as i32,
            unit_entries: self.unit_entries as i32,
            spare_units: self.spare_units as i32,
            full_units: self.full_units as i32,
            ordered: self.ordered.into(),
            packs_sums: self.packs_sums.into(),
            max_split_blocks: self.max_split_blocks() as i32,
        }
    }
}
