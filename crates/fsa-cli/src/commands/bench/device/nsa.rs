//! Stage `nsa`: the whole operation, its forward with what the backward needs, as in training.

use super::super::definition::Point;
use super::super::work::SAMPLED_ROWS;
use super::inputs::{Inputs, heads, sampled_heads};
use super::{Checked, Operation, Planned, Setup};
use crate::random::normal_tensor;
use crate::sampled::{Compared, Sample};
use fsa::cuda::driver::{DeviceBuffer, UploadedBatch};
use fsa::cuda::plan::{CompressionKind, NsaProblem};
use fsa::cuda::stages::{
    Gates, NsaBackward, NsaBackwardTensors, NsaForward, NsaForwardTensors, NsaParameters, NsaSavedTensors,
};
use fsa::{AttentionArgs, DType, Tensor};
use fsa_oracle::Pass;

/// What the forward leaves for the backward.
struct Saved {
    compressed: [DeviceBuffer; 2],
    branches: [DeviceBuffer; 3],
    lse: [DeviceBuffer; 3],
}

/// Gradients in device memory.
struct Gradients {
    out: Tensor,
    uploaded: DeviceBuffer,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    gates: DeviceBuffer,
}

/// The whole with its tensors.
pub struct Whole {
    inputs: Inputs,
    host_gates: Tensor,
    sample: Sample,
    problem: NsaProblem,
    batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    gates: DeviceBuffer,
    out: DeviceBuffer,
    topk_indices: DeviceBuffer,
    saved: Saved,
    gradients: Option<Gradients>,
}

impl Whole {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let inputs = Inputs::new(point)?;
        let problem = NsaProblem::new(&setup.sizes, &point.config, [CompressionKind::Mean; 2], false);
        let host_gates = inputs.gates()?;
        let [query, key] = [setup.upload("query", &inputs.query)?, setup.upload("key", &inputs.key)?];
        let rows = setup.kv_shape(problem.total_compressed()).iter().product::<usize>() * point.dtype.size_bytes();
        let compressed = || setup.memory("compressed", rows);
        let branch = || setup.like("branch", &query);
        let lse = || setup.memory("lse", setup.lse_bytes());
        let whole = Self {
            sample: Sample::new(&inputs.batch, SAMPLED_ROWS, 1)?,
            batch: UploadedBatch::new(setup.kernels.device(), &inputs.batch, &setup.stream)?,
            value: setup.upload("value", &inputs.value)?,
            gates: setup.upload("gates", &host_gates)?,
            out: setup.like("out", &query)?,
            topk_indices: setup.memory("topk_indices", problem.topk_indices_bytes())?,
            saved: Saved {
                compressed: [compressed()?, compressed()?],
                branches: [branch()?, branch()?, branch()?],
                lse: [lse()?, lse()?, lse()?],
            },
            gradients: None,
            query,
            key,
            inputs,
            host_gates,
            problem,
        };
        if point.pass == Pass::Forward {
            return Ok(whole);
        }
        setup.run(&whole.forward(setup)?)?;
        let gradients = Some(whole.gradients(setup)?);
        Ok(Self { gradients, ..whole })
    }

    fn gradients(&self, setup: &Setup<'_>) -> fsa::Result<Gradients> {
        let out = self.sample.grad_out(setup.sizes.dtype, &setup.q_shape(), 6)?;
        Ok(Gradients {
            uploaded: setup.upload("grad_out", &out)?,
            query: setup.like("grad_query", &self.query)?,
            key: setup.like("grad_key", &self.key)?,
            value: setup.like("grad_value", &self.value)?,
            gates: setup.like("grad_gates", &self.gates)?,
            out,
        })
    }

    fn saved(&self, setup: &Setup<'_>) -> NsaSavedTensors<'_> {
        NsaSavedTensors {
            rotated: None,
            compressed: self.saved.compressed.each_ref().map(|buffer| setup.of_kv(buffer)),
            branches: self.saved.branches.each_ref().map(|buffer| setup.of_q(buffer)),
            lse: self.saved.lse.each_ref().map(DeviceBuffer::span),
        }
    }

    fn device_gates(&self, setup: &Setup<'_>) -> Gates<'_> {
        Gates::per_head(self.gates.span(), setup.sizes.num_q_heads)
    }

    fn forward(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let planned = NsaForward::plan(setup.kernels, &self.problem, None, &setup.options, true)?;
        let tensors = NsaForwardTensors {
            query: setup.of_q(&self.query),
            key: setup.of_kv(&self.key),
            value: setup.of_kv(&self.value),
            gates: self.device_gates(setup),
            parameters: [NsaParameters::default(); 2],
            out: setup.of_q(&self.out),
            topk_indices: self.topk_indices.span(),
            saved: Some(self.saved(setup)),
        };
        let (bytes, scale) = (planned.workspace_bytes(), setup.scale());
        Ok(Planned::new(bytes, move |context| planned.launch(context, &self.batch.get(), &tensors, scale)))
    }

    fn backward<'s>(&'s self, setup: &Setup<'_>, gradients: &'s Gradients) -> fsa::Result<Planned<'s>> {
        let planned = NsaBackward::plan(setup.kernels, &self.problem, None, &setup.options)?;
        let tensors = NsaBackwardTensors {
            query: setup.of_q(&self.query),
            key: setup.of_kv(&self.key),
            value: setup.of_kv(&self.value),
            gates: self.device_gates(setup),
            parameters: [NsaParameters::default(); 2],
            saved: self.saved(setup),
            topk_indices: self.topk_indices.span(),
            grad_out: setup.of_q(&gradients.uploaded),
            grad_query: setup.of_q(&gradients.query),
            grad_key: setup.of_kv(&gradients.key),
            grad_value: setup.of_kv(&gradients.value),
            grad_gates: gradients.gates.span(),
            grad_parameters: [NsaParameters::default(); 2],
        };
        let (bytes, scale) = (planned.workspace_bytes(), setup.scale());
        Ok(Planned::new(bytes, move |context| planned.launch(context, &self.batch.get(), &tensors, scale)))
    }

    fn ids(&self, setup: &Setup<'_>) -> fsa::Result<Tensor> {
        let shape = [setup.sizes.num_kv_heads, setup.sizes.total_q, self.problem.topk];
        setup.download_as("topk_indices", &self.topk_indices, DType::I32, &shape)
    }

    fn compare_forward(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let (ids, out) = (self.ids(setup)?, setup.download("out", &self.out, &setup.q_shape())?);
        let lse = |b: usize| setup.download_as("lse", &self.saved.lse[b], DType::F32, &setup.lse_shape());
        let lse = [lse(0)?, lse(1)?, lse(2)?];
        let rows = self.inputs.batch.total_compressed(self.inputs.config.kernel_size, self.inputs.config.kernel_stride);
        let compressed = |c: usize| setup.download("compressed", &self.saved.compressed[c], &setup.kv_shape(rows));
        let [keys, values] = [compressed(0)?, compressed(1)?];
        let mut checked = Checked::default();
        for kv_head in sampled_heads(setup.sizes.num_kv_heads) {
            let (group, own) = (self.inputs.group(kv_head), kv_head..kv_head + 1);
            let args = self.inputs.whole_of_head(&self.host_gates, kv_head)?;
            let ids = ids.view().slice_axis("topk_indices", 0, own.clone())?;
            let lse = |b: usize| lse[b].view().slice_axis("lse", 0, group.clone());
            let results = (&heads(&out, group.clone())?, [lse(0)?, lse(1)?, lse(2)?]);
            checked.add(kv_head, self.sample.nsa(&args, results, ids)?);
            let [key, value] = [heads(&keys, own.clone())?, heads(&values, own)?];
            let attention = AttentionArgs { key, value, ..args.attention() };
            checked.wrong_selections += self.sample.wrong_selections(&attention, args.config, &ids)?;
        }
        Ok(checked)
    }

    fn compare_backward(&self, setup: &Setup<'_>, gradients: &Gradients) -> fsa::Result<Checked> {
        let (ids, q_shape) = (self.ids(setup)?, setup.q_shape());
        let kv_shape = setup.kv_shape(setup.sizes.total_kv);
        let query = setup.download("grad_query", &gradients.query, &q_shape)?;
        let key = setup.download("grad_key", &gradients.key, &kv_shape)?;
        let value = setup.download("grad_value", &gradients.value, &kv_shape)?;
        let gates = setup.download("grad_gates", &gradients.gates, &[q_shape[0], q_shape[1], 3])?;
        let mut checked = Checked::default();
        for kv_head in sampled_heads(setup.sizes.num_kv_heads) {
            let (group, own) = (self.inputs.group(kv_head), kv_head..kv_head + 1);
            let args = self.inputs.whole_of_head(&self.host_gates, kv_head)?;
            let ids = ids.view().slice_axis("topk_indices", 0, own.clone())?;
            let results = [
                heads(&query, group.clone())?,
                heads(&key, own.clone())?,
                heads(&value, own)?,
                heads(&gates, group.clone())?,
            ];
            checked.add(kv_head, self.sample.nsa_backward(&args, ids, &heads(&gradients.out, group)?, results)?);
        }
        Ok(checked)
    }
}

impl Checked {
    fn add(&mut self, kv_head: usize, compared: Vec<Compared>) {
        let named = |c: Compared| Compared { tensor: format!("{} of kv head {kv_head}", c.tensor), ..c };
        self.compared.extend(compared.into_iter().map(named));
    }
}

impl Operation for Whole {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        match &self.gradients {
            None => self.forward(setup),
            Some(gradients) => self.backward(setup, gradients),
        }
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        match &self.gradients {
            None => vec![&self.out, &self.topk_indices],
            Some(Gradients { query, key, value, gates, .. }) => vec![query, key, value, gates],
        }
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        match &self.gradients {
            None => self.compare_forward(setup),
            Some(gradients) => self.compare_backward(setup, gradients),
        }
    }

    fn before_timing(&self, setup: &Setup<'_>) -> fsa::Result<()> {
        let Some(gradients) = &self.gradients else { return Ok(()) };
        setup.replace(&gradients.uploaded, &normal_tensor("grad_out", 5, setup.sizes.dtype, &setup.q_shape())?)
    }
}
