//! What the results of a measurement are compared with: the oracle on sampled rows of sampled heads.

use super::super::definition::Point;
use super::super::work::SAMPLED_ROWS;
use super::inputs::{Inputs, heads, sampled_heads};
use crate::sampled::{Compared, Sample};
use fsa::Tensor;
use fsa_oracle::Pass;

/// Inputs, and the sample of the results.
#[derive(Debug)]
pub struct Reference {
    /// Inputs of the call.
    pub inputs: Inputs,
    /// For a backward: a gradient that is zero outside of the sample.
    pub grad_out: Option<Tensor>,
    sample: Sample,
}

impl Reference {
    /// Inputs of `point`, and the sample.
    pub fn new(point: &Point) -> fsa::Result<Self> {
        let inputs = Inputs::new(point)?;
        let sample = Sample::new(&inputs.batch, SAMPLED_ROWS, 1)?;
        let grad_out = match point.pass {
            Pass::Forward => None,
            Pass::Backward => Some(sample.grad_out(point.dtype, inputs.query.shape(), 6)?),
        };
        Ok(Self { inputs, grad_out, sample })
    }

    /// Compares `out` and `lse`, or the gradients of query, key and value for [`Reference::grad_out`], on the first and
    /// the last kv head with their query heads.
    pub fn compare(&self, results: &[Tensor]) -> fsa::Result<Vec<Compared>> {
        let mut compared = Vec::new();
        for kv_head in sampled_heads(self.inputs.key.shape()[1]) {
            let named = |c: Compared| Compared { tensor: format!("{} of kv head {kv_head}", c.tensor), ..c };
            compared.extend(self.compare_head(kv_head, results)?.into_iter().map(named));
        }
        Ok(compared)
    }

    fn compare_head(&self, kv_head: usize, results: &[Tensor]) -> fsa::Result<Vec<Compared>> {
        let (stage, args) = self.inputs.of_head(kv_head)?;
        let (group, own) = (self.inputs.group(kv_head), kv_head..kv_head + 1);
        match (results, &self.grad_out) {
            ([out, lse], None) => {
                let lse = lse.view().slice_axis("lse", 0, group.clone())?;
                self.sample.attention(&stage, &args, [heads(out, group)?, lse])
            }
            ([query, key, value], Some(grad_out)) => {
                let grads = [heads(query, group.clone())?, heads(key, own.clone())?, heads(value, own)?];
                self.sample.attention_backward(&stage, &args, &heads(grad_out, group)?, grads)
            }
            _ => Err(fsa::Error::input("results", "those of the pass", format!("{} tensors", results.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsa::{AttentionArgs, DType, Engine, NsaConfig, Selection, Stage};

    fn point(pass: Pass) -> Point {
        Point {
            definition: "test".into(),
            stage: Stage::Selected,
            pass,
            dtype: DType::Bf16,
            tokens: 500,
            num_q_heads: 6,
            num_kv_heads: 3,
            head_dim: 16,
            config: NsaConfig { block_size: 16, topk: 4, ..NsaConfig::default() },
        }
    }

    /// What the CPU computes of a point.
    fn results(reference: &Reference) -> Vec<Tensor> {
        let (engine, inputs) = (Engine::cpu().expect("starts"), &reference.inputs);
        let args = AttentionArgs {
            query: inputs.query.view(),
            key: inputs.key.view(),
            value: inputs.value.view(),
            batch: &inputs.batch,
            softmax_scale: None,
        };
        let topk_indices = inputs.topk_indices.as_ref().expect("of stage selected").view();
        let selection = Selection { topk_indices, block_size: 16, validate: true };
        let forward = engine.selected(&args, &selection).expect("valid");
        match &reference.grad_out {
            None => vec![forward.out, forward.lse],
            Some(grad_out) => {
                let grad = forward.grad_args(grad_out.view());
                let grads = engine.selected_backward(&args, &selection, &grad).expect("valid");
                vec![grads.grad_query, grads.grad_key, grads.grad_value]
            }
        }
    }

    #[test]
    fn right_results_pass_and_those_of_other_heads_do_not() {
        for pass in Pass::ALL {
            let reference = Reference::new(&point(*pass)).expect("valid");
            let mut results = results(&reference);
            let compared = reference.compare(&results).expect("compares");
            assert_eq!(compared.len(), 2 * results.len(), "two heads");
            assert!(compared.iter().all(Compared::passed), "{compared:#?}");
            // Heads in the wrong order, in a single tensor.
            let tensor = results[0].view().to_f64();
            let values: Vec<f32> = tensor.chunks(16).rev().flatten().map(|value| *value as f32).collect();
            results[0] = Tensor::from_f32("tensor", &values, DType::Bf16, &[500, 6, 16]).expect("shape");
            let failed = reference.compare(&results).expect("compares").iter().filter(|c| !c.passed()).count();
            assert_eq!(failed, 2, "that tensor, for both heads");
        }
    }
}
