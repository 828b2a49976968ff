//! What a backend implements. The public face, the conformance suite and the command line work
//! through this trait, so that a backend is tested and used by being passed in.

use crate::config::NsaConfig;
use crate::error::Result;
use crate::ops::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, CombineArgs, CombineGrads,
    CompressArgs, CompressGrads, NsaArgs, NsaForward, NsaGrads, NsaSaved, RopeArgs, SelectArgs,
};
use crate::tensor::{TensorView, TensorViewMut};

/// A set of stages over host tensors.
///
/// Every method checks its arguments before it writes; the results do not depend on the number of
/// threads. `docs/algorithm.md` defines the stages.
pub trait Backend: Send + Sync {
    /// Short lower-case name, such as `cpu`.
    fn name(&self) -> &'static str;

    /// Stages `dense`, `window`, `compressed`, `selected`: writes `out` and `lse`.
    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()>;

    /// Backward of [`Backend::attention`].
    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()>;

    /// Stages `compressed` and `select` in one pass: writes `out`, `lse` and `topk_indices`.
    fn select(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()>;

    /// Stage `compress`.
    fn compress(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()>;

    /// Backward of [`Backend::compress`].
    fn compress_backward(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()>;

    /// Stage `rope`; its backward is the inverse rotation.
    fn rope(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()>;

    /// Stage `combine`.
    fn combine(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()>;

    /// Backward of [`Backend::combine`].
    fn combine_backward(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()>;

    /// The whole operation: writes `out`; keeps the state for the backward if `save` is set.
    fn nsa(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward>;

    /// Backward of [`Backend::nsa`].
    fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()>;

    /// Scratch memory that the whole operation takes at most besides inputs, outputs and saved state, in bytes.
    fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize>;
}

/// Reads the window geometry of a configuration as an attention stage.
pub fn compressed_stage(config: &NsaConfig) -> AttentionStage<'static> {
    AttentionStage::Compressed { kernel_size: config.kernel_size, kernel_stride: config.kernel_stride }
}
