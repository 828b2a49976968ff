//! Stage `combine`: the gated sum of the branches, its backward, and the statistics of rows with which stage `nsa` does without the
//! gradients of the branches.
//!
//! Kernel file: `kernels/combine.cuh`.

use crate::arch::KernelSet;
use crate::block_mask::VALUE_ROWS;
use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{Branch, CombineBackwardParams, CombineParams, CombineStatisticsParams, SumsOpening};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("combine", "CombineParams"),
    ("combine_backward", "CombineBackwardParams"),
    ("combine_statistics", "CombineStatisticsParams"),
];

/// Rows of a CTA, and its threads.
const CTA_ROWS: usize = 4;
const THREADS: usize = 256;
/// CTAs that a multiprocessor runs at one time, as the kernel is bounded.
const CTAS_OF_MULTIPROCESSOR: usize = 4;

/// What the kernel file must agree with.
pub(crate) fn constants(_: &Specialisation) -> Vec<(&'static str, usize)> {
    vec![
        ("CTA_ROWS", CTA_ROWS),
        ("CTA_THREADS", THREADS),
        ("CTAS_OF_MULTIPROCESSOR", CTAS_OF_MULTIPROCESSOR),
        ("VALUE_ROWS", VALUE_ROWS),
    ]
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct CombineKernels {
    combine: Function<CombineParams>,
    backward: Function<CombineBackwardParams>,
    statistics: Function<CombineStatisticsParams>,
    can_overlap: bool,
}

impl CombineKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            combine: module.function("combine")?,
            backward: module.function("combine_backward")?,
            statistics: module.function("combine_statistics")?,
            can_overlap: specialisation.set == KernelSet::Sm90,
        })
    }

    /// The sum of the branches.
    pub(crate) fn combine(&self, stream: &Stream, params: &CombineParams) -> Result<()> {
        self.combine.launch(stream, dims(params), params)
    }

    /// The gradients of branches and gates.
    pub(crate) fn backward(&self, stream: &Stream, params: &CombineBackwardParams) -> Result<()> {
        self.backward.launch(stream, dims(&params.forward), params)
    }

    /// The gradients of the gates, and the statistics of rows of every branch, and what is to be opened besides. Behind the kernel that
    /// clears bounds and fills tables, if there are such, which on Hopper it may overlap.
    pub(crate) fn statistics(&self, stream: &Stream, params: &CombineStatisticsParams) -> Result<()> {
        let follows = params.row_bounds.iter().any(|bounds| *bounds != Address::default());
        let mut dims = LaunchDims { overlaps: self.can_overlap && follows, ..dims(&params.forward) };
        dims.grid[0] += params.opening.ctas as u32;
        self.statistics.launch(stream, dims, params)
    }
}

impl SumsOpening {
    /// The same with the CTAs that it takes for `total_kv` tokens and, if there is a mask, the lists of all rows. They come first,
    /// because they load in two turns, but behind those of rows where all run at once: else some multiprocessors got more rows than others.
    pub(crate) fn with_ctas(self, total_kv: usize, multiprocessors: usize) -> Self {
        let lists = if self.mask.rows == Address::default() { 0 } else { self.total_q as usize };
        let ctas = self.num_kv_heads as usize * total_kv.max(lists).div_ceil(VALUE_ROWS);
        let of_rows = (self.total_q as usize).div_ceil(CTA_ROWS);
        let run_at_once = of_rows + ctas <= CTAS_OF_MULTIPROCESSOR * multiprocessors;
        Self { ctas: ctas as i32, row_cta: if run_at_once { 0 } else { ctas as i32 }, ..self }
    }
}

fn dims(params: &CombineParams) -> LaunchDims {
    let grid = [(params.rows as usize).div_ceil(CTA_ROWS) as u32, 1, 1];
    LaunchDims { grid, threads: THREADS as u32, smem_bytes: 0, overlaps: false }
}

impl Branch {
    /// Where the log-sum-exps go: of branches that are discarded only those of the first are read, by the selection.
    pub(crate) fn lse(&self, lse: Address) -> Address {
        if self.discards != 0 && self.number > 0 { Address::default() } else { lse }
    }

    /// What a launch takes of it.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u64> + use<> {
        let Self { sum, gates, number, accumulate, discards } = *self;
        let strides = [sum.row_stride, sum.head_stride, gates.row_stride, gates.head_stride];
        let words = strides.into_iter().chain([number, accumulate, discards].map(i64::from));
        [sum.data.0, gates.data.0].into_iter().chain(words.map(|word| word as u64))
    }
}
