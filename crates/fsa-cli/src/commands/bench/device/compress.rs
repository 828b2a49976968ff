//! Stage `compress`: keys and values, one after the other.

use super::super::definition::Point;
use super::inputs::{Inputs, heads, sampled_heads};
use super::{Checked, Operation, Planned, Setup};
use crate::random::normal_tensor;
use crate::sampled::{Compared, compare};
use fsa::cuda::driver::{DeviceBuffer, UploadedBatch};
use fsa::cuda::plan::{CompressProblem, CompressionKind, Windows};
use fsa::cuda::stages::{CompressBackward, CompressBackwardTensors, CompressForward, CompressTensors};
use fsa::{CompressArgs, Tensor};
use fsa_oracle::Pass;
use fsa_oracle::array::Array;
use fsa_oracle::compress::{self, CompressInputs};

/// Keys or values.
struct Side {
    name: &'static str,
    input: DeviceBuffer,
    /// Compressed rows, or their gradient.
    compressed: DeviceBuffer,
    /// Gradient of the input, for a backward, with that of the compressed rows.
    gradient: Option<(DeviceBuffer, Tensor)>,
}

impl Side {
    fn written(&self) -> &DeviceBuffer {
        self.gradient.as_ref().map_or(&self.compressed, |(gradient, _)| gradient)
    }
}

/// The stage with its tensors.
pub struct Compress {
    inputs: Inputs,
    problem: CompressProblem,
    batch: UploadedBatch,
    sides: [Side; 2],
    /// Rows that exist, of those that there is room for.
    rows: usize,
}

impl Compress {
    pub fn new(setup: &Setup<'_>, point: &Point) -> fsa::Result<Self> {
        let inputs = Inputs::new(point)?;
        let windows = Windows { kernel_size: point.config.kernel_size, kernel_stride: point.config.kernel_stride };
        let problem = CompressProblem { sizes: setup.sizes, windows, kind: CompressionKind::Mean };
        let rows = inputs.batch.total_compressed(windows.kernel_size, windows.kernel_stride);
        let bytes = setup.kv_shape(problem.total_compressed()).iter().product::<usize>() * point.dtype.size_bytes();
        let side = |name, seed, input: &Tensor| -> fsa::Result<Side> {
            let input = setup.upload(name, input)?;
            let (compressed, gradient) = match point.pass {
                Pass::Forward => (setup.memory("compressed", bytes)?, None),
                Pass::Backward => {
                    let grad_out = normal_tensor("grad_out", seed, point.dtype, &setup.kv_shape(rows))?;
                    let compressed = setup.upload_with_room("grad_out", &grad_out, bytes)?;
                    (compressed, Some((setup.like("grad_input", &input)?, grad_out)))
                }
            };
            Ok(Side { name, input, compressed, gradient })
        };
        Ok(Self {
            batch: UploadedBatch::new(setup.kernels.device(), &inputs.batch, &setup.stream)?,
            sides: [side("key", 6, &inputs.key)?, side("value", 7, &inputs.value)?],
            inputs,
            problem,
            rows,
        })
    }

    fn tensors<'s>(&self, setup: &Setup<'_>, side: &'s Side) -> CompressTensors<'s> {
        let (input, out) = (setup.of_kv(&side.input), setup.of_kv(&side.compressed));
        CompressTensors { input, out, weight: None, position: None }
    }

    /// A head of the input of a side as a call of its own.
    fn args<'t>(&'t self, input: &'t Tensor, head: usize) -> fsa::Result<CompressArgs<'t>> {
        Ok(CompressArgs { input: heads(input, head..head + 1)?, ..self.inputs.compress(input) })
    }
}

impl Operation for Compress {
    fn plan(&self, setup: &Setup<'_>) -> fsa::Result<Planned<'_>> {
        let batch = &self.batch;
        let calls = self.sides.each_ref().map(|side| (self.tensors(setup, side), side));
        if self.sides[0].gradient.is_none() {
            let planned = CompressForward::plan(setup.kernels, &self.problem)?;
            return Ok(Planned::new(planned.workspace_bytes(), move |context| {
                calls.iter().try_for_each(|(tensors, _)| planned.launch(context, &batch.get(), tensors))
            }));
        }
        let planned = CompressBackward::plan(setup.kernels, &self.problem)?;
        let calls: Vec<_> = calls
            .into_iter()
            .filter_map(|(forward, side)| {
                let (gradient, _) = side.gradient.as_ref()?;
                Some(CompressBackwardTensors {
                    forward,
                    grad_out: forward.out,
                    grad_input: setup.of_kv(gradient),
                    grad_weight: None,
                    grad_position: None,
                    accumulate: false,
                })
            })
            .collect();
        Ok(Planned::new(planned.workspace_bytes(), move |context| {
            calls.iter().try_for_each(|tensors| planned.launch(context, &batch.get(), tensors))
        }))
    }

    fn written(&self) -> Vec<&DeviceBuffer> {
        self.sides.iter().map(Side::written).collect()
    }

    fn compare(&self, setup: &Setup<'_>) -> fsa::Result<Checked> {
        let mut compared: Vec<Compared> = Vec::new();
        for (side, input) in self.sides.iter().zip([&self.inputs.key, &self.inputs.value]) {
            let (buffer, rows) = match &side.gradient {
                None => (&side.compressed, self.rows),
                Some((gradient, _)) => (gradient, setup.sizes.total_kv),
            };
            let result = setup.download(side.name, buffer, &setup.kv_shape(rows))?;
            for head in sampled_heads(setup.sizes.num_kv_heads) {
                let inputs = CompressInputs::new(&self.args(input, head)?);
                let grad_out =
                    side.gradient.as_ref().map(|(_, grad_out)| heads(grad_out, head..head + 1)).transpose()?;
                let grad_out = grad_out.map(|view| Array::from_view(&view));
                let got = [Array::from_view(&heads(&result, head..head + 1)?)];
                let name = format!("{} of kv head {head}", side.name);
                compared.extend(compare(&[name.as_str()], [setup.sizes.dtype], &got, |a| {
                    Ok(vec![match &grad_out {
                        None => compress::forward(a, &inputs),
                        Some(grad_out) => compress::backward(a, &inputs, grad_out).input,
                    }])
                })?);
            }
        }
        Ok(Checked { compared, wrong_selections: 0 })
    }
}
