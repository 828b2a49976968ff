//! A small call through the backend, and whether it wrote its outputs.

use fsa_core::{AttentionArgs, AttentionOutput, AttentionStage, Backend, Batch, DType, Tensor, TensorView};
use fsa_cuda::CudaBackend;

/// A forward of stage `selected` on zeros in which every row lists `id`, into outputs of threes.
pub struct Call {
    batch: Batch,
    query: Tensor,
    ids: Vec<i32>,
    pub out: Tensor,
    pub lse: Tensor,
}

impl Call {
    /// Of `rows` rows, one head and vectors of 8.
    pub fn new(dtype: DType, rows: usize, id: i32) -> Self {
        let threes = vec![3.0f32; rows * 8];
        Self {
            batch: Batch::single(rows),
            query: Tensor::zeros("query", dtype, &[rows, 1, 8]).expect("small"),
            ids: vec![id; rows],
            out: Tensor::from_f32("out", &threes, dtype, &[rows, 1, 8]).expect("small"),
            lse: Tensor::new("lse", vec![3.0f32; rows], &[1, rows]).expect("small"),
        }
    }

    /// Runs it.
    pub fn run(&mut self, backend: &CudaBackend, validate: bool) -> fsa_core::Result<()> {
        let topk_indices = TensorView::new("topk_indices", &self.ids, &[1, self.ids.len(), 1])?;
        let stage = AttentionStage::Selected { topk_indices, block_size: 16, validate };
        let query = self.query.view();
        let args = AttentionArgs { query, key: query, value: query, batch: &self.batch, softmax_scale: None };
        let mut output = AttentionOutput { out: self.out.view_mut(), lse: self.lse.view_mut() };
        backend.attention(&stage, &args, &mut output)
    }

    /// Requires that no output was written.
    #[track_caller]
    pub fn is_untouched(&self) {
        for tensor in [&self.out, &self.lse] {
            assert!(tensor.view().to_f64().iter().all(|value| *value == 3.0), "an output was written");
        }
    }
}
