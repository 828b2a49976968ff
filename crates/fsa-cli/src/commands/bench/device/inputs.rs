//! The tensors of a measurement in host memory: normal numbers, and random blocks.

use super::super::definition::Point;
use crate::random::{mix, normal_tensor};
use fsa::{AttentionArgs, AttentionStage, Batch, NsaConfig, Tensor, TensorView};
use rayon::prelude::*;
use std::ops::Range;

/// Inputs of a point.
#[derive(Debug)]
pub struct Inputs {
    /// `[tokens, num_q_heads, head_dim]`.
    pub query: Tensor,
    /// `[tokens, num_kv_heads, head_dim]`.
    pub key: Tensor,
    /// `[tokens, num_kv_heads, head_dim]`.
    pub value: Tensor,
    /// `[num_kv_heads, tokens, topk]`.
    pub topk_indices: Tensor,
    /// One sequence.
    pub batch: Batch,
    block_size: usize,
}

impl Inputs {
    /// The same numbers as a measurement on the CPU, and blocks as [`random_row`] lists them.
    pub fn new(point: &Point) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, config, .. } = point;
        let [q, kv] = [num_q_heads, num_kv_heads].map(|heads| [*tokens, *heads, *head_dim]);
        let mut ids = vec![-1; num_kv_heads * tokens * config.topk];
        ids.par_chunks_mut(config.topk).enumerate().for_each(|(row, ids)| {
            random_row(row as u64, row % tokens, config, ids);
        });
        Ok(Self {
            query: normal_tensor("query", 1, *dtype, &q)?,
            key: normal_tensor("key", 2, *dtype, &kv)?,
            value: normal_tensor("value", 3, *dtype, &kv)?,
            topk_indices: Tensor::new("topk_indices", ids, &[*num_kv_heads, *tokens, config.topk])?,
            batch: Batch::from_lengths(&[*tokens])?,
            block_size: config.block_size,
        })
    }

    /// Query heads that share kv head `kv_head`.
    pub fn group(&self, kv_head: usize) -> Range<usize> {
        let size = self.query.shape()[1] / self.key.shape()[1];
        kv_head * size..(kv_head + 1) * size
    }

    /// The stage and its arguments for one kv head and its query heads: a problem of its own.
    pub fn of_head(&self, kv_head: usize) -> fsa::Result<(AttentionStage<'_>, AttentionArgs<'_>)> {
        let own = kv_head..kv_head + 1;
        let topk_indices = self.topk_indices.view().slice_axis("topk_indices", 0, own.clone())?;
        let stage = AttentionStage::Selected { topk_indices, block_size: self.block_size, validate: false };
        let args = AttentionArgs {
            query: heads(&self.query, self.group(kv_head))?,
            key: heads(&self.key, own.clone())?,
            value: heads(&self.value, own)?,
            batch: &self.batch,
            softmax_scale: None,
        };
        Ok((stage, args))
    }
}

/// Some heads of a tensor `[tokens, heads, head_dim]`.
pub fn heads(tensor: &Tensor, heads: Range<usize>) -> fsa::Result<TensorView<'_>> {
    tensor.view().slice_axis("tensor", 1, heads)
}

/// The blocks of a row at `position`: the first ones and the own with those before it, as the selection always takes
/// them, then any others; ascending, left-packed.
fn random_row(seed: u64, position: usize, config: &NsaConfig, ids: &mut [i32]) {
    let own = position / config.block_size;
    let count = config.topk.min(own + 1);
    let first_local = (own + 1).saturating_sub(config.local_blocks);
    let mut listed = 0;
    let forced = (0..config.init_blocks.min(first_local)).chain(first_local..=own);
    for block in forced.take(count) {
        ids[listed] = block as i32;
        listed += 1;
    }
    let mut word = mix(seed);
    while listed < count {
        word = mix(word);
        let block = (word % (own as u64 + 1)) as i32;
        if !ids[..listed].contains(&block) {
            ids[listed] = block;
            listed += 1;
        }
    }
    ids[..count].sort_unstable();
    ids[count..].fill(-1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsa::selection;

    #[test]
    fn random_rows_are_selections() {
        let config = NsaConfig { block_size: 16, topk: 6, ..NsaConfig::default() };
        let mut ids = vec![7; 400 * 6];
        for (position, row) in ids.chunks_mut(6).enumerate() {
            random_row(position as u64, position, &config, row);
            let own = (position / 16) as i32;
            let count = row.iter().filter(|id| **id >= 0).count();
            assert_eq!(count, 6.min(own as usize + 1), "{position}: {row:?}");
            assert!(row[..count].is_sorted() && row[0] == 0 && row[..count].contains(&own), "{position}: {row:?}");
            assert!(own == 0 || row.contains(&(own - 1)), "{position}: {row:?}");
        }
        let view = TensorView::new("topk_indices", &ids, &[1, 400, 6]).expect("shape");
        let typed = selection::check(&view, 1, 400).expect("typed");
        selection::validate(&typed, &Batch::single(400), 16).expect("unique and in the past");
    }
}
