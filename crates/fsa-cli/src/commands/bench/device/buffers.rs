//! Device memory of a measurement: host tensors go there, results come back.

use super::Setup;
use bytemuck::Pod;
use fsa::cuda::driver::DeviceBuffer;
use fsa::cuda::stages::TensorSpan;
use fsa::{DType, Element, Storage, Tensor, bf16, f16};

impl Setup<'_> {
    /// A copy of `tensor` on the device.
    pub(super) fn upload(&self, name: &str, tensor: &Tensor) -> fsa::Result<DeviceBuffer> {
        self.upload_with_room(name, tensor, 0)
    }

    /// A copy of `tensor` in memory of at least `bytes` bytes.
    pub(super) fn upload_with_room(&self, name: &str, tensor: &Tensor, bytes: usize) -> fsa::Result<DeviceBuffer> {
        let buffer = self.memory(name, bytes.max(tensor.size_bytes()))?;
        self.replace(&buffer, tensor)?;
        Ok(buffer)
    }

    /// Memory for what a call writes.
    pub(super) fn memory(&self, name: &str, bytes: usize) -> fsa::Result<DeviceBuffer> {
        Ok(DeviceBuffer::new(self.kernels.device(), name, bytes)?)
    }

    /// Memory of the size of `buffer`.
    pub(super) fn like(&self, name: &str, buffer: &DeviceBuffer) -> fsa::Result<DeviceBuffer> {
        self.memory(name, buffer.span().size_bytes())
    }

    /// Writes `tensor` to the front of `buffer`.
    pub(super) fn replace(&self, buffer: &DeviceBuffer, tensor: &Tensor) -> fsa::Result<()> {
        match tensor.storage() {
            Storage::F32(data) => buffer.upload(data, &self.stream)?,
            Storage::Bf16(data) => buffer.upload(data, &self.stream)?,
            Storage::F16(data) => buffer.upload(data, &self.stream)?,
            Storage::I32(data) => buffer.upload(data, &self.stream)?,
        }
        Ok(())
    }

    /// The front of `buffer` as a tensor of the call's dtype.
    pub(super) fn download(&self, name: &str, buffer: &DeviceBuffer, shape: &[usize]) -> fsa::Result<Tensor> {
        self.download_as(name, buffer, self.sizes.dtype, shape)
    }

    /// The front of `buffer` as a tensor.
    pub(super) fn download_as(
        &self,
        name: &str,
        buffer: &DeviceBuffer,
        dtype: DType,
        shape: &[usize],
    ) -> fsa::Result<Tensor> {
        match dtype {
            DType::F32 => self.typed::<f32>(name, buffer, shape),
            DType::Bf16 => self.typed::<bf16>(name, buffer, shape),
            DType::F16 => self.typed::<f16>(name, buffer, shape),
            DType::I32 => self.typed::<i32>(name, buffer, shape),
        }
    }

    fn typed<T: Element + Pod>(&self, name: &str, buffer: &DeviceBuffer, shape: &[usize]) -> fsa::Result<Tensor> {
        let mut data = vec![T::default(); shape.iter().product()];
        buffer.download(&mut data, &self.stream)?;
        Tensor::new(name, data, shape)
    }

    /// `[total_q, num_q_heads, head_dim]` in `buffer`.
    pub(super) fn of_q<'b>(&self, buffer: &'b DeviceBuffer) -> TensorSpan<'b> {
        TensorSpan::contiguous(buffer.span(), self.sizes.num_q_heads, self.sizes.head_dim)
    }

    /// `[rows, num_kv_heads, head_dim]` in `buffer`.
    pub(super) fn of_kv<'b>(&self, buffer: &'b DeviceBuffer) -> TensorSpan<'b> {
        TensorSpan::contiguous(buffer.span(), self.sizes.num_kv_heads, self.sizes.head_dim)
    }

    /// Shape of `query` and of `out`.
    pub(super) fn q_shape(&self) -> [usize; 3] {
        [self.sizes.total_q, self.sizes.num_q_heads, self.sizes.head_dim]
    }

    /// Shape of `rows` rows of keys.
    pub(super) fn kv_shape(&self, rows: usize) -> [usize; 3] {
        [rows, self.sizes.num_kv_heads, self.sizes.head_dim]
    }

    /// Shape of `lse`.
    pub(super) fn lse_shape(&self) -> [usize; 2] {
        [self.sizes.num_q_heads, self.sizes.total_q]
    }

    /// Bytes of `lse`.
    pub(super) fn lse_bytes(&self) -> usize {
        self.sizes.num_q_heads * self.sizes.total_q * size_of::<f32>()
    }
}
