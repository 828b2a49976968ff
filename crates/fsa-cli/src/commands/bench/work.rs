//! The tensors of a measurement, the call that is timed, and the comparison of its result with the oracle.

use super::definition::Point;
use crate::random::normal;
use crate::sampled::{Compared, Sample};
use fsa::{
    AttentionArgs, AttentionResult, AttentionStage, Batch, CombineArgs, CompressArgs, Compression, DType, Engine, NsaArgs,
    NsaSaved, Rope, RopeArgs, SelectArgs, Stage, Tensor, kv_positions, query_positions,
};
use fsa_oracle::Pass;
use fsa_oracle::array::Array;

/// Rows that are compared with the oracle.
const SAMPLED_ROWS: usize = 12;

/// Inputs of a measurement.
#[derive(Debug)]
pub struct Tensors {
    point: Point,
    batch: Batch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    grad_out: Tensor,
    /// Compressed key and value, and the selection that they lead to; where the stage needs them.
    compressed: Option<[Tensor; 2]>,
    topk_indices: Option<Tensor>,
    rope: Rope,
}

/// What a forward leaves for the backward.
pub enum State {
    None,
    Attention(AttentionResult),
    Nsa(Box<NsaSaved>),
    Branches(Box<[Tensor; 3]>),
}

impl Tensors {
    /// Normal numbers of the shapes of `point`; the selection is that of the backend.
    pub fn new(engine: &Engine, point: &Point) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *point;
        let tensor = |name: &str, seed, shape: &[usize]| {
            Tensor::from_f32(name, &normal(seed, shape.iter().product()), dtype, shape)
        };
        let (q, kv) = ([tokens, num_q_heads, head_dim], [tokens, num_kv_heads, head_dim]);
        let gates: Vec<f32> = normal(4, tokens * 3).into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let mut tensors = Self {
            point: point.clone(),
            batch: Batch::from_lengths(&[tokens])?,
            query: tensor("query", 1, &q)?,
            key: tensor("key", 2, &kv)?,
            value: tensor("value", 3, &kv)?,
            gates: Tensor::from_f32("gates", &gates, dtype, &[tokens, 3])?,
            grad_out: tensor("grad_out", 5, &q)?,
            compressed: None,
            topk_indices: None,
            rope: Rope::default(),
        };
        if matches!(point.stage, Stage::Compressed | Stage::Select | Stage::Selected) {
            let key = engine.compress(&tensors.compress(&tensors.key))?;
            let value = engine.compress(&tensors.compress(&tensors.value))?;
            tensors.compressed = Some([key, value]);
        }
        if point.stage == Stage::Selected {
            tensors.topk_indices = Some(engine.select(&tensors.select()?)?.topk_indices);
        }
        Ok(tensors)
    }

    fn compress<'a>(&'a self, input: &'a Tensor) -> CompressArgs<'a> {
        CompressArgs {
            input: input.view(),
            batch: &self.batch,
            kernel_size: self.point.config.kernel_size,
            kernel_stride: self.point.config.kernel_stride,
            compression: Compression::Mean,
        }
    }

    fn select(&self) -> fsa::Result<SelectArgs<'_>> {
        Ok(SelectArgs { attention: self.attention()?, config: &self.point.config })
    }

    /// Query with the keys and values of the stage.
    fn attention(&self) -> fsa::Result<AttentionArgs<'_>> {
        let (key, value) = match (&self.compressed, self.point.stage) {
            (Some([key, value]), Stage::Compressed | Stage::Select) => (key, value),
            _ => (&self.key, &self.value),
        };
        // The selection of stage `selected` is made through the compressed keys before the indices are known.
        let (key, value) = match (&self.compressed, &self.topk_indices, self.point.stage) {
            (Some([key, value]), None, Stage::Selected) => (key, value),
            _ => (key, value),
        };
        Ok(AttentionArgs {
            query: self.query.view(),
            key: key.view(),
            value: value.view(),
            batch: &self.batch,
            softmax_scale: None,
        })
    }

    fn stage(&self) -> Option<AttentionStage<'_>> {
        let config = &self.point.config;
        match self.point.stage {
            Stage::Dense => Some(AttentionStage::Dense),
            Stage::Window => Some(AttentionStage::Window { window_size: config.window_size }),
            Stage::Compressed => Some(AttentionStage::Compressed {
                kernel_size: config.kernel_size,
                kernel_stride: config.kernel_stride,
            }),
            Stage::Selected => self.topk_indices.as_ref().map(|indices| AttentionStage::Selected {
                topk_indices: indices.view(),
                block_size: config.block_size,
                validate: false,
            }),
            _ => None,
        }
    }

    fn nsa(&self) -> NsaArgs<'_> {
        NsaArgs {
            query: self.query.view(),
            key: self.key.view(),
            value: self.value.view(),
            gates: self.gates.view(),
            batch: &self.batch,
            config: &self.point.config,
            key_compression: Compression::Mean,
            value_compression: Compression::Mean,
            rope: None,
            softmax_scale: None,
        }
    }
}
