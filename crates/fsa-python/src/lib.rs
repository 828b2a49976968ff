//! `fsa_rs._native`: the stages of Flash Sparse Attention over memory that NumPy or PyTorch owns.
//!
//! The Python package `fsa_rs` is the public face; this module is private to it. Every function takes
//! its inputs and its outputs as arrays or tensors: Python allocates, so that the outputs are ordinary
//! objects of the caller's library, and Rust checks and computes. Neither libtorch nor CUDA is linked.
//!
//! | module | holds |
//! |---|---|
//! | `memory` | address, dtype, shape, strides and device of a Python array; the only `unsafe` code |
//! | `memory::device` | the same of a tensor on a CUDA device, as spans for the kernels |
//! | `memory::exchange` | PyTorch's functions that say it in one call |
//! | `failure` | errors to Python exceptions, in the argument names of the Python functions |
//! | `run` | the engine, the release of the interpreter lock, panics to exceptions |
//! | `packed` | what the calls share: packed inputs, prefix sums, parameters |
//! | `attention`, `compress`, `nsa` | the calls on the CPU |
//! | `cuda` | the calls on CUDA tensors: checks, plans, outputs, launches on PyTorch's stream |
//!
//! A `Memory` is a plain description, made for any device; only `Memory::view` asks for host memory, and memory of
//! another device is [`Unsupported`](fsa::Error::Unsupported) there. The stages that run on CUDA take a
//! `DeviceTensor` instead, which becomes a span on the caller's stream.

mod attention;
mod compress;
mod cuda;
mod failure;
mod memory;
mod nsa;
mod packed;
mod run;

use pyo3::prelude::*;

/// The stages over arrays of NumPy and tensors of PyTorch. Private: use `fsa_rs`.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("HEAD_DIMS", fsa::cuda::source::HEAD_DIMS)?;
    module.add_function(wrap_pyfunction!(attention::attention, module)?)?;
    module.add_function(wrap_pyfunction!(attention::attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(attention::validate, module)?)?;
    module.add_function(wrap_pyfunction!(attention::select, module)?)?;
    module.add_function(wrap_pyfunction!(compress::compress, module)?)?;
    module.add_function(wrap_pyfunction!(compress::compress_backward, module)?)?;
    module.add_function(wrap_pyfunction!(nsa::nsa, module)?)?;
    module.add_function(wrap_pyfunction!(nsa::check_options, module)?)?;
    module.add_function(wrap_pyfunction!(nsa::nsa_backward, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::attention::cuda_attention, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::attention::cuda_attention_backward, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::select::cuda_select, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::compress::cuda_compress, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::compress::cuda_compress_backward, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::nsa::cuda_nsa, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::nsa::cuda_nsa_backward, module)?)
}
