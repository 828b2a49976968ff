//! Vector kernels, each written once over [`pulp::Simd`] and instantiated for the instruction sets
//! that `pulp` detects at run time (AVX-512, AVX2 with FMA, NEON, or none).
//!
//! A kernel works on one strip or tile, a few microseconds, so the cost of choosing an instantiation per
//! call (a branch and a call, some nanoseconds) does not show. Rows are padded to
//! [`fsa_core::plan::VECTOR`] elements, a multiple of every register's length: kernels have no tails.

mod exp;
mod product;
mod rows;
mod softmax;

pub(crate) use exp::exp2_in_place;
pub(crate) use product::{Left, Product};
pub(crate) use rows::{add, all_finite, dot, merge_row, scale, sum_windows, transpose};
pub(crate) use softmax::{GradientStrip, Online, SoftmaxStrip, gradient_strip, softmax_strip};

use pulp::{Arch, WithSimd};

/// The instruction set that kernels are dispatched to.
#[derive(Debug, Clone, Copy)]
pub struct Isa(Arch);

impl Isa {
    /// The best that this machine has.
    pub fn detect() -> Self {
        Self(Arch::new())
    }

    /// Every instruction set that this machine can run, the best first. Used to test them all.
    pub fn available() -> Vec<Self> {
        let mut sets = vec![Arch::new()];
        #[cfg(target_arch = "x86_64")]
        if let (Some(v3), Arch::V4(_)) = (pulp::x86::V3::try_new(), Arch::new()) {
            sets.push(Arch::V3(v3));
        }
        if !matches!(sets[0], Arch::Scalar) {
            sets.push(Arch::Scalar);
        }
        sets.into_iter().map(Self).collect()
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Arch::V3(_) => "avx2",
            #[cfg(target_arch = "aarch64")]
            Arch::Neon(_) => "neon",
            _ => "scalar",
        }
    }

    #[inline]
    pub(crate) fn run<Op: WithSimd>(self, op: Op) -> Op::Output {
        self.0.dispatch(op)
    }
}

#[cfg(test)]
mod tests;
