//! One measurement: tensors, a run that is compared with the oracle, and the timed repetitions of the same call.
//!
//! The timed calls write into outputs that exist already, so that no page of memory is touched for the first time.

use super::definition::Point;
use super::timing::{Times, measure};
use crate::random::{normal, normal_tensor};
use crate::sampled::{Compared, Sample, compare};
use fsa::{
    AttentionArgs, AttentionStage, Batch, CombineArgs, CompressArgs, Compression, Engine, NsaArgs, Rope, RopeArgs,
    SelectArgs, Stage, Tensor, query_positions,
};
use fsa_oracle::array::Array;
use fsa_oracle::combine::{self, CombineInputs};
use fsa_oracle::compress::{self, CompressInputs};
use fsa_oracle::{Pass, rope};
use std::time::Duration;

/// Rows that are compared with the oracle.
pub const SAMPLED_ROWS: usize = 12;

/// Times of a measurement and the comparisons that preceded them.
#[derive(Debug)]
pub struct Measured {
    /// `None` if a comparison failed.
    pub times: Option<Times>,
    /// Comparison with the oracle.
    pub compared: Vec<Compared>,
    /// Rows whose selection no rounding explains, for `select`.
    pub wrong_selections: usize,
}

/// Inputs of a measurement.
#[derive(Debug)]
pub struct Work<'a> {
    engine: &'a Engine,
    point: &'a Point,
    budget: Duration,
    batch: Batch,
    sample: Sample,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    grad_out: Tensor,
}

impl<'a> Work<'a> {
    /// Normal numbers of the shapes of `point`.
    pub fn new(engine: &'a Engine, point: &'a Point, budget: Duration) -> fsa::Result<Self> {
        let Point { tokens, num_q_heads, num_kv_heads, head_dim, dtype, .. } = *point;
        let tensor = |name: &str, seed, shape: &[usize]| normal_tensor(name, seed, dtype, shape);
        let (q, kv) = ([tokens, num_q_heads, head_dim], [tokens, num_kv_heads, head_dim]);
        let gates: Vec<f32> = normal(4, tokens * 3).into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let batch = Batch::from_lengths(&[tokens])?;
        Ok(Self {
            engine,
            point,
            budget,
            sample: Sample::new(&batch, SAMPLED_ROWS, 1)?,
            batch,
            query: tensor("query", 1, &q)?,
            key: tensor("key", 2, &kv)?,
            value: tensor("value", 3, &kv)?,
            gates: Tensor::from_f32("gates", &gates, dtype, &[tokens, 3])?,
            grad_out: tensor("grad_out", 5, &q)?,
        })
    }

    /// Runs, compares and times.
    pub fn run(&self) -> fsa::Result<Measured> {
        let config = &self.point.config;
        match self.point.stage {
            Stage::Dense => self.attention(&AttentionStage::Dense, &self.args(&self.key, &self.value)),
            Stage::Window => {
                let stage = AttentionStage::Window { window_size: config.window_size };
                self.attention(&stage, &self.args(&self.key, &self.value))
            }
            Stage::Compressed => {
                let [key, value] = self.compressed()?;
                let (kernel_size, kernel_stride) = (config.kernel_size, config.kernel_stride);
                self.attention(&AttentionStage::Compressed { kernel_size, kernel_stride }, &self.args(&key, &value))
            }
            Stage::Selected => {
                let [key, value] = self.compressed()?;
                let select = SelectArgs { attention: self.args(&key, &value), config };
                let chosen = self.engine.select(&select)?.topk_indices;
                let (topk_indices, block_size) = (chosen.view(), config.block_size);
                let stage = AttentionStage::Selected { topk_indices, block_size, validate: false };
                self.attention(&stage, &self.args(&self.key, &self.value))
            }
            Stage::Select => self.select(),
            Stage::Nsa if self.point.pass == Pass::Forward => self.nsa_forward(),
            Stage::Nsa => self.nsa_backward(),
            Stage::Compress => self.compress(),
            Stage::Rope => self.rope(),
            Stage::Combine => self.combine(),
            Stage::Index => Err(fsa::Error::input("stage", "an operation of its own", Stage::Index)),
        }
    }

    fn args<'t>(&'t self, key: &'t Tensor, value: &'t Tensor) -> AttentionArgs<'t> {
        AttentionArgs {
            query: self.query.view(),
            key: key.view(),
            value: value.view(),
            batch: &self.batch,
            softmax_scale: None,
        }
    }

    fn compress_args<'t>(&'t self, input: &'t Tensor) -> CompressArgs<'t> {
        CompressArgs {
            input: input.view(),
            batch: &self.batch,
            kernel_size: self.point.config.kernel_size,
            kernel_stride: self.point.config.kernel_stride,
            compression: Compression::Mean,
        }
    }

    fn compressed(&self) -> fsa::Result<[Tensor; 2]> {
        let compress = |input| self.engine.compress(&self.compress_args(input));
        Ok([compress(&self.key)?, compress(&self.value)?])
    }

    /// Times `call` unless a comparison failed.
    fn timed(
        &self,
        compared: Vec<Compared>,
        wrong_selections: usize,
        call: impl FnMut() -> fsa::Result<()>,
    ) -> fsa::Result<Measured> {
        let right = wrong_selections == 0 && compared.iter().all(Compared::passed);
        let times = if right { Some(measure(self.budget, call)?) } else { None };
        Ok(Measured { times, compared, wrong_selections })
    }

    fn attention(&self, stage: &AttentionStage<'_>, args: &AttentionArgs<'_>) -> fsa::Result<Measured> {
        let mut result = self.engine.attention(stage, args)?;
        if self.point.pass == Pass::Forward {
            let compared = self.sample.attention(stage, args, [result.out.view(), result.lse.view()])?;
            return self.timed(compared, 0, || self.engine.attention_into(stage, args, &mut result.as_output()));
        }
        let sparse = self.sample.grad_out(self.point.dtype, self.query.shape(), 6)?;
        let mut grads = self.engine.attention_backward(stage, args, &result.grad_args(sparse.view()))?;
        let views = [grads.grad_query.view(), grads.grad_key.view(), grads.grad_value.view()];
        let compared = self.sample.attention_backward(stage, args, &sparse.view(), views)?;
        let grad = result.grad_args(self.grad_out.view());
        self.timed(compared, 0, || self.engine.attention_backward_into(stage, args, &grad, &mut grads.as_grads()))
    }

    fn select(&self) -> fsa::Result<Measured> {
        let [key, value] = self.compressed()?;
        let args = SelectArgs { attention: self.args(&key, &value), config: &self.point.config };
        let mut result = self.engine.select(&args)?;
        let outputs = [result.attention.out.view(), result.attention.lse.view()];
        let compared = self.sample.attention(&args.stage(), &args.attention, outputs)?;
        let wrong = self.sample.wrong_selections(&args.attention, args.config, &result.topk_indices.view())?;
        self.timed(compared, wrong, || {
            let topk_indices = &mut result.topk_indices.view_mut();
            self.engine.select_into(&args, &mut result.attention.as_output(), topk_indices)
        })
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

    fn nsa_forward(&self) -> fsa::Result<Measured> {
        let args = self.nsa();
        let (mut out, saved) = self.engine.nsa(&args, true)?.into_parts();
        let saved = saved.ok_or_else(|| fsa::Error::input("saved", "the state that was asked for", "none"))?;
        let lse = saved.lse.each_ref().map(Tensor::view);
        let compared = self.sample.nsa(&args, (&out.view(), lse), saved.topk_indices.view())?;
        let [key, value] = &saved.compressed;
        let attention = self.args(key, value);
        let wrong = self.sample.wrong_selections(&attention, args.config, &saved.topk_indices.view())?;
        self.timed(compared, wrong, || self.engine.nsa_into(&args, &mut out.view_mut(), false).map(drop))
    }

    fn nsa_backward(&self) -> fsa::Result<Measured> {
        let args = self.nsa();
        let (_, saved) = self.engine.nsa(&args, true)?.into_parts();
        let saved = saved.ok_or_else(|| fsa::Error::input("saved", "the state that was asked for", "none"))?;
        let sparse = self.sample.grad_out(self.point.dtype, self.query.shape(), 6)?;
        let mut grads = self.engine.nsa_backward(&args, &saved, &sparse.view())?;
        let views = [&grads.grad_query, &grads.grad_key, &grads.grad_value, &grads.grad_gates].map(Tensor::view);
        let compared = self.sample.nsa_backward(&args, saved.topk_indices.view(), &sparse.view(), views)?;
        let grad_out = self.grad_out.view();
        self.timed(compared, 0, || self.engine.nsa_backward_into(&args, &saved, &grad_out, &mut grads.as_grads()))
    }

    /// Keys and values, one after the other. The result is small enough to be compared whole.
    fn compress(&self) -> fsa::Result<Measured> {
        let calls = [self.compress_args(&self.key), self.compress_args(&self.value)];
        let dtype = self.point.dtype;
        let [mut key, mut value] = self.compressed()?;
        if self.point.pass == Pass::Forward {
            let got = [Array::from_view(&key.view()), Array::from_view(&value.view())];
            let compared = compare(&["key", "value"], [dtype; 2], &got, |a| {
                Ok(calls.iter().map(|call| compress::forward(a, &CompressInputs::new(call))).collect())
            })?;
            return self.timed(compared, 0, || {
                self.engine.compress_into(&calls[0], &mut key.view_mut())?;
                self.engine.compress_into(&calls[1], &mut value.view_mut())
            });
        }
        // Any tensor of the right shape is a gradient.
        let mut grads = [
            self.engine.compress_backward(&calls[0], &key.view())?,
            self.engine.compress_backward(&calls[1], &value.view())?,
        ];
        let got = grads.each_ref().map(|grads| Array::from_view(&grads.grad_input.view()));
        let given = [Array::from_view(&key.view()), Array::from_view(&value.view())];
        let compared = compare(&["grad_key", "grad_value"], [dtype; 2], &got, |a| {
            let backward = |(call, grad)| compress::backward(a, &CompressInputs::new(call), grad).input;
            Ok(calls.iter().zip(&given).map(backward).collect())
        })?;
        self.timed(compared, 0, || {
            let [key_grads, value_grads] = &mut grads;
            self.engine.compress_backward_into(&calls[0], &key.view(), &mut key_grads.as_grads())?;
            self.engine.compress_backward_into(&calls[1], &value.view(), &mut value_grads.as_grads())
        })
    }

    /// The query; the backward is the inverse rotation.
    fn rope(&self) -> fsa::Result<Measured> {
        let (embedding, positions) = (Rope::default(), query_positions(&self.batch));
        let inverse = self.point.pass == Pass::Backward;
        let args = RopeArgs { input: self.query.view(), positions: &positions, rope: &embedding, inverse };
        let mut out = self.engine.rope(&args)?;
        let input = Array::from_view(&args.input);
        let compared = compare(&["out"], [self.point.dtype], &[Array::from_view(&out.view())], |a| {
            Ok(vec![rope::rotate(a, &input, &positions, &embedding, inverse)])
        })?;
        self.timed(compared, 0, || self.engine.rope_into(&args, &mut out.view_mut()))
    }

    fn combine(&self) -> fsa::Result<Measured> {
        // Query, gradient and query again stand for the three branches: the shapes are the same.
        let branches = [self.query.view(), self.grad_out.view(), self.query.view()];
        let args = CombineArgs { gates: self.gates.view(), branches };
        let (inputs, dtype) = (CombineInputs::new(&args), self.point.dtype);
        if self.point.pass == Pass::Forward {
            let mut out = self.engine.combine(&args)?;
            let got = [Array::from_view(&out.view())];
            let compared = compare(&["out"], [dtype], &got, |a| Ok(vec![combine::forward(a, &inputs)]))?;
            return self.timed(compared, 0, || self.engine.combine_into(&args, &mut out.view_mut()));
        }
        let grad_out = self.grad_out.view();
        let mut grads = self.engine.combine_backward(&args, &grad_out)?;
        let given = Array::from_view(&grad_out);
        let compared = {
            let [compressed, selected, window] =
                grads.grad_branches.each_ref().map(|grad| Array::from_view(&grad.view()));
            let got = [Array::from_view(&grads.grad_gates.view()), compressed, selected, window];
            let names = ["grad_gates", "grad_out_compressed", "grad_out_selected", "grad_out_window"];
            compare(&names, [dtype; 4], &got, |a| {
                let grads = combine::backward(a, &inputs, &given);
                Ok([grads.gates].into_iter().chain(grads.branches).collect())
            })?
        };
        self.timed(compared, 0, || self.engine.combine_backward_into(&args, &grad_out, &mut grads.as_grads()))
    }
}
