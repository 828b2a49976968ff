//! Stage `selected` on device tensors: plan once, launch as often as wanted.
//!
//! A launch only gives kernels to streams: it waits for nothing and reads nothing back, so it may be recorded into a CUDA
//! graph. A call that comes again with the same memory is recorded by itself and replayed from then on, also where it is
//! planned anew: the launches of a long sequence take the host some hundred microseconds, a replay two. The caller owns
//! the tensors, the workspace and the stream.

mod backward;
mod dense;
mod forward;
mod route;
mod tensors;

pub(crate) use dense::MaskStep;

pub use crate::launch::{LaunchContext, TensorSpan};
pub use route::{SelectedBackward, SelectedForward};
pub(crate) use tensors::WholeGrads;
pub use tensors::{BackwardTensors, ForwardTensors};

/// Kernels of a call from which on a replay is quicker for the host than the launches.
const MANY_LAUNCHES: usize = 8;
