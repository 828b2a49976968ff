//! Device memory of a measurement: host tensors go there, results come back.

use super::reference::Reference;
use bytemuck::Pod;
use fsa::cuda::driver::{Device, DeviceBuffer, Stream, UploadedBatch};
use fsa::cuda::plan::Problem;
use fsa::cuda::selected::{BackwardTensors, ForwardTensors, TensorSpan};
use fsa::{DType, Element, Storage, Tensor, bf16, f16};
use std::sync::Arc;

/// Device memory of a call. Empty buffers stand for what the pass lacks.
#[derive(Debug)]
pub struct Buffers {
    pub batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    topk_indices: DeviceBuffer,
    pub out: DeviceBuffer,
    pub lse: DeviceBuffer,
    pub grad_out: DeviceBuffer,
    pub grad_query: DeviceBuffer,
    pub grad_key: DeviceBuffer,
    pub grad_value: DeviceBuffer,
}

impl Buffers {
    /// The inputs, copied, and memory for what the call writes.
    pub fn new(device: &Arc<Device>, reference: &Reference, stream: &Stream) -> fsa::Result<Self> {
        let Reference { inputs, grad_out, .. } = reference;
        let like = |name: &str, tensor: &Tensor| DeviceBuffer::new(device, name, tensor.size_bytes());
        // A forward has no gradients.
        let gradient = |name: &str, tensor: &Tensor| match grad_out {
            None => DeviceBuffer::new(device, name, 0),
            Some(_) => like(name, tensor),
        };
        let rows = inputs.query.shape()[0] * inputs.query.shape()[1];
        Ok(Self {
            batch: UploadedBatch::new(device, &inputs.batch, stream)?,
            query: upload("query", &inputs.query, device, stream)?,
            key: upload("key", &inputs.key, device, stream)?,
            value: upload("value", &inputs.value, device, stream)?,
            topk_indices: upload("topk_indices", &inputs.topk_indices, device, stream)?,
            out: like("out", &inputs.query)?,
            lse: DeviceBuffer::new(device, "lse", rows * size_of::<f32>())?,
            grad_out: match grad_out {
                None => DeviceBuffer::new(device, "grad_out", 0)?,
                Some(tensor) => upload("grad_out", tensor, device, stream)?,
            },
            grad_query: gradient("grad_query", &inputs.query)?,
            grad_key: gradient("grad_key", &inputs.key)?,
            grad_value: gradient("grad_value", &inputs.value)?,
        })
    }

    /// What a forward takes.
    pub fn forward(&self, problem: &Problem) -> ForwardTensors<'_> {
        let [q, kv] = [problem.num_q_heads, problem.num_kv_heads]
            .map(|heads| move |buffer| TensorSpan::contiguous(buffer, heads, problem.head_dim));
        ForwardTensors {
            query: q(self.query.span()),
            key: kv(self.key.span()),
            value: kv(self.value.span()),
            topk_indices: self.topk_indices.span(),
            out: q(self.out.span()),
            lse: self.lse.span(),
        }
    }

    /// What a backward takes.
    pub fn backward(&self, problem: &Problem) -> BackwardTensors<'_> {
        let [q, kv] = [problem.num_q_heads, problem.num_kv_heads]
            .map(|heads| move |buffer| TensorSpan::contiguous(buffer, heads, problem.head_dim));
        BackwardTensors {
            forward: self.forward(problem),
            grad_out: q(self.grad_out.span()),
            grad_lse: None,
            grad_query: q(self.grad_query.span()),
            grad_key: kv(self.grad_key.span()),
            grad_value: kv(self.grad_value.span()),
        }
    }
}

/// A copy of `tensor` on the device.
fn upload(name: &str, tensor: &Tensor, device: &Arc<Device>, stream: &Stream) -> fsa::Result<DeviceBuffer> {
    let buffer = DeviceBuffer::new(device, name, tensor.size_bytes())?;
    replace(&buffer, tensor, stream)?;
    Ok(buffer)
}

/// Writes `tensor` to the front of `buffer`.
pub fn replace(buffer: &DeviceBuffer, tensor: &Tensor, stream: &Stream) -> fsa::Result<()> {
    match tensor.storage() {
        Storage::F32(data) => buffer.upload(data, stream)?,
        Storage::Bf16(data) => buffer.upload(data, stream)?,
        Storage::F16(data) => buffer.upload(data, stream)?,
        Storage::I32(data) => buffer.upload(data, stream)?,
    }
    Ok(())
}

/// The front of `buffer` as a tensor.
pub fn download(
    name: &str,
    buffer: &DeviceBuffer,
    dtype: DType,
    shape: &[usize],
    stream: &Stream,
) -> fsa::Result<Tensor> {
    fn typed<T: Element + Pod>(
        name: &str,
        buffer: &DeviceBuffer,
        shape: &[usize],
        stream: &Stream,
    ) -> fsa::Result<Tensor> {
        let mut data = vec![T::default(); shape.iter().product()];
        buffer.download(&mut data, stream)?;
        Tensor::new(name, data, shape)
    }
    match dtype {
        DType::F32 => typed::<f32>(name, buffer, shape, stream),
        DType::Bf16 => typed::<bf16>(name, buffer, shape, stream),
        DType::F16 => typed::<f16>(name, buffer, shape, stream),
        DType::I32 => typed::<i32>(name, buffer, shape, stream),
    }
}
