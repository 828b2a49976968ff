//! Flash Sparse Attention: native sparse attention (NSA, arXiv 2502.11089) in the loop order of FSA
//! (arXiv 2508.18224), forward and backward, behind an interface that does not name a device.
//!
//! An [`Engine`] runs the stages on a [`Backend`]. There is one method for the whole operation,
//! [`Engine::nsa`], and one per stage; each comes in two forms and with its backward:
//!
//! | | allocates its outputs | writes into the caller's views |
//! |---|---|---|
//! | forward | [`Engine::nsa`] | [`Engine::nsa_into`] |
//! | backward | [`Engine::nsa_backward`] | [`Engine::nsa_backward_into`] |
//!
//! Every argument is checked before anything is written: an error names the argument, what was
//! expected and what came, and leaves the outputs as they were. The results do not depend on the
//! number of threads, bit for bit. Sums and softmax state are f32 whatever the dtype of the tensors, except that
//! on Hopper gradients of bf16 queries are added up in scaled f16.
//!
//! `docs/algorithm.md` in the repository defines every stage, `docs/numerics.md` what precision each has.
//!
//! # Example
//!
//! ```
//! use fsa::{Batch, Compression, DType, Engine, NsaArgs, NsaConfig, Tensor};
//!
//! # fn main() -> fsa::Result<()> {
//! let engine = Engine::cpu()?;
//! // Two sequences of 100 and 60 tokens, packed end to end; 4 query heads share 2 kv heads.
//! let batch = Batch::from_lengths(&[100, 60])?;
//! let config = NsaConfig { block_size: 16, topk: 4, window_size: 32, ..NsaConfig::default() };
//! let values = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
//! let query = Tensor::new("query", values(160 * 4 * 16), &[160, 4, 16])?;
//! let key = Tensor::new("key", values(160 * 2 * 16), &[160, 2, 16])?;
//! let value = Tensor::new("value", values(160 * 2 * 16), &[160, 2, 16])?;
//! let gates = Tensor::from_f32("gates", &[0.5; 160 * 3], DType::F32, &[160, 3])?;
//! let args = NsaArgs {
//!     query: query.view(),
//!     key: key.view(),
//!     value: value.view(),
//!     gates: gates.view(),
//!     batch: &batch,
//!     config: &config,
//!     key_compression: Compression::Mean,
//!     value_compression: Compression::Mean,
//!     rope: None,
//!     softmax_scale: None,
//! };
//! let forward = engine.nsa(&args, true)?;
//! assert_eq!(forward.out.shape(), [160, 4, 16]);
//! assert_eq!(forward.topk_indices().shape(), [2, 160, 4]);
//!
//! let grad_out = Tensor::from_f32("grad_out", &[1.0; 160 * 4 * 16], DType::F32, &[160, 4, 16])?;
//! let saved = forward.saved().expect("asked for above");
//! let grads = engine.nsa_backward(&args, saved, &grad_out.view())?;
//! assert_eq!(grads.grad_key.shape(), [160, 2, 16]);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod attention;
mod combine;
mod compress;
mod compressed;
mod dense;
mod engine;
mod environment;
mod nsa;
mod rope;
mod select;
mod selected;
mod window;

pub use attention::{AttentionGradTensors, AttentionResult};
pub use combine::CombineGradTensors;
pub use compress::CompressGradTensors;
pub use engine::Engine;
pub use environment::{Environment, VARIABLES};
pub use nsa::{CompressionGradTensors, NsaGradTensors, NsaResult};
pub use select::SelectResult;
pub use selected::Selection;

pub use fsa_core::ops::{CompressShape, GateLayout, compressed_positions, kv_positions, query_positions};
pub use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, Backend, Batch,
    CombineArgs, CombineGrads, CompressArgs, CompressGrads, Compression, CompressionGrads, DType, Element, Error,
    InputError, InverseIndex, Layout, NsaArgs, NsaConfig, NsaForward, NsaGrads, NsaSaved, Result, Rope, RopeArgs,
    RopeScaling, ScoreHeads, SelectArgs, Sequence, Slice, SliceMut, Stage, Storage, Strided, StridedMut, Tensor,
    TensorView, TensorViewMut, bf16, f16,
};
pub use fsa_core::{index, ops, plan, selection};
pub use fsa_cpu::{self as cpu, CpuOptions};
pub use fsa_cuda as cuda;

/// The example of the README is compiled and run with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct ReadmeExamples;
