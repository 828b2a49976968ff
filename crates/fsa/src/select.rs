//! Stage `select`: the blocks that every row attends to, found in the pass that computes compressed attention.

use crate::attention::AttentionResult;
use crate::engine::Engine;
use fsa_core::{AttentionOutput, DType, Result, SelectArgs, Tensor, TensorViewMut};

/// What [`Engine::select`] computes.
///
/// ```
/// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, SelectArgs, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let (batch, config) = (Batch::single(64), NsaConfig::default());
/// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
/// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
/// # let attention = AttentionArgs {
/// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
/// # };
/// let result = Engine::cpu()?.select(&SelectArgs { attention, config: &config })?;
/// assert_eq!(result.attention.out.shape(), [64, 2, 8]);
/// assert_eq!(result.topk_indices.shape(), [1, 64, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SelectResult {
    /// Output and log-sum-exp of compressed attention.
    pub attention: AttentionResult,
    /// `[num_kv_heads, total_q, topk]` i32: ascending ids, left-packed, then -1.
    pub topk_indices: Tensor,
}

/// Stage `select`.
impl Engine {
    /// Compressed attention, and the blocks of every row: its first `init_blocks`, its last `local_blocks`, and
    /// those with the highest scores, `topk` in all. `query` is `[total_q, num_q_heads, head_dim]`; `key` and
    /// `value` are the compressed rows, as [`Engine::compress`] writes them.
    ///
    /// The choice is not differentiated; the attention is, by [`Engine::compressed_backward`].
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) or [`Error::Unsupported`](crate::Error::Unsupported) that names the
    /// argument or the field of `config`; [`Error::OutOfMemory`](crate::Error::OutOfMemory) if an output cannot be
    /// allocated.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, SelectArgs, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(96);
    /// # let query = Tensor::zeros("query", DType::F32, &[96, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[5, 1, 8])?;
    /// # let attention = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let config = NsaConfig { block_size: 16, topk: 4, ..NsaConfig::default() };
    /// let result = Engine::cpu()?.select(&SelectArgs { attention, config: &config })?;
    /// // Row 16 lies in block 1 and lists both blocks that it can see.
    /// assert_eq!(result.topk_indices.as_slice::<i32>("topk_indices")?[16 * 4..17 * 4], [0, 1, -1, -1]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn select(&self, args: &SelectArgs<'_>) -> Result<SelectResult> {
        args.config.validate()?;
        let shape = args.attention.shape(&args.stage())?;
        let mut attention = AttentionResult::zeros(&shape)?;
        let lists = [shape.num_kv_heads, shape.total_q, args.config.topk];
        let mut topk_indices = Tensor::zeros("topk_indices", DType::I32, &lists)?;
        self.select_into(args, &mut attention.as_output(), &mut topk_indices.view_mut())?;
        Ok(SelectResult { attention, topk_indices })
    }

    /// [`Engine::select`] into the caller's `out`, `lse` and `topk_indices`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::select`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype; the outputs are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, SelectArgs, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(64), NsaConfig::default());
    /// # let query = Tensor::zeros("query", DType::F32, &[64, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[3, 1, 8])?;
    /// # let attention = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let (engine, args) = (Engine::cpu()?, SelectArgs { attention, config: &config });
    /// let mut result = engine.select(&args)?;
    /// engine.select_into(&args, &mut result.attention.as_output(), &mut result.topk_indices.view_mut())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn select_into(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        self.backend().select(args, output, topk_indices)
    }
}
