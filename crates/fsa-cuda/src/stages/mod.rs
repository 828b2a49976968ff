//! The stages of native sparse attention besides `selected`, and the whole of it, on device tensors: plan once, launch as often
//! as wanted.
//!
//! As in [`crate::selected`], a launch only gives kernels to the stream, waits for nothing and allocates nothing; the caller owns
//! the tensors, the workspace and the stream. Sizes of everything follow from shapes: what the lengths of the sequences decide,
//! such as how many compressed keys there are, is bounded on the host and found on the device.
//!
//! | stage | forward | backward |
//! |---|---|---|
//! | Stage `dense`, Stage `window`, Stage `compressed` | [`BandForward`] | [`BandBackward`] |
//! | Stage `select`, with compressed attention | [`Select`] | |
//! | Stage `compress` | [`CompressForward`] | [`CompressBackward`] |
//! | Stage `rope` | [`RopeTurn`] | the same, inverse |
//! | Stage `combine` | [`CombineForward`] | [`CombineBackward`] |
//! | Stage `nsa` | [`NsaForward`] | [`NsaBackward`] |

mod band;
mod combine;
mod compress;
mod nsa;
mod rope;
mod select;
mod tensors;

pub use band::{BandBackward, BandForward};
pub use combine::{CombineBackward, CombineBackwardTensors, CombineForward, CombineTensors};
pub use compress::{CompressBackward, CompressBackwardTensors, CompressForward, CompressTensors};
pub use nsa::{
    NsaBackward, NsaBackwardTensors, NsaForward, NsaForwardTensors, NsaParameterGrads, NsaParameters, NsaSavedTensors,
};
pub use rope::{RopeRows, RopeTurn};
pub use select::Select;
pub use tensors::{AttentionGradTensors, AttentionTensors, Gates};

pub use crate::selected::{LaunchContext, TensorSpan};

use crate::driver::DeviceBatch;
use crate::plan::Sizes;
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
fn check_batch(batch: &DeviceBatch<'_>, sizes: &Sizes) -> Result<()> {
    let planned = (sizes.sequences, sizes.total_q, sizes.total_kv);
    if batch.sizes() != planned {
        let text = |(sequences, q, kv)| format!("{sequences} sequences of together {q} rows and {kv} keys");
        return Err(Error::input("cu_seqlens_q", text(planned), text(batch.sizes())));
    }
    let bytes = (sizes.sequences + 1) * size_of::<i32>();
    let names = ["cu_seqlens_q", "cu_seqlens_kv"];
    names.into_iter().zip(batch.spans()).try_for_each(|(name, span)| tensors::check_words(name, &span, bytes))
}
