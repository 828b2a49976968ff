//! The plan of stage `select`: compressed attention, then the lists.

use super::tables::{TablePlan, TableSpec};
use super::{
    BandProblem, Keys, MAX_TOPK, PlanOptions, RowTiles, STATIC_SMEM_BYTES, Sizes, Slot, Windows, Workspace, require,
};
use crate::arch::KernelSet;
use crate::driver::DeviceFacts;
use crate::select::{Scoring, fitting, smem_bytes, tile_rows};
use crate::source::{Kernel, Specialisation};
use crate::{band, band_select};
use fsa_core::config::BLOCK_SIZES;
use fsa_core::{NsaConfig, Result, ScoreHeads};
use serde::Serialize;
use std::fmt;

/// Keys of a sequence from which on one pass is faster where a group has one head, as measured on the H200: the warps that attend choose, which
/// is a fixed cost for every row.
const ONE_HEAD_KEYS: usize = 2048;

/// A call of stage `select`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SelectProblem {
    /// Sizes of the tensors.
    pub sizes: Sizes,
    /// Windows of the compressed keys.
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
}

impl SelectProblem {
    /// A call with a checked configuration.
    pub fn new(sizes: &Sizes, config: &NsaConfig) -> Self {
        let NsaConfig { kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, score_heads, .. } =
            *config;
        let windows = Windows { kernel_size, kernel_stride };
        Self { sizes: *sizes, windows, block_size, topk, init_blocks, local_blocks, score_heads }
    }

    /// Its compressed attention.
    pub fn attention(&self) -> BandProblem {
        BandProblem { sizes: self.sizes, keys: Keys::Compressed(self.windows) }
    }

    /// Query heads of a group that vote.
    pub fn scored_heads(&self) -> usize {
        match self.score_heads {
            ScoreHeads::GroupSum => self.sizes.gqa_group_size(),
            ScoreHeads::FirstHead => 1,
        }
    }

    /// Size of `topk_indices`.
    pub fn topk_indices_bytes(&self) -> usize {
        self.sizes.num_kv_heads * self.sizes.total_q * self.topk * size_of::<i32>()
    }

    /// How compressed keys make blocks, in tiles of `tile_tokens` tokens.
    fn scoring(&self, tile_tokens: usize) -> Scoring {
        let Windows { kernel_size, kernel_stride } = self.windows;
        let (steps, reach) = (self.block_size / kernel_stride, kernel_size / kernel_stride - 1);
        let places = self.topk.saturating_sub(self.init_blocks + self.local_blocks);
        let scoring = Scoring { tile_tokens, steps, reach, topk: self.topk, places, segment_steps: 0, direct: false };
        let heads = self.scored_heads();
        Scoring { direct: scoring.is_direct(heads), segment_steps: scoring.has_segments(heads).into(), ..scoring }
    }

    /// The kernel of the lists: the portable one where the set has none for these windows.
    pub(crate) fn kernel(&self, set: KernelSet) -> Specialisation {
        let suits = set == KernelSet::Sm80 || self.scoring(1).suits_hopper(self.scored_heads());
        let set = if suits { set } else { KernelSet::Sm80 };
        self.sizes.specialisation(Kernel::Select, set, self.block_size)
    }

    /// Whether all blocks and compressed keys of the call fit one step, and there is room for a key: there is a kernel for one such sequence, for groups of any size.
    pub(crate) fn has_few_keys(&self) -> bool {
        let Sizes { sequences, total_kv, .. } = self.sizes;
        let has_keys = self.attention().total_keys() > 0;
        sequences == 1 && total_kv <= band_select::FEW_BLOCKS * self.block_size && has_keys
    }

    /// The kernel that attends to the compressed keys and makes the lists.
    pub(crate) fn choosing_kernel(&self, set: KernelSet) -> Specialisation {
        let Sizes { dtype, head_dim, .. } = self.sizes;
        let kernel = Specialisation::new(Kernel::BandSelect, set, dtype, head_dim, self.block_size);
        if self.has_few_keys() {
            return kernel.with_few_keys();
        }
        kernel.with_one_head(self.sizes.gqa_group_size() == 1)
    }

    /// The same, where there is one for these windows and heads.
    fn one_pass_kernel(&self, set: KernelSet) -> Option<Specialisation> {
        let (heads, kernel) = (self.scored_heads(), self.choosing_kernel(set));
        let suits = heads == self.sizes.gqa_group_size() && band_select::suits(&self.scoring(1), heads);
        (suits && kernel.exists(self.topk)).then_some(kernel)
    }

    /// How blocks are chosen: if nobody says so, in one pass where that is faster and its scores fit.
    pub(crate) fn choice(&self, set: KernelSet, options: &PlanOptions, fits: impl FnOnce(Choice) -> bool) -> Choice {
        let Sizes { total_kv, sequences, .. } = self.sizes;
        let faster = self.scored_heads() > 1 || self.has_few_keys() || total_kv >= sequences * ONE_HEAD_KEYS;
        let one_pass = self.one_pass_kernel(set).map(Choice::OnePass);
        let taken = one_pass.filter(|choice| options.one_pass.unwrap_or_else(|| faster && fits(*choice)));
        taken.unwrap_or(Choice::OwnPass)
    }

    /// The kernels of attention and lists besides that of the tables, which makes lists of all blocks.
    pub(crate) fn kernels(&self, set: KernelSet, lists: &ListPlan) -> Vec<Specialisation> {
        let attention = self.sizes.specialisation(Kernel::Band, set, 64);
        match lists {
            ListPlan::AllBlocks => vec![attention],
            ListPlan::OnePass(_) => vec![self.choosing_kernel(set)],
            ListPlan::OwnPass(_) => vec![attention, self.kernel(set)],
        }
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`fsa_core::Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts, kernels: &[Specialisation]) -> Result<()> {
        self.attention().check(facts, kernels)?;
        require(BLOCK_SIZES.contains(&self.block_size), "block_size", &self.block_size, "16, 32, 64, 128, 256")?;
        let (stride, multiple) = (self.windows.kernel_stride, "a multiple of kernel_stride");
        require(self.block_size.is_multiple_of(stride), "block_size", &self.block_size, multiple)?;
        require((1..=MAX_TOPK).contains(&self.topk), "topk on CUDA", &self.topk, "1 to 64")?;
        let forced = self.init_blocks.saturating_add(self.local_blocks);
        require(forced <= self.topk, "init_blocks and local_blocks", &forced, "together at most topk")
    }
}

impl fmt::Display for SelectProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; blocks of {}, top {}", self.attention(), self.block_size, self.topk)
    }
}

/// Tiles and workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SelectPlan {
    /// The call.
    pub problem: SelectProblem,
    /// Tiles of the attention.
    pub attention: RowTiles,
    pub(crate) tables: TablePlan,
    /// How the lists are made.
    pub lists: ListPlan,
    /// Scratch that later stages of a call may have.
    pub(crate) scratch: Slot,
    /// Scratch memory.
    pub workspace: Workspace,
}

/// How blocks are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Not at all: rows list all that they see.
    All,
    /// By the scores that compressed attention leaves, with its kernel.
    OnePass(Specialisation),
    /// By scores of their own.
    OwnPass,
}

/// How the lists are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ListPlan {
    /// Beside the tables, where rows list all blocks that they see. Inside the whole only: the stage's own calls have compressed keys,
    /// whose number does not say how many blocks there are.
    AllBlocks,
    /// In one pass with the attention.
    OnePass(ChoicePlan),
    /// After it, from scores of their own.
    OwnPass(ScorePlan),
}

/// Attention that leaves the scores of blocks, by which warps beside it choose, or its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ChoicePlan {
    /// Which take one tile after the other.
    pub ctas: usize,
    /// Bound on the steps of blocks of a tile.
    pub(crate) max_steps: usize,
    /// Whether they leave a mask of what is chosen, too.
    makes_masks: bool,
    /// Scores of the CTAs' tiles, in scratch that later stages may have.
    pub(crate) scores: Slot,
}

/// Tiles of the scores. They hold the heads that vote and no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ScorePlan {
    /// Tiles of rows.
    pub tiles: RowTiles,
    pub(crate) smem_bytes: usize,
    pub(crate) segment_steps: usize,
    pub(crate) direct: bool,
    /// Where the attention's tiles have another number of tokens.
    pub(crate) tables: Option<TablePlan>,
}

impl ScorePlan {
    fn new(
        problem: &SelectProblem,
        kernel: &Specialisation,
        facts: &DeviceFacts,
        attention: &RowTiles,
        workspace: &mut Workspace,
    ) -> Result<Self> {
        let sizes = &problem.sizes;
        let tiles = RowTiles::of_heads(sizes, problem.scored_heads(), tile_rows(kernel));
        let scoring = problem.scoring(tiles.tile_tokens);
        // Fewer tokens where their scores and lists do not fit: of long windows or lists.
        let most = facts.smem_per_cta_bytes.saturating_sub(STATIC_SMEM_BYTES);
        let scoring = fitting(kernel, &scoring, most);
        let (tiles, smem_bytes) = (tiles.with_tokens(sizes, scoring.tile_tokens), smem_bytes(kernel, &scoring));
        let got = format!("{smem_bytes} bytes of shared memory");
        require(smem_bytes <= most, "windows of stage select", &got, &format!("at most {most} bytes"))?;
        let spec = TableSpec { tile_tokens: Some(tiles.tile_tokens), ..TableSpec::default() };
        let other = tiles.tile_tokens != attention.tile_tokens;
        let tables = other.then(|| TablePlan::new(spec, sizes.sequences, workspace));
        let Scoring { segment_steps, direct, .. } = scoring;
        Ok(Self { tiles, smem_bytes, segment_steps, direct, tables })
    }
}

impl ChoicePlan {
    fn new(
        problem: &SelectProblem,
        kernel: &Specialisation,
        facts: &DeviceFacts,
        attention: &RowTiles,
        scratch: &mut Workspace,
    ) -> Self {
        let Sizes { num_kv_heads, .. } = problem.sizes;
        let ctas = band_select::ctas(kernel, attention.ctas(), num_kv_heads, facts.multiprocessors);
        // All tokens may be those of one sequence.
        let max_steps = band_select::max_steps(kernel, problem.sizes.total_kv);
        let scores = scratch.add("block scores", band_select::scores_bytes(kernel, ctas, max_steps));
        Self { ctas, max_steps, makes_masks: band_select::makes_masks(kernel, max_steps), scores }
    }
}

impl ListPlan {
    /// Plans the lists beside attention in tiles of `attention`. What is kept until the lists are made lies in `scratch`.
    ///
    /// # Errors
    /// The windows are too long for the shared memory of the device.
    pub(crate) fn new(
        problem: &SelectProblem,
        (set, facts): (KernelSet, &DeviceFacts),
        attention: &RowTiles,
        choice: Choice,
        [workspace, scratch]: [&mut Workspace; 2],
    ) -> Result<Self> {
        match choice {
            Choice::All => Ok(Self::AllBlocks),
            Choice::OnePass(kernel) => Ok(Self::OnePass(ChoicePlan::new(problem, &kernel, facts, attention, scratch))),
            Choice::OwnPass => {
                ScorePlan::new(problem, &problem.kernel(set), facts, attention, workspace).map(Self::OwnPass)
            }
        }
    }

    /// Whether rows list all blocks that they see.
    pub fn is_all_blocks(&self) -> bool {
        matches!(self, Self::AllBlocks)
    }

    /// Whether attention and lists are one pass.
    pub fn is_one_pass(&self) -> bool {
        matches!(self, Self::OnePass(_))
    }

    /// Whether those who choose make a mask of what they choose, too.
    pub(crate) fn makes_mask(&self) -> bool {
        matches!(self, Self::OnePass(plan) if plan.makes_masks)
    }

    /// Tables of its own.
    pub(crate) fn tables(&self) -> Option<&TablePlan> {
        match self {
            Self::AllBlocks | Self::OnePass(_) => None,
            Self::OwnPass(scores) => scores.tables.as_ref(),
        }
    }
}

impl fmt::Display for ListPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllBlocks => f.write_str("lists of all blocks"),
            Self::OnePass(ChoicePlan { ctas, .. }) => write!(f, "lists in the same pass of {ctas} CTAs"),
            Self::OwnPass(scores) => write!(f, "scores in {}", scores.tiles),
        }
    }
}

impl SelectPlan {
    /// Plans a checked problem for the kernels of `set`.
    ///
    /// # Errors
    /// The windows are too long for the shared memory of the device.
    pub fn new(problem: &SelectProblem, set: KernelSet, facts: &DeviceFacts, options: &PlanOptions) -> Result<Self> {
        let with = |choice| Self::with(problem, set, facts, choice);
        let fits = |choice| with(choice).is_ok_and(|plan| plan.workspace.size_bytes() <= options.budget_bytes);
        with(problem.choice(set, options, fits))
    }

    fn with(problem: &SelectProblem, set: KernelSet, facts: &DeviceFacts, choice: Choice) -> Result<Self> {
        let (mut workspace, mut before) = (Workspace::default(), Workspace::default());
        let kernel = problem.sizes.specialisation(Kernel::Band, set, 64);
        let attention = RowTiles::new(&problem.sizes, band::tile_rows(&kernel));
        let (windows, tile_tokens) = (Some(problem.windows), Some(attention.tile_tokens));
        let spec = TableSpec { windows, tile_tokens, tile_keys: None };
        let tables = TablePlan::new(spec, problem.sizes.sequences, &mut workspace);
        let memory = [&mut workspace, &mut before];
        let lists = ListPlan::new(problem, (set, facts), &attention, choice, memory)?;
        let scratch = workspace.add("scratch", before.size_bytes());
        Ok(Self { problem: *problem, attention, tables, lists, scratch, workspace })
    }
}

impl fmt::Display for SelectPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { problem, attention, lists, workspace, .. } = self;
        write!(f, "select: {problem}; attention in {attention}, {lists}; {workspace}")
    }
}
