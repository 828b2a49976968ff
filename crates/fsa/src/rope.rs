//! Stage `rope`: rotary position embedding.

use crate::engine::Engine;
use fsa_core::{Error, Result, RopeArgs, Tensor, TensorView, TensorViewMut};

/// Stage `rope`.
impl Engine {
    /// Rotates every vector of `input` `[rows, heads, head_dim]` to its row's position; the pairs are
    /// `(x[k], x[k + head_dim / 2])`. [`query_positions`](crate::query_positions),
    /// [`kv_positions`](crate::kv_positions) and [`compressed_positions`](crate::compressed_positions) give the
    /// positions of a batch.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) that names the argument; [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    /// if the output cannot be allocated.
    ///
    /// ```
    /// # use fsa::{Engine, Rope, RopeArgs, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let input = Tensor::new("input", vec![1.0f32, 0.0], &[1, 1, 2])?;
    /// let rope = Rope::default();
    /// let args = RopeArgs { input: input.view(), positions: &[1], rope: &rope, inverse: false };
    /// let out = Engine::cpu()?.rope(&args)?;
    /// // The first pair turns by one radian per position.
    /// let out = out.as_slice::<f32>("out")?;
    /// assert!((out[0] - 1f32.cos()).abs() < 1e-6 && (out[1] - 1f32.sin()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn rope(&self, args: &RopeArgs<'_>) -> Result<Tensor> {
        let mut out = Tensor::zeros("out", args.input.dtype(), args.input.shape())?;
        self.rope_into(args, &mut out.view_mut())?;
        Ok(out)
    }

    /// [`Engine::rope`] into the caller's view.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::rope`], and [`Error::Input`](crate::Error::Input) for an output of another shape or
    /// dtype, which is then untouched.
    ///
    /// ```
    /// # use fsa::{Engine, Rope, RopeArgs, Tensor, TensorViewMut};
    /// # fn main() -> fsa::Result<()> {
    /// # let input = Tensor::new("input", vec![1.0f32, 0.0], &[1, 1, 2])?;
    /// # let rope = Rope::default();
    /// let mut out = [0.0f32; 2];
    /// let args = RopeArgs { input: input.view(), positions: &[0], rope: &rope, inverse: false };
    /// Engine::cpu()?.rope_into(&args, &mut TensorViewMut::new("out", &mut out, &[1, 1, 2])?)?;
    /// assert_eq!(out, [1.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn rope_into(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        self.backend().rope(args, out)
    }

    /// Backward of [`Engine::rope`]: a rotation is orthogonal, so that the gradient of `input` is `grad_out`
    /// rotated the other way. The values of `args.input` are not read.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::rope`], and [`Error::Input`](crate::Error::Input) for a `grad_out` of another shape or dtype
    /// than `args.input`.
    ///
    /// ```
    /// # use fsa::{Engine, Rope, RopeArgs, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let input = Tensor::new("input", vec![1.0f32, 0.0], &[1, 1, 2])?;
    /// # let rope = Rope::default();
    /// let args = RopeArgs { input: input.view(), positions: &[1], rope: &rope, inverse: false };
    /// let engine = Engine::cpu()?;
    /// let out = engine.rope(&args)?;
    /// // The forward's own result as gradient comes back as the input.
    /// let grad_input = engine.rope_backward(&args, &out.view())?;
    /// assert!((grad_input.as_slice::<f32>("grad_input")?[0] - 1.0).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn rope_backward(&self, args: &RopeArgs<'_>, grad_out: &TensorView<'_>) -> Result<Tensor> {
        self.rope(&backward_args(args, grad_out)?)
    }

    /// [`Engine::rope_backward`] into the caller's view.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::rope_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another shape or
    /// dtype, which is then untouched.
    ///
    /// ```
    /// # use fsa::{Engine, Rope, RopeArgs, Tensor, TensorViewMut};
    /// # fn main() -> fsa::Result<()> {
    /// # let input = Tensor::new("input", vec![1.0f32, 0.0], &[1, 1, 2])?;
    /// # let rope = Rope::default();
    /// # let args = RopeArgs { input: input.view(), positions: &[0], rope: &rope, inverse: false };
    /// let mut grad_input = [0.0f32; 2];
    /// let mut view = TensorViewMut::new("grad_input", &mut grad_input, &[1, 1, 2])?;
    /// Engine::cpu()?.rope_backward_into(&args, &input.view(), &mut view)?;
    /// assert_eq!(grad_input, [1.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn rope_backward_into(
        &self,
        args: &RopeArgs<'_>,
        grad_out: &TensorView<'_>,
        grad_input: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        self.rope_into(&backward_args(args, grad_out)?, grad_input)
    }
}

/// The inverse rotation of `grad_out`, once it is known to have the form of the forward's result.
fn backward_args<'a>(args: &RopeArgs<'a>, grad_out: &TensorView<'a>) -> Result<RopeArgs<'a>> {
    let describe = |view: &TensorView<'_>| format!("shape {:?} of {}", view.shape(), view.dtype());
    let (expected, got) = (describe(&args.input), describe(grad_out));
    if expected != got {
        return Err(Error::input("grad_out", expected, got));
    }
    Ok(RopeArgs { input: *grad_out, inverse: !args.inverse, ..*args })
}
