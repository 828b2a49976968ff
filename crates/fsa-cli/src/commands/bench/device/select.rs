//! Stage `select`, with compressed attention.

use super::super::definition::Point;
use super::super::work::SAMPLED_ROWS;
use super::attention::Buffers;
use super::inputs::{Inputs, heads, sampled_heads};
use super::{Checked, Operation, Planned, Setup};
use crate::sampled::{Compared, Sample};
use fsa::DType;
use fsa::cuda::driver::DeviceBuffer;
use fsa::cuda::plan::SelectProblem;
use fsa::cuda::stages::Select;

/// The stage with its tensors.
pub struct Lists {
    inputs: Inputs,
    sample: Sample,
    problem: SelectProblem,
    buffers: Buffers,
    topk_indices: DeviceBuffer,
}

impl Lists {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let inputs = Inputs::new(point)?;
        let problem = SelectProblem::new(&setup.sizes, &point.config);
        Ok(Self {
            sample: Sample::new(&inputs.batch, SAMPLED_ROWS, 1)?,
            buffers: Buffers::new(setup, &inputs, problem.attention().total_keys())?,
            topk_indices: setup.memory("topk_indices", problem.topk_indices_bytes())?,
            problem,
            inputs,
        })
    }
}

impl Operation for Lists {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let planned = Select::plan(setup.kernels, &self.problem, &setup.options)?;
        let (batch, tensors, scale) = (&self.buffers.batch, self.buffers.tensors(setup), setup.scale());
        let ids = self.topk_indices.span();
        let bytes = planned.workspace_bytes();
        Ok(Planned::new(bytes, move |context| planned.launch(context, &batch.get(), &tensors, &ids, scale)))
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        vec![&self.buffers.out, &self.buffers.lse, &self.topk_indices]
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let out = setup.download("out", &self.buffers.out, &setup.q_shape())?;
        let lse = setup.download_as("lse", &self.buffers.lse, DType::F32, &setup.lse_shape())?;
        let shape = [setup.sizes.num_kv_heads, setup.sizes.total_q, self.problem.topk];
        let ids = setup.download_as("topk_indices", &self.topk_indices, DType::I32, &shape)?;
        let mut checked = Checked::default();
        for kv_head in sampled_heads(setup.sizes.num_kv_heads) {
            let (stage, args) = self.inputs.of_head(kv_head)?;
            let group = self.inputs.group(kv_head);
            let results = [heads(&out, group.clone())?, lse.view().slice_axis("lse", 0, group)?];
            let named = |c: Compared| Compared { tensor: format!("{} of kv head {kv_head}", c.tensor), ..c };
            checked.compared.extend(self.sample.attention(&stage, &args, results)?.into_iter().map(named));
            let own = ids.view().slice_axis("topk_indices", 0, kv_head..kv_head + 1)?;
            checked.wrong_selections += self.sample.wrong_selections(&args, &self.inputs.config, &own)?;
        }
        Ok(checked)
    }
}
