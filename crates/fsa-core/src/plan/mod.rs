//! Plans: what a call will do, decided before any data is seen.
//!
//! A plan is a plain value made from shapes, the batch and the number of workers. It names the tiles of
//! every stage, the regions of the workspace, the floating-point operations and the least bytes that
//! must move, and it prints itself. Backends execute plans; nothing here touches a tensor.

mod cost;
mod tile;

pub use cost::{Cost, pairs};
pub use tile::{
    BACKWARD_PARTS, BackwardTile, CHUNK_ROWS, COMPRESS_WINDOWS, KEYS_PER_TILE, QueryTile, SLAB_BYTES, STRIP_ROWS,
    SelectedTile, VECTOR, backward_tile, padded, query_tile, select_tile, selected_tile, slab_rows,
};

use crate::batch::Batch;
use crate::config::NsaConfig;
use crate::error::Result;
use crate::ops::{AttentionShape, Compression};
use crate::stage::Stage;
use serde::Serialize;
use std::fmt;

/// A named piece of scratch memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Region {
    /// What lies there.
    pub name: &'static str,
    /// Its size for one worker.
    pub bytes: usize,
    /// How many workers hold one at a time.
    pub copies: usize,
}

/// The plan of one stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StagePlan {
    /// The stage.
    pub stage: Stage,
    /// Its tiles, in words: rows and keys of a work item.
    pub tile: String,
    /// Independent work items of the forward.
    pub work_items: usize,
    /// Scratch memory of the forward.
    pub forward_workspace: Vec<Region>,
    /// Scratch memory of the backward.
    pub backward_workspace: Vec<Region>,
    /// Operations and bytes.
    pub cost: Cost,
}

fn total(regions: &[Region]) -> usize {
    regions.iter().map(|region| region.bytes * region.copies).sum()
}

impl StagePlan {
    /// Scratch memory of the forward over all workers.
    pub fn forward_workspace_bytes(&self) -> usize {
        total(&self.forward_workspace)
    }

    /// Scratch memory of the backward over all workers.
    pub fn backward_workspace_bytes(&self) -> usize {
        total(&self.backward_workspace)
    }
}

/// The plan of the whole operation, with the dense yardstick.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Sizes of the call.
    pub description: String,
    /// Worker threads planned for.
    pub workers: usize,
    /// The stages of the operation in order.
    pub stages: Vec<StagePlan>,
    /// Dense causal attention on the same tensors.
    pub dense: StagePlan,
    /// Bytes that are kept for the backward.
    pub saved_bytes: usize,
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// Sizes of query, key and value.
    pub shape: AttentionShape,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// What is computed.
    pub config: &'a NsaConfig,
    /// True if keys and values are compressed by a matrix product.
    pub linear_compression: bool,
    /// True if there is a rotary embedding.
    pub rope: bool,
    /// Worker threads.
    pub workers: usize,
}

impl PlanInput<'_> {
    /// True if either compression is a matrix product.
    pub fn is_linear(key: &Compression<'_>, value: &Compression<'_>) -> bool {
        [key, value].into_iter().any(|c| matches!(c, Compression::Linear { .. }))
    }
}

impl Plan {
    /// Plans the whole operation. The configuration must be valid.
    pub fn new(input: &PlanInput<'_>) -> Result<Self> {
        input.config.validate()?;
        let mut stages = vec![tile::compress_plan(input)];
        if input.rope {
            stages.push(tile::elementwise_plan(Stage::Rope, input));
        }
        stages.push(tile::query_tile_plan(Stage::Compressed, input));
        stages.push(tile::select_plan(input));
        stages.push(tile::index_plan(input));
        stages.push(tile::selected_plan(input));
        stages.push(tile::query_tile_plan(Stage::Window, input));
        stages.push(tile::elementwise_plan(Stage::Combine, input));
        let shape = &input.shape;
        let sequences = input.batch.sequences().len();
        let description = format!(
            "{} rows, {} keys in {sequences} sequence{}, {}/{} heads, head_dim {}, value_dim {}, {}; blocks of {}, top {}",
            shape.total_q,
            shape.total_keys,
            if sequences == 1 { "" } else { "s" },
            shape.num_q_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.value_dim,
            shape.dtype,
            input.config.block_size,
            input.config.topk,
        );
        let dense = tile::query_tile_plan(Stage::Dense, input);
        Ok(Self { description, workers: input.workers, stages, dense, saved_bytes: cost::saved_bytes(input) })
    }

    /// The plan of one stage of the operation, or of the yardstick.
    pub fn stage(&self, stage: Stage) -> Option<&StagePlan> {
        self.stages.iter().chain([&self.dense]).find(|plan| plan.stage == stage)
    }

    /// Operations and bytes of the whole operation.
    pub fn cost(&self) -> Cost {
        self.stages.iter().map(|plan| plan.cost).fold(Cost::default(), Cost::plus)
    }

    /// Largest scratch memory of the forward: the stages run one after another.
    pub fn forward_workspace_bytes(&self) -> usize {
        self.stages.iter().map(StagePlan::forward_workspace_bytes).max().unwrap_or(0)
    }

    /// Largest scratch memory of the backward.
    pub fn backward_workspace_bytes(&self) -> usize {
        self.stages.iter().map(StagePlan::backward_workspace_bytes).max().unwrap_or(0)
    }
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

impl fmt::Display for StagePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<10}  {:>9.2} GFLOP forward {:>9.2} backward  {:>8} least  {:>10} scratch {:>10} backward  {} items: {}",
            self.stage,
            self.cost.forward_flops / 1e9,
            self.cost.backward_flops / 1e9,
            mebibytes(self.cost.forward_bytes),
            mebibytes(self.forward_workspace_bytes()),
            mebibytes(self.backward_workspace_bytes()),
            self.work_items,
            self.tile,
        )
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; {} workers", self.description, self.workers)?;
        for stage in &self.stages {
            writeln!(f, "{stage}")?;
        }
        let (cost, dense) = (self.cost(), self.dense.cost);
        writeln!(
            f,
            "{:<10}  {:>9.2} GFLOP forward {:>9.2} backward: {:.2}x and {:.2}x fewer than dense",
            Stage::Nsa,
            cost.forward_flops / 1e9,
            cost.backward_flops / 1e9,
            dense.forward_flops / cost.forward_flops.max(1.0),
            dense.backward_flops / cost.backward_flops.max(1.0),
        )?;
        writeln!(
            f,
            "scratch {} forward, {} backward; {} kept for the backward",
            mebibytes(self.forward_workspace_bytes()),
            mebibytes(self.backward_workspace_bytes()),
            mebibytes(self.saved_bytes),
        )?;
        write!(f, "{}", self.dense)
    }
}

#[cfg(test)]
mod tests;
