//! The kernel files, embedded in the binary, and the translation unit that is generated around one of them.

use crate::arch::KernelSet;
use crate::backward::UNIT_HEADS;
use crate::band::{BOTH_STEPS, MAX_WINDOW_STEPS_HEAD_DIM, WINDOW_STEPS};
use crate::band_backward::{MAX_HOPPER_HEAD_DIM, SUMS_HEAD_DIM, WIDE_ROWS};
use crate::plan::MAX_CTA_SMEM_BYTES;
use crate::{band_pair, band_select, params};
use fsa_core::config::BLOCK_SIZES;
use fsa_core::{DType, Error};
use serde::Serialize;
use std::fmt::{self, Write};
use std::str::FromStr;

mod files;
pub(crate) use files::{files, headers};

/// Head dimensions that the kernels are compiled for.
pub const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// Largest block whose backward on Hopper can write partials: parts of a block side by side would write to one slot. The
/// portable kernel takes them in turn.
const MAX_PARTIALS_BLOCK: usize = 128;

/// A kernel: one file per set or for all sets, one host file of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// Stage `index`.
    Index,
    /// KV-major forward of stage `selected`.
    Attend,
    /// Its merge, with the dense blocks.
    Reduce,
    /// KV-major backward of stage `selected`.
    Backward,
    /// Prefix sums of a batch, for the kernels below.
    Prepare,
    /// Forward of the stages whose rows see an interval of keys: `dense`, `window`, `compressed`.
    Band,
    /// Forward of stage `selected` with a mask and stage `window` in one walk of the keys.
    BandPair,
    /// Backward of the stages with an interval of keys.
    BandBackward,
    /// Lists of blocks as masks, with which the two above do stage `selected`.
    BlockMask,
    /// Stage `select`.
    Select,
    /// Forward of stage `compressed` and stage `select` in one pass, for windows and heads where that is possible.
    BandSelect,
    /// Stage `compress` by sums, forward and backward.
    Compress,
    /// Stage `compress` by a matrix product, forward and backward.
    CompressLinear,
    /// Stage `rope`.
    Rope,
    /// Stage `combine`, forward and backward.
    Combine,
}

/// How the gradients of a query through its blocks are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QuerySums {
    /// In memory, in f32.
    F32,
    /// In memory, in f16 with a factor that keeps them in range: half the bytes. For gradients in bf16, which has three
    /// bits less.
    Scaled,
    /// One partial per block, merged in order: slower, but repeatable.
    Partials,
}

impl FromStr for QuerySums {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "f32" => Ok(Self::F32),
            "scaled" => Ok(Self::Scaled),
            _ => Err(Error::input("query_sums", "f32 or scaled", format!("{text:?}"))),
        }
    }
}

/// What a kernel file depends on, of what a call says.
struct Depends {
    /// Type and length of the rows.
    rows: bool,
    /// Keys of a block.
    block_size: bool,
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Kernel; 15] = [
        Kernel::Index,
        Kernel::Attend,
        Kernel::Reduce,
        Kernel::Backward,
        Kernel::Prepare,
        Kernel::Band,
        Kernel::BandPair,
        Kernel::BandBackward,
        Kernel::BlockMask,
        Kernel::Select,
        Kernel::BandSelect,
        Kernel::Compress,
        Kernel::CompressLinear,
        Kernel::Rope,
        Kernel::Combine,
    ];

    /// Stem of its files.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Index => "index",
            Kernel::Attend => "attend",
            Kernel::Reduce => "reduce",
            Kernel::Backward => "backward",
            Kernel::Prepare => "prepare",
            Kernel::Band => "band",
            Kernel::BandPair => "band_pair",
            Kernel::BandBackward => "band_backward",
            Kernel::BlockMask => "block_mask",
            Kernel::Select => "select",
            Kernel::BandSelect => "band_select",
            Kernel::Compress => "compress",
            Kernel::CompressLinear => "compress_linear",
            Kernel::Rope => "rope",
            Kernel::Combine => "combine",
        }
    }

    /// What is not in it would only compile the same kernel again.
    fn depends(self) -> Depends {
        use Kernel::{Attend, Backward, BandPair, BandSelect, BlockMask, Index, Prepare, Reduce, Select};
        let rows = !matches!(self, Index | Prepare);
        let block_size =
            matches!(self, Index | Attend | Reduce | Backward | BandPair | BlockMask | Select | BandSelect);
        Depends { rows, block_size }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a kernel file is compiled for. No length of a sequence is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Specialisation {
    /// Which kernel.
    pub kernel: Kernel,
    /// Which of its files.
    pub set: KernelSet,
    /// Type of the tensors: bf16 or f16.
    pub is_bf16: bool,
    /// Elements of a row, one of [`HEAD_DIMS`].
    pub head_dim: usize,
    /// Keys of a block.
    pub block_size: usize,
    /// Backward only; of an interval of keys: [`QuerySums::F32`] in two passes, [`QuerySums::Scaled`] in one.
    pub query_sums: QuerySums,
    /// Backward with [`QuerySums::Scaled`] only: heads of a group that a unit takes, side by side in its tiles of rows.
    pub unit_heads: usize,
    /// Attention to an interval of keys only: rows see the blocks that they list.
    pub block_mask: bool,
    /// Attention to an interval of keys only: to a window, and then to all keys. Its backward, [`QuerySums::Scaled`] only: the gradients
    /// of attention to the window are added, of which the rows have statistics of their own. Where there is no mask, too.
    pub window_too: bool,
    /// [`QuerySums::Scaled`] of an interval of keys only, and not with the window: tiles of more rows.
    pub wide_rows: bool,
    /// Attention that chooses blocks only: a group has one head.
    pub one_head: bool,
    /// Attention that chooses blocks only: of one sequence whose compressed keys are a single step.
    pub few_keys: bool,
    /// Hopper's attention to a window only: keys of a step, where they are not what other attentions take.
    pub step_keys: Option<usize>,
}

impl Specialisation {
    /// The specialisation of a kernel for a call. Of what its file does not depend on, one value stands for all.
    pub fn new(kernel: Kernel, set: KernelSet, dtype: DType, head_dim: usize, block_size: usize) -> Self {
        let depends = kernel.depends();
        let (is_bf16, head_dim) = if depends.rows { (dtype == DType::Bf16, head_dim) } else { (true, 128) };
        let block_size = if depends.block_size { block_size } else { 64 };
        let (query_sums, [block_mask, window_too, wide_rows, one_head, few_keys]) = (QuerySums::F32, [false; 5]);
        let (unit_heads, step_keys) = (1, None);
        Self {
            kernel,
            set,
            is_bf16,
            head_dim,
            block_size,
            query_sums,
            unit_heads,
            block_mask,
            window_too,
            wide_rows,
            one_head,
            few_keys,
            step_keys,
        }
    }

    /// The same, or the portable kernel where the set has none of its own.
    pub(crate) fn or_portable(self, topk: usize) -> Self {
        if self.exists(topk) { self } else { Self { set: KernelSet::Sm80, ..self } }
    }

    /// Type of the tensors.
    pub fn dtype(&self) -> DType {
        if self.is_bf16 { DType::Bf16 } else { DType::F16 }
    }

    /// The specialisation that adds up gradients of queries in another way.
    pub fn with_query_sums(self, query_sums: QuerySums) -> Self {
        Self { query_sums, ..self }
    }

    /// The specialisation whose units take so many heads.
    pub fn with_unit_heads(self, unit_heads: usize) -> Self {
        Self { unit_heads, ..self }
    }

    /// The specialisation with a mask of blocks.
    pub fn with_block_mask(self, block_size: usize) -> Self {
        Self { block_mask: true, block_size, ..self }
    }

    /// The specialisation of one pass that does the window, too.
    pub fn with_window_too(self) -> Self {
        if self.kernel == Kernel::Band {
            return Self { window_too: true, ..self.with_step_keys(BOTH_STEPS) };
        }
        Self { query_sums: QuerySums::Scaled, window_too: true, wide_rows: false, ..self }
    }

    /// The specialisation of one pass with tiles of more rows, or not.
    pub fn with_wide_rows(self, wide_rows: bool) -> Self {
        Self { wide_rows, ..self }
    }

    /// The specialisation for groups of one head, or of several.
    pub fn with_one_head(self, one_head: bool) -> Self {
        Self { one_head, ..self }
    }

    /// The specialisation for one sequence of few keys, and groups of any number of heads.
    pub fn with_few_keys(self) -> Self {
        Self { one_head: false, few_keys: true, ..self }
    }

    /// The specialisation with steps of so many keys.
    pub fn with_step_keys(self, step_keys: usize) -> Self {
        Self { step_keys: Some(step_keys), ..self }
    }

    /// Path of its kernel file below `kernels/`: one for all architectures, or the one of its set.
    ///
    /// # Errors
    /// There is no such kernel for the set.
    pub fn file(&self) -> Result<&'static str, Error> {
        let stem = match (self.kernel, self.query_sums) {
            (Kernel::BandBackward, QuerySums::Scaled) => "band_sums",
            (Kernel::BandSelect, _) if self.one_head => "band_select_rows",
            (Kernel::BandSelect, _) if self.few_keys => "band_select_few",
            (kernel, _) => kernel.name(),
        };
        let names = [format!("{stem}.cuh"), format!("{stem}_{}.cuh", self.set)];
        let file = files().iter().map(|(path, _)| *path).find(|path| names.iter().any(|name| name == path));
        file.ok_or_else(|| Error::Unsupported {
            constraint: format!("kernel `{}`", self.kernel),
            got: format!("the kernels for {}", self.set),
            supported: "the kernels of this version".into(),
        })
    }

    /// Dynamic shared memory that a CTA takes where rows list `topk` blocks; 0 where it depends on other sizes of a call.
    pub fn smem_bytes(&self, topk: usize) -> usize {
        match self.kernel {
            Kernel::Index | Kernel::Prepare | Kernel::BlockMask | Kernel::Compress | Kernel::Rope | Kernel::Combine => {
                0
            }
            Kernel::Attend => crate::attend::smem_bytes(self),
            Kernel::Reduce => crate::reduce::smem_bytes(self, topk),
            Kernel::Backward => crate::backward::smem_bytes(self),
            Kernel::Band | Kernel::BandPair => crate::band::smem_bytes(self),
            Kernel::BandBackward => crate::band_backward::smem_bytes(self),
            Kernel::Select => crate::select::usual_smem_bytes(self, topk),
            Kernel::BandSelect => crate::band_select::smem_bytes(self),
            Kernel::CompressLinear => crate::compress_linear::smem_bytes(self),
        }
    }

    /// True if there is such a kernel, and a CTA of it has the shared memory for rows that list `topk` blocks.
    pub(crate) fn exists(&self, topk: usize) -> bool {
        let portable = self.set == KernelSet::Sm80;
        let writes = match self.query_sums {
            QuerySums::F32 => true,
            QuerySums::Scaled if self.kernel == Kernel::BandBackward => {
                !portable && self.is_bf16 && self.head_dim == SUMS_HEAD_DIM && self.window_too >= self.block_mask
            }
            QuerySums::Scaled => !portable && self.is_bf16 && self.head_dim < 256,
            QuerySums::Partials => portable || (self.block_size <= MAX_PARTIALS_BLOCK && self.head_dim < 256),
        };
        let fits = match self.kernel {
            Kernel::BandBackward => portable || self.head_dim <= MAX_HOPPER_HEAD_DIM,
            Kernel::BandPair => self.head_dim <= band_pair::MAX_HEAD_DIM,
            Kernel::BandSelect => self.head_dim <= band_select::MAX_HEAD_DIM,
            Kernel::Band => self.step_keys.is_none() || (!portable && self.head_dim <= MAX_WINDOW_STEPS_HEAD_DIM),
            _ => true,
        };
        writes && fits && self.file().is_ok() && self.smem_bytes(topk) <= MAX_CTA_SMEM_BYTES
    }

    /// The kernels of the file and the parameter struct that each takes.
    pub(crate) fn entry_points(&self) -> &'static [(&'static str, &'static str)] {
        match self.kernel {
            Kernel::Index => crate::index::ENTRY_POINTS,
            Kernel::Attend => crate::attend::ENTRY_POINTS,
            Kernel::Reduce => crate::reduce::ENTRY_POINTS,
            Kernel::Backward => crate::backward::ENTRY_POINTS,
            Kernel::Prepare => crate::prepare::ENTRY_POINTS,
            Kernel::Band => crate::band::entry_points(self),
            Kernel::BandPair => band_pair::ENTRY_POINTS,
            Kernel::BandBackward => crate::band_backward::entry_points(self),
            Kernel::BlockMask => crate::block_mask::ENTRY_POINTS,
            Kernel::Select => crate::select::ENTRY_POINTS,
            Kernel::BandSelect => crate::band_select::ENTRY_POINTS,
            Kernel::Compress => crate::compress::ENTRY_POINTS,
            Kernel::CompressLinear => crate::compress_linear::ENTRY_POINTS,
            Kernel::Rope => crate::rope::ENTRY_POINTS,
            Kernel::Combine => crate::combine::ENTRY_POINTS,
        }
    }

    /// What the file's constants must be: expression and value.
    fn constants(&self) -> Vec<(&'static str, usize)> {
        match self.kernel {
            Kernel::Index => vec![("MOST_UNIT_GROWTH", crate::plan::MOST_UNIT_GROWTH)],
            Kernel::Prepare => Vec::new(),
            Kernel::Attend => crate::attend::constants(self),
            Kernel::Reduce => crate::reduce::constants(self),
            Kernel::Backward => crate::backward::constants(self),
            Kernel::Band | Kernel::BandPair => crate::band::constants(self),
            Kernel::BandBackward => crate::band_backward::constants(self),
            Kernel::BlockMask => crate::block_mask::constants(),
            Kernel::Select => crate::select::constants(self),
            Kernel::BandSelect => crate::band_select::constants(self),
            Kernel::Compress => crate::compress::constants(self),
            Kernel::CompressLinear => crate::compress_linear::constants(self),
            Kernel::Rope => crate::rope::constants(self),
            Kernel::Combine => crate::combine::constants(self),
        }
    }

    /// The translation unit: constants, the kernel file, and what it must agree with Rust on.
    ///
    /// # Errors
    /// There is no such kernel for the set.
    pub fn translation_unit(&self) -> Result<String, Error> {
        let file = self.file()?;
        let mut text = String::new();
        let bf16 = u8::from(self.is_bf16);
        let defines = [("HEAD_DIM", self.head_dim), ("BLOCK_SIZE", self.block_size), ("IS_BF16", bf16.into())];
        for (name, value) in defines {
            let _ = writeln!(text, "#define FSA_{name} {value}");
        }
        if self.kernel == Kernel::Backward {
            for (name, sums) in [("QUERY_PARTIALS", QuerySums::Partials), ("SCALED_SUMS", QuerySums::Scaled)] {
                let _ = writeln!(text, "#define FSA_{name} {}", u8::from(self.query_sums == sums));
            }
            let _ = writeln!(text, "#define FSA_TILE_HEADS {}", self.unit_heads);
        }
        if self.block_mask {
            let _ = writeln!(text, "#define FSA_BLOCK_MASK 1");
        }
        if self.window_too {
            let _ = writeln!(text, "#define FSA_WINDOW_TOO 1");
        }
        if self.wide_rows {
            let _ = writeln!(text, "#define FSA_SUM_ROWS {WIDE_ROWS}");
        }
        if self.kernel == Kernel::CompressLinear {
            let _ = writeln!(text, "#define FSA_WGMMA {}", u8::from(crate::compress_linear::takes_wgmma(self)));
        }
        if let Some(step_keys) = self.step_keys {
            let _ = writeln!(text, "#define FSA_STEP_KEYS {step_keys}");
        }
        let _ = writeln!(text, "#include \"{file}\"");
        text.push_str(&params::assertions());
        for (expression, value) in self.constants() {
            let _ = writeln!(text, "static_assert({expression} == {value}, \"{expression}\");");
        }
        text.push_str("template <class A, class B> struct Same { static constexpr bool value = false; };\n");
        text.push_str("template <class A> struct Same<A, A> { static constexpr bool value = true; };\n");
        for (kernel, params) in self.entry_points() {
            let same = format!("Same<decltype({kernel}), void({params})>::value");
            let _ = writeln!(text, "static_assert({same}, \"{kernel} takes {params}\");");
        }
        Ok(text)
    }
}

impl fmt::Display for Specialisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, set, head_dim, block_size, .. } = self;
        write!(f, "{kernel}")?;
        if self.file().is_ok_and(|file| file.strip_suffix(".cuh") != Some(kernel.name())) {
            write!(f, "_{set}")?;
        }
        let depends = kernel.depends();
        if depends.rows {
            write!(f, " {} head_dim {head_dim}", self.dtype())?;
        }
        if depends.block_size || self.block_mask {
            write!(f, " block {block_size}")?;
        }
        let flags = [
            (self.block_mask, " mask"),
            (self.window_too, " window too"),
            (self.wide_rows, " wide tiles"),
            (self.one_head, " one head"),
            (self.few_keys, " few keys"),
        ];
        for (_, text) in flags.into_iter().filter(|(is_set, _)| *is_set) {
            f.write_str(text)?;
        }
        if let Some(step_keys) = self.step_keys {
            write!(f, " steps of {step_keys}")?;
        }
        if self.unit_heads > 1 {
            write!(f, " {} heads", self.unit_heads)?;
        }
        match self.query_sums {
            QuerySums::F32 => Ok(()),
            QuerySums::Scaled => f.write_str(" scaled sums"),
            QuerySums::Partials => f.write_str(" partials"),
        }
    }
}

/// Every specialisation of `set` that has a kernel file and fits into the shared memory of a CTA.
pub fn specialisations(set: KernelSet) -> Vec<Specialisation> {
    let mut all = Vec::new();
    for kernel in Kernel::ALL {
        for dtype in [DType::Bf16, DType::F16] {
            for head_dim in HEAD_DIMS {
                for block_size in BLOCK_SIZES {
                    let specialisation = Specialisation::new(kernel, set, dtype, head_dim, block_size);
                    all.push(specialisation);
                    match kernel {
                        Kernel::Backward => {
                            let scaled = specialisation.with_query_sums(QuerySums::Scaled);
                            all.extend([scaled, specialisation.with_query_sums(QuerySums::Partials)]);
                            all.extend(UNIT_HEADS.map(|heads| scaled.with_unit_heads(heads)));
                        }
                        Kernel::Band => {
                            all.extend([specialisation.with_block_mask(block_size), specialisation.with_window_too()]);
                            all.extend(WINDOW_STEPS.map(|step_keys| specialisation.with_step_keys(step_keys)));
                        }
                        Kernel::BandSelect => {
                            all.extend([specialisation.with_one_head(true), specialisation.with_few_keys()]);
                        }
                        Kernel::BandBackward => all.extend([
                            specialisation.with_block_mask(block_size),
                            specialisation.with_query_sums(QuerySums::Scaled),
                            specialisation.with_query_sums(QuerySums::Scaled).with_wide_rows(true),
                            specialisation.with_window_too(),
                            specialisation.with_block_mask(block_size).with_window_too(),
                            specialisation.with_block_mask(block_size).with_window_too().with_wide_rows(true),
                        ]),
                        _ => {}
                    }
                }
            }
        }
    }
    all.sort_unstable();
    all.dedup();
    all.retain(|specialisation| specialisation.exists(1));
    all
}

/// Those of the committed resource table: every block size at head_dim 128, every head_dim at blocks of 64, bf16; the other dtype once.
pub fn tabled(set: KernelSet) -> Vec<Specialisation> {
    let mut all = specialisations(set);
    all.retain(|Specialisation { is_bf16, head_dim, block_size, .. }| match (head_dim, block_size) {
        (128, 64) => true,
        (128, _) | (_, 64) => *is_bf16,
        _ => false,
    });
    all
}

#[cfg(test)]
mod tests;
