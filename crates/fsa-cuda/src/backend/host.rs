//! Host tensors to device memory and back: packed, and padded to the dimension of the kernels.

use crate::driver::{Device, DeviceBuffer, Stream};
use bytemuck::Pod;
use fsa_core::{DType, Element, Error, Result, Storage, Tensor, TensorView, TensorViewMut, bf16, f16};
use std::sync::Arc;

/// How the innermost vectors lie on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Elements from one vector to the next.
    pitch: usize,
    /// Vectors of a group, on the host and on the device, where groups are padded with vectors of zeros.
    group: [usize; 2],
}

impl Rows {
    /// Vectors padded to `dim` elements.
    pub(super) fn padded(dim: usize) -> Self {
        Self { pitch: dim, group: [1, 1] }
    }

    /// Vectors of `length` elements without padding.
    pub(super) fn plain(length: usize) -> Self {
        Self::padded(length)
    }

    /// Square matrices of `dim` rows and columns, padded to `padded` of both.
    pub(super) fn matrices(dim: usize, padded: usize) -> Self {
        Self { pitch: padded, group: [dim, padded] }
    }

    /// Where vector `row` starts on the device.
    fn start(&self, row: usize) -> usize {
        let [host, device] = self.group;
        (row / host * device + row % host) * self.pitch
    }
}

/// Memory of a device, and the stream that fills and reads it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer<'a> {
    pub device: &'a Arc<Device>,
    pub stream: &'a Stream,
}

fn out_of_memory(what: &str, bytes: usize) -> Error {
    Error::OutOfMemory { what: what.to_string(), bytes }
}

/// Zeros in host memory.
fn zeros<T: Element>(what: &str, len: usize) -> Result<Vec<T>> {
    let mut data = Vec::new();
    data.try_reserve_exact(len).map_err(|_| out_of_memory(what, len.saturating_mul(size_of::<T>())))?;
    data.resize(len, T::default());
    Ok(data)
}

/// Calls `visit` with every index of the leading axes of `shape`, in memory order.
fn for_each_row(shape: &[usize], mut visit: impl FnMut(usize, &[usize])) {
    let leading = &shape[..shape.len() - 1];
    let mut index = vec![0; leading.len()];
    for row in 0..leading.iter().product() {
        let mut rest = row;
        for (axis, size) in leading.iter().enumerate().rev() {
            index[axis] = rest % size;
            rest /= size;
        }
        visit(row, &index);
    }
}

/// A tensor in host memory as it lies on the device, times `factor`, 1 or -1.
fn laid_out<T: Element>(what: &str, view: &TensorView<'_>, rows: Rows, factor: f32) -> Result<Vec<T>> {
    let typed = view.typed::<T>(what)?;
    let shape = view.shape();
    let (count, length) = (shape[..shape.len() - 1].iter().product::<usize>(), shape[shape.len() - 1]);
    let mut host = zeros::<T>(what, rows.start(count))?;
    let mut at = vec![0; shape.len()];
    for_each_row(shape, |row, index| {
        at[..index.len()].copy_from_slice(index);
        for (k, target) in host[rows.start(row)..][..length].iter_mut().enumerate() {
            at[index.len()] = k;
            let value = typed.at(&at);
            // Integers have no sign to change, and floats are changed exactly.
            *target = if factor == 1.0 { value } else { T::from_f32(value.to_f32() * factor) };
        }
    });
    Ok(host)
}

impl Transfer<'_> {
    /// Memory whose every byte is 0xff: floats of it are NaN, so what a kernel reads without having written it shows.
    pub(super) fn poisoned(&self, what: &str, bytes: usize) -> Result<DeviceBuffer> {
        let buffer = DeviceBuffer::new(self.device, what, bytes)?;
        let _bound = self.device.bind()?;
        buffer.span().fill(0xff, self.stream)?;
        Ok(buffer)
    }

    /// Poisoned memory of the size of `like`.
    pub(super) fn like(&self, what: &str, like: &DeviceBuffer) -> Result<DeviceBuffer> {
        self.poisoned(what, like.span().size_bytes())
    }

    /// Copies a tensor of floats, every vector padded with zeros to `dim` elements and times `factor`, 1 or -1.
    pub(super) fn upload(&self, what: &str, view: &TensorView<'_>, dim: usize, factor: f32) -> Result<DeviceBuffer> {
        self.upload_to(what, view, Rows::padded(dim), 0, factor)
    }

    /// The same into memory with room for `bytes` bytes.
    pub(super) fn upload_with_room(
        &self,
        what: &str,
        view: &TensorView<'_>,
        dim: usize,
        bytes: usize,
    ) -> Result<DeviceBuffer> {
        self.upload_to(what, view, Rows::padded(dim), bytes, 1.0)
    }

    /// Copies a tensor of floats as `rows` say.
    pub(super) fn upload_rows(&self, what: &str, view: &TensorView<'_>, rows: Rows) -> Result<DeviceBuffer> {
        self.upload_to(what, view, rows, 0, 1.0)
    }

    /// Copies a tensor as it is, packed.
    pub(super) fn upload_plain(&self, what: &str, view: &TensorView<'_>) -> Result<DeviceBuffer> {
        let rows = Rows::plain(view.shape().last().copied().unwrap_or(0));
        match view.dtype() {
            DType::F32 => self.write(what, &laid_out::<f32>(what, view, rows, 1.0)?, 0),
            DType::I32 => self.write(what, &laid_out::<i32>(what, view, rows, 1.0)?, 0),
            _ => self.upload_rows(what, view, rows),
        }
    }

    fn upload_to(
        &self,
        what: &str,
        view: &TensorView<'_>,
        rows: Rows,
        bytes: usize,
        factor: f32,
    ) -> Result<DeviceBuffer> {
        match view.dtype() {
            DType::Bf16 => self.write(what, &laid_out::<bf16>(what, view, rows, factor)?, bytes),
            DType::F16 => self.write(what, &laid_out::<f16>(what, view, rows, factor)?, bytes),
            other => super::unsupported_dtype(other),
        }
    }

    /// Copies `host` to the front of memory of at least `bytes` bytes.
    pub(super) fn write<T: Pod>(&self, what: &str, host: &[T], bytes: usize) -> Result<DeviceBuffer> {
        let own = size_of_val(host);
        let buffer = if bytes > own { self.poisoned(what, bytes)? } else { DeviceBuffer::new(self.device, what, own)? };
        buffer.upload(host, self.stream)?;
        Ok(buffer)
    }

    /// Copies a whole buffer of `dtype` to host memory.
    pub(super) fn fetch(&self, what: &str, source: &DeviceBuffer, dtype: DType) -> Result<Storage> {
        Ok(match dtype {
            DType::Bf16 => Storage::Bf16(self.read(what, source)?),
            DType::F16 => Storage::F16(self.read(what, source)?),
            DType::F32 => Storage::F32(self.read(what, source)?),
            DType::I32 => Storage::I32(self.read(what, source)?),
        })
    }

    fn read<T: Element + Pod>(&self, what: &str, source: &DeviceBuffer) -> Result<Vec<T>> {
        let mut host = zeros::<T>(what, source.span().size_bytes() / size_of::<T>())?;
        source.download(&mut host, self.stream)?;
        Ok(host)
    }

    /// A host tensor of the leading rows of a buffer, whose vectors lie as `rows` say, times `factor`, 1 or -1.
    pub(super) fn tensor(
        &self,
        what: &str,
        (source, rows, factor): (&DeviceBuffer, Rows, f32),
        dtype: DType,
        shape: &[usize],
    ) -> Result<Tensor> {
        let mut tensor = Tensor::zeros(what, dtype, shape)?;
        store(&self.fetch(what, source, dtype)?, rows, &mut tensor.view_mut(), factor)?;
        Ok(tensor)
    }
}

/// Writes the leading elements of every vector to `target`, times `factor`, 1 or -1.
pub(super) fn store(source: &Storage, rows: Rows, target: &mut TensorViewMut<'_>, factor: f32) -> Result<()> {
    match source {
        Storage::Bf16(data) => store_rows(data, rows, target, factor),
        Storage::F16(data) => store_rows(data, rows, target, factor),
        Storage::F32(data) => store_rows(data, rows, target, factor),
        Storage::I32(data) => store_rows(data, rows, target, factor),
    }
}

fn store_rows<T: Element>(source: &[T], rows: Rows, target: &mut TensorViewMut<'_>, factor: f32) -> Result<()> {
    let shape = target.shape().to_vec();
    let length = shape[shape.len() - 1];
    let mut typed = target.typed::<T>("output")?;
    let mut at = vec![0; shape.len()];
    for_each_row(&shape, |row, index| {
        at[..index.len()].copy_from_slice(index);
        for (k, element) in source[rows.start(row)..][..length].iter().enumerate() {
            at[index.len()] = k;
            typed.set(&at, if factor == 1.0 { *element } else { T::from_f32(element.to_f32() * factor) });
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_vectors_are_stored_without_their_padding() {
        // Two vectors of 3 elements, padded to 4.
        let source = Storage::F16([1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0].map(f16::from_f32).to_vec());
        let mut target = [f16::ZERO; 6];
        let mut view = TensorViewMut::new("out", &mut target, &[2, 1, 3]).expect("shape");
        store(&source, Rows::padded(4), &mut view, -1.0).expect("the same dtype");
        assert_eq!(target.map(f16::to_f32), [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]);
    }

    #[test]
    fn padded_matrices_keep_their_place() {
        // One head, two matrices of 2 x 2, padded to 3 x 3.
        let host = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0].map(f16::from_f32);
        let view = TensorView::new("weight", &host, &[1, 4, 2]).expect("shape");
        let rows = Rows::matrices(2, 3);
        let device = laid_out::<f16>("weight", &view, rows, 1.0).expect("f16");
        let expected = [1, 2, 0, 3, 4, 0, 0, 0, 0, 5, 6, 0, 7, 8, 0, 0, 0, 0].map(|x| f16::from_f32(x as f32));
        assert_eq!(device, expected);
        let mut target = [f16::ZERO; 8];
        let mut view = TensorViewMut::new("weight", &mut target, &[1, 4, 2]).expect("shape");
        store(&Storage::F16(device), rows, &mut view, 1.0).expect("the same dtype");
        assert_eq!(target, host);
    }
}
