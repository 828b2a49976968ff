//! The whole operation: compress, rope, compressed attention and selection, selected, window, combine.

use crate::compress::parameter_zeros;
use crate::engine::Engine;
use fsa_core::{
    AttentionShape, Compression, CompressionGrads, DType, Error, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result,
    Tensor, TensorView, TensorViewMut,
};

/// What [`Engine::nsa`] computes.
///
/// ```
/// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let (batch, config) = (Batch::single(40), NsaConfig::default());
/// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
/// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
/// # let args = NsaArgs {
/// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
/// #     config: &config, key_compression: Compression::Mean,
/// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
/// # };
/// let result = Engine::cpu()?.nsa(&args, false)?;
/// assert_eq!(result.out.shape(), [40, 1, 8]);
/// assert_eq!(result.topk_indices().shape(), [1, 40, 16]);
/// assert!(result.saved().is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NsaResult {
    /// `[total_q, num_q_heads, value_dim]`, dtype of the inputs.
    pub out: Tensor,
    state: State,
}

/// The chosen blocks are part of the saved state where there is one.
#[derive(Debug, Clone)]
enum State {
    Saved(Box<NsaSaved>),
    Chosen(Tensor),
}

impl NsaResult {
    fn new(out: Tensor, forward: NsaForward, backend: &str) -> Result<Self> {
        let state = match (forward.saved, forward.topk_indices) {
            (Some(saved), _) => State::Saved(Box::new(saved)),
            (None, Some(topk_indices)) => State::Chosen(topk_indices),
            (None, None) => {
                let message = "the whole operation returned no topk_indices".to_string();
                return Err(Error::Backend { backend: backend.to_string(), message });
            }
        };
        Ok(Self { out, state })
    }

    /// The chosen blocks, `[num_kv_heads, total_q, topk]` i32: ascending ids, left-packed, then -1.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig { topk: 3, ..NsaConfig::default() });
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let result = Engine::cpu()?.nsa(&args, false)?;
    /// assert_eq!(result.topk_indices().as_slice::<i32>("topk_indices")?[..3], [0, -1, -1]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn topk_indices(&self) -> &Tensor {
        match &self.state {
            State::Saved(saved) => &saved.topk_indices,
            State::Chosen(topk_indices) => topk_indices,
        }
    }

    /// The state for [`Engine::nsa_backward`], if it was asked for.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let result = Engine::cpu()?.nsa(&args, true)?;
    /// assert!(result.saved().expect("asked for").size_bytes() > 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn saved(&self) -> Option<&NsaSaved> {
        match &self.state {
            State::Saved(saved) => Some(saved),
            State::Chosen(_) => None,
        }
    }

    /// Output and saved state, to keep one without the other.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let (out, saved) = Engine::cpu()?.nsa(&args, true)?.into_parts();
    /// assert!(saved.is_some());
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_parts(self) -> (Tensor, Option<NsaSaved>) {
        match self.state {
            State::Saved(saved) => (self.out, Some(*saved)),
            State::Chosen(_) => (self.out, None),
        }
    }
}

/// Gradients of the parameters of a compression, as far as it has any.
///
/// ```
/// let none = fsa::CompressionGradTensors::default(); // those of Compression::Mean
/// assert!(none.grad_weight.is_none() && none.grad_position.is_none());
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CompressionGradTensors {
    /// Shape of the weight; `None` for `mean`.
    pub grad_weight: Option<Tensor>,
    /// Shape of `position`; `None` where there is none.
    pub grad_position: Option<Tensor>,
}

impl CompressionGradTensors {
    fn zeros(compression: &Compression<'_>, dtype: DType) -> Result<Self> {
        let (grad_weight, grad_position) = parameter_zeros(compression, dtype)?;
        Ok(Self { grad_weight, grad_position })
    }

    fn as_grads(&mut self) -> CompressionGrads<'_> {
        CompressionGrads {
            grad_weight: self.grad_weight.as_mut().map(Tensor::view_mut),
            grad_position: self.grad_position.as_mut().map(Tensor::view_mut),
        }
    }
}

/// Gradients of the whole operation; shapes and dtype of the inputs.
///
/// ```
/// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
/// # fn main() -> fsa::Result<()> {
/// # let (batch, config) = (Batch::single(40), NsaConfig::default());
/// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
/// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
/// # let args = NsaArgs {
/// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
/// #     config: &config, key_compression: Compression::Mean,
/// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
/// # };
/// let engine = Engine::cpu()?;
/// let (out, saved) = engine.nsa(&args, true)?.into_parts();
/// let grads = engine.nsa_backward(&args, &saved.expect("asked for"), &out.view())?;
/// assert_eq!(grads.grad_gates.shape(), [40, 3]);
/// assert!(grads.key_compression.grad_weight.is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct NsaGradTensors {
    /// `[total_q, num_q_heads, head_dim]`.
    pub grad_query: Tensor,
    /// `[total_kv, num_kv_heads, head_dim]`.
    pub grad_key: Tensor,
    /// `[total_kv, num_kv_heads, value_dim]`.
    pub grad_value: Tensor,
    /// Shape of `gates`.
    pub grad_gates: Tensor,
    /// Parameters of the compression of keys.
    pub key_compression: CompressionGradTensors,
    /// Parameters of the compression of values.
    pub value_compression: CompressionGradTensors,
}

impl NsaGradTensors {
    fn zeros(args: &NsaArgs<'_>, shape: &AttentionShape) -> Result<Self> {
        let of = |name, view: &TensorView<'_>| Tensor::zeros(name, shape.dtype, view.shape());
        Ok(Self {
            grad_query: of("grad_query", &args.query)?,
            grad_key: of("grad_key", &args.key)?,
            grad_value: of("grad_value", &args.value)?,
            grad_gates: of("grad_gates", &args.gates)?,
            key_compression: CompressionGradTensors::zeros(&args.key_compression, shape.dtype)?,
            value_compression: CompressionGradTensors::zeros(&args.value_compression, shape.dtype)?,
        })
    }

    /// Writable views, for [`Engine::nsa_backward_into`].
    ///
    /// ```
    /// # use fsa::{CompressionGradTensors, DType, NsaGradTensors, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let zeros = |name, shape: &[usize]| Tensor::zeros(name, DType::Bf16, shape);
    /// let mut grads = NsaGradTensors {
    ///     grad_query: zeros("grad_query", &[40, 4, 8])?,
    ///     grad_key: zeros("grad_key", &[40, 2, 8])?,
    ///     grad_value: zeros("grad_value", &[40, 2, 8])?,
    ///     grad_gates: zeros("grad_gates", &[40, 3])?,
    ///     key_compression: CompressionGradTensors::default(),
    ///     value_compression: CompressionGradTensors::default(),
    /// };
    /// assert_eq!(grads.as_grads().grad_query.shape(), [40, 4, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn as_grads(&mut self) -> NsaGrads<'_> {
        NsaGrads {
            grad_query: self.grad_query.view_mut(),
            grad_key: self.grad_key.view_mut(),
            grad_value: self.grad_value.view_mut(),
            grad_gates: self.grad_gates.view_mut(),
            key_compression: self.key_compression.as_grads(),
            value_compression: self.value_compression.as_grads(),
        }
    }
}

/// The whole operation.
impl Engine {
    /// Native sparse attention: the gated sum of attention to the compressed keys, to the selected blocks and to a
    /// sliding window. `query` is `[total_q, num_q_heads, head_dim]`, `key` `[total_kv, num_kv_heads, head_dim]`,
    /// `value` `[total_kv, num_kv_heads, value_dim]`, `gates` `[total_q, 3]` or `[total_q, num_q_heads, 3]`. With
    /// `save` the result holds the state that [`Engine::nsa_backward`] takes.
    ///
    /// # Errors
    ///
    /// [`Error::Input`](crate::Error::Input) or [`Error::Unsupported`](crate::Error::Unsupported) that names the
    /// argument or the field of `config`; [`Error::OutOfMemory`](crate::Error::OutOfMemory) if the output, the saved
    /// state or the workspace cannot be allocated.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// let zeros = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// let value = Tensor::from_f32("value", &[2.0; 40 * 8], DType::F32, &[40, 1, 8])?;
    /// let gates = Tensor::from_f32("gates", &[0.5; 40 * 3], DType::F32, &[40, 3])?;
    /// let args = NsaArgs {
    ///     query: zeros.view(),
    ///     key: zeros.view(),
    ///     value: value.view(),
    ///     gates: gates.view(),
    ///     batch: &batch,
    ///     config: &config,
    ///     key_compression: Compression::Mean,
    ///     value_compression: Compression::Mean,
    ///     rope: None,
    ///     softmax_scale: None,
    /// };
    /// let result = Engine::cpu()?.nsa(&args, false)?;
    /// // Every value is 2: row 39 has all three branches, row 0 no whole compression window yet.
    /// let out = result.out.as_slice::<f32>("out")?;
    /// assert!((out[39 * 8] - 3.0).abs() < 1e-5 && (out[0] - 2.0).abs() < 1e-5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn nsa(&self, args: &NsaArgs<'_>, save: bool) -> Result<NsaResult> {
        let shape = args.shape()?;
        let mut out = Tensor::zeros("out", shape.dtype, &shape.out())?;
        let forward = self.nsa_into(args, &mut out.view_mut(), save)?;
        NsaResult::new(out, forward, self.backend().name())
    }

    /// [`Engine::nsa`] into the caller's `out`; the chosen blocks and the saved state are returned.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::nsa`], and [`Error::Input`](crate::Error::Input) for an output of another shape or dtype,
    /// which is then untouched.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let mut out = Tensor::zeros("out", DType::F32, &[40, 1, 8])?;
    /// let forward = Engine::cpu()?.nsa_into(&args, &mut out.view_mut(), false)?;
    /// assert!(forward.topk_indices().is_some() && forward.saved.is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn nsa_into(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward> {
        self.backend().nsa(args, out, save)
    }

    /// Backward of [`Engine::nsa`]: the gradients of `query`, `key`, `value`, `gates` and of the parameters of the
    /// compressions. `args` and `saved` are those of the forward; `grad_out` has the shape and dtype of its `out`.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::nsa`], for `grad_out` too, and [`Error::Input`](crate::Error::Input) that names `saved.*` for
    /// the state of a call of other sizes.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// let engine = Engine::cpu()?;
    /// let forward = engine.nsa(&args, true)?;
    /// let grad_out = Tensor::zeros("grad_out", DType::F32, &[40, 1, 8])?;
    /// let grads = engine.nsa_backward(&args, forward.saved().expect("asked for"), &grad_out.view())?;
    /// assert_eq!(grads.grad_query.shape(), [40, 1, 8]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
    ) -> Result<NsaGradTensors> {
        let mut grads = NsaGradTensors::zeros(args, &args.shape()?)?;
        self.nsa_backward_into(args, saved, grad_out, &mut grads.as_grads())?;
        Ok(grads)
    }

    /// [`Engine::nsa_backward`] into the caller's views, which are overwritten, not added to. A gradient of a
    /// parameter that is `None` is not computed.
    ///
    /// # Errors
    ///
    /// Those of [`Engine::nsa_backward`], and [`Error::Input`](crate::Error::Input) for a gradient of another shape or
    /// dtype; the gradients are then untouched.
    ///
    /// ```
    /// # use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
    /// # fn main() -> fsa::Result<()> {
    /// # let (batch, config) = (Batch::single(40), NsaConfig::default());
    /// # let tensor = Tensor::zeros("query", DType::F32, &[40, 1, 8])?;
    /// # let gates = Tensor::zeros("gates", DType::F32, &[40, 3])?;
    /// # let args = NsaArgs {
    /// #     query: tensor.view(), key: tensor.view(), value: tensor.view(), gates: gates.view(), batch: &batch,
    /// #     config: &config, key_compression: Compression::Mean,
    /// #     value_compression: Compression::Mean, rope: None, softmax_scale: None,
    /// # };
    /// # let engine = Engine::cpu()?;
    /// # let (out, saved) = engine.nsa(&args, true)?.into_parts();
    /// # let saved = saved.expect("asked for");
    /// let mut grads = engine.nsa_backward(&args, &saved, &out.view())?;
    /// engine.nsa_backward_into(&args, &saved, &out.view(), &mut grads.as_grads())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn nsa_backward_into(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()> {
        self.backend().nsa_backward(args, saved, grad_out, grads)
    }
}
