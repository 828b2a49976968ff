//! A backend of plain loops in the dtype: the baseline of the tolerance rule as something that can be called.
//!
//! It shows the suite to be passable, carries the deliberately broken stages of the suite's own tests, and is the
//! shortest complete implementation of [`Backend`] to read.

use crate::arithmetic::{Arithmetic, Noisy, Rounded};
use crate::array::{Array, round_to};
use crate::attention::{self, AttentionForward, AttentionInputs};
use crate::combine::{self, CombineInputs};
use crate::compress::{self, CompressInputs};
use crate::nsa::{self, NsaInputs, Prepared};
use crate::{rope, select};
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionStage, Backend, CombineArgs,
    CombineGrads, CompressArgs, CompressGrads, DType, Element, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result,
    RopeArgs, SelectArgs, TensorView, TensorViewMut, bf16, f16,
};

/// Plain loops in an arithmetic.
#[derive(Debug, Clone, Copy)]
pub struct NaiveBackend {
    arithmetic: fn(DType) -> Box<dyn Arithmetic>,
}

impl Default for NaiveBackend {
    /// Every intermediate tensor rounded to the dtype of the call.
    fn default() -> Self {
        Self { arithmetic: |dtype| Box::new(Rounded(dtype)) }
    }
}

impl NaiveBackend {
    /// What a good backend does: f32 throughout, only the tensors of the interface in the dtype, and sums in an order
    /// of its own. Random errors stand for it, half as large as those of the baseline: a sum in several lanes or
    /// tiles errs less than one from first to last.
    pub fn reordered() -> Self {
        Self { arithmetic: |_| Box::new(Noisy::with_size(DType::F32, 0x0de5, 0.5)) }
    }

    fn arithmetic(&self, dtype: DType) -> Box<dyn Arithmetic> {
        (self.arithmetic)(dtype)
    }

    /// Compressed and rotated tensors as they are saved: in the dtype.
    fn prepare<'a>(&self, a: &dyn Arithmetic, inputs: &NsaInputs<'a>, dtype: DType) -> Prepared<'a> {
        let mut prepared = nsa::prepare(a, inputs);
        for branch in [&mut prepared.compressed, &mut prepared.tokens] {
            for array in [&mut branch.query, &mut branch.key, &mut branch.value] {
                array.data_mut().iter_mut().for_each(|v| *v = round_to(dtype, *v));
            }
        }
        prepared
    }
}

/// Rounds `array` into `target`.
pub fn write(target: &mut TensorViewMut<'_>, array: &Array) -> Result<()> {
    fn put<T: Element>(target: &mut TensorViewMut<'_>, array: &Array) -> Result<()> {
        let mut typed = target.typed::<T>("output")?;
        let shape = array.shape();
        if shape.contains(&0) {
            return Ok(());
        }
        let rows = shape[..shape.len() - 1].iter().product();
        for row in 0..rows {
            let index = crate::buffer::unravel(row, &shape[..shape.len() - 1]);
            let values: Vec<f32> = array.row(&index).iter().map(|v| *v as f32).collect();
            typed.store_row(&index, &values);
        }
        Ok(())
    }
    match target.dtype() {
        DType::F32 => put::<f32>(target, array),
        DType::Bf16 => put::<bf16>(target, array),
        DType::F16 => put::<f16>(target, array),
        DType::I32 => put::<i32>(target, array),
    }
}

fn write_optional(target: &mut Option<TensorViewMut<'_>>, array: &Option<Array>) -> Result<()> {
    match (target, array) {
        (Some(target), Some(array)) => write(target, array),
        _ => Ok(()),
    }
}

/// The forward that a backward is given, in the form that the plain loops take.
fn given_forward(mut forward: AttentionForward, out: &TensorView<'_>, lse: &TensorView<'_>) -> AttentionForward {
    forward.out = Array::from_view(out);
    forward.lse = Array::from_view(lse);
    let (total_q, heads) = (forward.out.shape()[0], forward.out.shape()[1]);
    for head in 0..heads {
        for row in 0..total_q {
            let given = &mut forward.rows[head * total_q + row];
            given.out = forward.out.row(&[row, head]).to_vec();
            given.lse = forward.lse.at(&[head, row]);
        }
    }
    forward
}

impl Backend for NaiveBackend {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn attention(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        output: &mut AttentionOutput<'_>,
    ) -> Result<()> {
        let shape = args.shape(stage)?;
        output.validate(&shape)?;
        let visible = attention::visible(stage, args.batch)?;
        let forward = attention::forward(&*self.arithmetic(shape.dtype), &AttentionInputs::new(args), &*visible);
        write(&mut output.out, &forward.out)?;
        write(&mut output.lse, &forward.lse)
    }

    fn attention_backward(
        &self,
        stage: &AttentionStage<'_>,
        args: &AttentionArgs<'_>,
        grad: &AttentionGradArgs<'_>,
        grads: &mut AttentionGrads<'_>,
    ) -> Result<()> {
        let shape = args.shape(stage)?;
        grad.validate(&shape)?;
        grads.validate(&shape)?;
        let (a, inputs) = (self.arithmetic(shape.dtype), AttentionInputs::new(args));
        let visible = attention::visible(stage, args.batch)?;
        let forward = given_forward(attention::forward(&*a, &inputs, &*visible), &grad.out, &grad.lse);
        let grad_lse = grad.grad_lse.as_ref().map(Array::from_view);
        let grad_out = Array::from_view(&grad.grad_out);
        let result = attention::backward(&*a, &inputs, &forward, &grad_out, grad_lse.as_ref());
        write(&mut grads.grad_query, &result.query)?;
        write(&mut grads.grad_key, &result.key)?;
        write(&mut grads.grad_value, &result.value)
    }

    fn select(
        &self,
        args: &SelectArgs<'_>,
        output: &mut AttentionOutput<'_>,
        topk_indices: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        let shape = args.shape(topk_indices)?;
        output.validate(&shape)?;
        // Softmax state and scores are f32 whatever the dtype: rounded probabilities would choose other blocks.
        let inputs = AttentionInputs::new(&args.attention);
        let selection = select::forward(&*self.arithmetic(DType::F32), &inputs, args.config)?;
        self.attention(&args.stage(), &args.attention, output)?;
        let ids = selection.tensor(shape.num_kv_heads, shape.total_q, args.config.topk)?;
        write(topk_indices, &Array::from_view(&ids.view()))
    }

    fn compress(&self, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        args.shape_with_output(out)?;
        write(out, &compress::forward(&*self.arithmetic(args.input.dtype()), &CompressInputs::new(args)))
    }

    fn compress_backward(
        &self,
        args: &CompressArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CompressGrads<'_>,
    ) -> Result<()> {
        grads.validate(args, grad_out)?;
        let a = self.arithmetic(args.input.dtype());
        let result = compress::backward(&*a, &CompressInputs::new(args), &Array::from_view(grad_out));
        write(&mut grads.grad_input, &result.input)?;
        write_optional(&mut grads.grad_weight, &result.weight)?;
        write_optional(&mut grads.grad_position, &result.position)
    }

    fn rope(&self, args: &RopeArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        args.shape(out)?;
        let (a, input) = (self.arithmetic(args.input.dtype()), Array::from_view(&args.input));
        write(out, &rope::rotate(&*a, &input, args.positions, args.rope, args.inverse))
    }

    fn combine(&self, args: &CombineArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
        args.shape_with_output(out)?;
        write(out, &combine::forward(&*self.arithmetic(args.gates.dtype()), &CombineInputs::new(args)))
    }

    fn combine_backward(
        &self,
        args: &CombineArgs<'_>,
        grad_out: &TensorView<'_>,
        grads: &mut CombineGrads<'_>,
    ) -> Result<()> {
        grads.validate(args, grad_out)?;
        let a = self.arithmetic(args.gates.dtype());
        let result = combine::backward(&*a, &CombineInputs::new(args), &Array::from_view(grad_out));
        write(&mut grads.grad_gates, &result.gates)?;
        grads.grad_branches.iter_mut().zip(&result.branches).try_for_each(|(target, branch)| write(target, branch))
    }

    fn nsa(&self, args: &NsaArgs<'_>, out: &mut TensorViewMut<'_>, save: bool) -> Result<NsaForward> {
        let dtype = args.shape_with_output(out)?.dtype;
        let (a, inputs) = (self.arithmetic(dtype), NsaInputs::new(args));
        let prepared = self.prepare(&*a, &inputs, dtype);
        let topk_indices = nsa::selection(&*self.arithmetic(DType::F32), &inputs, &prepared)?;
        let result = nsa::forward(&*a, &inputs, &prepared, topk_indices.view())?;
        write(out, &result.out)?;
        if !save {
            return Ok(NsaForward { topk_indices: Some(topk_indices), saved: None });
        }
        let [c, s, w] = &result.branches;
        let tensor = |array: &Array, dtype| array.to_tensor("saved", dtype);
        let rotated = match args.rope {
            Some(_) => Some([tensor(&prepared.tokens.query, dtype)?, tensor(&prepared.tokens.key, dtype)?]),
            None => None,
        };
        let saved = NsaSaved {
            rotated,
            compressed: [tensor(&prepared.compressed.key, dtype)?, tensor(&prepared.compressed.value, dtype)?],
            branches: [tensor(&c.out, dtype)?, tensor(&s.out, dtype)?, tensor(&w.out, dtype)?],
            lse: [tensor(&c.lse, DType::F32)?, tensor(&s.lse, DType::F32)?, tensor(&w.lse, DType::F32)?],
            topk_indices,
        };
        Ok(NsaForward { topk_indices: None, saved: Some(saved) })
    }

    fn nsa_backward(
        &self,
        args: &NsaArgs<'_>,
        saved: &NsaSaved,
        grad_out: &TensorView<'_>,
        grads: &mut NsaGrads<'_>,
    ) -> Result<()> {
        let dtype = grads.validate(args, saved, grad_out)?.dtype;
        let (a, inputs) = (self.arithmetic(dtype), NsaInputs::new(args));
        let prepared = self.prepare(&*a, &inputs, dtype);
        let result = nsa::forward(&*a, &inputs, &prepared, saved.topk_indices.view())?;
        let result = nsa::backward(&*a, &inputs, &prepared, &result, &Array::from_view(grad_out));
        write(&mut grads.grad_query, &result.query)?;
        write(&mut grads.grad_key, &result.key)?;
        write(&mut grads.grad_value, &result.value)?;
        write(&mut grads.grad_gates, &result.gates)?;
        let [key_weight, key_position] = &result.key_compression;
        let [value_weight, value_position] = &result.value_compression;
        write_optional(&mut grads.key_compression.grad_weight, key_weight)?;
        write_optional(&mut grads.key_compression.grad_position, key_position)?;
        write_optional(&mut grads.value_compression.grad_weight, value_weight)?;
        write_optional(&mut grads.value_compression.grad_position, value_position)
    }

    /// Everything widened, and every logit kept: this backend is not for long sequences.
    fn workspace_bytes(&self, args: &NsaArgs<'_>) -> Result<usize> {
        let shape = args.shape()?;
        let widened = shape.total_q * shape.num_q_heads * (shape.head_dim + shape.value_dim)
            + shape.total_keys * shape.num_kv_heads * (shape.head_dim + shape.value_dim);
        let logits = shape.num_q_heads * args.batch.max_kv_len() * shape.total_q;
        Ok(8 * (4 * widened + 6 * logits))
    }
}
