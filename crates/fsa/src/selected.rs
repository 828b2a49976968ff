//! Stage `selected`: attention to the blocks that each row lists. This is the stage that FSA is about.

use crate::attention::{AttentionGradTensors, AttentionResult};
use crate::engine::Engine;
use fsa_core::{AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Result, TensorView};

/// Blocks that each row attends to.
///
/// ```
/// # fn main() -> fsa::Result<()> {
/// use fsa::{Selection, Tensor};
/// // Two rows of one kv head; the second lists one block only.
/// let topk_indices = Tensor::new("topk_indices", vec![0, 1, 2, -1], &[1, 2, 2])?;
/// let selection = Selection { topk_indices: topk_indices.view(), block_size: 64, validate: false };
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Selection<'a> {
    /// `[num_kv_heads, total_q, topk]` i32: block ids local to the row's sequence, in any order, each once
    /// in a row. An id that is negative or beyond the row's own block counts as absent.
    pub topk_indices: TensorView<'a>,
    /// Keys in a block: 16, 32, 64, 128 or 256.
    pub block_size: usize,
    /// Refuse ids other than -1 and the blocks of the row's past, and ids that occur twice in a row.
    pub validate: bool,
}

impl<'a> Selection<'a> {
    fn stage(&self) -> AttentionStage<'a> {
        let Self { topk_indices, block_size, validate } = *self;
        AttentionStage::Selected { topk_indices, block_size, validate }
    }
}

/// Stage `selected`.
impl Engine {
    /// Attention of every row to the keys at or before its position in the blocks that it lists, one list per row and
    /// kv head. Shapes are those of [`Engine::dense`]. The ids may come from [`Engine::select`] or from anywhere
    /// else: any i32 is safe.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) or [`Error::Unsupported`](crate::Error::Unsupported) that names the
    /// argument, `topk_indices` with the row and the id if `validate` is set;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if an output cannot be allocated.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(32);
    /// # let query = Tensor::zeros("query", DType::F32, &[32, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[32, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let ids: Vec<i32> = (0..32).map(|row| row / 16).collect(); // every row lists its own block
    /// let topk_indices = Tensor::new("topk_indices", ids, &[1, 32, 1])?;
    /// let selection = Selection { topk_indices: topk_indices.view(), block_size: 16, validate: true };
    /// let result = engine.selected(&args, &selection)?;
    /// // Row 20 sees positions 16 ..= 20.
    /// let lse = result.lse.as_slice::<f32>("lse")?;
    /// assert!((lse[20] - 5f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn selected(&self, args: &AttentionArgs<'_>, selection: &Selection<'_>) -> Result<AttentionResult> {
        self.attention(&selection.stage(), args)
    }

    /// [`Engine::selected`] into the caller's `out` and `lse`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::selected`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype; the outputs are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(32);
    /// # let query = Tensor::zeros("query", DType::F32, &[32, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[32, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let ids: Vec<i32> = (0..32).map(|row| row / 16).collect(); // every row lists its own block
    /// let topk_indices = Tensor::new("topk_indices", ids, &[1, 32, 1])?;
    /// let selection = Selection { topk_indices: topk_indices.view(), block_size: 16, validate: true };
    /// let mut result = engine.selected(&args, &selection)?;
    /// engine.selected_into(&args, &selection, &mut result.as_output())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn selected_into(
        &self,
        args: &AttentionArgs<'_>,
        selection: &Selection<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        self.attention_into(&selection.stage(), args, output)
    }

    /// Backward of [`Engine::selected`]: the gradients of `query`, `key` and `value`, in their shapes and dtype.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::selected`], for the tensors of `grad` too.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(32);
    /// # let query = Tensor::zeros("query", DType::F32, &[32, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[32, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let ids: Vec<i32> = (0..32).map(|row| row / 16).collect(); // every row lists its own block
    /// let topk_indices = Tensor::new("topk_indices", ids, &[1, 32, 1])?;
    /// let selection = Selection { topk_indices: topk_indices.view(), block_size: 16, validate: true };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[32, 2, 8])?;
    /// let forward = engine.selected(&args, &selection)?;
    /// let grads = engine.selected_backward(&args, &selection, &forward.grad_args(grad_out.view()))?;
    /// assert_eq!(grads.grad_key.shape(), [32, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn selected_backward(
        &self,
        args: &AttentionArgs<'_>,
        selection: &Selection<'_>,
        grad: &AttentionGradArgs<'_>,
    ) -> Result<AttentionGradTensors> {
        self.attention_backward(&selection.stage(), args, grad)
    }

    /// [`Engine::selected_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::selected_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, NsaConfig, Selection, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let engine = Engine::cpu()?;
    /// # let batch = Batch::single(32);
    /// # let query = Tensor::zeros("query", DType::F32, &[32, 2, 8])?;
    /// # let key = Tensor::zeros("key", DType::F32, &[32, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: query.view(), key: key.view(), value: key.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let ids: Vec<i32> = (0..32).map(|row| row / 16).collect(); // every row lists its own block
    /// let topk_indices = Tensor::new("topk_indices", ids, &[1, 32, 1])?;
    /// let selection = Selection { topk_indices: topk_indices.view(), block_size: 16, validate: true };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[32, 2, 8])?;
    /// # let forward = engine.selected(&args, &selection)?;
    /// let grad = forward.grad_args(grad_out.view());
    /// let mut grads = engine.selected_backward(&args, &selection, &grad)?;
    /// engine.selected_backward_into(&args, &selection, &grad, &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn selected_backward_into(
        &self,
        args: &AttentionArgs<'_>,
        selection: &Selection<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.attention_backward_into(&selection.stage(), args, grad, grads)
    }
}
