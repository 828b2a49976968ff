//! Checks of a CUDA call, in the argument names of the Python function.

use crate::memory::device::{DeviceTensor, Place};
use fsa::cuda::plan::Problem;
use fsa::cuda::source::HEAD_DIMS;
use fsa::{DType, Error, NsaConfig, Result};
use pyo3::FromPyObject;
use std::fmt::Display;

/// `(q, k, v, topk_indices, cu_seqlens_q, cu_seqlens_k)`, as the user gave them.
#[derive(Debug, FromPyObject)]
pub struct Inputs(DeviceTensor, DeviceTensor, DeviceTensor, DeviceTensor, DeviceTensor, DeviceTensor);

impl Inputs {
    /// Checks everything that can be known without looking at the device's memory; device and sizes of the call.
    ///
    /// # Errors
    /// [`Error::Input`] that names the argument, [`Error::Unsupported`].
    pub fn place(&self, block_size: usize) -> Result<Place> {
        let ordinal = self.device()?;
        let dtype = self.dtypes()?;
        let [total_q, num_q_heads, head_dim] = rank3("q", "[total_q, num_q_heads, head_dim]", &self.0)?;
        let [total_kv, num_kv_heads, _] = rank3("k", "[total_k, num_kv_heads, head_dim]", &self.1)?;
        let [_, _, value_dim] = rank3("v", "[total_k, num_kv_heads, value_dim]", &self.2)?;
        if num_kv_heads == 0 || num_q_heads == 0 || !num_q_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a positive number of heads that is a multiple of num_kv_heads {num_kv_heads}");
            return Err(Error::input("q", expected, format!("{num_q_heads} heads")));
        }
        let padded = padded("head_dim", head_dim)?.max(padded("value_dim", value_dim)?);
        expect_shape("k", &[total_kv, num_kv_heads, head_dim], &self.1)?;
        expect_shape("v", &[total_kv, num_kv_heads, value_dim], &self.2)?;
        NsaConfig { block_size, ..NsaConfig::default() }.validate()?;
        let [_, _, topk] = rank3("topk_indices", "[num_kv_heads, total_q, topk]", &self.3)?;
        expect_shape("topk_indices", &[num_kv_heads, total_q, topk], &self.3)?;
        let sequences = self.sequences()?;
        let problem = Problem {
            total_q,
            total_kv,
            sequences,
            num_q_heads,
            num_kv_heads,
            head_dim: padded,
            block_size,
            topk,
            dtype,
        };
        Ok(Place { ordinal, problem })
    }

    fn named(&self) -> [(&'static str, &DeviceTensor); 6] {
        let names = ["q", "k", "v", "topk_indices", "cu_seqlens_q", "cu_seqlens_k"];
        let tensors = [&self.0, &self.1, &self.2, &self.3, &self.4, &self.5];
        std::array::from_fn(|at| (names[at], tensors[at]))
    }

    /// The device that all tensors are on.
    fn device(&self) -> Result<usize> {
        let Some(ordinal) = self.0.ordinal() else {
            return Err(Error::input("q", "a CUDA tensor, as other arguments of the call", self.0.device()));
        };
        match self.named().into_iter().find(|(_, tensor)| tensor.ordinal() != Some(ordinal)) {
            Some((name, other)) => Err(Error::input(
                name,
                format!("a tensor on cuda:{ordinal}, as q"),
                format!("one on {}", other.device()),
            )),
            None => Ok(ordinal),
        }
    }

    /// The dtype of the vectors; the others are i32.
    fn dtypes(&self) -> Result<DType> {
        let dtype = self.0.dtype().filter(|dtype| matches!(dtype, DType::Bf16 | DType::F16));
        let Some(dtype) = dtype else {
            let supported = "bfloat16, float16 (float32 on the CPU)".into();
            let got = self.0.dtype_name().into();
            return Err(Error::Unsupported { constraint: "dtype of q on CUDA".into(), got, supported });
        };
        for (at, (name, tensor)) in self.named().into_iter().enumerate() {
            let expected = if at < 3 { self.0.dtype_name() } else { "int32" };
            if tensor.dtype_name() != expected {
                return Err(Error::input(name, format!("dtype {expected}"), format!("dtype {}", tensor.dtype_name())));
            }
        }
        Ok(dtype)
    }

    fn sequences(&self) -> Result<usize> {
        let (q, k) = (self.4.shape(), self.5.shape());
        for (name, shape) in [("cu_seqlens_q", q), ("cu_seqlens_k", k)] {
            if shape.len() != 1 || shape[0] == 0 {
                return Err(Error::input(name, "shape [batch + 1]", format!("shape {shape:?}")));
            }
        }
        if q != k {
            return Err(Error::input("cu_seqlens_k", format!("{} elements, as cu_seqlens_q", q[0]), k[0]));
        }
        Ok(q[0] - 1)
    }
}

fn rank3(name: &str, layout: impl Display, tensor: &DeviceTensor) -> Result<[usize; 3]> {
    let shape = tensor.shape();
    shape.try_into().map_err(|_| Error::input(name, format!("shape {layout}"), format!("shape {shape:?}")))
}

fn expect_shape(name: &str, expected: &[usize; 3], tensor: &DeviceTensor) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::input(name, format!("shape {expected:?}"), format!("shape {:?}", tensor.shape())))
}

/// The kernels' dimension for `dim`: vectors are padded with zeros.
fn padded(name: &str, dim: usize) -> Result<usize> {
    let kernels = HEAD_DIMS.into_iter().find(|kernels| *kernels >= dim);
    kernels.filter(|_| dim > 0 && dim.is_multiple_of(8)).ok_or_else(|| Error::Unsupported {
        constraint: name.into(),
        got: dim.to_string(),
        supported: "multiples of 8 up to 256".into(),
    })
}
