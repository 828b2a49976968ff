//! Stage `compress`: every window of keys or values becomes one vector.

use crate::arithmetic::{Arithmetic, Exact};
use crate::array::Array;
use fsa_core::{Batch, CompressArgs, Compression, Result, TensorView};

/// How a window becomes one vector, widened.
#[derive(Debug, Clone)]
pub enum CompressionInputs {
    /// The mean.
    Mean,
    /// A weighted sum.
    Weighted {
        /// `[num_kv_heads, kernel_size]`.
        weight: Array,
    },
    /// `flatten(window + position) @ weight`.
    Linear {
        /// `[num_kv_heads, kernel_size * dim, dim]`.
        weight: Array,
        /// `[num_kv_heads, kernel_size, dim]`.
        position: Option<Array>,
    },
}

impl CompressionInputs {
    /// Widens the parameters.
    pub fn new(compression: &Compression<'_>) -> Self {
        match compression {
            Compression::Mean => Self::Mean,
            Compression::Weighted { weight } => Self::Weighted { weight: Array::from_view(weight) },
            Compression::Linear { weight, position } => {
                Self::Linear { weight: Array::from_view(weight), position: position.as_ref().map(Array::from_view) }
            }
        }
    }
}

/// Inputs of a compression, widened.
#[derive(Debug, Clone)]
pub struct CompressInputs<'a> {
    /// `[total_kv, num_kv_heads, dim]`.
    pub input: Array,
    /// Where the sequences lie.
    pub batch: &'a Batch,
    /// Tokens in a window.
    pub kernel_size: usize,
    /// Tokens between the starts of neighbouring windows.
    pub kernel_stride: usize,
    /// How a window becomes one vector.
    pub compression: CompressionInputs,
}

/// Gradients of a compression; shapes of the inputs.
#[derive(Debug, Clone)]
pub struct CompressGradients {
    /// `[total_kv, num_kv_heads, dim]`.
    pub input: Array,
    /// Shape of the weight, where there is one.
    pub weight: Option<Array>,
    /// Shape of the position embedding, where there is one.
    pub position: Option<Array>,
}

impl CompressGradients {
    /// Those that exist: input, weight, position.
    pub fn into_vec(self) -> Vec<Array> {
        [Some(self.input), self.weight, self.position].into_iter().flatten().collect()
    }
}

impl<'a> CompressInputs<'a> {
    /// Widens the arguments of a call.
    pub fn new(args: &CompressArgs<'a>) -> Self {
        Self {
            input: Array::from_view(&args.input),
            batch: args.batch,
            kernel_size: args.kernel_size,
            kernel_stride: args.kernel_stride,
            compression: CompressionInputs::new(&args.compression),
        }
    }

    /// First input row of every window, all sequences in order: window i of a sequence exists iff
    /// `i * kernel_stride + kernel_size <= kv_len`.
    pub fn windows(&self) -> Vec<usize> {
        let mut windows = Vec::new();
        for sequence in self.batch.sequences() {
            let mut start = 0;
            while start + self.kernel_size <= sequence.kv_len() {
                windows.push(sequence.kv_rows.start + start);
                start += self.kernel_stride;
            }
        }
        windows
    }

    fn heads(&self) -> usize {
        self.input.shape()[1]
    }

    fn dim(&self) -> usize {
        self.input.shape()[2]
    }

    /// Token `j` of a window with its position embedding.
    fn positioned(&self, a: &dyn Arithmetic, position: Option<&Array>, row: usize, head: usize, j: usize) -> Vec<f64> {
        let token = self.input.row(&[row + j, head]);
        match position {
            Some(position) => token.iter().zip(position.row(&[head, j])).map(|(x, p)| a.store(a.op(x + p))).collect(),
            None => token.to_vec(),
        }
    }

    fn window(&self, a: &dyn Arithmetic, row: usize, head: usize) -> Vec<f64> {
        let (dim, mut out) = (self.dim(), vec![0.0; self.dim()]);
        for j in 0..self.kernel_size {
            match &self.compression {
                CompressionInputs::Mean => a.add_scaled(&mut out, 1.0, self.input.row(&[row + j, head])),
                CompressionInputs::Weighted { weight } => {
                    a.add_scaled(&mut out, weight.at(&[head, j]), self.input.row(&[row + j, head]));
                }
                CompressionInputs::Linear { weight, position } => {
                    let token = self.positioned(a, position.as_ref(), row, head, j);
                    for (k, x) in token.into_iter().enumerate() {
                        a.add_scaled(&mut out, x, weight.row(&[head, j * dim + k]));
                    }
                }
            }
        }
        if matches!(self.compression, CompressionInputs::Mean) {
            out.iter_mut().for_each(|v| *v = a.op(*v / self.kernel_size as f64));
        }
        a.store_all(&mut out);
        out
    }
}

/// `[total_compressed, num_kv_heads, dim]`.
pub fn forward(a: &dyn Arithmetic, inputs: &CompressInputs<'_>) -> Array {
    let windows = inputs.windows();
    let mut out = Array::zeros(&[windows.len(), inputs.heads(), inputs.dim()]);
    for (i, row) in windows.into_iter().enumerate() {
        for head in 0..inputs.heads() {
            out.row_mut(&[i, head]).copy_from_slice(&inputs.window(a, row, head));
        }
    }
    out
}

/// Gradients of the input and of the parameters.
pub fn backward(a: &dyn Arithmetic, inputs: &CompressInputs<'_>, grad_out: &Array) -> CompressGradients {
    let zeros = |array: &Array| Array::zeros(array.shape());
    let mut grads = CompressGradients { input: zeros(&inputs.input), weight: None, position: None };
    match &inputs.compression {
        CompressionInputs::Mean => {}
        CompressionInputs::Weighted { weight } => grads.weight = Some(zeros(weight)),
        CompressionInputs::Linear { weight, position } => {
            grads.weight = Some(zeros(weight));
            grads.position = position.as_ref().map(zeros);
        }
    }
    for (i, row) in inputs.windows().into_iter().enumerate() {
        for head in 0..inputs.heads() {
            for j in 0..inputs.kernel_size {
                backward_token(a, inputs, &mut grads, grad_out.row(&[i, head]), [row, head, j]);
            }
        }
    }
    let store = |mut array: Array| {
        a.store_all(array.data_mut());
        array
    };
    CompressGradients {
        input: store(grads.input),
        weight: grads.weight.map(store),
        position: grads.position.map(store),
    }
}

/// Adds what token `j` of the window that starts at `row` gets of the window's gradient.
fn backward_token(
    a: &dyn Arithmetic,
    inputs: &CompressInputs<'_>,
    grads: &mut CompressGradients,
    grad: &[f64],
    [row, head, j]: [usize; 3],
) {
    let index = [row + j, head];
    match &inputs.compression {
        CompressionInputs::Mean => {
            a.add_scaled(grads.input.row_mut(&index), a.op(1.0 / inputs.kernel_size as f64), grad);
        }
        CompressionInputs::Weighted { weight } => {
            a.add_scaled(grads.input.row_mut(&index), weight.at(&[head, j]), grad);
            if let Some(grad_weight) = &mut grads.weight {
                let sum = grad_weight.at_mut(&[head, j]);
                *sum = a.op(*sum + a.dot(inputs.input.row(&index), grad));
            }
        }
        CompressionInputs::Linear { weight, position } => {
            let dim = inputs.dim();
            let token = inputs.positioned(a, position.as_ref(), row, head, j);
            let grad_token: Vec<f64> =
                (0..dim).map(|k| a.store(a.dot(weight.row(&[head, j * dim + k]), grad))).collect();
            a.add_scaled(grads.input.row_mut(&index), 1.0, &grad_token);
            if let Some(grad_position) = &mut grads.position {
                a.add_scaled(grad_position.row_mut(&[head, j]), 1.0, &grad_token);
            }
            if let Some(grad_weight) = &mut grads.weight {
                for (k, x) in token.into_iter().enumerate() {
                    a.add_scaled(grad_weight.row_mut(&[head, j * dim + k]), x, grad);
                }
            }
        }
    }
}

/// The compression of a call, in f64.
pub fn compress(args: &CompressArgs<'_>) -> Result<Array> {
    args.shape()?;
    Ok(forward(&Exact, &CompressInputs::new(args)))
}

/// The gradients of a call, in f64.
pub fn compress_backward(args: &CompressArgs<'_>, grad_out: &TensorView<'_>) -> Result<CompressGradients> {
    args.shape()?;
    Ok(backward(&Exact, &CompressInputs::new(args), &Array::from_view(grad_out)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(lengths: &[usize], compression: CompressionInputs) -> Vec<f64> {
        let batch = Batch::from_lengths(lengths).expect("valid");
        let input = Array::new(&[batch.total_kv(), 1, 1], (1..=batch.total_kv()).map(|v| v as f64).collect());
        let inputs = CompressInputs { input, batch: &batch, kernel_size: 4, kernel_stride: 2, compression };
        forward(&Exact, &inputs).data().to_vec()
    }

    #[test]
    fn windows_are_whole_and_stay_in_their_sequence() {
        // Sequences 1..=5, then 6..=8 (too short), then 9..=14: windows 1-4, 9-12 and 11-14.
        assert_eq!(compressed(&[5, 3, 6], CompressionInputs::Mean), [2.5, 10.5, 12.5]);
        assert_eq!(compressed(&[3, 0], CompressionInputs::Mean), [0.0; 0]);
    }

    #[test]
    fn weights_and_positions_by_hand() {
        let weight = Array::new(&[1, 4], vec![1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(compressed(&[6], CompressionInputs::Weighted { weight }), [4321.0, 6543.0]);
        let weight = Array::new(&[1, 4, 1], vec![1.0, 10.0, 100.0, 1000.0]);
        let position = Some(Array::new(&[1, 4, 1], vec![1.0, 0.0, 0.0, 2.0]));
        assert_eq!(compressed(&[6], CompressionInputs::Linear { weight, position }), [6322.0, 8544.0]);
    }
}
