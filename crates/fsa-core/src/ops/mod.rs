//! Argument structs of every stage, and their checks.
//!
//! A `shape()` or `validate()` here runs before a backend writes anything; each error names the
//! argument, what was expected and what came. Shapes are in memory order.

mod attention;
mod combine;
mod compress;
mod nsa;
mod rope;

pub use attention::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, SelectArgs,
};
pub use combine::{BRANCHES, CombineArgs, CombineGrads, GateLayout};
pub use compress::{CompressArgs, CompressGrads, CompressShape, Compression};
pub use nsa::{CompressionGrads, NsaArgs, NsaForward, NsaGrads, NsaSaved};
pub use rope::{RopeArgs, compressed_positions, kv_positions, query_positions};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorView, TensorViewMut};

/// Checks dtype and shape of one tensor against what its role requires.
pub(crate) fn expect(argument: &str, dtype: DType, shape: &[usize], got: (DType, &[usize])) -> Result<()> {
    if got.1 != shape {
        return Err(Error::input(argument, format!("shape {shape:?}"), format!("shape {:?}", got.1)));
    }
    if got.0 != dtype {
        return Err(Error::input(argument, format!("dtype {dtype}"), format!("dtype {}", got.0)));
    }
    Ok(())
}

/// [`expect`] for a view.
pub(crate) fn expect_view(argument: &str, dtype: DType, shape: &[usize], view: &TensorView<'_>) -> Result<()> {
    expect(argument, dtype, shape, (view.dtype(), view.shape()))
}

/// [`expect`] for a writable view.
pub(crate) fn expect_mut(argument: &str, dtype: DType, shape: &[usize], view: &TensorViewMut<'_>) -> Result<()> {
    expect(argument, dtype, shape, (view.dtype(), view.shape()))
}

/// Requires a floating-point tensor of rank 3 and returns its shape.
pub(crate) fn rank3(argument: &str, axes: &str, view: &TensorView<'_>) -> Result<[usize; 3]> {
    if !view.dtype().is_float() {
        return Err(Error::input(argument, "dtype f32, bf16 or f16", format!("dtype {}", view.dtype())));
    }
    <[usize; 3]>::try_from(view.shape())
        .map_err(|_| Error::input(argument, format!("rank 3 {axes}"), format!("shape {:?}", view.shape())))
}
