//! Plans of the whole operation. Where its temporaries do not fit the budget, kv heads are taken in passes: nothing but the gradient
//! of gates that heads share reaches from one to another.

use super::band::BandBackwardPlan;
use super::compress::{CompressProblem, CompressScratch, CompressionKind};
use super::select::{Choice, ListPlan, SelectProblem};
use super::tables::{TablePlan, TableSpec};
use super::{
    BOUNDS_BYTES, BandProblem, EarlyRows, ForwardTemporaries, Keys, Lists, PlanOptions, Problem, QuerySums, RowTiles,
    SelectedBackwardPlan, SelectedPlan, Sizes, Slot, Windows, Workspace, choose,
};
use crate::arch::KernelSet;
use crate::band;
use crate::driver::DeviceFacts;
use crate::source::{Kernel, Specialisation};
use fsa_core::{NsaArgs, NsaConfig, Result, ScoreHeads};
use serde::Serialize;
use std::fmt;

/// A call of the whole operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NsaProblem {
    /// Sizes of the tensors.
    pub sizes: Sizes,
    /// Windows of the compression.
    pub windows: Windows,
    /// Keys of a block.
    pub block_size: usize,
    /// Blocks that a row lists.
    pub topk: usize,
    /// Blocks at the start of a sequence that every row lists.
    pub init_blocks: usize,
    /// Blocks up to and including its own that every row lists.
    pub local_blocks: usize,
    /// Which heads of a group vote.
    pub score_heads: ScoreHeads,
    /// Earlier keys that the sliding window shows.
    pub window_size: usize,
    /// How keys and values are compressed.
    pub compressions: [CompressionKind; 2],
    /// Query and keys are rotated.
    pub rope: bool,
}

impl NsaProblem {
    /// A call with a checked configuration.
    pub fn new(sizes: &Sizes, config: &NsaConfig, compressions: [CompressionKind; 2], rope: bool) -> Self {
        let NsaConfig { kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, .. } = *config;
        Self {
            sizes: *sizes,
            windows: Windows { kernel_size, kernel_stride },
            block_size,
            topk,
            init_blocks,
            local_blocks,
            score_heads: config.score_heads,
            window_size: config.window_size,
            compressions,
            rope,
        }
    }

    /// The call of checked arguments.
    pub fn of(args: &NsaArgs<'_>, sizes: &Sizes) -> Self {
        let compressions = [&args.key_compression, &args.value_compression].map(CompressionKind::of);
        Self::new(sizes, args.config, compressions, args.rope.is_some())
    }

    /// The same call for some of its kv heads.
    pub fn with_kv_heads(&self, num_kv_heads: usize) -> Self {
        Self { sizes: self.sizes.with_kv_heads(num_kv_heads), ..*self }
    }

    /// Compression of keys, then of values.
    pub fn compress(&self) -> [CompressProblem; 2] {
        self.compressions.map(|kind| CompressProblem { sizes: self.sizes, windows: self.windows, kind })
    }

    /// Compressed attention and the lists.
    pub fn select(&self) -> SelectProblem {
        let Self { sizes, windows, block_size, topk, init_blocks, local_blocks, score_heads, .. } = *self;
        SelectProblem { sizes, windows, block_size, topk, init_blocks, local_blocks, score_heads }
    }

    /// Attention to the selected blocks.
    pub fn selected(&self) -> Problem {
        self.sizes.selected(self.block_size, self.topk)
    }

    /// Attention to the sliding window.
    pub fn window(&self) -> BandProblem {
        BandProblem { sizes: self.sizes, keys: Keys::Window { window_size: self.window_size } }
    }

    /// The kernel of attention to the window that goes on to all keys, and to compressed keys.
    pub(crate) fn window_too_kernel(&self, set: KernelSet) -> Specialisation {
        self.specialisation(Kernel::Band, set).with_window_too()
    }

    /// Rows that compressed keys and values have room for.
    pub fn total_compressed(&self) -> usize {
        self.windows.bound(self.sizes.total_kv)
    }

    /// Size of `topk_indices`.
    pub fn topk_indices_bytes(&self) -> usize {
        self.selected().topk_indices_bytes()
    }

    /// Bytes of a tensor of query rows, of token rows, of compressed rows.
    pub(super) fn row_bytes(&self) -> [usize; 3] {
        let Sizes { total_q, total_kv, num_q_heads, num_kv_heads, .. } = self.sizes;
        let of_kv = |rows| self.sizes.tensor_bytes(rows, num_kv_heads);
        [self.sizes.tensor_bytes(total_q, num_q_heads), of_kv(total_kv), of_kv(self.total_compressed())]
    }

    /// Whether all heads are compressed before the first pass: one head alone keeps few multiprocessors busy with a matrix product. Not
    /// where that would take more than an eighth of the budget.
    fn compresses_at_once(&self, options: &PlanOptions) -> bool {
        let [_, _, compressed] = self.row_bytes();
        2 * compressed <= options.budget_bytes / 8
    }

    /// Multiprocessors that attend to the window of one half of the heads while the others attend to the selected blocks of the other
    /// half: these wait for memory, the window for tensor cores, and it should keep a small part of the device busy for as long.
    fn window_multiprocessors(&self, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Option<usize> {
        let Sizes { total_q, num_q_heads, num_kv_heads, head_dim, .. } = self.sizes;
        let rows = total_q.saturating_mul(num_q_heads);
        if set != KernelSet::Sm90 || head_dim > 128 || !num_kv_heads.is_multiple_of(2) || rows < options.beside_rows {
            return None;
        }
        // A tile of rows sees the masked ends of its window, too.
        let window = self.window_size.saturating_add(64).min(total_q).saturating_mul(WINDOW_KEY_COST);
        let selected = (self.topk * self.block_size).div_ceil(64).saturating_mul(SELECTED_BLOCK_COST);
        // Beside the others, who keep L2 busy, the window takes about twice as long as this says (56 to 72 of 132 are equally good).
        let share = (facts.multiprocessors.saturating_mul(2 * window) / selected.max(1)).max(1);
        (share <= facts.multiprocessors / 2).then_some(share)
    }

    /// Parts of a pass whose heads are attended to one after the other: two halves, where the window of one runs beside the selected
    /// blocks of the other.
    fn parts(&self, kv_heads: usize, window_multiprocessors: Option<usize>) -> usize {
        if window_multiprocessors.is_some() && kv_heads == self.sizes.num_kv_heads { 2 } else { 1 }
    }

    /// Numbers of kv heads of a pass, most first. All passes have as many.
    fn passes(&self) -> impl Iterator<Item = usize> + use<> {
        let heads = self.sizes.num_kv_heads;
        (1..=heads).rev().filter(move |pass| heads.is_multiple_of(*pass))
    }

    /// The specialisation of a kernel for this call.
    pub(crate) fn specialisation(&self, kernel: Kernel, set: KernelSet) -> Specialisation {
        self.sizes.specialisation(kernel, set, self.block_size)
    }

    /// The kernels of the stages before and behind attention, and those of `others`.
    pub(crate) fn kernels(&self, set: KernelSet, others: &[Kernel]) -> Vec<Specialisation> {
        let linear = |kind: &CompressionKind| kind.is_linear();
        let mut kernels = vec![Kernel::Prepare];
        kernels.extend_from_slice(others);
        kernels.extend(self.rope.then_some(Kernel::Rope));
        kernels.extend(self.compressions.iter().any(linear).then_some(Kernel::CompressLinear));
        kernels.extend((!self.compressions.iter().all(linear)).then_some(Kernel::Compress));
        kernels.into_iter().map(|kernel| self.specialisation(kernel, set)).collect()
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`fsa_core::Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts) -> Result<()> {
        self.select().check(facts, &[])?;
        self.selected().check(facts, &[])?;
        self.compress().iter().try_for_each(|compress| compress.check(facts, &[]))
    }
}

impl fmt::Display for NsaProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [key, value] = self.compressions;
        let rope = if self.rope { ", rotated" } else { "" };
        write!(f, "{}; window of {}; keys {key}, values {value}{rope}", self.select(), self.window_size)
    }
}

/// What the kernels of a pass besides those of stage `selected` count: there are few, but most of them end with idle multiprocessors.
const OTHER_LAUNCHES: usize = 16;

/// What a multiprocessor takes, in picoseconds, for a key of the window of a row, and for a selected block of 64 keys (H200, head_dim 128,
/// 64K tokens: 1.35 ms for 576 keys and 5.85 ms for 16 blocks, of 2 M rows). Only their ratio counts.
const WINDOW_KEY_COST: usize = 148;
const SELECTED_BLOCK_COST: usize = 23_000;

/// Passes and workspace of a forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NsaForwardPlan {
    /// The call.
    pub problem: NsaProblem,
    /// The state is given to the caller.
    pub saves: bool,
    /// kv heads of a pass.
    pub kv_heads: usize,
    /// Multiprocessors for the window, where it is attended to beside the selected blocks of the other half of the heads: in a call of
    /// one pass. In one of several, too, the window comes first in the second half, so that sums are rounded in the same order.
    pub window_multiprocessors: Option<usize>,
    /// Attention to the window goes on to all keys, where rows list all blocks that they see, and to compressed keys: one kernel for all branches.
    pub window_goes_on: bool,
    /// Selected blocks, by the dense route with a mask, and window are attended to in one walk.
    pub window_beside: bool,
    /// Rows that have all branches in one kernel, as if the call were so short, while the others are attended to in one walk.
    pub early: Option<EarlyRows>,
    /// kv heads that are compressed at a time: those of a pass, or all before the first one.
    pub compress_heads: usize,
    /// Tiles of compressed and of window attention.
    pub attention: RowTiles,
    pub(crate) tables: TablePlan,
    /// How the lists are made.
    pub lists: ListPlan,
    pub(crate) compress: [CompressScratch; 2],
    pub(crate) temporaries: Option<ForwardTemporaries>,
    /// Scratch of stage `selected`.
    pub(crate) scratch: Slot,
    /// The same where those who choose the blocks make their mask: their scratch is in use by then.
    pub(crate) mask: Option<Slot>,
    /// What stage `selected` may take.
    pub(crate) stage_budget_bytes: usize,
    /// Kernels of all passes, as heavy as those of stage `selected`.
    pub(crate) launches: usize,
    /// Scratch memory.
    pub workspace: Workspace,
}

impl NsaForwardPlan {
    /// Plans a checked problem for the kernels of `set`.
    ///
    /// # Errors
    /// The windows are too long for the shared memory of the device.
    pub fn new(
        problem: &NsaProblem,
        set: KernelSet,
        facts: &DeviceFacts,
        options: &PlanOptions,
        saves: bool,
    ) -> Result<Self> {
        let most = options.budget_bytes + problem.topk_indices_bytes();
        // All passes, with or without the state, make the lists in one way, which rounds in its own order.
        let smallest = |choice| Self::with(problem, set, facts, options, (false, 1, choice));
        let room = options.budget_bytes + problem.with_kv_heads(1).topk_indices_bytes();
        let fits = |choice| smallest(choice).is_ok_and(|plan| plan.workspace.size_bytes() <= room);
        let nothing = options.one_pass.is_none() && problem.selected().has_few_blocks();
        let choice = if nothing { Choice::All } else { problem.select().choice(set, options, fits) };
        let with = |kv_heads| Self::with(problem, set, facts, options, (saves, kv_heads, choice));
        // What is saved has room for all heads. No pass has heads of both halves, unless it has all.
        let halves = problem.window_multiprocessors(set, facts, options).is_some();
        let heads = problem.sizes.num_kv_heads;
        let passes = problem.passes().filter(|pass| !halves || *pass == heads || (heads / 2).is_multiple_of(*pass));
        let passes = passes.take(if saves { 1 } else { usize::MAX });
        let plans = passes.map(with).collect::<Result<Vec<_>>>()?.into_iter();
        // Few passes, but not at any price: where stage `selected` has less memory, it takes more and smaller chunks.
        let best = choose(most, plans, |plan| plan.workspace.size_bytes(), |plan| plan.launches);
        best.map_or_else(|| with(problem.sizes.num_kv_heads), Ok)
    }

    fn with(
        problem: &NsaProblem,
        set: KernelSet,
        facts: &DeviceFacts,
        options: &PlanOptions,
        (saves, kv_heads, choice): (bool, usize, Choice),
    ) -> Result<Self> {
        let pass = problem.with_kv_heads(kv_heads);
        let (mut workspace, mut before) = (Workspace::default(), Workspace::default());
        let kernel = pass.specialisation(Kernel::Band, set);
        let attention = RowTiles::new(&pass.sizes, band::tile_rows(&kernel));
        let (windows, tile_tokens) = (Some(pass.windows), Some(attention.tile_tokens));
        let spec = TableSpec { windows, tile_tokens, tile_keys: None };
        let tables = TablePlan::new(spec, pass.sizes.sequences, &mut workspace);
        let memory = [&mut workspace, &mut before];
        let lists = ListPlan::new(&pass.select(), (set, facts), &attention, choice, memory)?;
        let at_once = if problem.compresses_at_once(options) { problem } else { &pass };
        let compress = at_once.compress().map(|compress| CompressScratch::forward(&compress, &mut workspace));
        let temporaries = (!saves).then(|| ForwardTemporaries::new(&pass, at_once, &mut workspace, &mut before));
        let compress_heads = at_once.sizes.num_kv_heads;
        let window_multiprocessors = problem.window_multiprocessors(set, facts, options);
        let options = left(options, &workspace);
        let parts = problem.parts(kv_heads, window_multiprocessors);
        let part = problem.with_kv_heads(kv_heads / parts);
        let plan = SelectedPlan::with_lists(&part.selected(), set, facts, &options, Lists::Selected);
        let one_walk = |kernel: Specialisation| window_multiprocessors.is_none() && kernel.exists(1);
        let window_goes_on = lists.is_all_blocks() && plan.is_unmasked() && one_walk(pass.window_too_kernel(set));
        let window_beside = plan.masked().is_some() && one_walk(pass.specialisation(Kernel::BandPair, set));
        let (own, before) = (plan.workspace().size_bytes(), before.size_bytes());
        let makes_mask = window_beside && lists.makes_mask();
        let one_kernel = makes_mask && one_walk(pass.window_too_kernel(set));
        let early = one_kernel.then(|| EarlyRows::new(&problem.select(), &attention, facts.multiprocessors)).flatten();
        let scratch = workspace.add("scratch", if makes_mask { before } else { own.max(before) });
        let mask = makes_mask.then(|| workspace.add("mask", own));
        Ok(Self {
            problem: *problem,
            saves,
            kv_heads,
            window_multiprocessors,
            window_goes_on,
            window_beside,
            early,
            compress_heads,
            attention,
            tables,
            lists,
            compress,
            temporaries,
            scratch,
            mask,
            stage_budget_bytes: options.budget_bytes,
            launches: (problem.sizes.num_kv_heads / kv_heads.max(1)) * (parts * plan.launches() + OTHER_LAUNCHES),
            workspace,
        })
    }

    /// One pass.
    pub(crate) fn pass(&self) -> NsaProblem {
        self.problem.with_kv_heads(self.kv_heads)
    }

    /// Position from which on rows are attended to by compressed attention that chooses and by one walk; 0: all are.
    pub(crate) fn split(&self) -> i32 {
        self.early.map_or(0, |early| early.end as i32)
    }

    /// Whether the window of one half of the heads runs beside the selected blocks of the other.
    pub(crate) fn is_halved(&self) -> bool {
        self.problem.parts(self.kv_heads, self.window_multiprocessors) == 2
    }

    /// Whether the window comes before the selected blocks in the pass that starts at a kv head.
    pub(crate) fn window_first(&self, first: usize) -> bool {
        self.window_multiprocessors.is_some() && first >= self.problem.sizes.num_kv_heads / 2
    }

    /// The heads whose selected blocks, and whose window, are attended to at a time.
    pub(crate) fn part(&self) -> NsaProblem {
        self.problem.with_kv_heads(self.kv_heads / self.problem.parts(self.kv_heads, self.window_multiprocessors))
    }
}

/// What a stage inside the whole may take: the budget less what is taken, and a quarter of it in any case.
fn left(options: &PlanOptions, taken: &Workspace) -> PlanOptions {
    let budget_bytes = options.budget_bytes.saturating_sub(taken.size_bytes()).max(options.budget_bytes / 4);
    PlanOptions { budget_bytes, ..*options }
}

impl fmt::Display for NsaForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, kv_heads, workspace, .. } = self;
        let saves = if self.saves { ", saves" } else { "" };
        let goes_on = if self.window_goes_on { ", one walk of window, all keys and compressed keys" } else { "" };
        let beside = if self.window_beside { ", selected blocks and window in one walk" } else { "" };
        write!(f, "nsa forward{saves}: {problem}; {kv_heads} kv heads a pass{goes_on}{beside}")?;
        if let Some(EarlyRows { end, .. }) = self.early {
            write!(f, ", rows before {end} with compressed keys")?;
        }
        write!(f, "; {workspace}")
    }
}

/// What a pass of a backward keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct BackwardTemporaries {
    /// Statistics of the rows of each branch, and their bounds.
    pub row_stats: [Slot; 3],
    /// Gradients of compressed key and value.
    pub compressed: [Slot; 2],
    /// Bounds of compressed keys, then of keys, and what those share who clear sums.
    pub key_bounds: Slot,
}

/// Passes and workspace of a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NsaBackwardPlan {
    /// The call.
    pub problem: NsaProblem,
    /// kv heads of a pass: all, except in calls so long that their statistics do not fit the budget.
    pub kv_heads: usize,
    /// Ranges of keys that take turns in stage `selected`.
    pub key_ranges: usize,
    /// Compressed attention.
    pub compressed: BandBackwardPlan,
    /// Window attention, where it is not done together with the selected blocks.
    pub window: Option<BandBackwardPlan>,
    /// Compressed attention and the window, which may have the selected blocks with it, add gradients of queries to one scaled sum. The
    /// last branch makes the gradient of it: selected blocks by themselves, with their own sums, or compressed attention. Else each
    /// branch rounds, and the next one adds to that.
    pub shares_query_sums: bool,
    /// Of the compressed keys, of the window.
    pub(crate) tables: TablePlan,
    pub(crate) window_tables: Option<TablePlan>,
    pub(crate) compress: [CompressScratch; 2],
    pub(crate) temporaries: BackwardTemporaries,
    /// Scratch of one attention at a time; of compressed attention, which may run beside another one.
    pub(crate) scratch: Slot,
    pub(crate) compressed_scratch: Slot,
    /// What each attention may take.
    pub(crate) stage_budget_bytes: usize,
    /// Scratch memory.
    pub workspace: Workspace,
}

impl NsaBackwardPlan {
    /// Plans a checked problem for the kernels of `set`.
    pub fn new(problem: &NsaProblem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Self {
        let most = options.budget_bytes + problem.topk_indices_bytes();
        let plans = problem.passes().map(|kv_heads| Self::with(problem, set, facts, options, kv_heads));
        // The most heads, of those of which stage `selected` can hold the most keys beside the statistics.
        let best = plans.filter(|plan| plan.workspace.size_bytes() <= most).min_by_key(|plan| plan.key_ranges);
        best.unwrap_or_else(|| Self::with(problem, set, facts, options, 1))
    }

    fn with(problem: &NsaProblem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions, kv_heads: usize) -> Self {
        let pass = problem.with_kv_heads(kv_heads);
        let mut workspace = Workspace::default();
        let compress = pass.compress().map(|compress| CompressScratch::backward(&compress, &mut workspace));
        let [_, _, compressed] = pass.row_bytes();
        let temporaries = BackwardTemporaries {
            row_stats: [(); 3].map(|()| workspace.add("row_stats", pass.sizes.given_stats_bytes())),
            compressed: [(); 2].map(|()| workspace.add("compressed gradient", compressed)),
            key_bounds: workspace.add("bounds", 3 * BOUNDS_BYTES),
        };
        // Stage `selected` counts the ids of this pass; the room for those of the others is to spare.
        let others = problem.topk_indices_bytes() - pass.topk_indices_bytes();
        let options = left(&PlanOptions { budget_bytes: options.budget_bytes + others, ..*options }, &workspace);
        let kernel = pass.specialisation(Kernel::BandBackward, set);
        let selected = SelectedBackwardPlan::of_branch(&pass.selected(), (set, facts), &options, pass.window_size);
        let attentions = |of: [Option<QuerySums>; 2]| {
            let plan = |problem: BandProblem, query_sums| {
                BandBackwardPlan::with_row_stats(&problem, &kernel, facts, &PlanOptions { query_sums, ..options })
            };
            let window = selected.window_size().is_none().then(|| plan(pass.window(), of[1]));
            (plan(pass.select().attention(), of[0]), window)
        };
        let asked = options.query_sums;
        let (compressed, window) = attentions([asked.or(Some(QuerySums::Scaled)); 2]);
        let of_keys = window.as_ref().or(selected.attention());
        let shares_query_sums = selected.takes_sums() && of_keys.is_some_and(|plan| compressed.can_share_sums(plan));
        let (compressed, window) = match window {
            // Beside the others, who have work for the whole device.
            None if shares_query_sums => {
                let beside = |other: &BandBackwardPlan| compressed.beside(other, &kernel, facts, &options);
                (selected.attention().map_or_else(|| compressed.clone(), beside), None)
            }
            _ if shares_query_sums => (compressed, window),
            // Who is not the first adds to gradients of queries that others rounded, which cannot be done in memory.
            Some(_) => attentions([asked, Some(QuerySums::F32)]),
            None => attentions([Some(QuerySums::F32); 2]),
        };
        let mut table =
            |plan: &BandBackwardPlan| TablePlan::new(plan.tables.spec(), pass.sizes.sequences, &mut workspace);
        let (tables, window_tables) = (table(&compressed), window.as_ref().map(&mut table));
        let of_others = window.iter().map(|plan| &plan.workspace).chain([selected.workspace()]);
        let (bytes, own) = (of_others.map(Workspace::size_bytes).max().unwrap_or(0), compressed.workspace.size_bytes());
        let beside = shares_query_sums && window.is_none();
        let scratch = workspace.add("scratch", if beside { bytes } else { bytes.max(own) });
        let compressed_scratch = if beside { workspace.add("scratch of compressed", own) } else { scratch };
        Self {
            problem: *problem,
            kv_heads,
            key_ranges: selected.key_ranges(),
            compressed,
            window,
            shares_query_sums,
            tables,
            window_tables,
            compress,
            temporaries,
            scratch,
            compressed_scratch,
            stage_budget_bytes: options.budget_bytes,
            workspace,
        }
    }

    /// One pass.
    pub(crate) fn pass(&self) -> NsaProblem {
        self.problem.with_kv_heads(self.kv_heads)
    }
}

impl fmt::Display for NsaBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, kv_heads, key_ranges, workspace, .. } = self;
        let shares = if self.shares_query_sums { ", one sum of gradients of queries" } else { "" };
        let passes = format!("{kv_heads} kv heads a pass, {key_ranges} ranges of keys{shares}");
        write!(f, "nsa backward: {problem}; {passes}; {workspace}")
    }
}
