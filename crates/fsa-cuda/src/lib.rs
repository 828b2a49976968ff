//! CUDA backend of Flash Sparse Attention: every stage and the whole operation, forward and backward; stage `selected` in FSA's
//! loop order.
//!
//! Kernels are compiled at run time by NVRTC from sources that are part of the binary, and kept on disk; the driver is
//! loaded at run time too. So a program that links this crate needs neither a CUDA toolkit to build nor a GPU to start,
//! and says what is missing when one is asked for.
//!
//! From the bottom up:
//!
//! - [`driver`]: the boundary to the driver and to NVRTC, the only unsafe code;
//! - [`jit`], [`cache`], [`source`]: from a specialisation to a cubin, for any architecture on any machine;
//! - `params`: what Rust and the kernels must agree on, asserted in every translation unit;
//! - `index`, `attend`, `reduce`, `backward` (Stage `index`, Stage `selected`), `band`, `band_backward` (Stage `dense`, Stage
//!   `window`, Stage `compressed`; with `block_mask` the other route of Stage `selected`; `band_pair` that and the
//!   window in one walk), `select`, `band_select` (both in one pass), `compress`, `compress_linear`, `rope`, `combine`, `prepare`: one host file per kernel, its grid and its shared memory;
//! - [`measured`]: times of the routes on this machine, on disk;
//! - [`plan`]: tiles, chunks and workspace from shapes alone;
//! - [`selected`] and [`stages`], the latter with Stage `nsa`: plan once, launch as often as wanted, on the caller's tensors,
//!   workspace and stream;
//! - [`CudaBackend`]: the same over host tensors, for the conformance suite and the command line.
#![deny(unsafe_code)]

mod arch;
mod attend;
mod backend;
mod backward;
mod band;
mod band_backward;
mod band_pair;
mod band_select;
mod block_mask;
pub mod cache;
mod combine;
mod compress;
mod compress_linear;
#[allow(unsafe_code, reason = "the boundary to the driver and to the compiler")]
pub mod driver;
mod environment;
mod error;
mod index;
pub mod jit;
mod kept;
mod kernels;
mod lanes;
mod launch;
mod measure;
pub mod measured;
mod params;
pub mod plan;
mod prepare;
mod reduce;
mod rope;
mod select;
pub mod selected;
pub mod source;
pub mod stages;

pub use arch::{Arch, KernelSet};
pub use backend::CudaBackend;
pub use environment::{Environment, VARIABLES};
pub use error::CudaError;
pub use kernels::Kernels;

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
