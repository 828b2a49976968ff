//! Host tensors to device memory and back: packed, and padded to the dimension of the kernels.

use crate::driver::{Device, DeviceBuffer, Stream};
use bytemuck::Pod;
use fsa_core::{DType, Element, Error, Result, TensorView, TensorViewMut, bf16, f16};
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
        other => Err(Error::Unsupported {
            constraint: "dtype on CUDA".into(),
            got: other.to_string(),
            supported: "bf16, f16".into(),
        }),
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

/// Copies the leading elements of every vector into `target`, times `factor`, 1 or -1.
pub(super) fn download(
    source: &DeviceBuffer,
    rows: Rows,
    target: &mut TensorViewMut<'_>,
    factor: f32,
    stream: &Stream,
) -> Result<()> {
    match target.dtype() {
        DType::Bf16 => download_rows::<bf16>(source, rows, target, factor, stream),
        DType::F16 => download_rows::<f16>(source, rows, target, factor, stream),
        DType::F32 => download_rows::<f32>(source, rows, target, factor, stream),
        DType::I32 => download_rows::<i32>(source, rows, target, factor, stream),
    }
}

fn download_rows<T: Element + Pod>(
    source: &DeviceBuffer,
    Rows { pitch }: Rows,
    target: &mut TensorViewMut<'_>,
    factor: f32,
    stream: &Stream,
) -> Result<()> {
    let shape = target.shape().to_vec();
    let count: usize = shape[..shape.len() - 1].iter().product();
    let mut host = zeros::<T>("the copy of an output", count * pitch)?;
    source.download(&mut host, stream)?;
    let length = shape[shape.len() - 1];
    let mut typed = target.typed::<T>("output")?;
    let mut values = vec![0.0; length];
    for_each_row(&shape, |row, index| {
        for (value, element) in values.iter_mut().zip(&host[row * pitch..]) {
            *value = element.to_f32() * factor;
        }
        // Rounding what came from the dtype gives it back.
        typed.store_row(index, &values);
    });
    Ok(())
}
