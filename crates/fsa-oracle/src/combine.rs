//! Stage `combine`: the gated sum of the three branches.

use crate::arithmetic::{Arithmetic, Exact};
use crate::array::Array;
use fsa_core::{CombineArgs, Result, TensorView};

/// Inputs of `combine`, widened.
#[derive(Debug, Clone)]
pub struct CombineInputs {
    /// `[total_q, 3]` or `[total_q, num_q_heads, 3]`.
    pub gates: Array,
    /// Compressed, selected, window: each `[total_q, num_q_heads, value_dim]`.
    pub branches: [Array; 3],
}

/// Gradients of `combine`.
#[derive(Debug, Clone)]
pub struct CombineGradients {
    /// Shape of the gates.
    pub gates: Array,
    /// Shapes of the branches.
    pub branches: [Array; 3],
}

impl CombineInputs {
    /// Widens the arguments of a call.
    pub fn new(args: &CombineArgs<'_>) -> Self {
        Self { gates: Array::from_view(&args.gates), branches: args.branches.each_ref().map(Array::from_view) }
    }

    /// Index of the gate of a row, head and branch.
    fn gate(&self, row: usize, head: usize, branch: usize) -> Vec<usize> {
        if self.gates.shape().len() == 2 { vec![row, branch] } else { vec![row, head, branch] }
    }

    fn rows_and_heads(&self) -> impl Iterator<Item = [usize; 2]> + use<> {
        let (rows, heads) = (self.branches[0].shape()[0], self.branches[0].shape()[1]);
        (0..rows).flat_map(move |row| (0..heads).map(move |head| [row, head]))
    }
}

/// `out = sum over the branches of gate * branch`.
pub fn forward(a: &dyn Arithmetic, inputs: &CombineInputs) -> Array {
    let mut out = Array::zeros(inputs.branches[0].shape());
    for [row, head] in inputs.rows_and_heads() {
        for (b, branch) in inputs.branches.iter().enumerate() {
            let gate = inputs.gates.at(&inputs.gate(row, head, b));
            a.add_scaled(out.row_mut(&[row, head]), gate, branch.row(&[row, head]));
        }
    }
    a.store_all(out.data_mut());
    out
}

/// Gradients of the gates and of the branches. A gate of a row gets the sum over the heads.
pub fn backward(a: &dyn Arithmetic, inputs: &CombineInputs, grad_out: &Array) -> CombineGradients {
    let mut gates = Array::zeros(inputs.gates.shape());
    let mut branches = inputs.branches.each_ref().map(|branch| Array::zeros(branch.shape()));
    for index in inputs.rows_and_heads() {
        for (b, grad_branch) in branches.iter_mut().enumerate() {
            let at = inputs.gate(index[0], index[1], b);
            let sum = gates.at_mut(&at);
            *sum = a.op(*sum + a.dot(grad_out.row(&index), inputs.branches[b].row(&index)));
            a.add_scaled(grad_branch.row_mut(&index), inputs.gates.at(&at), grad_out.row(&index));
        }
    }
    let store = |mut array: Array| {
        a.store_all(array.data_mut());
        array
    };
    CombineGradients { gates: store(gates), branches: branches.map(store) }
}

/// `combine` of a call, in f64.
pub fn combine(args: &CombineArgs<'_>) -> Result<Array> {
    args.shape()?;
    Ok(forward(&Exact, &CombineInputs::new(args)))
}

/// The gradients of a call, in f64.
pub fn combine_backward(args: &CombineArgs<'_>, grad_out: &TensorView<'_>) -> Result<CombineGradients> {
    args.shape()?;
    Ok(backward(&Exact, &CombineInputs::new(args), &Array::from_view(grad_out)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_of_rows_and_of_heads_by_hand() {
        let branch = |values: [f64; 2]| Array::new(&[1, 2, 1], values.to_vec());
        let branches = [branch([1.0, 2.0]), branch([10.0, 20.0]), branch([100.0, 200.0])];
        let per_row = Array::new(&[1, 3], vec![1.0, 2.0, 3.0]);
        let inputs = CombineInputs { gates: per_row, branches: branches.clone() };
        assert_eq!(forward(&Exact, &inputs).data(), [321.0, 642.0]);
        let grads = backward(&Exact, &inputs, &branch([1.0, 10.0]));
        assert_eq!(grads.gates.data(), [21.0, 210.0, 2100.0]);
        assert_eq!(grads.branches[2].data(), [3.0, 30.0]);
        let per_head = Array::new(&[1, 2, 3], vec![1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        let inputs = CombineInputs { gates: per_head, branches };
        assert_eq!(forward(&Exact, &inputs).data(), [1.0, 200.0]);
        assert_eq!(
            backward(&Exact, &inputs, &branch([1.0, 10.0])).gates.data(),
            [1.0, 10.0, 100.0, 20.0, 200.0, 2000.0]
        );
    }
}
