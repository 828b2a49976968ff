//! Stage `combine`: the gated sum of the three branches.

use crate::engine::Engine;
use fsa_core::{CombineArgs, CombineGrads, Result, Tensor, TensorView, TensorViewMut};

/// Gradients of a gated sum.
///
/// ```
/// # use fsa::{CombineArgs, DType, Engine, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let gates = Tensor::zeros("gates", DType::F32, &[2, 3])?;
/// # let branch = Tensor::zeros("out", DType::F32, &[2, 1, 8])?;
/// # let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
/// let grads = Engine::cpu()?.combine_backward(&args, &branch.view())?;
/// assert_eq!(grads.grad_gates.shape(), [2, 3]);
/// assert_eq!(grads.grad_branches[2].shape(), [2, 1, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct CombineGradTensors {
    /// Shape of `gates`.
    pub grad_gates: Tensor,
    /// Gradients of the compressed, selected and window branch, each `[total_q, num_q_heads, value_dim]`.
    pub grad_branches: [Tensor; 3],
}

impl CombineGradTensors {
    /// Writable views, for [`Engine::combine_backward_into`].
    ///
    /// ```
    /// # use fsa::{CombineArgs, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let gates = Tensor::zeros("gates", DType::F32, &[2, 3])?;
    /// # let branch = Tensor::zeros("out", DType::F32, &[2, 1, 8])?;
    /// # let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
    /// let mut grads = Engine::cpu()?.combine_backward(&args, &branch.view())?;
    /// assert_eq!(grads.as_grads().grad_gates.shape(), [2, 3]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_grads(&mut self) -> CombineGrads<'_> {
        CombineGrads {
            grad_gates: self.grad_gates.view_mut(),
            grad_branches: self.grad_branches.each_mut().map(Tensor::view_mut),
        }
    }
}

/// Stage `combine`.
impl Engine {
    /// `out = g0 * out_compressed + g1 * out_selected + g2 * out_window`, per row or per row and head. The gates
    /// arrive activated: `[total_q, 3]` or `[total_q, num_q_heads, 3]`. The branches and the result are
    /// `[total_q, num_q_heads, value_dim]`.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) that names the argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    /// if the output cannot be allocated.
    ///
    /// ```
    /// # use fsa::{CombineArgs, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let gates = Tensor::new("gates", vec![1.0f32, 0.5, 0.25], &[1, 3])?;
    /// let branch = Tensor::new("out", vec![4.0f32; 8], &[1, 1, 8])?;
    /// let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
    /// assert_eq!(Engine::cpu()?.combine(&args)?.as_slice::<f32>("out")?, [7.0; 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn combine(&self, args: &CombineArgs<'_>) -> Result<Tensor> {
        let (shape, _) = args.shape()?;
        let mut out = Tensor::zeros("out", args.branches[0].dtype(), &shape)?;
        self.combine_into(args, &mut out.view_mut())?;
        Ok(out)
    }

    /// [`Engine::combine`] into the caller's view.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::combine`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype, which is then untouched.
    ///
    /// ```
    /// # use fsa::{CombineArgs, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let gates = Tensor::zeros("gates", DType::F32, &[1, 3])?;
    /// # let branch = Tensor::zeros("out", DType::F32, &[1, 1, 8])?;
    /// # let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
    /// let mut out = Tensor::zeros("out", DType::F32, &[1, 1, 8])?;
    /// Engine::cpu()?.combine_into(&args, &mut out.view_mut())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn combine_into(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.backend().combine(args, out)
    }

    /// Backward of [`Engine::combine`]: the gradients of the gates and of the three branches. `grad_out` has the
    /// shape and dtype of the forward's result.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::combine`], for `grad_out` too.
    ///
    /// ```
    /// # use fsa::{CombineArgs, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let gates = Tensor::new("gates", vec![1.0f32, 0.5, 0.25], &[1, 3])?;
    /// # let branch = Tensor::new("out", vec![4.0f32; 8], &[1, 1, 8])?;
    /// # let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
    /// let grad_out = Tensor::new("grad_out", vec![1.0f32; 8], &[1, 1, 8])?;
    /// let grads = Engine::cpu()?.combine_backward(&args, &grad_out.view())?;
    /// assert_eq!(grads.grad_gates.as_slice::<f32>("grad_gates")?, [32.0; 3]);
    /// assert_eq!(grads.grad_branches[1].as_slice::<f32>("grad_out_selected")?, [0.5; 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn combine_backward(&self, args: &CombineArgs<'_>, grad_out: &TensorView<'_>) -> Result<CombineGradTensors> {
        let (shape, _) = args.shape()?;
        let dtype = args.branches[0].dtype();
        let branch = |name| Tensor::zeros(name, dtype, &shape);
        let mut grads = CombineGradTensors {
            grad_gates: Tensor::zeros("grad_gates", dtype, args.gates.shape())?,
            grad_branches: [branch("grad_out_compressed")?, branch("grad_out_selected")?, branch("grad_out_window")?],
        };
        self.combine_backward_into(args, grad_out, &mut grads.as_grads())?;
        Ok(grads)
    }

    /// [`Engine::combine_backward`] into the caller's views, which are overwritten, not added to.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::combine_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another
    /// shape or dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{CombineArgs, DType, Engine, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let gates = Tensor::zeros("gates", DType::F32, &[1, 3])?;
    /// # let branch = Tensor::zeros("out", DType::F32, &[1, 1, 8])?;
    /// # let args = CombineArgs { gates: gates.view(), branches: [branch.view(); 3] };
    /// # let engine = Engine::cpu()?;
    /// let mut grads = engine.combine_backward(&args, &branch.view())?;
    /// engine.combine_backward_into(&args, &branch.view(), &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn combine_backward_into(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()> {
        self.backend().combine_backward(args, grad_out, grads)
    }
}
