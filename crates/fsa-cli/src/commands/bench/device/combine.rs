//! Stage `combine`. Query, gradient and value-like numbers stand for the branches: the shapes are the same.

use super::super::definition::Point;
use super::inputs::{Inputs, heads, sampled_heads};
use super::{Checked, Operation, Planned, Setup};
use crate::random::normal_tensor;
use crate::sampled::{Compared, compare};
use fsa::cuda::driver::DeviceBuffer;
use fsa::cuda::stages::{CombineBackward, CombineBackwardTensors, CombineForward, CombineTensors, Gates};
use fsa::{CombineArgs, Tensor};
use fsa_oracle::Pass;
use fsa_oracle::array::Array;
use fsa_oracle::combine::{self, CombineInputs};

/// Gradients in device memory.
struct Gradients {
    out: Tensor,
    uploaded: DeviceBuffer,
    branches: [DeviceBuffer; 3],
    gates: DeviceBuffer,
}

/// The stage with its tensors.
pub struct Combine {
    branches: [Tensor; 3],
    gates: Tensor,
    uploaded: [DeviceBuffer; 3],
    uploaded_gates: DeviceBuffer,
    out: DeviceBuffer,
    gradients: Option<Gradients>,
}

impl Combine {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let branch = |seed| normal_tensor("branch", seed, point.dtype, &setup.q_shape());
        let branches = [branch(1)?, branch(5)?, branch(8)?];
        let gates = Inputs::new(point)?.gates()?;
        let upload = |b: usize| setup.upload("branch", &branches[b]);
        let uploaded = [upload(0)?, upload(1)?, upload(2)?];
        let uploaded_gates = setup.upload("gates", &gates)?;
        let gradients = match point.pass {
            Pass::Forward => None,
            Pass::Backward => {
                let out = normal_tensor("grad_out", 9, point.dtype, &setup.q_shape())?;
                let like = |b: usize| setup.like("grad_branch", &uploaded[b]);
                Some(Gradients {
                    uploaded: setup.upload("grad_out", &out)?,
                    branches: [like(0)?, like(1)?, like(2)?],
                    gates: setup.like("grad_gates", &uploaded_gates)?,
                    out,
                })
            }
        };
        let out = setup.like("out", &uploaded[0])?;
        Ok(Self { branches, gates, uploaded, uploaded_gates, out, gradients })
    }

    /// A head as a call of its own.
    fn inputs(&self, head: usize) -> fsa::Result<CombineInputs> {
        let branch = |b: usize| heads(&self.branches[b], head..head + 1);
        let gates = heads(&self.gates, head..head + 1)?;
        Ok(CombineInputs::new(&CombineArgs { gates, branches: [branch(0)?, branch(1)?, branch(2)?] }))
    }
}

impl Operation for Combine {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let branches = self.uploaded.each_ref().map(|branch| setup.of_q(branch));
        let gates = Gates::per_head(self.uploaded_gates.span(), setup.sizes.num_q_heads);
        let Some(gradients) = &self.gradients else {
            let planned = CombineForward::plan(setup.kernels, &setup.sizes)?;
            let tensors = CombineTensors { branches, gates, out: setup.of_q(&self.out) };
            return Ok(Planned::without_workspace(move |stream| planned.launch(stream, &tensors)));
        };
        let planned = CombineBackward::plan(setup.kernels, &setup.sizes)?;
        let tensors = CombineBackwardTensors {
            branches,
            gates,
            grad_out: setup.of_q(&gradients.uploaded),
            grad_branches: gradients.branches.each_ref().map(|branch| setup.of_q(branch)),
            grad_gates: gradients.gates.span(),
        };
        Ok(Planned::without_workspace(move |stream| planned.launch(stream, &tensors)))
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        match &self.gradients {
            None => vec![&self.out],
            Some(gradients) => gradients.branches.iter().chain([&gradients.gates]).collect(),
        }
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let (dtype, shape) = (setup.sizes.dtype, setup.q_shape());
        let gate_shape = [shape[0], shape[1], 3];
        let results = match &self.gradients {
            None => vec![setup.download("out", &self.out, &shape)?],
            Some(Gradients { branches: [compressed, selected, window], gates, .. }) => vec![
                setup.download("grad_gates", gates, &gate_shape)?,
                setup.download("grad_compressed", compressed, &shape)?,
                setup.download("grad_selected", selected, &shape)?,
                setup.download("grad_window", window, &shape)?,
            ],
        };
        let mut compared: Vec<Compared> = Vec::new();
        for head in sampled_heads(setup.sizes.num_q_heads) {
            let inputs = self.inputs(head)?;
            let of_head = |tensor: &Tensor| Ok(Array::from_view(&heads(tensor, head..head + 1)?));
            let got = results.iter().map(of_head).collect::<fsa::Result<Vec<Array>>>()?;
            match (&self.gradients, <[Array; 4]>::try_from(got)) {
                (Some(gradients), Ok(got)) => {
                    let grad_out = of_head(&gradients.out)?;
                    let names = ["grad_gates", "grad_compressed", "grad_selected", "grad_window"];
                    compared.extend(compare(&names, [dtype; 4], &got, |a| {
                        let grads = combine::backward(a, &inputs, &grad_out);
                        Ok([grads.gates].into_iter().chain(grads.branches).collect())
                    })?);
                }
                (_, got) => {
                    let got = got.err().and_then(|got| <[Array; 1]>::try_from(got).ok());
                    let got = got.ok_or_else(|| fsa::Error::input("results", "those of the pass", "others"))?;
                    compared.extend(compare(&["out"], [dtype], &got, |a| Ok(vec![combine::forward(a, &inputs)]))?);
                }
            }
        }
        Ok(Checked { compared, wrong_selections: 0 })
    }
}
