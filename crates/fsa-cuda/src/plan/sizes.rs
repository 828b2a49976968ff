//! Sizes that all stages share, and which keys rows see.

use super::{Problem, STATIC_SMEM_BYTES, require};
use crate::driver::{Address, DeviceFacts, DeviceSpan};
use crate::source::{HEAD_DIMS, Kernel, Specialisation};
use crate::{arch::KernelSet, params::Band};
use fsa_core::{AttentionShape, AttentionStage, DType, Result};
use serde::Serialize;
use std::fmt;

/// Sizes of the tensors of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Rows of `query`.
    pub total_q: usize,
    /// Tokens: rows of `key` and `value` before compression.
    pub total_kv: usize,
    /// Sequences.
    pub sequences: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a vector on the device, one of [`HEAD_DIMS`].
    pub head_dim: usize,
    /// Type of the tensors.
    pub dtype: DType,
}

impl Sizes {
    /// The sizes of a checked call; `total_kv` counts tokens, `head_dim` is the kernels', which may be larger than the call's.
    pub fn new(shape: &AttentionShape, sequences: usize, total_kv: usize, head_dim: usize) -> Self {
        let AttentionShape { total_q, num_q_heads, num_kv_heads, dtype, .. } = *shape;
        Self { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype }
    }

    /// Query heads that share one kv head.
    pub fn gqa_group_size(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    /// The same call for some of its kv heads.
    pub fn with_kv_heads(&self, num_kv_heads: usize) -> Self {
        Self { num_kv_heads, num_q_heads: num_kv_heads * self.gqa_group_size(), ..*self }
    }

    /// Stage `selected` of these sizes.
    pub fn selected(&self, block_size: usize, topk: usize) -> Problem {
        let Self { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype } = *self;
        Problem { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, block_size, topk, dtype }
    }

    /// The specialisation of a kernel for this call; the portable one where the set has none. `block_size` where the kernel
    /// depends on it.
    pub(crate) fn specialisation(&self, kernel: Kernel, set: KernelSet, block_size: usize) -> Specialisation {
        Specialisation::new(kernel, set, self.dtype, self.head_dim, block_size).or_portable(1)
    }

    /// Bytes of `[rows, heads, head_dim]`.
    pub(crate) fn tensor_bytes(&self, rows: usize, heads: usize) -> usize {
        rows * heads * self.head_dim * self.dtype.size_bytes()
    }

    /// Bytes of `lse`.
    pub(crate) fn lse_bytes(&self) -> usize {
        self.num_q_heads * self.total_q * size_of::<f32>()
    }

    /// Bytes of the statistics of all rows: two numbers each.
    pub(crate) fn row_stats_bytes(&self) -> usize {
        2 * self.lse_bytes()
    }

    /// The same as a stage gives them to another: their bounds lie behind them.
    pub(crate) fn given_stats_bytes(&self) -> usize {
        self.row_stats_bytes() + BOUNDS_BYTES
    }

    /// These bounds.
    pub(crate) fn row_bounds(&self, given_stats: &DeviceSpan<'_>) -> Address {
        given_stats.address().offset(self.row_stats_bytes())
    }

    /// Checks what the kernels support on a device.
    ///
    /// # Errors
    /// [`fsa_core::Error::Unsupported`] that names the constraint.
    pub fn check(&self, facts: &DeviceFacts, kernels: &[Specialisation]) -> Result<()> {
        require(self.dtype == DType::Bf16 || self.dtype == DType::F16, "dtype on CUDA", &self.dtype, "bf16, f16")?;
        let dims = "64, 96, 128, 192, 256";
        require(HEAD_DIMS.contains(&self.head_dim), "head_dim of the CUDA kernels", &self.head_dim, dims)?;
        let heads = format!("{} on {} heads", self.num_q_heads, self.num_kv_heads);
        let divides =
            self.num_kv_heads > 0 && self.num_q_heads > 0 && self.num_q_heads.is_multiple_of(self.num_kv_heads);
        let multiple = "at most 65535 query heads, a multiple of the kv heads";
        require(divides && self.num_q_heads < 1 << 16, "heads", &heads, multiple)?;
        let tokens = "totals below 2^31";
        require(self.total_q.max(self.total_kv) < 1 << 31, "tokens", &self.total_q.max(self.total_kv), tokens)?;
        kernels.iter().try_for_each(|kernel| check_smem(kernel, 1, facts))
    }
}

/// A pair of bounds for the scale of sums, of rows or of keys: two f32.
pub(crate) const BOUNDS_BYTES: usize = 2 * size_of::<f32>();

/// Checks that a CTA of a kernel has the shared memory that it takes.
pub(super) fn check_smem(kernel: &Specialisation, topk: usize, facts: &DeviceFacts) -> Result<()> {
    let (needed, most) = (kernel.smem_bytes(topk), facts.smem_per_cta_bytes.saturating_sub(STATIC_SMEM_BYTES));
    let what = format!("kernel `{kernel}` on {}", facts.name);
    let got = format!("{needed} bytes of shared memory");
    require(needed <= most, &what, &got, &format!("at most {most} bytes"))
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim, dtype } = self;
        write!(
            f,
            "{total_q} rows, {total_kv} tokens in {sequences} sequences, {num_q_heads}/{num_kv_heads} heads, \
             head_dim {head_dim}, {dtype}"
        )
    }
}

/// Windows of the compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Windows {
    /// Tokens in a window.
    pub kernel_size: usize,
    /// Tokens between the starts of neighbouring windows; divides `kernel_size`.
    pub kernel_stride: usize,
}

impl Windows {
    /// Bound on the windows of all sequences: a sequence of n tokens has at most n / stride.
    pub fn bound(&self, total_kv: usize) -> usize {
        total_kv / self.kernel_stride
    }

    /// Checks what the kernels support.
    pub(super) fn check(&self) -> Result<()> {
        let Self { kernel_size, kernel_stride } = self;
        let holds = (1..1 << 31).contains(kernel_stride) && (1..1 << 31).contains(kernel_size);
        let got = format!("{kernel_size} tokens, {kernel_stride} apart");
        let supported = "kernel_size a multiple of kernel_stride, both below 2^31";
        require(holds && kernel_size.is_multiple_of(*kernel_stride), "windows on CUDA", &got, supported)
    }
}

/// Which keys the rows of a band see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Keys {
    /// Stage `dense`: every token at or before the row's position.
    Dense,
    /// Stage `window`: tokens `position - window_size ..= position`.
    Window {
        /// Earlier keys shown besides the row's own position.
        window_size: usize,
    },
    /// Stage `compressed`: windows that lie at or before the row's position as a whole.
    Compressed(Windows),
}

impl Keys {
    /// The keys of a stage; `None` for stage `selected`.
    pub fn of(stage: &AttentionStage<'_>) -> Option<Self> {
        match *stage {
            AttentionStage::Dense => Some(Self::Dense),
            AttentionStage::Window { window_size } => Some(Self::Window { window_size }),
            AttentionStage::Compressed { kernel_size, kernel_stride } => {
                Some(Self::Compressed(Windows { kernel_size, kernel_stride }))
            }
            AttentionStage::Selected { .. } => None,
        }
    }

    /// The windows, if keys are compressed.
    pub fn windows(&self) -> Option<Windows> {
        match self {
            Self::Compressed(windows) => Some(*windows),
            _ => None,
        }
    }

    /// Earlier keys that a window shows.
    pub fn window_size(&self) -> Option<usize> {
        match self {
            Self::Window { window_size } => Some(*window_size),
            _ => None,
        }
    }

    /// Bound on the rows of key and value.
    pub fn bound(&self, total_kv: usize) -> usize {
        self.windows().map_or(total_kv, |windows| windows.bound(total_kv))
    }

    /// Sets the fields of the kernels' view that say which keys a row sees.
    pub(crate) fn describe(&self, band: &mut Band) {
        let tokens = Windows { kernel_size: 1, kernel_stride: 1 };
        let Windows { kernel_size, kernel_stride } = self.windows().unwrap_or(tokens);
        (band.kernel_size, band.kernel_stride) = (kernel_size as i32, kernel_stride as i32);
        band.window = match self {
            Self::Window { window_size } => i32::try_from(*window_size).unwrap_or(i32::MAX),
            _ => i32::MAX,
        };
    }
}

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => f.write_str("dense"),
            Self::Window { window_size } => write!(f, "window of {window_size}"),
            Self::Compressed(Windows { kernel_size, kernel_stride }) => {
                write!(f, "compressed, windows of {kernel_size} every {kernel_stride}")
            }
        }
    }
}
