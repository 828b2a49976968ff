//! Stage `dense`, Stage `window`, Stage `compressed` and Stage `selected`.

use super::super::definition::Point;
use super::inputs::Inputs;
use super::reference::Reference;
use super::{Checked, Operation, Planned, Setup};
use crate::random::normal_tensor;
use fsa::DType;
use fsa::cuda::driver::{DeviceBuffer, DeviceSpan, UploadedBatch};
use fsa::cuda::plan::{BandProblem, Keys};
use fsa::cuda::selected::{BackwardTensors, ForwardTensors, SelectedBackward, SelectedForward};
use fsa::cuda::stages::{AttentionGradTensors, AttentionTensors, BandBackward, BandForward};

/// Device memory of a forward.
pub struct Buffers {
    pub batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    pub out: DeviceBuffer,
    pub lse: DeviceBuffer,
}

impl Buffers {
    /// The inputs, copied, and memory for what the call writes. Keys and values have room for `total_keys` rows.
    pub fn new(setup: &Setup<'_>, inputs: &Inputs, total_keys: usize) -> fsa::Result<Self> {
        let room = setup.kv_shape(total_keys).iter().product::<usize>() * setup.sizes.dtype.size_bytes();
        Ok(Self {
            batch: UploadedBatch::new(setup.kernels.device(), &inputs.batch, &setup.stream)?,
            query: setup.upload("query", &inputs.query)?,
            key: setup.upload_with_room("key", &inputs.key, room)?,
            value: setup.upload_with_room("value", &inputs.value, room)?,
            out: setup.memory("out", inputs.query.size_bytes())?,
            lse: setup.memory("lse", setup.lse_bytes())?,
        })
    }

    pub fn tensors(&self, setup: &Setup<'_>) -> AttentionTensors<'_> {
        AttentionTensors {
            query: setup.of_q(&self.query),
            key: setup.of_kv(&self.key),
            value: setup.of_kv(&self.value),
            out: setup.of_q(&self.out),
            lse: self.lse.span(),
        }
    }
}

/// Device memory of a backward besides that of its forward.
struct Gradients {
    out: DeviceBuffer,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
}

/// One of the stages, forward or backward.
pub struct Attention {
    reference: Reference,
    buffers: Buffers,
    topk_indices: Option<DeviceBuffer>,
    gradients: Option<Gradients>,
}

impl Attention {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let reference = Reference::new(point)?;
        let inputs = &reference.inputs;
        let topk_indices = inputs.topk_indices.as_ref().map(|ids| setup.upload("topk_indices", ids)).transpose()?;
        let total_keys = keys(inputs)?.map_or(point.tokens, |keys| keys.bound(point.tokens));
        let buffers = Buffers::new(setup, inputs, total_keys)?;
        let Buffers { query, key, value, .. } = &buffers;
        let gradients = |grad_out| -> fsa::Result<Gradients> {
            Ok(Gradients {
                out: setup.upload("grad_out", grad_out)?,
                query: setup.like("grad_query", query)?,
                key: setup.like("grad_key", key)?,
                value: setup.like("grad_value", value)?,
            })
        };
        let gradients = reference.grad_out.as_ref().map(gradients).transpose()?;
        let attention = Self { reference, buffers, topk_indices, gradients };
        if attention.gradients.is_some() {
            // What a backward needs: `out` and `lse` of the forward.
            setup.run(&attention.forward(setup)?)?;
        }
        Ok(attention)
    }

    fn forward(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let (tensors, scale) = (self.buffers.tensors(setup), setup.scale());
        let batch = &self.buffers.batch;
        Ok(match (&self.topk_indices, keys(&self.reference.inputs)?) {
            (_, Some(keys)) => {
                let planned = BandForward::plan(setup.kernels, &BandProblem { sizes: setup.sizes, keys })?;
                let bytes = planned.workspace_bytes();
                Planned::new(bytes, move |context| planned.launch(context, &batch.get(), &tensors, scale))
            }
            (ids, None) => {
                let config = &self.reference.inputs.config;
                let problem = setup.sizes.selected(config.block_size, config.topk);
                let planned = SelectedForward::plan(setup.kernels, &problem, &setup.options)?;
                let tensors = selected(&tensors, ids.as_ref().map(DeviceBuffer::span))?;
                let bytes = planned.workspace_bytes();
                Planned::new(bytes, move |context| planned.launch(context, &batch.get(), &tensors, scale))
            }
        })
    }

    fn backward<'s>(&'s self, setup: &Setup<'_>, gradients: &'s Gradients) -> fsa::Result<Planned<'s>> {
        let (forward, scale) = (self.buffers.tensors(setup), setup.scale());
        let batch = &self.buffers.batch;
        let tensors = AttentionGradTensors {
            forward,
            grad_out: setup.of_q(&gradients.out),
            grad_lse: None,
            grad_query: setup.of_q(&gradients.query),
            grad_key: setup.of_kv(&gradients.key),
            grad_value: setup.of_kv(&gradients.value),
        };
        Ok(match (&self.topk_indices, keys(&self.reference.inputs)?) {
            (_, Some(keys)) => {
                let problem = BandProblem { sizes: setup.sizes, keys };
                let planned = BandBackward::plan(setup.kernels, &problem, &setup.options)?;
                let bytes = planned.workspace_bytes();
                Planned::new(bytes, move |context| planned.launch(context, &batch.get(), &tensors, scale))
            }
            (ids, None) => {
                let config = &self.reference.inputs.config;
                let problem = setup.sizes.selected(config.block_size, config.topk);
                let planned = SelectedBackward::plan(setup.kernels, &problem, &setup.options)?;
                let forward = selected(&forward, ids.as_ref().map(DeviceBuffer::span))?;
                let AttentionGradTensors { grad_out, grad_lse, grad_query, grad_key, grad_value, .. } = tensors;
                let tensors = BackwardTensors {
                    forward,
                    grad_out,
                    grad_lse,
                    grad_query,
                    grad_key,
                    grad_value,
                    row_stats: None,
                    accumulate: false,
                };
                let bytes = planned.workspace_bytes();
                Planned::new(bytes, move |context| planned.launch(context, &batch.get(), &tensors, scale))
            }
        })
    }
}

/// Which keys rows see; none for stage `selected`.
fn keys(inputs: &Inputs) -> fsa::Result<Option<Keys>> {
    let ids = inputs.topk_indices.as_ref().map(fsa::Tensor::view);
    Ok(Keys::of(&inputs.stage(ids)?))
}

fn selected<'t>(
    tensors: &AttentionTensors<'t>,
    topk_indices: Option<DeviceSpan<'t>>,
) -> fsa::Result<ForwardTensors<'t>> {
    let topk_indices = topk_indices.ok_or_else(|| fsa::Error::input("topk_indices", "those of the stage", "none"))?;
    let AttentionTensors { query, key, value, out, lse } = *tensors;
    Ok(ForwardTensors { query, key, value, topk_indices, out, lse })
}

impl Operation for Attention {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        match &self.gradients {
            None => self.forward(setup),
            Some(gradients) => self.backward(setup, gradients),
        }
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        match &self.gradients {
            None => vec![&self.buffers.out, &self.buffers.lse],
            Some(Gradients { query, key, value, .. }) => vec![query, key, value],
        }
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let keys = setup.kv_shape(self.reference.inputs.key.shape()[0]);
        let results = match &self.gradients {
            None => vec![
                setup.download("out", &self.buffers.out, &setup.q_shape())?,
                setup.download_as("lse", &self.buffers.lse, DType::F32, &setup.lse_shape())?,
            ],
            Some(Gradients { query, key, value, .. }) => vec![
                setup.download("grad_query", query, &setup.q_shape())?,
                setup.download("grad_key", key, &keys)?,
                setup.download("grad_value", value, &keys)?,
            ],
        };
        Ok(Checked { compared: self.reference.compare(&results)?, wrong_selections: 0 })
    }

    fn before_timing(&self, setup: &Setup<'_>) -> fsa::Result<()> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        setup.replace(&gradients.out, &normal_tensor("grad_out", 5, setup.sizes.dtype, &setup.q_shape())?)
    }
}
