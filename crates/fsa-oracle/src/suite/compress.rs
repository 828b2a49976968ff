//! Check of stage `compress`, and the parameters of a compression for the whole operation.

use super::check::{Check, gradient};
use crate::array::Array;
use crate::buffer::Buffer;
use crate::case::{Case, CompressionKind, Hostile};
use crate::compress::{self, CompressInputs};
use crate::inputs::{Stream, magnitudes, normal, random};
use fsa_core::{Backend, Batch, CompressArgs, CompressGrads, Compression, Result};

/// Weight and position embedding of a compression.
pub(super) struct Parameters {
    kind: CompressionKind,
    pub(super) weight: Option<Buffer>,
    pub(super) position: Option<Buffer>,
}

impl Parameters {
    /// Random parameters under which the output is about as large as the input.
    pub(super) fn new(case: &Case, kind: CompressionKind, dim: usize, streams: [Stream; 2]) -> Self {
        let (heads, size) = (case.num_kv_heads, case.config.kernel_size);
        let [weight, position] = streams;
        let weight = match kind {
            CompressionKind::Mean => None,
            CompressionKind::Weighted => {
                Some(normal(case, "weight", weight, &[heads, size], (1.0 / size as f64).sqrt()))
            }
            CompressionKind::Linear | CompressionKind::LinearPosition => {
                let factor = (1.0 / (size * dim) as f64).sqrt();
                Some(normal(case, "weight", weight, &[heads, size * dim, dim], factor))
            }
        };
        let position = (kind == CompressionKind::LinearPosition)
            .then(|| normal(case, "position", position, &[heads, size, dim], magnitudes(case).0));
        Self { kind, weight, position }
    }

    pub(super) fn compression(&self) -> Result<Compression<'_>> {
        match (self.kind, &self.weight) {
            (CompressionKind::Weighted, Some(weight)) => Ok(Compression::Weighted { weight: weight.view()? }),
            (CompressionKind::Linear | CompressionKind::LinearPosition, Some(weight)) => {
                let position = self.position.as_ref().map(Buffer::view).transpose()?;
                Ok(Compression::Linear { weight: weight.view()?, position })
            }
            _ => Ok(Compression::Mean),
        }
    }
}

struct CompressData<'c> {
    case: &'c Case,
    batch: Batch,
    input: Buffer,
    parameters: Parameters,
}

impl<'c> CompressData<'c> {
    fn new(case: &'c Case) -> Result<Self> {
        let batch = case.batch()?;
        let shape = [batch.total_kv(), case.num_kv_heads, case.head_dim];
        let input = normal(case, "input", Stream::Key, &shape, magnitudes(case).0);
        let streams = [Stream::KeyWeight, Stream::KeyPosition];
        let parameters = Parameters::new(case, case.key_compression, case.head_dim, streams);
        let mut data = Self { case, batch, input, parameters };
        data.poison()?;
        Ok(data)
    }

    fn args(&self) -> Result<CompressArgs<'_>> {
        Ok(CompressArgs {
            input: self.input.view()?,
            batch: &self.batch,
            kernel_size: self.case.config.kernel_size,
            kernel_stride: self.case.config.kernel_stride,
            compression: self.parameters.compression()?,
        })
    }

    /// NaN in the rows that no window covers, or in any one row.
    fn poison(&mut self) -> Result<()> {
        let total = self.batch.total_kv();
        let rows: Vec<usize> = match self.case.hostile {
            Hostile::NanUnseen => {
                let windows = CompressInputs::new(&self.args()?).windows();
                let size = self.case.config.kernel_size;
                (0..total).filter(|row| !windows.iter().any(|start| (*start..start + size).contains(row))).collect()
            }
            Hostile::NanFuture if total > 0 => vec![random(self.case, Stream::Poison).below(total)],
            _ => Vec::new(),
        };
        for row in rows {
            for head in 0..self.case.num_kv_heads {
                self.input.set_row(&[row, head], |_| f64::NAN);
            }
        }
        Ok(())
    }

    fn out_shape(&self) -> [usize; 3] {
        let config = &self.case.config;
        let rows = self.batch.total_compressed(config.kernel_size, config.kernel_stride);
        [rows, self.case.num_kv_heads, self.case.head_dim]
    }
}

pub(super) fn forward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = CompressData::new(case)?;
    let outputs = check.run(|| {
        let mut out = Buffer::poisoned("out", case.dtype, &data.out_shape(), case.layout);
        backend.compress(&data.args()?, &mut out.view_mut()?)?;
        Ok(vec![out])
    })?;
    let inputs = CompressInputs::new(&data.args()?);
    check.compare(&outputs, |a| vec![compress::forward(a, &inputs)])
}

pub(super) fn backward(backend: &dyn Backend, case: &Case, check: &mut Check<'_>) -> Result<()> {
    let data = CompressData::new(case)?;
    let grad_out = normal(case, "grad_out", Stream::GradOut, &data.out_shape(), magnitudes(case).2);
    let outputs = check.run(|| {
        let mut input = gradient(case, "grad_input", &data.input);
        let mut weight = data.parameters.weight.as_ref().map(|like| gradient(case, "grad_weight", like));
        let mut position = data.parameters.position.as_ref().map(|like| gradient(case, "grad_position", like));
        let mut grads = CompressGrads {
            grad_input: input.view_mut()?,
            grad_weight: weight.as_mut().map(Buffer::view_mut).transpose()?,
            grad_position: position.as_mut().map(Buffer::view_mut).transpose()?,
        };
        backend.compress_backward(&data.args()?, &grad_out.view()?, &mut grads)?;
        Ok([Some(input), weight, position].into_iter().flatten().collect())
    })?;
    let inputs = CompressInputs::new(&data.args()?);
    let grad_out = Array::from_view(&grad_out.view()?);
    check.compare(&outputs, |a| compress::backward(a, &inputs, &grad_out).into_vec())
}
