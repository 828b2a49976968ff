//! The tensors of a measurement in host memory: normal numbers, and random blocks.

use super::super::definition::Point;
use crate::random::{mix, normal, normal_tensor};
use fsa::{
    AttentionArgs, AttentionStage, Batch, CompressArgs, Compression, Engine, NsaArgs, NsaConfig, Stage, Tensor,
    TensorView,
};
use rayon::prelude::*;
use std::ops::Range;

/// Inputs of a point.
#[derive(Debug)]
pub struct Inputs {
    /// `[tokens, num_q_heads, head_dim]`.
    pub query: Tensor,
    /// `[tokens, num_kv_heads, head_dim]`, or the compressed keys where the stage takes those.
    pub key: Tensor,
    /// The same.
    pub value: Tensor,
    /// `[num_kv_heads, tokens, topk]`, for stage `selected`.
    pub topk_indices: Option<Tensor>,
    /// One sequence.
    pub batch: Batch,
    /// Parameters.
    pub config: NsaConfig,
    stage: Stage,
}

/// The first and the last of `heads`: those that are compared.
pub fn sampled_heads(heads: usize) -> Vec<usize> {
    if heads > 1 { vec![0, heads - 1] } else { vec![0] }
}

impl Inputs {
    /// The same numbers as a measurement on the CPU, and blocks as [`random_row`] lists them.
    pub fn new(point: &Point) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, config, stage, .. } = point;
        let [q, kv] = [num_q_heads, num_kv_heads].map(|heads| [*tokens, *heads, *head_dim]);
        let mut inputs = Self {
            query: normal_tensor("query", 1, *dtype, &q)?,
            key: normal_tensor("key", 2, *dtype, &kv)?,
            value: normal_tensor("value", 3, *dtype, &kv)?,
            topk_indices: None,
            batch: Batch::from_lengths(&[*tokens])?,
            config: config.clone(),
            stage: *stage,
        };
        match stage {
            Stage::Selected => {
                let ids = random_rows(*num_kv_heads, *tokens, config);
                inputs.topk_indices = Some(Tensor::new("topk_indices", ids, &[*num_kv_heads, *tokens, config.topk])?);
            }
            Stage::Compressed | Stage::Select => {
                let engine = Engine::cpu()?;
                let [key, value] = [&inputs.key, &inputs.value].map(|input| engine.compress(&inputs.compress(input)));
                (inputs.key, inputs.value) = (key?, value?);
            }
            _ => {}
        }
        Ok(inputs)
    }

    /// Arguments of the compression of keys or values.
    pub fn compress<'t>(&'t self, input: &'t Tensor) -> CompressArgs<'t> {
        let NsaConfig { kernel_size, kernel_stride, .. } = self.config;
        let compression = Compression::Mean;
        CompressArgs { input: input.view(), batch: &self.batch, kernel_size, kernel_stride, compression }
    }

    /// Gates of every row and head.
    pub fn gates(&self) -> fsa::Result<Tensor> {
        let [rows, heads] = [self.query.shape()[0], self.query.shape()[1]];
        let gates: Vec<f32> = normal(4, rows * heads * 3).into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        Tensor::from_f32("gates", &gates, self.query.dtype(), &[rows, heads, 3])
    }

    /// Query heads that share kv head `kv_head`.
    pub fn group(&self, kv_head: usize) -> Range<usize> {
        let size = self.query.shape()[1] / self.key.shape()[1];
        kv_head * size..(kv_head + 1) * size
    }

    /// The stage of all heads, or of those whose blocks `topk_indices` lists.
    pub fn stage<'t>(&self, topk_indices: Option<TensorView<'t>>) -> fsa::Result<AttentionStage<'t>> {
        let NsaConfig { kernel_size, kernel_stride, block_size, window_size, .. } = self.config;
        match (self.stage, topk_indices) {
            (Stage::Window, _) => Ok(AttentionStage::Window { window_size }),
            (Stage::Compressed | Stage::Select, _) => Ok(AttentionStage::Compressed { kernel_size, kernel_stride }),
            (Stage::Selected, Some(topk_indices)) => {
                Ok(AttentionStage::Selected { topk_indices, block_size, validate: false })
            }
            (Stage::Dense, _) => Ok(AttentionStage::Dense),
            (stage, _) => Err(fsa::Error::input("stage", "one of attention", stage)),
        }
    }

    /// The stage and its arguments for one kv head and its query heads: a problem of its own.
    pub fn of_head(&self, kv_head: usize) -> fsa::Result<(AttentionStage<'_>, AttentionArgs<'_>)> {
        let own = kv_head..kv_head + 1;
        let ids = self.topk_indices.as_ref().map(|ids| ids.view().slice_axis("topk_indices", 0, own.clone()));
        let args = AttentionArgs {
            query: heads(&self.query, self.group(kv_head))?,
            key: heads(&self.key, own.clone())?,
            value: heads(&self.value, own)?,
            batch: &self.batch,
            softmax_scale: None,
        };
        Ok((self.stage(ids.transpose()?)?, args))
    }

    /// The whole operation for one kv head and its query heads.
    pub fn whole_of_head<'t>(&'t self, gates: &'t Tensor, kv_head: usize) -> fsa::Result<NsaArgs<'t>> {
        let (group, own) = (self.group(kv_head), kv_head..kv_head + 1);
        Ok(NsaArgs {
            query: heads(&self.query, group.clone())?,
            key: heads(&self.key, own.clone())?,
            value: heads(&self.value, own)?,
            gates: heads(gates, group)?,
            batch: &self.batch,
            config: &self.config,
            key_compression: Compression::Mean,
            value_compression: Compression::Mean,
            rope: None,
            softmax_scale: None,
        })
    }
}

/// Some heads of a tensor `[tokens, heads, ..]`.
pub fn heads(tensor: &Tensor, heads: Range<usize>) -> fsa::Result<TensorView<'_>> {
    tensor.view().slice_axis("tensor", 1, heads)
}

fn random_rows(num_kv_heads: usize, tokens: usize, config: &NsaConfig) -> Vec<i32> {
    let mut ids = vec![-1; num_kv_heads * tokens * config.topk];
    ids.par_chunks_mut(config.topk).enumerate().for_each(|(row, ids)| {
        random_row(row as u64, row % tokens, config, ids);
    });
    ids
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
