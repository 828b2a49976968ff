//! Calls on CUDA tensors of PyTorch: check, plan, allocate with PyTorch's allocator, launch on PyTorch's stream.
//!
//! Nothing here allocates device memory by itself, waits for the device or looks at its memory, so a call may be recorded
//! into a CUDA graph. One function for a call, because the device waits for the first kernel: what Python would do line by
//! line is done here.

pub mod attention;
pub mod compress;
mod inputs;
pub mod nsa;
mod plans;
pub mod select;
mod tensors;

use fsa::{Error, Result};
use pyo3::prelude::*;
use std::path::PathBuf;

/// `sys.path`, as far as it is text.
fn python_path(py: Python<'_>) -> Vec<PathBuf> {
    let path = py.import("sys").and_then(|sys| sys.getattr("path")).and_then(|path| path.try_iter());
    let entries = path.into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.extract::<String>().ok()).map(PathBuf::from).collect()
}

/// Of either sign.
fn check_scale(softmax_scale: f32) -> Result<()> {
    if softmax_scale.is_finite() {
        return Ok(());
    }
    Err(Error::input("softmax_scale", "a finite number", softmax_scale))
}
