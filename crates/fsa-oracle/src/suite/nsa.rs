//! Check of the whole operation. The oracle takes the backend's own selection, which is checked by itself.

use super::check::{Check, gradient};
use super::combine::gates;
use super::compress::Parameters;
use super::select::check_ids;
use crate::array::Array;
use crate::attention::AttentionInputs;
use crate::buffer::Buffer;
use crate::case::{Case, ViewLayout};
use crate::inputs::{AttentionData, Stream};
use crate::nsa::{self, NsaInputs};
use fsa_core::{
    Backend, CompressionGrads, DType, Error, NsaArgs, NsaGrads, NsaSaved, Result, Rope, Tensor, TensorView,
};

struct NsaData {
    case: Case,
    attention: AttentionData,
    gates: Buffer,
    keys: Parameters,
    values: Parameters,
    rope: Option<Rope>,
}

impl NsaData {
    fn new(case: &Case) -> Result<Self> {
        let attention = AttentionData::new(case)?;
        let keys = [Stream::KeyWeight, Stream::KeyPosition];
        let values = [Stream::ValueWeight, Stream::ValuePosition];
        Ok(Self {
            gates: gates(case, attention.batch.total_q()),
            keys: Parameters::new(case, case.key_compression, case.head_dim, keys),
            values: Parameters::new(case, case.value_compression, case.value_dim, values),
            rope: case.rope.rope(),
            attention,
            case: case.clone(),
        })
    }

    fn args(&self) -> Result<NsaArgs<'_>> {
        Ok(NsaArgs {
            query: self.attention.query.view()?,
            key: self.attention.key.view()?,
            value: self.attention.value.view()?,
            gates: self.gates.view()?,
            batch: &self.attention.batch,
            config: &self.case.config,
            key_compression: self.keys.compression()?,
            value_compression: self.values.compression()?,
            rope: self.rope.as_ref(),
            softmax_scale: self.case.softmax_scale,
        })
    }

    /// A tensor of a backend as a buffer, so that it is compared like an output.
    fn ids(&self, tensor: Option<&Tensor>) -> Result<Buffer> {
        let tensor = tensor.ok_or_else(|| Error::input("topk_indices", "the selection of the forward", "none"))?;
        let shape = [self.case.num_kv_heads, self.attention.batch.total_q(), self.case.config.topk];
        if tensor.shape() != shape || tensor.dtype() != DType::I32 {
            let got = format!("{} {:?}", tensor.dtype(), tensor.shape());
            return Err(Error::input("topk_indices", format!("i32 {shape:?}"), got));
        }
        Ok(Buffer::from_f64("topk_indices", DType::I32, &shape, ViewLayout::Contiguous, tensor.view().to_f64()))
    }

    /// `out` and the selection, and the saved state if it is asked for.
    fn call(&self, backend: &dyn Backend, save: bool) -> Result<(Vec<Buffer>, Option<NsaSaved>)> {
        let shape = [self.attention.batch.total_q(), self.case.num_q_heads, self.case.value_dim];
        let mut out = Buffer::poisoned("out", self.case.dtype, &shape, self.case.layout);
        let forward = backend.nsa(&self.args()?, &mut out.view_mut()?, save)?;
        let ids = self.ids(forward.topk_indices())?;
        Ok((vec![out, ids], forward.saved))
    }

    fn saved(&self, backend: &dyn Backend) -> Result<(Vec<Buffer>, NsaSaved)> {
        let (outputs, saved) = self.call(backend, true)?;
        let saved = saved.ok_or_else(|| Error::input("saved", "the state that was asked for", "none"))?;
        Ok((outputs, saved))
    }
}

/// The selection is judged on the compressed keys that the backend made it from: rounding a key to bf16 moves a score
/// by far more than f32 sums do.
fn selected_from<'d>(data: &'d NsaData, saved: &NsaSaved) -> Result<AttentionInputs<'d>> {
    let mut inputs = AttentionInputs::new(&data.args()?.attention());
    if let Some([query, _]) = &saved.rotated {
        inputs.query = Array::from_view(&query.view());
    }
    inputs.key = Array::from_view(&saved.compressed[0].view());
    inputs.value = Array::from_view(&saved.compressed[1].view());
    Ok(inputs)
}

pub(super) fn forward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = NsaData::new(case)?;
    let outputs = check.run(|| Ok(data.call(backend, false)?.0))?;
    let (again, saved) = data.saved(backend)?;
    for (a, b) in outputs.iter().zip(&again) {
        check.same_bits("a call that saves the state", a, b)?;
    }
    let topk_indices = outputs[1].view()?;
    check_ids(check, &selected_from(&data, &saved)?, &case.config, &topk_indices)?;
    let inputs = NsaInputs::new(&data.args()?);
    check.try_compare(&outputs[..1], |a| {
        let prepared = nsa::prepare(a, &inputs);
        Ok(vec![nsa::forward(a, &inputs, &prepared, topk_indices)?.out])
    })
}

fn call_backward(
    backend: &dyn Backend,
    data: &NsaData,
    saved: &NsaSaved,
    grad_out: &TensorView<'_>,
) -> Result<Vec<Buffer>> {
    let case = &data.case;
    let mut query = gradient(case, "grad_query", &data.attention.query);
    let mut key = gradient(case, "grad_key", &data.attention.key);
    let mut value = gradient(case, "grad_value", &data.attention.value);
    let mut gates = gradient(case, "grad_gates", &data.gates);
    let parameter = |name, like: &Option<Buffer>| like.as_ref().map(|like| gradient(case, name, like));
    let mut parameters = [
        parameter("key_compression.grad_weight", &data.keys.weight),
        parameter("key_compression.grad_position", &data.keys.position),
        parameter("value_compression.grad_weight", &data.values.weight),
        parameter("value_compression.grad_position", &data.values.position),
    ];
    let [key_weight, key_position, value_weight, value_position] = &mut parameters;
    fn view(buffer: &mut Option<Buffer>) -> Result<Option<fsa_core::TensorViewMut<'_>>> {
        buffer.as_mut().map(Buffer::view_mut).transpose()
    }
    let mut grads = NsaGrads {
        grad_query: query.view_mut()?,
        grad_key: key.view_mut()?,
        grad_value: value.view_mut()?,
        grad_gates: gates.view_mut()?,
        key_compression: CompressionGrads { grad_weight: view(key_weight)?, grad_position: view(key_position)? },
        value_compression: CompressionGrads { grad_weight: view(value_weight)?, grad_position: view(value_position)? },
    };
    backend.nsa_backward(&data.args()?, saved, grad_out, &mut grads)?;
    Ok([query, key, value, gates].into_iter().chain(parameters.into_iter().flatten()).collect())
}

pub(super) fn backward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = NsaData::new(case)?;
    let (_, saved) = data.saved(backend)?;
    let grad_out = data.attention.grad_out.view()?;
    let outputs = check.run(|| call_backward(backend, &data, &saved, &grad_out))?;
    let inputs = NsaInputs::new(&data.args()?);
    let grad_out = Array::from_view(&grad_out);
    check.try_compare(&outputs, |a| {
        let prepared = nsa::prepare(a, &inputs);
        let result = nsa::forward(a, &inputs, &prepared, saved.topk_indices.view())?;
        Ok(nsa::backward(a, &inputs, &prepared, &result, &grad_out).into_vec())
    })
}
