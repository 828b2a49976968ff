//! Arguments of stage `combine`: the gated sum of the branches.

use super::{expect_mut, expect_view, rank3};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{TensorView, TensorViewMut};

/// Whether a gate belongs to a row or to a row and head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateLayout {
    /// `[total_q, 3]`.
    PerRow,
    /// `[total_q, num_q_heads, 3]`.
    PerHead,
}

impl GateLayout {
    /// Checks `gates` against the output `[total_q, num_q_heads, value_dim]`.
    pub fn of(gates: &TensorView<'_>, dtype: DType, out: [usize; 3]) -> Result<Self> {
        if gates.dtype() != dtype {
            return Err(Error::input("gates", format!("dtype {dtype}"), format!("dtype {}", gates.dtype())));
        }
        match gates.shape() {
            shape if shape == [out[0], 3] => Ok(Self::PerRow),
            shape if shape == [out[0], out[1], 3] => Ok(Self::PerHead),
            shape => Err(Error::input(
                "gates",
                format!("shape [{}, 3] or [{}, {}, 3]", out[0], out[0], out[1]),
                format!("shape {shape:?}"),
            )),
        }
    }

    /// Leading indices of the gate vector of a row and head.
    pub fn leading<'i>(&self, index: &'i [usize; 2]) -> &'i [usize] {
        match self {
            GateLayout::PerRow => &index[..1],
            GateLayout::PerHead => index,
        }
    }
}

/// Inputs of stage `combine`.
#[derive(Debug, Clone, Copy)]
pub struct CombineArgs<'a> {
    /// `[total_q, 3]` or `[total_q, num_q_heads, 3]`: weights of compressed, selected, window, already activated.
    pub gates: TensorView<'a>,
    /// Outputs of the compressed, selected and window branch, each `[total_q, num_q_heads, value_dim]`.
    pub branches: [TensorView<'a>; 3],
}

/// Argument names of the branches, in the order of the gates.
pub const BRANCHES: [&str; 3] = ["out_compressed", "out_selected", "out_window"];

impl CombineArgs<'_> {
    /// Checks the inputs and returns the shape of the output and the layout of the gates.
    pub fn shape(&self) -> Result<([usize; 3], GateLayout)> {
        let shape = rank3(BRANCHES[0], "[total_q, num_q_heads, value_dim]", &self.branches[0])?;
        let dtype = self.branches[0].dtype();
        for (name, branch) in BRANCHES.iter().zip(&self.branches) {
            expect_view(name, dtype, &shape, branch)?;
        }
        Ok((shape, GateLayout::of(&self.gates, dtype, shape)?))
    }

    /// [`CombineArgs::shape`] that also checks the output.
    pub fn shape_with_output(&self, out: &TensorViewMut<'_>) -> Result<([usize; 3], GateLayout)> {
        let checked = self.shape()?;
        expect_mut("out", self.branches[0].dtype(), &checked.0, out)?;
        Ok(checked)
    }
}

/// What the backward of `combine` writes.
#[derive(Debug)]
pub struct CombineGrads<'a> {
    /// Shape of `gates`.
    pub grad_gates: TensorViewMut<'a>,
    /// Gradients of the three branches.
    pub grad_branches: [TensorViewMut<'a>; 3],
}

impl CombineGrads<'_> {
    /// Checks the gradients against the call.
    pub fn validate(&self, args: &CombineArgs<'_>, grad_out: &TensorView<'_>) -> Result<([usize; 3], GateLayout)> {
        let (shape, layout) = args.shape()?;
        let dtype = args.branches[0].dtype();
        expect_view("grad_out", dtype, &shape, grad_out)?;
        expect_mut("grad_gates", dtype, args.gates.shape(), &self.grad_gates)?;
        for (name, grad) in BRANCHES.iter().zip(&self.grad_branches) {
            expect_mut(&format!("grad_{name}"), dtype, &shape, grad)?;
        }
        Ok((shape, layout))
    }
}
