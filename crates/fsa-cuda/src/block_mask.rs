//! Lists of blocks as masks: the bits of every row, and the steps of keys of every tile of rows.
//!
//! Kernel file: `kernels/block_mask.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::BlockMaskParams;
use crate::plan::MAX_TOPK;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("block_mask", "BlockMaskParams")];

/// Threads of a CTA.
const THREADS: usize = 128;

/// What the kernel file must agree with.
pub(crate) fn constants() -> Vec<(&'static str, usize)> {
    vec![("MASK_THREADS", THREADS), ("MAX_WORDS", MAX_TOPK)]
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct BlockMaskKernel {
    block_mask: Function<BlockMaskParams>,
}

impl BlockMaskKernel {
    pub(crate) fn load(module: &Arc<Module>, _: &Specialisation) -> Result<Self> {
        Ok(Self { block_mask: module.function("block_mask")? })
    }

    /// Fills the mask of `num_kv_heads` kv heads. Ahead of what makes the statistics of rows meanwhile: less waits for that.
    pub(crate) fn launch(&self, stream: &Stream, num_kv_heads: usize, params: &BlockMaskParams) -> Result<()> {
        let grid = [params.band.mask.num_tiles as u32, num_kv_heads as u32, 1];
        let dims = LaunchDims { grid, threads: THREADS as u32, smem_bytes: 0, overlaps: false };
        self.block_mask.launch_ahead(stream, dims, params)
    }
}
