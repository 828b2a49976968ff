//! Plans of stage `compress`: what is kept between its kernels.

use super::tables::{TablePlan, TableSpec};
use super::{STATIC_SMEM_BYTES, Sizes, Slot, Windows, Workspace, require};
use crate::driver::DeviceFacts;
use crate::source::Specialisation;
use crate::{compress, compress_linear};
use fsa_core::{Compression, Result};
use serde::Serialize;
use std::fmt;

/// How a window becomes one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CompressionKind {
    /// The mean of the window.
    Mean,
    /// A weighted sum.
    Weighted,
    /// A matrix product.
    Linear {
        /// A position embedding is added before the product.
        position: bool,
    },
}

impl CompressionKind {
    /// The kind of a compression.
    pub fn of(compression: &Compression<'_>) -> Self {
        match compression {
            Compression::Mean => Self::Mean,
            Compression::Weighted { .. } => Self::Weighted,
            Compression::Linear { position, .. } => Self::Linear { position: position.is_some() },
        }
    }

    /// True if it is a matrix product, which has kernels of its own.
    pub fn is_linear(self) -> bool {
        matches!(self, Self::Linear { .. })
    }
}

impl fmt::Display for CompressionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Mean => "mean",
            Self::Weighted => "weighted",
            Self::Linear { position: false } => "linear",
            Self::Linear { position: true } => "linear with position",
        })
    }
}

/// A call of stage `compress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CompressProblem {
    /// Sizes of the tensors; those of the query do not matter.
    pub sizes: Sizes,
    /// Windows.
    pub windows: Windows,
    /// How they become vectors.
    pub kind: CompressionKind,
}

impl CompressProblem {
    /// Rows that the output has room for.
    pub fn total_compressed(&self) -> usize {
        self.windows.bound(self.sizes.total_kv)
    }

    /// Bytes of the weight on the device, where there is one.
    pub fn weight_bytes(&self) -> usize {
        let Sizes { num_kv_heads, head_dim, dtype, .. } = self.sizes;
        let heads = num_kv_heads * self.windows.kernel_size * dtype.size_bytes();
        match self.kind {
            CompressionKind::Mean => 0,
            CompressionKind::Weighted => heads,
            CompressionKind::Linear { .. } => heads * head_dim * head_dim,
        }
    }

    /// Bytes of the position embedding on the device, where there is one.
    pub fn position_bytes(&self) -> usize {
        let Sizes { num_kv_heads, head_dim, dtype, .. } = self.sizes;
        let bytes = num_kv_heads * self.windows.kernel_size * head_dim * dtype.size_bytes();
        if self.kind == (CompressionKind::Linear { position: true }) { bytes } else { 0 }
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`fsa_core::Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts, kernels: &[Specialisation]) -> Result<()> {
        self.windows.check()?;
        self.sizes.check(facts, kernels)?;
        let most = facts.smem_per_cta_bytes.saturating_sub(STATIC_SMEM_BYTES) / size_of::<f32>();
        let size = self.windows.kernel_size;
        require(self.kind.is_linear() || size <= most, "kernel_size on CUDA", &size, &format!("at most {most}"))
    }
}

impl fmt::Display for CompressProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Windows { kernel_size, kernel_stride } = self.windows;
        write!(f, "{}, windows of {kernel_size} every {kernel_stride}; {}", self.kind, self.sizes)
    }
}

/// What the kernels keep besides the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct CompressScratch {
    /// Sums of pieces.
    pub sums: Option<Slot>,
    /// Forward: parts of the contraction of a matrix product. Backward: parts of the windows.
    pub pieces: usize,
}

impl CompressScratch {
    pub(crate) fn forward(problem: &CompressProblem, workspace: &mut Workspace) -> Self {
        let (rows, Sizes { num_kv_heads, head_dim, .. }) = (problem.total_compressed(), problem.sizes);
        let pieces = match problem.kind {
            CompressionKind::Linear { .. } => compress_linear::parts(rows),
            _ => 1,
        };
        let bytes = pieces * rows * num_kv_heads * head_dim * size_of::<f32>();
        Self { sums: (pieces > 1).then(|| workspace.add("partial", bytes)), pieces }
    }

    pub(crate) fn backward(problem: &CompressProblem, workspace: &mut Workspace) -> Self {
        let (rows, row_bytes) = (problem.total_compressed(), problem.sizes.num_kv_heads * size_of::<f32>());
        let (pieces, width) = match problem.kind {
            CompressionKind::Weighted => (compress::pieces(rows), problem.windows.kernel_size),
            CompressionKind::Linear { position: true } => (compress_linear::pieces(rows), problem.sizes.head_dim),
            _ => return Self { sums: None, pieces: 1 },
        };
        Self { sums: Some(workspace.add("partial", pieces * width * row_bytes)), pieces }
    }
}

/// Workspace of a forward or a backward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompressPlan {
    /// The call.
    pub problem: CompressProblem,
    pub(crate) tables: TablePlan,
    pub(crate) scratch: CompressScratch,
    /// Scratch memory.
    pub workspace: Workspace,
}

impl CompressPlan {
    /// Plans a forward of a checked problem.
    pub fn forward(problem: &CompressProblem) -> Self {
        Self::with(problem, CompressScratch::forward)
    }

    /// Plans a backward of a checked problem.
    pub fn backward(problem: &CompressProblem) -> Self {
        Self::with(problem, CompressScratch::backward)
    }

    /// Whether it can do with the workspace of another plan, and the tables in it, once that is done.
    pub fn shares(&self, other: &Self) -> bool {
        self.tables == other.tables && self.workspace.size_bytes() <= other.workspace.size_bytes()
    }

    fn with(
        problem: &CompressProblem,
        scratch: impl FnOnce(&CompressProblem, &mut Workspace) -> CompressScratch,
    ) -> Self {
        let mut workspace = Workspace::default();
        let spec = TableSpec { windows: Some(problem.windows), ..TableSpec::default() };
        let tables = TablePlan::new(spec, problem.sizes.sequences, &mut workspace);
        let scratch = scratch(problem, &mut workspace);
        Self { problem: *problem, tables, scratch, workspace }
    }
}

impl fmt::Display for CompressPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compress: {}; {}", self.problem, self.workspace)
    }
}
