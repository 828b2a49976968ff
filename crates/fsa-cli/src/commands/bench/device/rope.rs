//! Stage `rope`: the rotation of the query; the backward is the other direction.

use super::super::definition::Point;
use super::inputs::{Inputs, heads, sampled_heads};
use super::{Checked, Operation, Planned, Setup};
use crate::sampled::{Compared, compare};
use fsa::cuda::driver::{DeviceBuffer, UploadedBatch};
use fsa::cuda::stages::{RopeRows, RopeTurn};
use fsa::{Rope, query_positions};
use fsa_oracle::array::Array;
use fsa_oracle::{Pass, rope};

/// The stage with its tensors.
pub struct Rotate {
    inputs: Inputs,
    inverse: bool,
    batch: UploadedBatch,
    input: DeviceBuffer,
    out: DeviceBuffer,
}

impl Rotate {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let inputs = Inputs::new(point)?;
        let input = setup.upload("query", &inputs.query)?;
        Ok(Self {
            inverse: point.pass == Pass::Backward,
            batch: UploadedBatch::new(setup.kernels.device(), &inputs.batch, &setup.stream)?,
            out: setup.like("out", &input)?,
            input,
            inputs,
        })
    }
}

impl Operation for Rotate {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let planned = RopeTurn::plan(setup.kernels, &setup.sizes, &Rope::default(), setup.sizes.head_dim)?;
        let (input, out, heads) = (setup.of_q(&self.input), setup.of_q(&self.out), setup.sizes.num_q_heads);
        Ok(Planned::without_workspace(move |stream| {
            let batch = self.batch.get();
            planned.launch(stream, &batch, &RopeRows::Query, (&input, &out, heads), self.inverse)
        }))
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        vec![&self.out]
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let (out, positions) =
            (setup.download("out", &self.out, &setup.q_shape())?, query_positions(&self.inputs.batch));
        let mut compared: Vec<Compared> = Vec::new();
        for head in sampled_heads(setup.sizes.num_q_heads) {
            let [input, got] = [&self.inputs.query, &out].map(|tensor| heads(tensor, head..head + 1));
            let (input, got) = (Array::from_view(&input?), [Array::from_view(&got?)]);
            let name = format!("out of head {head}");
            compared.extend(compare(&[name.as_str()], [setup.sizes.dtype], &got, |a| {
                Ok(vec![rope::rotate(a, &input, &positions, &Rope::default(), self.inverse)])
            })?);
        }
        Ok(Checked { compared, wrong_selections: 0 })
    }
}
