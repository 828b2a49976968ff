//! Host tensors to device memory and back: packed, and padded to the dimension of the kernels.

use crate::driver::{Device, DeviceBuffer, Stream};
use bytemuck::Pod;
use fsa_core::{DType, Element, Error, Result, Storage, TensorView, TensorViewMut, bf16, f16};
use std::sync::Arc;

/// How the innermost vectors lie on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Elements from one vector to the next.
    pitch: usize,
}

impl Rows {
    /// Vectors padded to `dim` elements.
    pub(super) fn padded(dim: usize) -> Self {
        Self { pitch: dim }
    }

    /// Vectors of `length` elements without padding.
    pub(super) fn plain(length: usize) -> Self {
        Self { pitch: length }
    }
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

/// Copies a tensor of floats, every vector padded with zeros to `dim` elements and times `factor`, 1 or -1.
pub(super) fn upload(
    what: &str,
    view: &TensorView<'_>,
    dim: usize,
    factor: f32,
    device: &Arc<Device>,
    stream: &Stream,
) -> Result<DeviceBuffer> {
    match view.dtype() {
        DType::Bf16 => upload_rows::<bf16>(what, view, dim, factor, device, stream),
        DType::F16 => upload_rows::<f16>(what, view, dim, factor, device, stream),
        other => super::unsupported_dtype(other),
    }
}

/// Copies a tensor as it is, packed.
pub(super) fn upload_plain<T: Element + Pod>(
    what: &str,
    view: &TensorView<'_>,
    device: &Arc<Device>,
    stream: &Stream,
) -> Result<DeviceBuffer> {
    let dim = view.shape().last().copied().unwrap_or(0);
    upload_rows::<T>(what, view, dim, 1.0, device, stream)
}

fn upload_rows<T: Element + Pod>(
    what: &str,
    view: &TensorView<'_>,
    dim: usize,
    factor: f32,
    device: &Arc<Device>,
    stream: &Stream,
) -> Result<DeviceBuffer> {
    let typed = view.typed::<T>(what)?;
    let shape = view.shape();
    let (rows, length) = (shape[..shape.len() - 1].iter().product::<usize>(), shape[shape.len() - 1]);
    let mut host = zeros::<T>(what, rows * dim)?;
    let mut at = vec![0; shape.len()];
    for_each_row(shape, |row, index| {
        at[..index.len()].copy_from_slice(index);
        for (k, target) in host[row * dim..row * dim + length].iter_mut().enumerate() {
            at[index.len()] = k;
            let value = typed.at(&at);
            // Integers have no sign to change, and floats are changed exactly.
            *target = if factor == 1.0 { value } else { T::from_f32(value.to_f32() * factor) };
        }
    });
    let buffer = DeviceBuffer::new(device, what, size_of_val(host.as_slice()))?;
    buffer.upload(&host, stream)?;
    Ok(buffer)
}

/// Copies a whole buffer of `dtype` to host memory.
pub(super) fn fetch(what: &str, source: &DeviceBuffer, dtype: DType, stream: &Stream) -> Result<Storage> {
    fn typed<T: Element + Pod>(what: &str, source: &DeviceBuffer, stream: &Stream) -> Result<Vec<T>> {
        let mut host = zeros::<T>(what, source.span().size_bytes() / size_of::<T>())?;
        source.download(&mut host, stream)?;
        Ok(host)
    }
    Ok(match dtype {
        DType::Bf16 => Storage::Bf16(typed(what, source, stream)?),
        DType::F16 => Storage::F16(typed(what, source, stream)?),
        DType::F32 => Storage::F32(typed(what, source, stream)?),
        DType::I32 => Storage::I32(typed(what, source, stream)?),
    })
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

fn store_rows<T: Element>(
    source: &[T],
    Rows { pitch }: Rows,
    target: &mut TensorViewMut<'_>,
    factor: f32,
) -> Result<()> {
    let shape = target.shape().to_vec();
    let length = shape[shape.len() - 1];
    let mut typed = target.typed::<T>("output")?;
    let mut values = vec![0.0; length];
    for_each_row(&shape, |row, index| {
        for (value, element) in values.iter_mut().zip(&source[row * pitch..]) {
            *value = element.to_f32() * factor;
        }
        // Rounding what came from the dtype gives it back.
        typed.store_row(index, &values);
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
}
