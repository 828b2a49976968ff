//! Calls on CUDA tensors of PyTorch: plan, then launch on PyTorch's stream.
//!
//! Python allocates outputs and workspace with PyTorch's allocator between the two calls; nothing here allocates
//! device memory for a call, waits for the device or looks at its memory, so a call may be recorded into a CUDA graph.
//!
//! A plan is made from descriptions of the tensors as the user gave them, which it checks. It says to which dimension
//! vectors have to be padded; a launch takes descriptions of the padded tensors, and of the outputs.

pub mod attention;
pub mod compress;
mod inputs;
pub mod nsa;
mod plans;
pub mod select;

use crate::failure::Failure;
use crate::memory::device::{DeviceTensor, Place, stream};
use crate::run::detached;
use fsa::cuda::driver::Stream;
use fsa::cuda::stages::LaunchContext;
use fsa::{Error, Result};
use plans::{Key, Planned, Work};
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// A plan of a call and its kernels.
#[pyclass(frozen, module = "fsa_rs._native")]
pub struct CudaPlan(Arc<Planned>);

/// What a planning call returns: the plan, the dimension that vectors have to be padded to, the size of the workspace in
/// bytes.
type Plan = (CudaPlan, usize, usize);

/// The first call for given sizes makes the plan, and may compile kernels.
fn planned(py: Python<'_>, place: Place, work: Work) -> Result<Plan, Failure> {
    let key = Key { place, work };
    let planned = match plans::find(&key) {
        Some(planned) => planned,
        None => {
            let path = python_path(py);
            detached(py, || plans::make(&key, &path))?
        }
    };
    let bytes = planned.workspace_bytes();
    Ok((CudaPlan(planned), place.sizes.head_dim, bytes))
}

/// `sys.path`, as far as it is text.
fn python_path(py: Python<'_>) -> Vec<PathBuf> {
    let path = py.import("sys").and_then(|sys| sys.getattr("path")).and_then(|path| path.try_iter());
    let entries = path.into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.extract::<String>().ok()).map(PathBuf::from).collect()
}

/// `(stream, workspace)`.
#[derive(FromPyObject)]
pub struct Context(u64, DeviceTensor);

impl Context {
    fn stream(&self, planned: &Planned) -> Stream {
        stream(planned.kernels.device(), self.0)
    }

    fn launch<'a>(&'a self, stream: &'a Stream, planned: &Planned) -> Result<LaunchContext<'a>> {
        Ok(LaunchContext { stream, workspace: self.1.bytes("workspace", planned.place())? })
    }
}

/// The sign of a negative factor is in `q` by now.
fn check_scale(softmax_scale: f32) -> Result<()> {
    if softmax_scale.is_finite() {
        return Ok(());
    }
    Err(Error::input("softmax_scale", "a finite number", softmax_scale))
}
