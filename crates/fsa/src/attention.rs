//! What the attention stages share: results, gradients, and the four calls that every stage is a name for.

use crate::engine::Engine;
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, DType, Result,
    Tensor, TensorView,
};

/// What an attention stage computes.
///
/// ```
/// # use fsa::{AttentionArgs, Batch, DType, Engine, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let batch = Batch::single(3);
/// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
/// # let args = AttentionArgs {
/// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
/// # };
/// let result = Engine::cpu()?.dense(&args)?;
/// assert_eq!((result.out.shape(), result.lse.shape()), (&[3, 1, 8][..], &[1, 3][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionResult {
    /// `[total_q, num_q_heads, value_dim]`, dtype of the inputs. A row that sees no key is 0.
    pub out: Tensor,
    /// `[num_q_heads, total_q]` f32, natural logarithm of the softmax denominator. A row that sees no key has `-inf`.
    pub lse: Tensor,
}

impl AttentionResult {
    /// Zeroed tensors of the sizes of a call.
    pub(crate) fn zeros(shape: &AttentionShape) -> Result<Self> {
        Ok(Self {
            out: Tensor::zeros("out", shape.dtype, &shape.out())?,
            lse: Tensor::zeros("lse", DType::F32, &shape.lse())?,
        })
    }

    /// Writable views, for the `_into` form of a stage.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let engine = Engine::cpu()?;
    /// let mut result = engine.dense(&args)?;
    /// engine.dense_into(&args, &mut result.as_output())?; // the second call reuses the memory of the first
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_output(&mut self) -> AttentionOutput<'_> {
        AttentionOutput { out: self.out.view_mut(), lse: self.lse.view_mut() }
    }

    /// What the backward takes besides the inputs, when no gradient reached `lse`. `grad_out` has the
    /// shape and dtype of `out`.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let grad_out = Tensor::zeros("grad_out", DType::F32, &[3, 1, 8])?;
    /// let engine = Engine::cpu()?;
    /// let forward = engine.dense(&args)?;
    /// let grads = engine.dense_backward(&args, &forward.grad_args(grad_out.view()))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn grad_args<'a>(&'a self, grad_out: TensorView<'a>) -> AttentionGradArgs<'a> {
        AttentionGradArgs { out: self.out.view(), lse: self.lse.view(), grad_out, grad_lse: None }
    }
}

/// Gradients of an attention stage; shapes and dtype of the inputs.
///
/// ```
/// # use fsa::{AttentionArgs, Batch, DType, Engine, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let batch = Batch::single(3);
/// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
/// # let args = AttentionArgs {
/// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
/// # };
/// # let engine = Engine::cpu()?;
/// # let forward = engine.dense(&args)?;
/// let grads = engine.dense_backward(&args, &forward.grad_args(zeros.view()))?;
/// assert_eq!(grads.grad_query.shape(), [3, 1, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionGradTensors {
    /// `[total_q, num_q_heads, head_dim]`.
    pub grad_query: Tensor,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub grad_key: Tensor,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub grad_value: Tensor,
}

impl AttentionGradTensors {
    fn zeros(shape: &AttentionShape) -> Result<Self> {
        let (q, kv, dtype) = (shape.num_q_heads, shape.num_kv_heads, shape.dtype);
        Ok(Self {
            grad_query: Tensor::zeros("grad_query", dtype, &[shape.total_q, q, shape.head_dim])?,
            grad_key: Tensor::zeros("grad_key", dtype, &[shape.total_keys, kv, shape.head_dim])?,
            grad_value: Tensor::zeros("grad_value", dtype, &[shape.total_keys, kv, shape.value_dim])?,
        })
    }

    /// Writable views, for the `_backward_into` form of a stage.
    ///
    /// ```
    /// # use fsa::{AttentionArgs, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let engine = Engine::cpu()?;
    /// # let forward = engine.dense(&args)?;
    /// # let mut grads = engine.dense_backward(&args, &forward.grad_args(zeros.view()))?;
    /// engine.dense_backward_into(&args, &forward.grad_args(zeros.view()), &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_grads(&mut self) -> AttentionGrads<'_> {
        AttentionGrads {
            grad_query: self.grad_query.view_mut(),
            grad_key: self.grad_key.view_mut(),
            grad_value: self.grad_value.view_mut(),
        }
    }
}

/// Sizes of a call, for allocation. The ids of a selection are not read here: the backend checks them once.
fn sizes(stage: &AttentionStage<'_>, args: &AttentionArgs<'_>) -> Result<AttentionShape> {
    match *stage {
        AttentionStage::Selected { topk_indices, block_size, .. } => {
            args.shape(&AttentionStage::Selected { topk_indices, block_size, validate: false })
        }
        _ => args.shape(stage),
    }
}

/// Any attention stage by value; [`Engine::dense`], [`Engine::window`], [`Engine::compressed`] and
/// [`Engine::selected`] are its named forms.
impl Engine {
    /// Runs `stage` and allocates `out` and `lse`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) or [`Error::Unsupported`](crate::Error::Unsupported) that names the
    /// argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory) if an output cannot be allocated.
    ///
    /// ```
    /// use fsa::{AttentionArgs, AttentionStage, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// for stage in [AttentionStage::Dense, AttentionStage::Window { window_size: 1 }] {
    ///     let result = Engine::cpu()?.attention(&stage, &args)?;
    ///     assert_eq!(result.out.shape(), [3, 1, 8]);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn attention(&self, stage: &AttentionStage<'_>, args: &AttentionArgs<'_>) -> Result<AttentionResult> {
        let mut result = AttentionResult::zeros(&sizes(stage, args)?)?;
        self.attention_into(stage, args, &mut result.as_output())?;
        Ok(result)
    }

    /// [`Engine::attention`] into the caller's views.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::attention`], and [`Error::Input`](crate::Error::Input) for an output of another shape
    /// or dtype; the outputs are then untouched.
    ///
    /// ```
    /// use fsa::{AttentionArgs, AttentionOutput, AttentionStage, Batch, DType, Engine, Tensor, TensorViewMut};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let (mut out, mut lse) = (vec![0.0f32; 3 * 8], vec![0.0f32; 3]);
    /// let mut output = AttentionOutput {
    ///     out: TensorViewMut::new("out", &mut out, &[3, 1, 8])?,
    ///     lse: TensorViewMut::new("lse", &mut lse, &[1, 3])?,
    /// };
    /// Engine::cpu()?.attention_into(&AttentionStage::Dense, &args, &mut output)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn attention_into(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        self.backend().attention(stage, args, output)
    }

    /// Backward of [`Engine::attention`]; allocates the gradients of `query`, `key` and `value`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::attention`], for `grad`'s tensors too.
    ///
    /// ```
    /// use fsa::{AttentionArgs, AttentionStage, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// let engine = Engine::cpu()?;
    /// let forward = engine.attention(&AttentionStage::Dense, &args)?;
    /// let grads = engine.attention_backward(&AttentionStage::Dense, &args, &forward.grad_args(zeros.view()))?;
    /// assert_eq!(grads.grad_value.shape(), [3, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
    ) -> Result<AttentionGradTensors> {
        let mut grads = AttentionGradTensors::zeros(&sizes(stage, args)?)?;
        self.attention_backward_into(stage, args, grad, &mut grads.as_grads())?;
        Ok(grads)
    }

    /// [`Engine::attention_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::attention_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// use fsa::{AttentionArgs, AttentionStage, Batch, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(3);
    /// # let zeros = Tensor::zeros("query", DType::F32, &[3, 1, 8])?;
    /// # let args = AttentionArgs {
    /// #     query: zeros.view(), key: zeros.view(), value: zeros.view(), batch: &batch, softmax_scale: None,
    /// # };
    /// # let engine = Engine::cpu()?;
    /// # let forward = engine.attention(&AttentionStage::Dense, &args)?;
    /// let (stage, grad) = (AttentionStage::Dense, forward.grad_args(zeros.view()));
    /// let mut grads = engine.attention_backward(&stage, &args, &grad)?;
    /// engine.attention_backward_into(&stage, &args, &grad, &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn attention_backward_into(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        self.backend().attention_backward(stage, args, grad, grads)
    }
}
