//! Checks of the attention stages `dense`, `window`, `compressed`, `selected`.

use super::check::{Check, gradient};
use crate::array::Array;
use crate::attention::{self, AttentionInputs};
use crate::buffer::Buffer;
use crate::case::Case;
use crate::inputs::AttentionData;
use fsa_core::{AttentionGradArgs, AttentionGrads, AttentionOutput, Backend, DType, Result};

/// Poisoned `out` and `lse` of a case.
pub(super) fn outputs(case: &Case, total_q: usize) -> [Buffer; 2] {
    let shape = [total_q, case.num_q_heads, case.value_dim];
    [
        Buffer::poisoned("out", case.dtype, &shape, case.layout),
        Buffer::poisoned("lse", DType::F32, &[case.num_q_heads, total_q], case.layout),
    ]
}

fn call_forward(backend: &dyn Backend, data: &AttentionData) -> Result<Vec<Buffer>> {
    let [mut out, mut lse] = outputs(&data.case, data.batch.total_q());
    let mut output = AttentionOutput { out: out.view_mut()?, lse: lse.view_mut()? };
    backend.attention(&data.stage()?, &data.args()?, &mut output)?;
    Ok(vec![out, lse])
}

pub(super) fn forward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = AttentionData::new(case)?;
    let outputs = check.run(|| call_forward(backend, &data))?;
    let inputs = AttentionInputs::new(&data.args()?);
    let visible = attention::visible(&data.stage()?, &data.batch)?;
    check.compare(&outputs, |a| {
        let forward = attention::forward(a, &inputs, &*visible);
        vec![forward.out, forward.lse]
    })
}

fn call_backward(backend: &dyn Backend, data: &AttentionData, forward: &[Buffer]) -> Result<Vec<Buffer>> {
    let mut query = gradient(&data.case, "grad_query", &data.query);
    let mut key = gradient(&data.case, "grad_key", &data.key);
    let mut value = gradient(&data.case, "grad_value", &data.value);
    let mut grads =
        AttentionGrads { grad_query: query.view_mut()?, grad_key: key.view_mut()?, grad_value: value.view_mut()? };
    let grad = AttentionGradArgs {
        out: forward[0].view()?,
        lse: forward[1].view()?,
        grad_out: data.grad_out.view()?,
        grad_lse: data.grad_lse.as_ref().map(Buffer::view).transpose()?,
    };
    backend.attention_backward(&data.stage()?, &data.args()?, &grad, &mut grads)?;
    Ok(vec![query, key, value])
}

pub(super) fn backward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = AttentionData::new(case)?;
    let own = check.run(|| call_forward(backend, &data))?;
    let outputs = check.run(|| call_backward(backend, &data, &own))?;
    let inputs = AttentionInputs::new(&data.args()?);
    let visible = attention::visible(&data.stage()?, &data.batch)?;
    let grad_out = Array::from_view(&data.grad_out.view()?);
    let grad_lse = data.grad_lse.as_ref().map(Buffer::view).transpose()?.map(|view| Array::from_view(&view));
    check.compare(&outputs, |a| {
        let forward = attention::forward(a, &inputs, &*visible);
        let grads = attention::backward(a, &inputs, &forward, &grad_out, grad_lse.as_ref());
        vec![grads.query, grads.key, grads.value]
    })
}
