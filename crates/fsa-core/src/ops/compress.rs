//! Arguments of stage `compress`.

use super::{expect_mut, expect_view, rank3};
use crate::batch::Batch;
use crate::config::NsaConfig;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorView, TensorViewMut};

/// How a window of vectors becomes one vector.
#[derive(Debug, Clone, Copy, Default)]
pub enum Compression<'a> {
    /// The mean of the window.
    #[default]
    Mean,
    /// A weighted sum.
    Weighted {
        /// `[num_kv_heads, kernel_size]`.
        weight: TensorView<'a>,
    },
    /// `flatten(window + position) @ weight`.
    Linear {
        /// `[num_kv_heads, kernel_size * dim, dim]`.
        weight: TensorView<'a>,
        /// `[num_kv_heads, kernel_size, dim]`, added to the window before the product.
        position: Option<TensorView<'a>>,
    },
}

impl Compression<'_> {
    /// `mean`, `weighted` or `linear`.
    pub fn name(&self) -> &'static str {
        match self {
            Compression::Mean => "mean",
            Compression::Weighted { .. } => "weighted",
            Compression::Linear { .. } => "linear",
        }
    }
}

/// Checked sizes of a compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressShape {
    /// Rows of the input.
    pub total_kv: usize,
    /// Rows of the output.
    pub total_compressed: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a vector.
    pub dim: usize,
    /// Tokens in a window.
    pub kernel_size: usize,
    /// Tokens between the starts of neighbouring windows.
    pub kernel_stride: usize,
}

/// Inputs of stage `compress`, for keys or for values.
#[derive(Debug, Clone, Copy)]
pub struct CompressArgs<'a> {
    /// `[total_kv, num_kv_heads, dim]`.
    pub input: TensorView<'a>,
    /// Where the sequences lie; windows never cross their borders.
    pub batch: &'a Batch,
    /// Tokens in a window.
    pub kernel_size: usize,
    /// Tokens between the starts of neighbouring windows.
    pub kernel_stride: usize,
    /// How a window becomes one vector. Weights have the dtype of `input`.
    pub compression: Compression<'a>,
}

impl CompressArgs<'_> {
    /// Checks everything and returns the sizes.
    pub fn shape(&self) -> Result<CompressShape> {
        let (kernel_size, kernel_stride) = (self.kernel_size, self.kernel_stride);
        match (NsaConfig { kernel_size, kernel_stride, ..NsaConfig::default() }).validate() {
            Err(error) if error.argument() != Some("block_size") => return Err(error),
            _ => {}
        }
        let [total_kv, num_kv_heads, dim] = rank3("input", "[total_kv, num_kv_heads, dim]", &self.input)?;
        if total_kv != self.batch.total_kv() {
            let expected = format!("{} rows, the last element of cu_seqlens_kv", self.batch.total_kv());
            return Err(Error::input("input", expected, format!("{total_kv} rows")));
        }
        let dtype = self.input.dtype();
        match &self.compression {
            Compression::Mean => {}
            Compression::Weighted { weight } => {
                expect_view("weight", dtype, &[num_kv_heads, kernel_size], weight)?;
            }
            Compression::Linear { weight, position } => {
                expect_view("weight", dtype, &[num_kv_heads, kernel_size.saturating_mul(dim), dim], weight)?;
                if let Some(position) = position {
                    expect_view("position", dtype, &[num_kv_heads, kernel_size, dim], position)?;
                }
            }
        }
        let total_compressed = self.batch.total_compressed(kernel_size, kernel_stride);
        Ok(CompressShape { total_kv, total_compressed, num_kv_heads, dim, kernel_size, kernel_stride })
    }

    /// Checks the output `[total_compressed, num_kv_heads, dim]` and returns the sizes.
    pub fn shape_with_output(&self, out: &TensorViewMut<'_>) -> Result<CompressShape> {
        let shape = self.shape()?;
        expect_mut("out", self.input.dtype(), &[shape.total_compressed, shape.num_kv_heads, shape.dim], out)?;
        Ok(shape)
    }
}

/// What the backward of a compression writes. Gradients of the parameters are written where asked for.
#[derive(Debug)]
pub struct CompressGrads<'a> {
    /// `[total_kv, num_kv_heads, dim]`.
    pub grad_input: TensorViewMut<'a>,
    /// Shape of the weight, for `weighted` and `linear`.
    pub grad_weight: Option<TensorViewMut<'a>>,
    /// Shape of `position`, for `linear` with one.
    pub grad_position: Option<TensorViewMut<'a>>,
}

impl CompressGrads<'_> {
    /// Checks the gradients against the call.
    pub fn validate(&self, args: &CompressArgs<'_>, grad_out: &TensorView<'_>) -> Result<CompressShape> {
        let shape = args.shape()?;
        let dtype = args.input.dtype();
        expect_view("grad_out", dtype, &[shape.total_compressed, shape.num_kv_heads, shape.dim], grad_out)?;
        expect_mut("grad_input", dtype, args.input.shape(), &self.grad_input)?;
        check_parameter_grads("", &args.compression, (&self.grad_weight, &self.grad_position), dtype)?;
        Ok(shape)
    }
}

/// Checks the gradients of the parameters of a compression, where asked for; `prefix` goes before their names.
pub(super) fn check_parameter_grads(
    prefix: &str,
    compression: &Compression<'_>,
    (grad_weight, grad_position): (&Option<TensorViewMut<'_>>, &Option<TensorViewMut<'_>>),
    dtype: DType,
) -> Result<()> {
    let (weight, position) = match compression {
        Compression::Mean => (None, None),
        Compression::Weighted { weight } => (Some(weight), None),
        Compression::Linear { weight, position } => (Some(weight), position.as_ref()),
    };
    for (name, grad, parameter) in [("grad_weight", grad_weight, weight), ("grad_position", grad_position, position)] {
        let argument = format!("{prefix}{name}");
        match (grad, parameter) {
            (Some(grad), Some(parameter)) => expect_mut(&argument, dtype, parameter.shape(), grad)?,
            (Some(_), None) => {
                let expected = format!("none: compression {} has no such parameter", compression.name());
                return Err(Error::input(argument, expected, "one"));
            }
            (None, _) => {}
        }
    }
    Ok(())
}
