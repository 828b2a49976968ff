//! Stage `rope` on device tensors. The backward is the same call with the other direction.

use crate::driver::{Address, DeviceBatch, DeviceBuffer, DeviceSpan, Stream};
use crate::kernels::Kernels;
use crate::launch::{TensorSpan, check_batch, check_words};
use crate::params::RopeParams;
use crate::plan::{Sizes, Windows};
use crate::rope::{RopeKernel, row_threads};
use crate::source::Kernel;
use fsa_core::{Error, Result, Rope};
use std::sync::Arc;

/// Which rows are rotated, and so at which positions.
#[derive(Debug, Clone, Copy)]
pub enum RopeRows<'a> {
    /// Those of a query: the last of their sequence's tokens.
    Query,
    /// Those of a key.
    Key,
    /// Compressed keys, at the start of their windows. `cu_compressed` `[batch + 1]` i32 says how many there are.
    Compressed {
        /// The windows.
        windows: Windows,
        /// Prefix sums of the compressed keys.
        cu_compressed: DeviceSpan<'a>,
    },
    /// Any rows, with a position each.
    Positions {
        /// `[rows]` i32.
        positions: DeviceSpan<'a>,
        /// Number of rows.
        rows: usize,
    },
}

impl RopeRows<'_> {
    /// Bound on the rows.
    fn count(&self, sizes: &Sizes) -> usize {
        match self {
            Self::Query => sizes.total_q,
            Self::Key => sizes.total_kv,
            Self::Compressed { windows, .. } => windows.bound(sizes.total_kv),
            Self::Positions { rows, .. } => *rows,
        }
    }

    fn check(&self, sizes: &Sizes) -> Result<()> {
        match self {
            Self::Query | Self::Key => Ok(()),
            Self::Compressed { cu_compressed, .. } => {
                check_words("cu_compressed", cu_compressed, (sizes.sequences + 1) * size_of::<i32>())
            }
            Self::Positions { positions, rows } => check_words("positions", positions, rows * size_of::<i32>()),
        }
    }
}

/// A planned rotation with its kernel and its frequencies.
#[derive(Debug)]
pub struct RopeTurn {
    kernels: Arc<Kernels>,
    sizes: Sizes,
    dim: usize,
    frequencies: DeviceBuffer,
    kernel: Arc<RopeKernel>,
}

impl RopeTurn {
    /// Plans rotations of vectors whose first `dim` elements hold the call's own, makes the kernel ready and copies the
    /// frequencies to the device. `sizes` says how vectors lie on the device; one plan serves query and keys.
    ///
    /// # Errors
    /// The kernels do not support the sizes, or cannot be had; the embedding is not valid for `dim`.
    pub fn plan(kernels: &Arc<Kernels>, sizes: &Sizes, rope: &Rope, dim: usize) -> Result<Self> {
        rope.validate(dim)?;
        if dim > sizes.head_dim {
            return Err(Error::input("head_dim", format!("at most {} on the device", sizes.head_dim), dim));
        }
        let specialisation = sizes.specialisation(Kernel::Rope, kernels.set(), 64);
        sizes.check(kernels.device().facts(), &[specialisation])?;
        let host = rope.frequencies(dim);
        let frequencies = DeviceBuffer::new(kernels.device(), "frequencies", size_of_val(host.as_slice()))?;
        frequencies.upload(&host, &Stream::new(kernels.device())?)?;
        let kernel = kernels.one(&specialisation)?;
        Ok(Self { kernels: Arc::clone(kernels), sizes: *sizes, dim, frequencies, kernel })
    }

    /// Gives the rotation of `heads` heads to the stream; `out` may be `input`. Elements of a vector that only fill it up are
    /// copied.
    ///
    /// # Errors
    /// A tensor is smaller than its rows; nothing was launched. Or the driver fails.
    pub fn launch(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        rows: &RopeRows<'_>,
        (input, out, heads): (&TensorSpan<'_>, &TensorSpan<'_>, usize),
        inverse: bool,
    ) -> Result<()> {
        let count = rows.count(&self.sizes);
        check_batch(batch, &self.sizes)?;
        rows.check(&self.sizes)?;
        input.require("input", [count, heads], &self.sizes)?;
        out.require("out", [count, heads], &self.sizes)?;
        let _bound = self.kernels.device().bind().map_err(Error::from)?;
        self.launch_on(stream, batch, rows, (input, out, heads), inverse)
    }

    /// The same for tensors that are known to be right, with the context bound.
    pub(super) fn launch_on(
        &self,
        stream: &Stream,
        batch: &DeviceBatch<'_>,
        rows: &RopeRows<'_>,
        (input, out, heads): (&TensorSpan<'_>, &TensorSpan<'_>, usize),
        inverse: bool,
    ) -> Result<()> {
        let [cu_seqlens_q, cu_seqlens_kv] = batch.spans().map(|span| span.address());
        let none = Address::default();
        let (cu_rows, aligned, positions, multiplier) = match rows {
            RopeRows::Query => (cu_seqlens_q, cu_seqlens_kv, none, 1),
            RopeRows::Key => (cu_seqlens_kv, none, none, 1),
            RopeRows::Compressed { windows, cu_compressed } => {
                (cu_compressed.address(), none, none, windows.kernel_stride)
            }
            RopeRows::Positions { positions, .. } => (none, none, positions.address(), 1),
        };
        let params = RopeParams {
            input: input.device(),
            out: out.device(),
            frequencies: self.frequencies.span().address(),
            cu_rows,
            cu_seqlens_kv: aligned,
            positions,
            batch: self.sizes.sequences as i32,
            rows: rows.count(&self.sizes) as i32,
            heads: heads as i32,
            head_dim: self.dim as i32,
            multiplier: multiplier as i32,
            inverse: inverse.into(),
            row_threads: row_threads(self.dim, heads) as i32,
        };
        Ok(self.kernel.launch(stream, &params)?)
    }
}
