//! Arguments of stage `rope`.

use super::{expect_mut, rank3};
use crate::batch::Batch;
use crate::error::{Result, ensure};
use crate::rope::Rope;
use crate::tensor::{TensorView, TensorViewMut};

/// Inputs of stage `rope`. The backward is the same call with `inverse` flipped.
#[derive(Debug, Clone, Copy)]
pub struct RopeArgs<'a> {
    /// `[rows, heads, head_dim]`.
    pub input: TensorView<'a>,
    /// One position per row.
    pub positions: &'a [usize],
    /// Frequencies.
    pub rope: &'a Rope,
    /// Rotate backwards: the gradient of the rotation.
    pub inverse: bool,
}

impl RopeArgs<'_> {
    /// Checks everything, the output included, and returns `[rows, heads, head_dim]`.
    pub fn shape(&self, out: &TensorViewMut<'_>) -> Result<[usize; 3]> {
        let shape = rank3("input", "[rows, heads, head_dim]", &self.input)?;
        self.rope.validate(shape[2])?;
        ensure(
            self.positions.len() == shape[0],
            "positions",
            || format!("{} positions, one per row", shape[0]),
            || self.positions.len().to_string(),
        )?;
        expect_mut("out", self.input.dtype(), &shape, out)?;
        Ok(shape)
    }
}

/// Position of every query row.
pub fn query_positions(batch: &Batch) -> Vec<usize> {
    batch.sequences().iter().flat_map(|s| s.first_position..s.first_position + s.query_len()).collect()
}

/// Position of every key row.
pub fn kv_positions(batch: &Batch) -> Vec<usize> {
    batch.sequences().iter().flat_map(|s| 0..s.kv_len()).collect()
}

/// Position at which every compressed key is rotated: the start of its window.
pub fn compressed_positions(batch: &Batch, kernel_size: usize, kernel_stride: usize) -> Vec<usize> {
    let windows = |s: &crate::Sequence| 0..s.num_compressed(kernel_size, kernel_stride);
    batch.sequences().iter().flat_map(|s| windows(s).map(|i| i * kernel_stride)).collect()
}
