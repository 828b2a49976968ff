//! Forward and backward of each operation of `fsa attend`.

use super::inputs::Inputs;
use super::{Flags, Produced, StageFlag};
use crate::failure::{Failure, Outcome};
use crate::progress::Progress;
use fsa::{
    AttentionArgs, AttentionGradArgs, AttentionGradTensors, AttentionResult, AttentionStage, CompressArgs, Engine,
    Error, NsaArgs, NsaConfig, Rope, RopeArgs, SelectArgs, Tensor, compressed_positions, kv_positions, query_positions,
};
use std::time::Instant;

/// One run of the command.
pub struct Call<'a> {
    pub engine: Engine,
    pub flags: &'a Flags,
    pub config: &'a NsaConfig,
    pub rope: Option<&'a Rope>,
    pub inputs: &'a Inputs,
    pub progress: &'a Progress,
}

/// Names of the branches in the output file, in the order of the gates.
const BRANCHES: [&str; 3] = ["compressed", "selected", "window"];

/// Calls the parameters of a compression by the names that they have in the file.
fn file_names(error: Error) -> Failure {
    let Error::Input(mut input) = error else { return Failure::Library(error) };
    input.argument = input.argument.replace("_compression.", "_");
    Failure::Library(Error::Input(input))
}

/// Puts `key` or `value` before what an error of a single compression names.
fn prefixed(prefix: &str) -> impl Fn(Error) -> Failure {
    move |error| {
        let Error::Input(mut input) = error else { return Failure::Library(error) };
        match input.argument.as_str() {
            "input" => input.argument = prefix.to_string(),
            "weight" | "position" => input.argument = format!("{prefix}_{}", input.argument),
            _ => {}
        }
        Failure::Library(Error::Input(input))
    }
}

fn elapsed_ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

impl Call<'_> {
    /// Runs the chosen operation.
    pub fn run(&self) -> Outcome<Produced> {
        match self.flags.stage {
            StageFlag::Nsa => self.nsa(),
            StageFlag::Compressed => self.compressed(),
            StageFlag::Dense => self.attention(&AttentionStage::Dense),
            StageFlag::Window => self.attention(&AttentionStage::Window { window_size: self.config.window_size }),
            StageFlag::Selected => {
                let Some(topk_indices) = &self.inputs.topk_indices else {
                    return Err(Failure::misuse("topk_indices", "a tensor of that name", "none"));
                };
                self.attention(&AttentionStage::Selected {
                    topk_indices: topk_indices.view(),
                    block_size: self.config.block_size,
                    validate: self.flags.validate,
                })
            }
        }
    }

    fn nsa(&self) -> Outcome<Produced> {
        let inputs = self.inputs;
        let Some(gates) = &inputs.gates else {
            return Err(Failure::misuse("gates", "a tensor of that name", "none"));
        };
        let args = NsaArgs {
            query: inputs.query.view(),
            key: inputs.key.view(),
            value: inputs.value.view(),
            gates: gates.view(),
            batch: &inputs.batch,
            config: self.config,
            key_compression: inputs.key_parameters.compression(),
            value_compression: inputs.value_parameters.compression(),
            rope: self.rope,
            softmax_scale: self.flags.softmax_scale,
        };
        let start = Instant::now();
        let result = self.progress.step("nsa", || self.engine.nsa(&args, true)).map_err(file_names)?;
        let mut produced = Produced { forward_ms: elapsed_ms(start), ..Produced::default() };
        let (out, saved) = result.into_parts();
        produced.add("out", out);
        let Some(saved) = saved else { return Ok(produced) };
        if let Some(grad_out) = &inputs.grad_out {
            let start = Instant::now();
            let backward = || self.engine.nsa_backward(&args, &saved, &grad_out.view());
            let grads = self.progress.step("nsa backward", backward).map_err(file_names)?;
            produced.backward_ms = Some(elapsed_ms(start));
            produced.add("grad_query", grads.grad_query);
            produced.add("grad_key", grads.grad_key);
            produced.add("grad_value", grads.grad_value);
            produced.add("grad_gates", grads.grad_gates);
            produced.add_optional("grad_key_weight", grads.key_compression.grad_weight);
            produced.add_optional("grad_key_position", grads.key_compression.grad_position);
            produced.add_optional("grad_value_weight", grads.value_compression.grad_weight);
            produced.add_optional("grad_value_position", grads.value_compression.grad_position);
        }
        for (name, lse) in BRANCHES.iter().zip(saved.lse) {
            produced.add(format!("lse_{name}"), lse);
        }
        if self.flags.branches {
            for (name, out) in BRANCHES.iter().zip(saved.branches) {
                produced.add(format!("out_{name}"), out);
            }
        }
        produced.add("topk_indices", saved.topk_indices);
        Ok(produced)
    }

    /// Dense, window and selected attention, on rotated query and key where there is an embedding.
    fn attention(&self, stage: &AttentionStage<'_>) -> Outcome<Produced> {
        let inputs = self.inputs;
        let name = stage.stage().name();
        let (rows, keys) = (query_positions(&inputs.batch), kv_positions(&inputs.batch));
        // The shapes are checked before the rotation, so that an error names the tensor of the file.
        self.args(&inputs.query, &inputs.key, &inputs.value).shape(stage)?;
        let start = Instant::now();
        let query = self.rotated(&inputs.query, &rows, false)?;
        let key = self.rotated(&inputs.key, &keys, false)?;
        let (query, key) = (query.as_ref().unwrap_or(&inputs.query), key.as_ref().unwrap_or(&inputs.key));
        let args = self.args(query, key, &inputs.value);
        let result = self.progress.step(name, || self.engine.attention(stage, &args))?;
        let mut produced = Produced { forward_ms: elapsed_ms(start), ..Produced::default() };
        if let Some(grad_out) = &inputs.grad_out {
            let start = Instant::now();
            let grads = self.attention_backward(stage, &args, &result, grad_out)?;
            let grad_query = self.rotated(&grads.grad_query, &rows, true)?;
            let grad_key = self.rotated(&grads.grad_key, &keys, true)?;
            produced.backward_ms = Some(elapsed_ms(start));
            produced.add("grad_query", grad_query.unwrap_or(grads.grad_query));
            produced.add("grad_key", grad_key.unwrap_or(grads.grad_key));
            produced.add("grad_value", grads.grad_value);
        }
        produced.add("out", result.out);
        produced.add("lse", result.lse);
        Ok(produced)
    }

    /// Compression, attention to the compressed keys, and the selection.
    fn compressed(&self) -> Outcome<Produced> {
        let inputs = self.inputs;
        let (kernel_size, kernel_stride) = (self.config.kernel_size, self.config.kernel_stride);
        let rows = query_positions(&inputs.batch);
        let windows = compressed_positions(&inputs.batch, kernel_size, kernel_stride);
        self.args(&inputs.query, &inputs.key, &inputs.value).shape(&AttentionStage::Dense)?;
        let start = Instant::now();
        let key = self.engine.compress(&self.compress_key()).map_err(prefixed("key"))?;
        let value = self.engine.compress(&self.compress_value()).map_err(prefixed("value"))?;
        let query = self.rotated(&inputs.query, &rows, false)?;
        let key = self.rotated(&key, &windows, false)?.unwrap_or(key);
        let query = query.as_ref().unwrap_or(&inputs.query);
        let select = SelectArgs { attention: self.args(query, &key, &value), config: self.config };
        let result = self.progress.step("compressed", || self.engine.select(&select))?;
        let mut produced = Produced { forward_ms: elapsed_ms(start), ..Produced::default() };
        if let Some(grad_out) = &inputs.grad_out {
            let start = Instant::now();
            let grads = self.attention_backward(&select.stage(), &select.attention, &result.attention, grad_out)?;
            let grad_query = self.rotated(&grads.grad_query, &rows, true)?.unwrap_or(grads.grad_query);
            let grad_key = self.rotated(&grads.grad_key, &windows, true)?.unwrap_or(grads.grad_key);
            produced.add("grad_query", grad_query);
            let parts = [("key", self.compress_key(), grad_key), ("value", self.compress_value(), grads.grad_value)];
            for (name, args, grad) in parts {
                let grads = self.engine.compress_backward(&args, &grad.view()).map_err(prefixed(name))?;
                produced.add(format!("grad_{name}"), grads.grad_input);
                produced.add_optional(&format!("grad_{name}_weight"), grads.grad_weight);
                produced.add_optional(&format!("grad_{name}_position"), grads.grad_position);
            }
            produced.backward_ms = Some(elapsed_ms(start));
        }
        produced.add("out", result.attention.out);
        produced.add("lse", result.attention.lse);
        produced.add("topk_indices", result.topk_indices);
        produced.add("key_compressed", key);
        produced.add("value_compressed", value);
        Ok(produced)
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        result: &AttentionResult,
        grad_out: &Tensor,
    ) -> Outcome<AttentionGradTensors> {
        let grad_lse = self.inputs.grad_lse.as_ref().map(Tensor::view);
        let grad = AttentionGradArgs { grad_lse, ..result.grad_args(grad_out.view()) };
        let what = format!("{} backward", stage.stage());
        Ok(self.progress.step(what, || self.engine.attention_backward(stage, args, &grad))?)
    }

    fn args<'t>(&'t self, query: &'t Tensor, key: &'t Tensor, value: &'t Tensor) -> AttentionArgs<'t> {
        AttentionArgs {
            query: query.view(),
            key: key.view(),
            value: value.view(),
            batch: &self.inputs.batch,
            softmax_scale: self.flags.softmax_scale,
        }
    }

    fn compress_key(&self) -> CompressArgs<'_> {
        self.compress(&self.inputs.key, self.inputs.key_parameters.compression())
    }

    fn compress_value(&self) -> CompressArgs<'_> {
        self.compress(&self.inputs.value, self.inputs.value_parameters.compression())
    }

    fn compress<'t>(&'t self, input: &'t Tensor, compression: fsa::Compression<'t>) -> CompressArgs<'t> {
        CompressArgs {
            input: input.view(),
            batch: &self.inputs.batch,
            kernel_size: self.config.kernel_size,
            kernel_stride: self.config.kernel_stride,
            compression,
        }
    }

    /// `tensor` rotated at `positions`, or `None` without an embedding.
    fn rotated(&self, tensor: &Tensor, positions: &[usize], inverse: bool) -> Outcome<Option<Tensor>> {
        let Some(rope) = self.rope else { return Ok(None) };
        Ok(Some(self.engine.rope(&RopeArgs { input: tensor.view(), positions, rope, inverse })?))
    }
}
