//! Stage `index` on the device: for every block the rows that chose it, in two or four launches without sort or sync.
//!
//! Kernel file: `kernels/index.cuh`. The plan bounds every table from shapes alone; what does not exist is written
//! as absent on the device.

use crate::arch::KernelSet;
use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::IndexParams;
use crate::plan::IndexPlan;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("index_prepare", "IndexParams"),
    ("index_count", "IndexParams"),
    ("index_scan", "IndexParams"),
    ("index_scatter", "IndexParams"),
    ("index_build", "IndexParams"),
];

/// Threads of a CTA that counts.
const COUNT_THREADS: u32 = 256;
/// Threads of a CTA that scans: the scan's tree is written for this number.
const SCAN_THREADS: u32 = 1024;

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct IndexKernels {
    prepare: Function<IndexParams>,
    count: Function<IndexParams>,
    scan: Function<IndexParams>,
    scatter: Function<IndexParams>,
    build: Function<IndexParams>,
    set: KernelSet,
}

impl IndexKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            prepare: module.function("index_prepare")?,
            count: module.function("index_count")?,
            scan: module.function("index_scan")?,
            scatter: module.function("index_scatter")?,
            build: module.function("index_build")?,
            set: specialisation.set,
        })
    }

    /// Builds the index of `kv_heads` kv heads; before that of the first, finds the tiles and chunks that all share.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        kv_heads: usize,
        params: &IndexParams,
    ) -> Result<()> {
        self.launch_beside(stream, plan, kv_heads, params, None::<fn() -> Result<()>>)
    }

    /// The same, where `beside` gives work to another stream that needs nothing but tiles and blocks: the index goes ahead of that.
    pub(crate) fn launch_beside(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        kv_heads: usize,
        params: &IndexParams,
        beside: Option<impl FnOnce() -> Result<()>>,
    ) -> Result<()> {
        let windows = plan.max_blocks.div_ceil(plan.window_blocks);
        let pieces = [plan.num_subs as u32, kv_heads as u32, windows as u32];
        let counters_bytes = (plan.window_blocks * size_of::<i32>()) as u32;
        let dims = |grid, threads, smem_bytes| LaunchDims { grid, threads, smem_bytes, overlaps: false };
        if params.first_kv_head == 0 || plan.builds {
            // Beside the layout: what the kernel after it adds to.
            let lists = if plan.builds { kv_heads * plan.num_chunks } else { 0 };
            self.prepare.launch(stream, dims([1 + lists as u32, 1, 1], SCAN_THREADS, 0), params)?;
        }
        let is_ahead = beside.is_some();
        beside.map_or(Ok(()), |beside| beside())?;
        let launch = |kernel: &Function<IndexParams>, dims: LaunchDims| {
            if is_ahead { kernel.launch_ahead(stream, dims, params) } else { kernel.launch(stream, dims, params) }
        };
        if plan.builds {
            let overlaps = self.set == KernelSet::Sm90 && !is_ahead;
            let smem_bytes = plan.build_smem_bytes() as u32;
            return launch(&self.build, LaunchDims { overlaps, ..dims(pieces, plan.build_threads as u32, smem_bytes) });
        }
        launch(&self.count, dims(pieces, COUNT_THREADS, counters_bytes))?;
        launch(&self.scan, dims([plan.num_chunks as u32, kv_heads as u32, 1], SCAN_THREADS, 0))?;
        let threads = 32 * plan.scatter_warps as u32;
        launch(&self.scatter, dims(pieces, threads, plan.scatter_smem_bytes() as u32))
    }
}
