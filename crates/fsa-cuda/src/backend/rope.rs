//! Stage `rope` over host tensors.

use super::host::{Rows, store};
use super::{CudaBackend, padded_dim, span};
use crate::driver::UploadedBatch;
use crate::plan::Sizes;
use crate::stages::{RopeRows, RopeTurn};
use fsa_core::{Batch, Error, Result, RopeArgs, TensorViewMut};

/// Rotates every row at its position.
pub(super) fn rotate(backend: &CudaBackend, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
    let [rows, heads, dim] = args.shape(out)?;
    let dtype = args.input.dtype();
    backend.check_dtype(dtype)?;
    if rows * heads * dim == 0 {
        return Ok(());
    }
    let sizes = Sizes {
        total_q: rows,
        total_kv: rows,
        sequences: 1,
        num_q_heads: heads,
        num_kv_heads: heads,
        head_dim: padded_dim(dim)?,
        dtype,
    };
    let position = |position: &usize| {
        i32::try_from(*position).map_err(|_| Error::Unsupported {
            constraint: "position on CUDA".into(),
            got: position.to_string(),
            supported: "below 2^31".into(),
        })
    };
    let positions: Vec<i32> = args.positions.iter().map(position).collect::<Result<_>>()?;
    let planned = RopeTurn::plan(backend.kernels(), &sizes, args.rope, dim)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let batch = UploadedBatch::new(backend.device(), &Batch::single(rows), &stream)?;
    let input = transfer.upload("input", &args.input, sizes.head_dim, 1.0)?;
    let result = transfer.like("out", &input)?;
    let positions = transfer.write("positions", &positions, 0)?;
    let which = RopeRows::Positions { positions: positions.span(), rows };
    let tensors = (&span(&input, heads, &sizes), &span(&result, heads, &sizes), heads);
    planned.launch(&stream, &batch.get(), &which, tensors, args.inverse)?;
    store(&transfer.fetch("out", &result, dtype)?, Rows::padded(sizes.head_dim), out, 1.0)
}
