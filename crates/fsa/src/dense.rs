//! Stage `dense`: causal attention to every key, the yardstick of the sparse stages.

use crate::attention::{AttentionGradTensors, AttentionResult};
use crate::engine::Engine;
use fsa_core::{AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Result};

/// Stage `dense`.
impl Engine {
    /// Causal attention to every key at or before the row's position. `query` is `[total_q, num_q_heads, head_dim]`,
    /// `key` `[total_kv, num_kv_heads, head_dim]`, `value` `[total_kv, num_kv_heads, value_dim]`; `out` is `[total_q,
    /// num_q_heads, value_dim]` and `lse` `[num_q_heads, total_q]` f32, natural log.
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
    /// # let batch = Batch::single(3);
    /// # let query = Tensor::zeros("query", DType::F32, &[3, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let result = engine.dense(&args)?;
    /// // Equal logits: row t spreads its weight over t + 1 keys, each logit 0, so lse = ln(t + 1).
    /// let lse = result.lse.as_slice::<f32>("lse")?;
    /// assert!((lse[2] - 3f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn dense(&self, args: &AttentionArgs<'_>) -> Result<AttentionResult> {
        self.attention(&AttentionStage::Dense, args)
    }

    /// [`Engine::dense`] into the caller's `out` and `lse`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::dense`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype; the outputs are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(3);
    /// # let query = Tensor::zeros("query", DType::F32, &[3, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let mut result = engine.dense(&args)?;
    /// engine.dense_into(&args, &mut result.as_output())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn dense_into(&self, args: &AttentionArgs<'_>, output: &mut AttentionOutput<'_>) -> Result<()> {
        self.attention_into(&AttentionStage::Dense, args, output)
    }

    /// Backward of [`Engine::dense`]: the gradients of `query`, `key` and `value`, in their shapes and dtype.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::dense`], for the tensors of `grad` too.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(3);
    /// # let query = Tensor::zeros("query", DType::F32, &[3, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[3, 2, 8])?;
    /// let forward = engine.dense(&args)?;
    /// let grads = engine.dense_backward(&args, &forward.grad_args(grad_out.view()))?;
    /// assert_eq!(grads.grad_key.shape(), [3, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn dense_backward(
        &self,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
    ) -> Result<AttentionGradTensors> {
        self.attention_backward(&AttentionStage::Dense, args, grad)
    }

    /// [`Engine::dense_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::dense_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(3);
    /// # let query = Tensor::zeros("query", DType::F32, &[3, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[3, 2, 8])?;
    /// # let forward = engine.dense(&args)?;
    /// let grad = forward.grad_args(grad_out.view());
    /// let mut grads = engine.dense_backward(&args, &grad)?;
    /// engine.dense_backward_into(&args, &grad, &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn dense_backward_into(
        &self,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.attention_backward_into(&AttentionStage::Dense, args, grad, grads)
    }
}
