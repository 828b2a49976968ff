//! Stage `compress`: windows of keys or values to compressed keys or values.

use crate::engine::Engine;
use fsa_core::{CompressArgs, CompressGrads, Compression, DType, Result, Tensor, TensorView, TensorViewMut};

/// Gradients of a compression.
///
/// ```
/// # use fsa::{Batch, CompressArgs, Compression, DType, Engine, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let batch = Batch::single(6);
/// # let input = Tensor::zeros("input", DType::F32, &[6, 1, 8])?;
/// let weight = Tensor::zeros("weight", DType::F32, &[1, 4])?;
/// let args = CompressArgs {
///     input: input.view(),
///     batch: &batch,
///     kernel_size: 4,
///     kernel_stride: 2,
///     compression: Compression::Weighted { weight: weight.view() },
/// };
/// let grad_out = Tensor::zeros("grad_out", DType::F32, &[2, 1, 8])?;
/// let grads = Engine::cpu()?.compress_backward(&args, &grad_out.view())?;
/// assert_eq!(grads.grad_input.shape(), [6, 1, 8]);
/// assert!(grads.grad_weight.is_some() && grads.grad_position.is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct CompressGradTensors {
    /// `[total_kv, num_kv_heads, dim]`.
    pub grad_input: Tensor,
    /// Shape of the weight; `None` for `mean`.
    pub grad_weight: Option<Tensor>,
    /// Shape of `position`; `None` where there is none.
    pub grad_position: Option<Tensor>,
}

impl CompressGradTensors {
    /// Writable views, for [`Engine::compress_backward_into`].
    ///
    /// ```
    /// # use fsa::{CompressGradTensors, DType, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let grad_input = Tensor::zeros("grad_input", DType::F32, &[6, 1, 8])?;
    /// let mut grads = CompressGradTensors { grad_input, grad_weight: None, grad_position: None };
    /// assert_eq!(grads.as_grads().grad_input.shape(), [6, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_grads(&mut self) -> CompressGrads<'_> {
        CompressGrads {
            grad_input: self.grad_input.view_mut(),
            grad_weight: self.grad_weight.as_mut().map(Tensor::view_mut),
            grad_position: self.grad_position.as_mut().map(Tensor::view_mut),
        }
    }
}

/// Zeroed gradients of the weight and the position embedding that `compression` has.
pub(crate) fn parameter_zeros(compression: &Compression<'_>, dtype: DType) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (weight, position) = match compression {
        Compression::Mean => (None, None),
        Compression::Weighted { weight } => (Some(weight), None),
        Compression::Linear { weight, position } => (Some(weight), position.as_ref()),
    };
    let zeros = |name, view: Option<&TensorView<'_>>| {
        view.map(|parameter| Tensor::zeros(name, dtype, parameter.shape())).transpose()
    };
    Ok((zeros("grad_weight", weight)?, zeros("grad_position", position)?))
}

/// Stage `compress`.
impl Engine {
    /// One vector per window of `kernel_size` tokens and kv head, a window every `kernel_stride` tokens, none
    /// across the border of two sequences. `input` is `[total_kv, num_kv_heads, dim]`; the result is
    /// `[total_compressed, num_kv_heads, dim]`, its rows described by
    /// [`Batch::compressed_offsets`](crate::Batch::compressed_offsets).
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) that names the argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    /// if the output cannot be allocated.
    ///
    /// ```
    /// # use fsa::{Batch, CompressArgs, Compression, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let batch = Batch::single(6);
    /// let input = Tensor::new("input", (0..6).map(|i| i as f32).collect(), &[6, 1, 1])?;
    /// let args = CompressArgs {
    ///     input: input.view(),
    ///     batch: &batch,
    ///     kernel_size: 4,
    ///     kernel_stride: 2,
    ///     compression: Compression::Mean,
    /// };
    /// let out = Engine::cpu()?.compress(&args)?;
    /// assert_eq!(out.as_slice::<f32>("out")?, [1.5, 3.5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compress(&self, args: &CompressArgs<'_>) -> Result<Tensor> {
        let shape = args.shape()?;
        let sizes = [shape.total_compressed, shape.num_kv_heads, shape.dim];
        let mut out = Tensor::zeros("out", args.input.dtype(), &sizes)?;
        self.compress_into(args, &mut out.view_mut())?;
        Ok(out)
    }

    /// [`Engine::compress`] into the caller's view.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compress`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype, which is then untouched.
    ///
    /// ```
    /// # use fsa::{Batch, CompressArgs, Compression, Engine, Tensor, TensorViewMut};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(6);
    /// # let input = Tensor::new("input", (0..6).map(|i| i as f32).collect(), &[6, 1, 1])?;
    /// # let compression = Compression::Mean;
    /// # let args = CompressArgs { input: input.view(), batch: &batch, kernel_size: 4, kernel_stride: 2, compression };
    /// let mut out = [0.0f32; 2];
    /// Engine::cpu()?.compress_into(&args, &mut TensorViewMut::new("out", &mut out, &[2, 1, 1])?)?;
    /// assert_eq!(out, [1.5, 3.5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compress_into(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.backend().compress(args, out)
    }

    /// Backward of [`Engine::compress`]: the gradients of `input`, and of the weight and the position embedding
    /// where the compression has them. `grad_out` has the shape and dtype of the forward's result.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compress`], for `grad_out` too.
    ///
    /// ```
    /// # use fsa::{Batch, CompressArgs, Compression, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(6);
    /// # let input = Tensor::new("input", (0..6).map(|i| i as f32).collect(), &[6, 1, 1])?;
    /// # let compression = Compression::Mean;
    /// # let args = CompressArgs { input: input.view(), batch: &batch, kernel_size: 4, kernel_stride: 2, compression };
    /// let grad_out = Tensor::new("grad_out", vec![4.0f32, 8.0], &[2, 1, 1])?;
    /// let grads = Engine::cpu()?.compress_backward(&args, &grad_out.view())?;
    /// // Tokens 2 and 3 lie in both windows.
    /// assert_eq!(grads.grad_input.as_slice::<f32>("grad_input")?, [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compress_backward(&self, args: &CompressArgs<'_>, grad_out: &TensorView<'_>) -> Result<CompressGradTensors> {
        args.shape()?;
        let dtype = args.input.dtype();
        let grad_input = Tensor::zeros("grad_input", dtype, args.input.shape())?;
        let (grad_weight, grad_position) = parameter_zeros(&args.compression, dtype)?;
        let mut grads = CompressGradTensors { grad_input, grad_weight, grad_position };
        self.compress_backward_into(args, grad_out, &mut grads.as_grads())?;
        Ok(grads)
    }

    /// [`Engine::compress_backward`] into the caller's views, which are overwritten, not added to. A gradient of a
    /// parameter that is `None` is not computed.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::compress_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype, or of a parameter that the compression does not have; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{Batch, CompressArgs, Compression, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let batch = Batch::single(6);
    /// # let input = Tensor::new("input", (0..6).map(|i| i as f32).collect(), &[6, 1, 1])?;
    /// # let compression = Compression::Mean;
    /// # let args = CompressArgs { input: input.view(), batch: &batch, kernel_size: 4, kernel_stride: 2, compression };
    /// # let (engine, grad_out) = (Engine::cpu()?, Tensor::new("grad_out", vec![4.0f32, 8.0], &[2, 1, 1])?);
    /// let mut grads = engine.compress_backward(&args, &grad_out.view())?;
    /// engine.compress_backward_into(&args, &grad_out.view(), &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn compress_backward_into(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()> {
        self.backend().compress_backward(args, grad_out, grads)
    }
}
