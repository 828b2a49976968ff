//! Checks of a CUDA call, in the argument names of the Python function, before anything is planned.

use super::tensors::Held;
use crate::memory::device::{DeviceTensor, Place};
use fsa::cuda::plan::{CompressionKind, Sizes};
use fsa::cuda::source::HEAD_DIMS;
use fsa::{DType, Error, Result};
use pyo3::FromPyObject;
use std::fmt::Display;

/// `(q, k, v, cu_seqlens_q, cu_seqlens_k)`, as the user gave them.
#[derive(FromPyObject)]
pub struct Packed<'py>(pub Held<'py>, pub Held<'py>, pub Held<'py>, pub Held<'py>, pub Held<'py>);

/// An argument: its name, the tensor, and whether it holds i32 instead of numbers.
pub type Argument<'a> = (&'a str, &'a DeviceTensor, bool);

impl Packed<'_> {
    /// Checks everything that can be known without looking at the device's memory; device and sizes of the call, with as
    /// many tokens as there are keys. `others` are the arguments besides.
    ///
    /// # Errors
    /// [`Error::Input`] that names the argument, [`Error::Unsupported`].
    pub fn place(&self, [key, value]: [&str; 2], others: &[Argument<'_>]) -> Result<Place> {
        let Packed(q, k, v, cu_seqlens_q, cu_seqlens_k) = self;
        let sums: [Argument<'_>; 2] = [("cu_seqlens_q", cu_seqlens_q, true), ("cu_seqlens_k", cu_seqlens_k, true)];
        let all: [Argument<'_>; 3] = [("q", q, false), (key, k, false), (value, v, false)];
        let (ordinal, dtype) = device_and_dtype(&[&all[..], others, &sums].concat())?;
        let [total_q, num_q_heads, head_dim] = rank3("q", "[total_q, num_q_heads, head_dim]", q)?;
        let [total_kv, num_kv_heads, _] = rank3(key, "[total_k, num_kv_heads, head_dim]", k)?;
        let [_, _, value_dim] = rank3(value, "[total_k, num_kv_heads, value_dim]", v)?;
        if num_kv_heads == 0 || num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a positive number of heads that is a multiple of num_kv_heads {num_kv_heads}");
            return Err(Error::input("q", expected, format!("{num_q_heads} heads")));
        }
        let padded = padded("head_dim", head_dim)?.max(padded("value_dim", value_dim)?);
        shape(key, &[total_kv, num_kv_heads, head_dim], k)?;
        shape(value, &[total_kv, num_kv_heads, value_dim], v)?;
        let sequences = sequences("cu_seqlens_q", cu_seqlens_q)?;
        if sequences != self::sequences("cu_seqlens_k", cu_seqlens_k)? {
            let expected = format!("{} elements, as cu_seqlens_q", sequences + 1);
            return Err(Error::input("cu_seqlens_k", expected, cu_seqlens_k.shape()[0]));
        }
        let sizes = Sizes { total_q, total_kv, sequences, num_q_heads, num_kv_heads, head_dim: padded, dtype };
        Ok(Place { ordinal, sizes })
    }

    /// Elements of a query and of a value vector, before padding.
    pub fn dims(&self) -> [usize; 2] {
        [self.0.dim(), self.2.dim()]
    }
}

/// The device that all tensors are on, and the dtype of those that hold numbers; the first decides.
///
/// # Errors
/// [`Error::Input`] that names the argument that has another; [`Error::Unsupported`] for a dtype.
pub fn device_and_dtype(arguments: &[Argument<'_>]) -> Result<(usize, DType)> {
    let [(first, tensor, _), ..] = arguments else {
        return Err(Error::input("arguments", "at least one", "none"));
    };
    let Some(ordinal) = tensor.ordinal() else {
        return Err(Error::input(*first, "a CUDA tensor, as other arguments of the call", tensor.device()));
    };
    if let Some((name, other, _)) = arguments.iter().find(|(_, other, _)| other.ordinal() != Some(ordinal)) {
        let (expected, got) = (format!("a tensor on cuda:{ordinal}, as {first}"), format!("one on {}", other.device()));
        return Err(Error::input(*name, expected, got));
    }
    let Some(dtype) = tensor.dtype().filter(|dtype| matches!(dtype, DType::Bf16 | DType::F16)) else {
        let supported = "bfloat16, float16 (float32 on the CPU)".into();
        let (constraint, got) = (format!("dtype of {first} on CUDA"), tensor.dtype_name().to_string());
        return Err(Error::Unsupported { constraint, got, supported });
    };
    for (name, other, is_index) in arguments {
        let expected = if *is_index { "int32" } else { &**tensor.dtype_name() };
        if other.dtype_name() != expected {
            return Err(Error::input(*name, format!("dtype {expected}"), format!("dtype {}", other.dtype_name())));
        }
    }
    Ok((ordinal, dtype))
}

/// Sequences of prefix sums.
///
/// # Errors
/// [`Error::Input`] if the tensor has another rank or no element.
pub fn sequences(name: &str, sums: &DeviceTensor) -> Result<usize> {
    match *sums.shape() {
        [elements] if elements > 0 => Ok(elements - 1),
        _ => Err(Error::input(name, "shape [batch + 1]", format!("shape {:?}", sums.shape()))),
    }
}

/// Sizes of a tensor with three axes.
///
/// # Errors
/// [`Error::Input`] if it has another number of axes.
pub fn rank3(name: &str, layout: impl Display, tensor: &DeviceTensor) -> Result<[usize; 3]> {
    let shape = tensor.shape();
    shape.try_into().map_err(|_| Error::input(name, format!("shape {layout}"), format!("shape {shape:?}")))
}

/// Checks the shape of a tensor.
///
/// # Errors
/// [`Error::Input`] if it is another.
pub fn shape(name: &str, expected: &[usize], tensor: &DeviceTensor) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::input(name, format!("shape {expected:?}"), format!("shape {:?}", tensor.shape())))
}

/// The kernels' dimension for `dim`: vectors are padded with zeros.
///
/// # Errors
/// [`Error::Unsupported`] if there is none.
pub fn padded(name: &str, dim: usize) -> Result<usize> {
    let kernels = HEAD_DIMS.into_iter().find(|kernels| *kernels >= dim);
    kernels.filter(|_| dim > 0 && dim.is_multiple_of(8)).ok_or_else(|| Error::Unsupported {
        constraint: name.into(),
        got: dim.to_string(),
        supported: "multiples of 8 up to 256".into(),
    })
}

/// `(weight, position)` of a compression, as the user gave them.
#[derive(FromPyObject)]
pub struct Parameters<'py>(pub Option<Held<'py>>, pub Option<Held<'py>>);

/// What a compression is checked against: heads, tokens in a window, elements of a vector before padding.
pub struct Windowed {
    pub heads: usize,
    pub kernel_size: usize,
    pub dim: usize,
}

impl Parameters<'_> {
    /// Those that are there, with the names that they have beside the argument `name`.
    pub fn named<'a>(&'a self, names: &'a [String; 2]) -> Vec<Argument<'a>> {
        let tensors = [(&names[0], &self.0), (&names[1], &self.1)];
        tensors
            .into_iter()
            .filter_map(|(name, tensor)| tensor.as_ref().map(|tensor| (name.as_str(), &**tensor, false)))
            .collect()
    }

    /// What they compute; the rank of the weight says it.
    ///
    /// # Errors
    /// [`Error::Input`] that names the parameter.
    pub fn kind(&self, [weight_name, position_name]: &[String; 2], about: &Windowed) -> Result<CompressionKind> {
        let Windowed { heads, kernel_size, dim } = *about;
        let kind = match self.0.as_ref().map(|weight| weight.shape()) {
            None => CompressionKind::Mean,
            Some([_, _]) => CompressionKind::Weighted,
            Some([_, _, _]) => CompressionKind::Linear { position: self.1.is_some() },
            Some(other) => {
                let expected = "shape [num_kv_heads, kernel_size] or [num_kv_heads, kernel_size * dim, dim]";
                return Err(Error::input(weight_name, expected, format!("shape {other:?}")));
            }
        };
        match (&self.0, kind) {
            (Some(weight), CompressionKind::Weighted) => shape(weight_name, &[heads, kernel_size], weight)?,
            (Some(weight), _) => shape(weight_name, &[heads, kernel_size * dim, dim], weight)?,
            (None, _) => {}
        }
        match &self.1 {
            Some(position) if kind.is_linear() => shape(position_name, &[heads, kernel_size, dim], position)?,
            Some(_) => {
                let expected = format!("None: compression {kind} has no position embedding");
                return Err(Error::input(position_name, expected, "one"));
            }
            None => {}
        }
        Ok(kind)
    }
}

/// Names of the parameters that belong to the argument `name`.
pub fn parameter_names(name: &str) -> [String; 2] {
    [format!("{name}_weight"), format!("{name}_position")]
}
