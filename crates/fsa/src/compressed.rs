//! Stage `compressed`: attention to the compressed keys.

use crate::attention::{AttentionGradTensors, AttentionResult};
use crate::engine::Engine;
use fsa_core::backend::compressed_stage;
use fsa_core::{AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, NsaConfig, Result};

/// Stage `compressed`.
impl Engine {
    /// Attention of the row at position `p` to the compressed keys `i` whose window has ended: `i * kernel_stride +
    /// kernel_size - 1 <= p`. `key` and `value` hold the compressed rows of all sequences,
    /// `[batch.total_compressed(kernel_size, kernel_stride), num_kv_heads, _]`, as [`Engine::compress`] writes them.
    /// Of `config` only `kernel_size` and `kernel_stride` count. [`Engine::select`] computes the same and the blocks
    /// besides.
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
    /// # let batch = Batch::single(64);
    /// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let config = NsaConfig::default(); // windows of 32 tokens, one every 16
    /// let result = engine.compressed(&args, &config)?;
    /// // Row 30 sees no whole window yet; row 63 sees all three.
    /// let lse = result.lse.as_slice::<f32>("lse")?;
    /// assert_eq!(lse[30], f32::NEG_INFINITY);
    /// assert!((lse[63] - 3f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compressed(&self, args: &AttentionArgs<'_>, config: &NsaConfig) -> Result<AttentionResult> {
        self.attention(&compressed_stage(config), args)
    }

    /// [`Engine::compressed`] into the caller's `out` and `lse`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compressed`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype; the outputs are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(64);
    /// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let config = NsaConfig::default(); // windows of 32 tokens, one every 16
    /// let mut result = engine.compressed(&args, &config)?;
    /// engine.compressed_into(&args, &config, &mut result.as_output())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn compressed_into(
        &self,
        args: &AttentionArgs<'_>,
        config: &NsaConfig,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        self.attention_into(&compressed_stage(config), args, output)
    }

    /// Backward of [`Engine::compressed`]: the gradients of `query` and of the compressed `key` and `value`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compressed`], for the tensors of `grad` too.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(64);
    /// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let config = NsaConfig::default(); // windows of 32 tokens, one every 16
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[64, 2, 8])?;
    /// let forward = engine.compressed(&args, &config)?;
    /// let grads = engine.compressed_backward(&args, &config, &forward.grad_args(grad_out.view()))?;
    /// assert_eq!(grads.grad_key.shape(), [3, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compressed_backward(
        &self,
        args: &AttentionArgs<'_>,
        config: &NsaConfig,
        grad: &AttentionGradArgs<'_>,
    ) -> Result<AttentionGradTensors> {
        self.attention_backward(&compressed_stage(config), args, grad)
    }

    /// [`Engine::compressed_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compressed_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(64);
    /// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let config = NsaConfig::default(); // windows of 32 tokens, one every 16
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[64, 2, 8])?;
    /// # let forward = engine.compressed(&args, &config)?;
    /// let grad = forward.grad_args(grad_out.view());
    /// let mut grads = engine.compressed_backward(&args, &config, &grad)?;
    /// engine.compressed_backward_into(&args, &config, &grad, &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn compressed_backward_into(
        &self,
        args: &AttentionArgs<'_>,
        config: &NsaConfig,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.attention_backward_into(&compressed_stage(config), args, grad, grads)
    }
}
