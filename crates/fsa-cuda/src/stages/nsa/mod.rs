//! Stage `nsa` on device tensors: the whole operation as one planned call on one workspace.

mod backward;
mod forward;
mod parts;
mod tensors;

pub use backward::NsaBackward;
pub use forward::{NsaForward, Recompute};
pub use tensors::{NsaBackwardTensors, NsaForwardTensors, NsaParameterGrads, NsaParameters, NsaSavedTensors};
