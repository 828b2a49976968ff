//! The truth about Flash Sparse Attention.
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
