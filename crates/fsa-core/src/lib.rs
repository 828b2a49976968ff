//! Vocabulary and planning of Flash Sparse Attention.
//!
//! This crate is pure: no `unsafe`, no threads, no device. It holds what every backend, the
//! oracle, the command line and the tests must agree on:
//!
//! - [`NsaConfig`], [`Rope`], [`Compression`]: what is computed;
//! - [`Batch`]: packed sequences, built from prefix sums;
//! - [`TensorView`], [`TensorViewMut`], [`Tensor`]: strided borrowed views and owned tensors;
//! - [`selection`]: the contract of `topk_indices`; [`index`]: the inverse index (block -> rows);
//! - [`ops`]: the argument structs of every [`Stage`], checked before anything is written;
//! - [`Backend`]: what a backend implements;
//! - [`plan`]: per stage the tiles, the workspace, the FLOPs and the least bytes, from shapes alone.
//!
//! `docs/algorithm.md` in the repository defines each stage.
#![forbid(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod config;
pub mod dtype;
pub mod error;
pub mod index;
pub mod ops;
pub mod plan;
pub mod rope;
pub mod selection;
pub mod stage;
pub mod tensor;

pub use backend::Backend;
pub use batch::{Batch, Sequence};
pub use config::{NsaConfig, ScoreHeads};
pub use dtype::{DType, Element};
pub use error::{Error, InputError, Result};
pub use index::InverseIndex;
pub use ops::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, Compression, CompressionGrads, NsaArgs, NsaForward, NsaGrads, NsaSaved,
    RopeArgs, SelectArgs,
};
pub use rope::{Rope, RopeScaling};
pub use stage::Stage;
pub use tensor::{Layout, Slice, SliceMut, Storage, Strided, StridedMut, Tensor, TensorView, TensorViewMut};

pub use half::{bf16, f16};
