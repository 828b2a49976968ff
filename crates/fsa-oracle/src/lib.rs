//! The truth about Flash Sparse Attention: what every stage means, and how far a backend may stray from it.
//!
//! - [`attention`] (with [`dense`], [`window`], [`compressed`], [`selected`], which differ only in the set of keys that
//!   a row sees), [`compress`], [`rope`], [`score`] and [`select`], [`combine`], [`nsa`]: every stage, forward and
//!   backward, in plain loops over one row after another. No blocks, no online softmax, no inverse index: nothing
//!   that a backend does to be fast.
//! - [`arithmetic`]: the loops run in f64 (the oracle), in the dtype with every intermediate rounded (the naive
//!   evaluation), and in the dtype with random errors in place of roundings.
//! - [`tolerance`]: at most twice the error of the naive evaluation, and 4 ulp.
//! - [`case`], [`generate`]: cases in one line of text, and hostile inputs of every kind.
//! - [`suite`]: the conformance suite that a backend is passed to.
//! - [`naive`]: the naive evaluation as a backend.
//!
//! Analytic gradients are checked against finite differences in `tests/gradients.rs`; that the suite finds what is
//! wrong is checked in `tests/mutants.rs`, with one broken backend per fault.
//!
//! # Example
//!
//! ```
//! use fsa_oracle::naive::NaiveBackend;
//! use fsa_oracle::suite::run_case;
//!
//! let case = "selected:backward:bf16:seed=17:q=33,0,64:kv=40,0,64:hq=6:hkv=2:d=64:block=16:topk=4".parse()?;
//! let outcome = run_case(&NaiveBackend::default(), &case);
//! assert!(outcome.passed(), "{:?}", outcome.failures);
//! # Ok::<(), fsa_core::Error>(())
//! ```
#![forbid(unsafe_code)]

pub mod arithmetic;
pub mod array;
pub mod attention;
mod buffer;
pub mod case;
mod case_text;
pub mod combine;
pub mod compress;
pub mod compressed;
pub mod dense;
pub mod generate;
mod inputs;
pub mod naive;
pub mod nsa;
pub mod random;
pub mod rope;
pub mod score;
pub mod select;
pub mod selected;
pub mod suite;
pub mod tolerance;
pub mod window;

pub use case::{Case, Hostile, Pass};
pub use suite::{CaseOutcome, CheckOptions, StageReport, run, run_case};
