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
mod band_both;
mod band_calls;
mod band_pair;
mod combine;
mod compress;
mod nsa;
mod rope;
mod select;
mod tensors;

pub(crate) use band::{BandBackwardStep, BandStep, BranchGrads, SharedSums, band};
pub use band_calls::{BandBackward, BandForward};
pub use combine::{CombineBackward, CombineBackwardTensors, CombineForward, CombineTensors};
pub use compress::{CompressBackward, CompressBackwardTensors, CompressForward, CompressTensors};
pub use nsa::{
    NsaBackward, NsaBackwardTensors, NsaForward, NsaForwardTensors, NsaParameterGrads, NsaParameters, NsaSavedTensors,
    Recompute,
};
pub use rope::{RopeRows, RopeTurn};
pub use select::Select;
pub use tensors::{AttentionGradInputs, AttentionGradTensors, AttentionTensors, Gates};

pub use crate::launch::{LaunchContext, TensorSpan};
