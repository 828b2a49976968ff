//! Stage `compress` over host tensors.

use super::host::{Rows, Transfer, store};
use super::{CudaBackend, check_batch, padded_dim, span};
use crate::driver::{DeviceBuffer, UploadedBatch};
use crate::plan::{CompressProblem, CompressionKind, Sizes, Windows};
use crate::stages::{
    CompressBackward, CompressBackwardTensors, CompressForward, CompressTensors, LaunchContext, NsaParameters,
};
use fsa_core::ops::CompressShape;
use fsa_core::{CompressArgs, CompressGrads, Compression, DType, Result, Storage, TensorView, TensorViewMut};

/// Parameters of a compression on the device.
pub(super) struct Parameters {
    weight: Option<DeviceBuffer>,
    position: Option<DeviceBuffer>,
    rows: Rows,
    dim: usize,
}

impl Parameters {
    /// Copies them, padded as vectors of `dim` elements are to `padded`.
    pub(super) fn upload(
        compression: &Compression<'_>,
        [dim, padded]: [usize; 2],
        transfer: &Transfer<'_>,
    ) -> Result<Self> {
        let (weight, position) = match compression {
            Compression::Mean => (None, None),
            Compression::Weighted { weight } => (Some(weight), None),
            Compression::Linear { weight, position } => (Some(weight), position.as_ref()),
        };
        let rows = match compression {
            Compression::Linear { .. } => Rows::matrices(dim, padded),
            _ => Rows::plain(weight.map_or(0, |weight| weight.shape()[1])),
        };
        Ok(Self {
            weight: weight.map(|view| transfer.upload_rows("weight", view, rows)).transpose()?,
            position: position.map(|view| transfer.upload("position", view, padded, 1.0)).transpose()?,
            rows,
            dim: padded,
        })
    }

    pub(super) fn spans(&self) -> NsaParameters<'_> {
        let Self { weight, position, .. } = self;
        NsaParameters {
            weight: weight.as_ref().map(DeviceBuffer::span),
            position: position.as_ref().map(DeviceBuffer::span),
        }
    }

    /// Memory for the gradients that are wanted.
    pub(super) fn gradients(&self, wanted: [bool; 2], transfer: &Transfer<'_>) -> Result<Self> {
        let like = |name, buffer: &Option<DeviceBuffer>, wanted: bool| {
            buffer.as_ref().filter(|_| wanted).map(|buffer| transfer.like(name, buffer)).transpose()
        };
        let weight = like("grad_weight", &self.weight, wanted[0])?;
        Ok(Self { weight, position: like("grad_position", &self.position, wanted[1])?, ..*self })
    }

    /// Copies gradients to host memory.
    pub(super) fn fetch(&self, dtype: DType, transfer: &Transfer<'_>) -> Result<Fetched> {
        let fetch = |name, buffer: &Option<DeviceBuffer>| {
            buffer.as_ref().map(|buffer| transfer.fetch(name, buffer, dtype)).transpose()
        };
        Ok(Fetched {
            weight: fetch("grad_weight", &self.weight)?.map(|data| (data, self.rows)),
            position: fetch("grad_position", &self.position)?.map(|data| (data, Rows::padded(self.dim))),
        })
    }
}

/// Gradients of parameters in host memory, as they lay on the device.
pub(super) struct Fetched {
    weight: Option<(Storage, Rows)>,
    position: Option<(Storage, Rows)>,
}

impl Fetched {
    /// Writes those that the caller has room for.
    pub(super) fn store(
        &self,
        weight: Option<&mut TensorViewMut<'_>>,
        position: Option<&mut TensorViewMut<'_>>,
    ) -> Result<()> {
        if let (Some((data, rows)), Some(target)) = (&self.weight, weight) {
            store(data, *rows, target, 1.0)?;
        }
        if let (Some((data, rows)), Some(target)) = (&self.position, position) {
            store(data, *rows, target, 1.0)?;
        }
        Ok(())
    }
}

/// A call, checked.
fn problem(backend: &CudaBackend, args: &CompressArgs<'_>, shape: &CompressShape) -> Result<CompressProblem> {
    let dtype = args.input.dtype();
    backend.check_dtype(dtype)?;
    check_batch(args.batch)?;
    let CompressShape { total_kv, num_kv_heads, dim, kernel_size, kernel_stride, .. } = *shape;
    let sizes = Sizes {
        total_q: args.batch.total_q(),
        total_kv,
        sequences: args.batch.sequences().len(),
        num_q_heads: num_kv_heads,
        num_kv_heads,
        head_dim: padded_dim(dim)?,
        dtype,
    };
    let windows = Windows { kernel_size, kernel_stride };
    Ok(CompressProblem { sizes, windows, kind: CompressionKind::of(&args.compression) })
}

/// The compressed rows.
pub(super) fn forward(backend: &CudaBackend, args: &CompressArgs<'_>, out: &mut TensorViewMut<'_>) -> Result<()> {
    let shape = args.shape_with_output(out)?;
    let problem = problem(backend, args, &shape)?;
    let (sizes, heads) = (&problem.sizes, problem.sizes.num_kv_heads);
    let planned = CompressForward::plan(backend.kernels(), &problem)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let batch = UploadedBatch::new(backend.device(), args.batch, &stream)?;
    let input = transfer.upload("input", &args.input, sizes.head_dim, 1.0)?;
    let parameters = Parameters::upload(&args.compression, [shape.dim, sizes.head_dim], &transfer)?;
    let result = transfer.poisoned("out", sizes.tensor_bytes(problem.total_compressed(), heads))?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let NsaParameters { weight, position } = parameters.spans();
    let tensors =
        CompressTensors { input: span(&input, heads, sizes), out: span(&result, heads, sizes), weight, position };
    planned.launch(&context, &batch.get(), &tensors)?;
    store(&transfer.fetch("out", &result, sizes.dtype)?, Rows::padded(sizes.head_dim), out, 1.0)
}

/// The gradients of input and parameters.
pub(super) fn backward(
    backend: &CudaBackend,
    args: &CompressArgs<'_>,
    grad_out: &TensorView<'_>,
    grads: &mut CompressGrads<'_>,
) -> Result<()> {
    let shape = grads.validate(args, grad_out)?;
    let problem = problem(backend, args, &shape)?;
    let (sizes, heads) = (&problem.sizes, problem.sizes.num_kv_heads);
    let planned = CompressBackward::plan(backend.kernels(), &problem)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let batch = UploadedBatch::new(backend.device(), args.batch, &stream)?;
    let input = transfer.upload("input", &args.input, sizes.head_dim, 1.0)?;
    let room = sizes.tensor_bytes(problem.total_compressed(), heads);
    let grad_out = transfer.upload_with_room("grad_out", grad_out, sizes.head_dim, room)?;
    let parameters = Parameters::upload(&args.compression, [shape.dim, sizes.head_dim], &transfer)?;
    let grad_input = transfer.like("grad_input", &input)?;
    let wanted = [grads.grad_weight.is_some(), grads.grad_position.is_some()];
    let grad_parameters = parameters.gradients(wanted, &transfer)?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let (own, gradients) = (parameters.spans(), grad_parameters.spans());
    let out = span(&grad_out, heads, sizes);
    let tensors = CompressBackwardTensors {
        forward: CompressTensors { input: span(&input, heads, sizes), out, weight: own.weight, position: own.position },
        grad_out: out,
        grad_input: span(&grad_input, heads, sizes),
        grad_weight: gradients.weight,
        grad_position: gradients.position,
        accumulate: false,
    };
    planned.launch(&context, &batch.get(), &tensors)?;
    let input = transfer.fetch("grad_input", &grad_input, sizes.dtype)?;
    let fetched = grad_parameters.fetch(sizes.dtype, &transfer)?;
    store(&input, Rows::padded(sizes.head_dim), &mut grads.grad_input, 1.0)?;
    fetched.store(grads.grad_weight.as_mut(), grads.grad_position.as_mut())
}
