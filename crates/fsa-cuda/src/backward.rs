//! Backward of stage `selected`: row statistics, one KV-major pass over five products, f32 sums to the dtype.
//!
//! Kernel file: `kernels/backward_sm90.cuh`.

use crate::driver::{Function, LaunchDims, Module, Stream};
use crate::error::Result;
use crate::params::{BackwardParams, ConvertParams, TILE_ROWS};
use crate::plan::{IndexPlan, tile_bytes};
use crate::source::Specialisation;
use std::sync::Arc;

/// Kernels of the file and what they take.
pub(crate) const ENTRY_POINTS: &[(&str, &str)] = &[
    ("backward_delta", "BackwardParams"),
    ("backward", "BackwardParams"),
    ("backward_merge", "BackwardParams"),
    ("backward_convert", "ConvertParams"),
];

/// Keys of a warpgroup.
const GROUP_KEYS: usize = 64;
/// Most keys of a CTA; a larger block is cut into parts.
const MAX_CTA_KEYS: usize = 128;
/// Rows that a CTA of `backward_delta` takes, one per warp.
const DELTA_ROWS: usize = 8;
/// Elements that a thread of `backward_merge` and of `backward_convert` takes.
const MERGE_ELEMENTS: usize = 8;
const CONVERT_ELEMENTS: usize = 4;
/// Threads of the small kernels.
const SMALL_THREADS: usize = 256;

fn cta_keys(block_size: usize) -> usize {
    block_size.clamp(GROUP_KEYS, MAX_CTA_KEYS)
}

/// Shared memory of a CTA: key and value tiles, two stages of query and gradient tiles, a tile of score gradients
/// per warpgroup.
pub(crate) fn smem_bytes(specialisation: &Specialisation) -> usize {
    let Specialisation { head_dim, block_size, .. } = *specialisation;
    let keys = cta_keys(block_size);
    let score_gradients = keys / GROUP_KEYS * tile_bytes(GROUP_KEYS, 64);
    2 * tile_bytes(keys, head_dim) + 4 * tile_bytes(TILE_ROWS, head_dim) + score_gradients
}

/// What the kernel file must agree with.
pub(crate) fn constants(specialisation: &Specialisation) -> Vec<(&'static str, usize)> {
    let keys = cta_keys(specialisation.block_size);
    vec![
        ("2 * KeyTile::BYTES + 2 * STAGE_BYTES + GROUPS * DS_BYTES", smem_bytes(specialisation)),
        ("THREADS", 128 * keys / GROUP_KEYS),
        ("KEYS_PER_PART", specialisation.block_size.min(MAX_CTA_KEYS)),
    ]
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct BackwardKernels {
    delta: Function<BackwardParams>,
    backward: Function<BackwardParams>,
    merge: Function<BackwardParams>,
    convert: Function<ConvertParams>,
    specialisation: Specialisation,
}

impl BackwardKernels {
    pub(crate) fn load(module: &Arc<Module>, specialisation: &Specialisation) -> Result<Self> {
        Ok(Self {
            delta: module.function("backward_delta")?,
            backward: module.function("backward")?,
            merge: module.function("backward_merge")?,
            convert: module.function("backward_convert")?,
            specialisation: *specialisation,
        })
    }

    /// Row statistics of the chunk, then its sums, for `heads` query heads of `rows` rows; with partials, their merge.
    pub(crate) fn launch(
        &self,
        stream: &Stream,
        plan: &IndexPlan,
        heads: usize,
        params: &BackwardParams,
    ) -> Result<()> {
        let (rows, heads) = (params.rows as usize, heads as u32);
        let small =
            |ctas: usize| LaunchDims { grid: [ctas as u32, heads, 1], threads: SMALL_THREADS as u32, smem_bytes: 0 };
        self.delta.launch(stream, small(rows.div_ceil(DELTA_ROWS)), params)?;
        let Specialisation { head_dim, block_size, query_partials, .. } = self.specialisation;
        let dims = LaunchDims {
            grid: [plan.max_units() as u32, block_size.div_ceil(MAX_CTA_KEYS) as u32, heads],
            threads: (128 * cta_keys(block_size) / GROUP_KEYS) as u32,
            smem_bytes: smem_bytes(&self.specialisation) as u32,
        };
        self.backward.launch(stream, dims, params)?;
        if !query_partials {
            return Ok(());
        }
        let rows_per_cta = SMALL_THREADS / (head_dim / MERGE_ELEMENTS);
        self.merge.launch(stream, small(rows.div_ceil(rows_per_cta)), params)
    }

    /// f32 sums of up to `rows` rows of `heads` heads to the dtype.
    pub(crate) fn convert(&self, stream: &Stream, rows: usize, heads: usize, params: &ConvertParams) -> Result<()> {
        let threads = rows * (self.specialisation.head_dim / CONVERT_ELEMENTS);
        let grid = [threads.div_ceil(SMALL_THREADS) as u32, heads as u32, 1];
        self.convert.launch(stream, LaunchDims { grid, threads: SMALL_THREADS as u32, smem_bytes: 0 }, params)
    }
}
