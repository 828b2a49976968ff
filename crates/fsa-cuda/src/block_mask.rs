//! Lists of blocks as masks: the bits of every row, and the steps of keys of every tile of rows; and which values are not finite.
//!
//! Kernel file: `kernels/block_mask.cuh`.

use crate::driver::{Address, Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BlockMask, BlockMaskParams};
use crate::plan::MAX_TOPK;
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[("block_mask", "BlockMaskParams")];

/// Threads of a CTA.
const THREADS: usize = 128;
/// Rows of value that share a word which says whether they are finite.
pub(crate) const VALUE_ROWS: usize = 64;

/// What the kernel file must agree with.
pub(crate) fn constants() -> Vec<(&'static str, usize)> {
    vec![("MASK_THREADS", THREADS), ("MAX_WORDS", MAX_TOPK), ("VALUE_ROWS", VALUE_ROWS)]
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

    /// Fills the mask of `num_kv_heads` kv heads. `follows`: right ahead on the stream, which is one of Hopper, is a kernel that started
    /// behind the tables, and whose end this may overlap. Else it goes ahead of what makes the statistics of rows meanwhile: less waits
    /// for that.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        num_kv_heads: usize,
        follows: bool,
        params: &BlockMaskParams,
    ) -> Result<()> {
        let grid = [params.band.mask.num_tiles as u32, num_kv_heads as u32, 1];
        let dims = LaunchDims { grid, threads: THREADS as u32, smem_bytes: 0, overlaps: follows };
        if follows {
            self.block_mask.launch(stream, dims, params)
        } else {
            self.block_mask.launch_ahead(stream, dims, params)
        }
    }
}

impl BlockMask {
    /// That of the kv heads from `first` on; none stays none.
    pub(crate) fn kv_heads_from(&self, first: usize, total_q: usize) -> Self {
        let at = |address: Address, words: usize| address.offset(first * words * size_of::<u32>());
        if self.rows == Address::default() {
            return *self;
        }
        let (words, max_steps, num_tiles) = (self.words as usize, self.max_steps as usize, self.num_tiles as usize);
        Self {
            rows: at(self.rows, total_q * words),
            steps: at(self.steps, num_tiles * max_steps),
            step_counts: at(self.step_counts, num_tiles),
            nonfinite: at(self.nonfinite, self.value_groups as usize),
            ..*self
        }
    }
}
