//! Stage `window`: causal attention to a sliding window.

use crate::attention::{AttentionGradTensors, AttentionResult};
use crate::engine::Engine;
use fsa_core::{AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Result};

/// Stage `window`.
impl Engine {
    /// Attention of the row at position `p` to the keys `max(0, p - window_size) ..= p`: `window_size` earlier keys
    /// and its own, the meaning that FlashAttention gives to `window_size=(window_size, 0)`. Shapes are those of
    /// [`Engine::dense`].
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) or [`Error::Unsupported`](crate::Error::Unsupported) that names the
    /// argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory) if an output cannot be allocated.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(4);
    /// # let query = Tensor::zeros("query", DType::F32, &[4, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[4, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let result = engine.window(&args, 1)?;
    /// // One earlier key and the own: two keys with logit 0 from the second row on.
    /// let lse = result.lse.as_slice::<f32>("lse")?;
    /// assert!((lse[3] - 2f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn window(&self, args: &AttentionArgs<'_>, window_size: usize) -> Result<AttentionResult> {
        self.attention(&AttentionStage::Window { window_size }, args)
    }

    /// [`Engine::window`] into the caller's `out` and `lse`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::window`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype; the outputs are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(4);
    /// # let query = Tensor::zeros("query", DType::F32, &[4, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[4, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let mut result = engine.window(&args, 1)?;
    /// engine.window_into(&args, 1, &mut result.as_output())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn window_into(
        &self,
        args: &AttentionArgs<'_>,
        window_size: usize,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        self.attention_into(&AttentionStage::Window { window_size }, args, output)
    }

    /// Backward of [`Engine::window`]: the gradients of `query`, `key` and `value`, in their shapes and dtype.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::window`], for the tensors of `grad` too.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(4);
    /// # let query = Tensor::zeros("query", DType::F32, &[4, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[4, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[4, 2, 8])?;
    /// let forward = engine.window(&args, 1)?;
    /// let grads = engine.window_backward(&args, 1, &forward.grad_args(grad_out.view()))?;
    /// assert_eq!(grads.grad_key.shape(), [4, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn window_backward(
        &self,
        args: &AttentionArgs<'_>,
        window_size: usize,
        grad: &AttentionGradArgs<'_>,
    ) -> Result<AttentionGradTensors> {
        self.attention_backward(&AttentionStage::Window { window_size }, args, grad)
    }

    /// [`Engine::window_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::window_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(4);
    /// # let query = Tensor::zeros("query", DType::F32, &[4, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[4, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[4, 2, 8])?;
    /// # let forward = engine.window(&args, 1)?;
    /// let grad = forward.grad_args(grad_out.view());
    /// let mut grads = engine.window_backward(&args, 1, &grad)?;
    /// engine.window_backward_into(&args, 1, &grad, &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn window_backward_into(
        &self,
        args: &AttentionArgs<'_>,
        window_size: usize,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.attention_backward_into(&AttentionStage::Window { window_size }, args, grad, grads)
    }
}
