//! Stage `selected` on device tensors: plan once, launch as often as wanted.
//!
//! A launch only gives kernels to streams: it waits for nothing and reads nothing back, so it may be recorded into a CUDA
//! graph. A call that comes again with the same memory is recorded by the plan itself and replayed from then on: the
//! launches of a long sequence take the host some hundred microseconds, a replay two. The caller owns the tensors, the
//! workspace and the stream.

mod backward;
mod forward;
mod tensors;

pub use backward::SelectedBackward;
pub use forward::SelectedForward;
pub use tensors::{BackwardTensors, ForwardTensors, TensorSpan};

use crate::driver::{Call, DeviceBatch, DeviceSpan, Stream};
use crate::plan::Problem;
use fsa_core::{Error, Result};

/// log2(e): the kernels take powers of two.
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Checks a factor of the logits. The kernels take the largest product for the largest logit.
fn check_scale(scale: f32) -> Result<()> {
    if scale.is_finite() && scale >= 0.0 {
        return Ok(());
    }
    Err(Error::Unsupported {
        constraint: "softmax_scale on CUDA".into(),
        got: scale.to_string(),
        supported: "finite and not negative: negate query instead".into(),
    })
}

/// The factor of the logits as the kernels take it. Never 0: minus infinity, which a masked logit is, would become NaN; the
/// smallest positive factor makes every finite logit 0 as well.
fn scale_log2(scale: f32) -> f32 {
    (scale * LOG2_E).max(f32::MIN_POSITIVE)
}

/// Checks that a batch has the sizes that were planned for.
fn check_batch(batch: &DeviceBatch<'_>, problem: &Problem) -> Result<()> {
    let planned = (problem.sequences, problem.total_q, problem.total_kv);
    if batch.sizes() != planned {
        let text = |(sequences, q, kv)| format!("{sequences} sequences of together {q} rows and {kv} keys");
        return Err(Error::input("cu_seqlens_q", text(planned), text(batch.sizes())));
    }
    let bytes = (problem.sequences + 1) * size_of::<i32>();
    let names = ["cu_seqlens_q", "cu_seqlens_kv"];
    names.into_iter().zip(batch.spans()).try_for_each(|(name, span)| tensors::check_span(name, &span, bytes))
}

/// Kernels of a call from which on a replay is quicker for the host than the launches.
const MANY_LAUNCHES: usize = 8;

/// What every launch takes besides its tensors.
#[derive(Debug, Clone, Copy)]
pub struct LaunchContext<'a> {
    /// Work is ordered after what the stream was given before, and before what it is given later.
    pub stream: &'a Stream,
    /// Scratch memory of the size that the plan names; its content means nothing before and after.
    pub workspace: DeviceSpan<'a>,
}

impl LaunchContext<'_> {
    /// The same on another stream.
    fn on<'s>(&'s self, stream: &'s Stream) -> LaunchContext<'s> {
        LaunchContext { stream, workspace: self.workspace }
    }

    /// Everything that a call gives to the device: that of its tensors, completed.
    fn call(&self, mut tensors: Call, batch: &DeviceBatch<'_>, scale: f32) -> Call {
        tensors.extend(batch.spans().map(|span| span.address().0));
        tensors.extend([self.workspace.address().0, scale.to_bits().into()]);
        tensors
    }
}
