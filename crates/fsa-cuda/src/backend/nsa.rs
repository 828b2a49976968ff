//! Stage `nsa` over host tensors: the whole operation and its backward.

use super::combine::gates;
use super::compress::{Fetched, Parameters};
use super::host::{Rows, Transfer, store};
use super::{CudaBackend, Scale, check_batch, padded_dim, span};
use crate::driver::{DeviceBuffer, UploadedBatch};
use crate::plan::{NsaForwardPlan, NsaProblem, Pass, Sizes};
use crate::stages::{
    Gates, LaunchContext, NsaBackward, NsaBackwardTensors, NsaForward as PlannedForward, NsaForwardTensors,
    NsaSavedTensors,
};
use fsa_core::ops::{BRANCHES, GateLayout};
use fsa_core::{
    AttentionShape, DType, NsaArgs, NsaForward, NsaGrads, NsaSaved, Result, Tensor, TensorView, TensorViewMut,
};

/// A call, checked.
struct Call<'a> {
    args: &'a NsaArgs<'a>,
    shape: AttentionShape,
    problem: NsaProblem,
    scale: Scale,
    gates: GateLayout,
}

impl<'a> Call<'a> {
    fn new(backend: &CudaBackend, args: &'a NsaArgs<'a>, shape: AttentionShape) -> Result<Self> {
        backend.check_dtype(shape.dtype)?;
        check_batch(args.batch)?;
        let dim = padded_dim(shape.head_dim.max(shape.value_dim))?;
        let sizes = Sizes::new(&shape, args.batch.sequences().len(), args.batch.total_kv(), dim);
        let (problem, scale) = (NsaProblem::of(args, &sizes), Scale::of(&args.attention()));
        let gates = GateLayout::of(&args.gates, shape.dtype, shape.out())?;
        Ok(Self { args, shape, problem, scale, gates })
    }

    fn sizes(&self) -> &Sizes {
        &self.problem.sizes
    }

    fn rope(&self) -> Option<(&'a fsa_core::Rope, usize)> {
        self.args.rope.map(|rope| (rope, self.shape.head_dim))
    }

    fn rows(&self) -> Rows {
        Rows::padded(self.sizes().head_dim)
    }
}

/// Inputs of both passes on the device.
struct Inputs {
    batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    gates: DeviceBuffer,
    parameters: [Parameters; 2],
}

impl Inputs {
    fn upload(call: &Call<'_>, transfer: &Transfer<'_>) -> Result<Self> {
        let (args, dim) = (call.args, call.sizes().head_dim);
        let AttentionShape { head_dim, value_dim, .. } = call.shape;
        Ok(Self {
            batch: UploadedBatch::new(transfer.device, args.batch, transfer.stream)?,
            query: transfer.upload("query", &args.query, dim, call.scale.sign)?,
            key: transfer.upload("key", &args.key, dim, 1.0)?,
            value: transfer.upload("value", &args.value, dim, 1.0)?,
            gates: transfer.upload_plain("gates", &args.gates)?,
            parameters: [
                Parameters::upload(&args.key_compression, [head_dim, dim], transfer)?,
                Parameters::upload(&args.value_compression, [value_dim, dim], transfer)?,
            ],
        })
    }

    fn gates(&self, call: &Call<'_>) -> Gates<'_> {
        gates(&self.gates, call.gates, call.shape.num_q_heads)
    }
}

/// The saved state on the device.
struct Saved {
    rotated: Option<[DeviceBuffer; 2]>,
    compressed: [DeviceBuffer; 2],
    branches: [DeviceBuffer; 3],
    lse: [DeviceBuffer; 3],
}

/// Three of a kind.
fn three<T>(make: impl Fn(usize) -> Result<T>) -> Result<[T; 3]> {
    Ok([make(0)?, make(1)?, make(2)?])
}

impl Saved {
    fn poisoned(call: &Call<'_>, inputs: &Inputs, transfer: &Transfer<'_>) -> Result<Self> {
        let (sizes, rows) = (call.sizes(), call.problem.total_compressed());
        let compressed = || transfer.poisoned("compressed", sizes.tensor_bytes(rows, sizes.num_kv_heads));
        let rotated = || -> Result<[DeviceBuffer; 2]> {
            Ok([transfer.like("rotated query", &inputs.query)?, transfer.like("rotated key", &inputs.key)?])
        };
        Ok(Self {
            rotated: call.args.rope.map(|_| rotated()).transpose()?,
            compressed: [compressed()?, compressed()?],
            branches: three(|b| transfer.poisoned(BRANCHES[b], sizes.tensor_bytes(sizes.total_q, sizes.num_q_heads)))?,
            lse: three(|_| transfer.poisoned("lse", sizes.lse_bytes()))?,
        })
    }

    fn upload(call: &Call<'_>, saved: &NsaSaved, transfer: &Transfer<'_>) -> Result<Self> {
        let (sizes, dim) = (call.sizes(), call.sizes().head_dim);
        let room = sizes.tensor_bytes(call.problem.total_compressed(), sizes.num_kv_heads);
        let compressed = |tensor: &Tensor| transfer.upload_with_room("compressed", &tensor.view(), dim, room);
        let rotated = |[query, key]: &[Tensor; 2]| -> Result<[DeviceBuffer; 2]> {
            let query = transfer.upload("rotated query", &query.view(), dim, call.scale.sign)?;
            Ok([query, transfer.upload("rotated key", &key.view(), dim, 1.0)?])
        };
        Ok(Self {
            rotated: saved.rotated.as_ref().map(rotated).transpose()?,
            compressed: [compressed(&saved.compressed[0])?, compressed(&saved.compressed[1])?],
            branches: three(|b| transfer.upload(BRANCHES[b], &saved.branches[b].view(), dim, 1.0))?,
            lse: three(|b| transfer.upload_plain("lse", &saved.lse[b].view()))?,
        })
    }

    fn tensors(&self, sizes: &Sizes) -> NsaSavedTensors<'_> {
        let (q, kv) = (sizes.num_q_heads, sizes.num_kv_heads);
        let rotated = self.rotated.as_ref();
        NsaSavedTensors {
            rotated: rotated.map(|[query, key]| [span(query, q, sizes), span(key, kv, sizes)]),
            compressed: self.compressed.each_ref().map(|buffer| span(buffer, kv, sizes)),
            branches: self.branches.each_ref().map(|buffer| span(buffer, q, sizes)),
            lse: self.lse.each_ref().map(DeviceBuffer::span),
        }
    }

    /// The state in host memory, where the backend's padding and sign are nobody's business.
    fn fetch(&self, call: &Call<'_>, topk_indices: Tensor, transfer: &Transfer<'_>) -> Result<NsaSaved> {
        let (args, shape, dtype, rows) = (call.args, &call.shape, call.shape.dtype, call.rows());
        let windows = args.batch.total_compressed(args.config.kernel_size, args.config.kernel_stride);
        let tensor = |name: &str, buffer: &DeviceBuffer, factor: f32, shape: &[usize]| {
            transfer.tensor(name, (buffer, rows, factor), dtype, shape)
        };
        let compressed =
            |c: usize, dim| tensor("compressed", &self.compressed[c], 1.0, &[windows, shape.num_kv_heads, dim]);
        let rotated = |[query, key]: &[DeviceBuffer; 2]| -> Result<[Tensor; 2]> {
            let query = tensor("rotated query", query, call.scale.sign, args.query.shape())?;
            Ok([query, tensor("rotated key", key, 1.0, args.key.shape())?])
        };
        let lse_rows = Rows::plain(shape.total_q);
        Ok(NsaSaved {
            rotated: self.rotated.as_ref().map(rotated).transpose()?,
            compressed: [compressed(0, shape.head_dim)?, compressed(1, shape.value_dim)?],
            branches: three(|b| tensor(BRANCHES[b], &self.branches[b], 1.0, &shape.out()))?,
            lse: three(|b| transfer.tensor("lse", (&self.lse[b], lse_rows, 1.0), DType::F32, &shape.lse()))?,
            topk_indices,
        })
    }
}

/// The whole operation.
pub(super) fn forward(
    backend: &CudaBackend,
    args: &NsaArgs<'_>,
    out: &mut TensorViewMut<'_>,
    save: bool,
) -> Result<NsaForward> {
    let call = Call::new(backend, args, args.shape_with_output(out)?)?;
    let (problem, sizes, heads) = (&call.problem, call.sizes(), call.shape.num_q_heads);
    let planned = PlannedForward::plan(backend.kernels(), problem, call.rope(), &backend.options(), save)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let inputs = Inputs::upload(&call, &transfer)?;
    let saved = if save { Some(Saved::poisoned(&call, &inputs, &transfer)?) } else { None };
    let result = transfer.like("out", &inputs.query)?;
    let lists = transfer.poisoned("topk_indices", problem.topk_indices_bytes())?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let tensors = NsaForwardTensors {
        query: span(&inputs.query, heads, sizes),
        key: span(&inputs.key, sizes.num_kv_heads, sizes),
        value: span(&inputs.value, sizes.num_kv_heads, sizes),
        gates: inputs.gates(&call),
        parameters: inputs.parameters.each_ref().map(Parameters::spans),
        out: span(&result, heads, sizes),
        topk_indices: lists.span(),
        saved: saved.as_ref().map(|saved| saved.tensors(sizes)),
    };
    planned.launch(&context, &inputs.batch.get(), &tensors, call.scale.size)?;
    let data = transfer.fetch("out", &result, sizes.dtype)?;
    let shape = [sizes.num_kv_heads, sizes.total_q, problem.topk];
    let ids = transfer.tensor("topk_indices", (&lists, Rows::plain(problem.topk), 1.0), DType::I32, &shape)?;
    let forward = match &saved {
        None => NsaForward { topk_indices: Some(ids), saved: None },
        Some(saved) => NsaForward { topk_indices: None, saved: Some(saved.fetch(&call, ids, &transfer)?) },
    };
    store(&data, call.rows(), out, 1.0)?;
    Ok(forward)
}

/// Gradients on the device.
struct Gradients {
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    gates: DeviceBuffer,
    parameters: [Parameters; 2],
}

impl Gradients {
    fn poisoned(inputs: &Inputs, grads: &NsaGrads<'_>, transfer: &Transfer<'_>) -> Result<Self> {
        let wanted = [&grads.key_compression, &grads.value_compression]
            .map(|grads| [grads.grad_weight.is_some(), grads.grad_position.is_some()]);
        Ok(Self {
            query: transfer.like("grad_query", &inputs.query)?,
            key: transfer.like("grad_key", &inputs.key)?,
            value: transfer.like("grad_value", &inputs.value)?,
            gates: transfer.like("grad_gates", &inputs.gates)?,
            parameters: [
                inputs.parameters[0].gradients(wanted[0], transfer)?,
                inputs.parameters[1].gradients(wanted[1], transfer)?,
            ],
        })
    }

    /// Copies them to the caller. Everything that can fail comes before the first write.
    fn write(&self, call: &Call<'_>, grads: &mut NsaGrads<'_>, transfer: &Transfer<'_>) -> Result<()> {
        let dtype = call.shape.dtype;
        let parts = [
            ("grad_query", &self.query, call.rows(), call.scale.sign),
            ("grad_key", &self.key, call.rows(), 1.0),
            ("grad_value", &self.value, call.rows(), 1.0),
            ("grad_gates", &self.gates, Rows::plain(3), 1.0),
        ];
        let fetched: Result<Vec<_>> =
            parts.iter().map(|(name, buffer, ..)| transfer.fetch(name, buffer, dtype)).collect();
        let parameters: Result<Vec<Fetched>> =
            self.parameters.iter().map(|parameters| parameters.fetch(dtype, transfer)).collect();
        let (fetched, parameters) = (fetched?, parameters?);
        let NsaGrads { grad_query, grad_key, grad_value, grad_gates, key_compression, value_compression } = grads;
        let targets = [grad_query, grad_key, grad_value, grad_gates];
        for ((data, (_, _, rows, factor)), target) in fetched.iter().zip(parts).zip(targets) {
            store(data, rows, target, factor)?;
        }
        let targets = parameters.iter().zip([key_compression, value_compression]);
        targets
            .into_iter()
            .try_for_each(|(data, grads)| data.store(grads.grad_weight.as_mut(), grads.grad_position.as_mut()))
    }
}

/// Its backward.
pub(super) fn backward(
    backend: &CudaBackend,
    args: &NsaArgs<'_>,
    saved: &NsaSaved,
    grad_out: &TensorView<'_>,
    grads: &mut NsaGrads<'_>,
) -> Result<()> {
    let call = Call::new(backend, args, grads.validate(args, saved, grad_out)?)?;
    let (problem, sizes, heads) = (&call.problem, call.sizes(), call.shape.num_q_heads);
    let planned = NsaBackward::plan(backend.kernels(), problem, call.rope(), &backend.options())?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let inputs = Inputs::upload(&call, &transfer)?;
    let state = Saved::upload(&call, saved, &transfer)?;
    let lists = transfer.upload_plain("topk_indices", &saved.topk_indices.view())?;
    let grad_out = transfer.upload("grad_out", grad_out, sizes.head_dim, 1.0)?;
    let gradients = Gradients::poisoned(&inputs, grads, &transfer)?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let (of_q, of_kv) = (|buffer| span(buffer, heads, sizes), |buffer| span(buffer, sizes.num_kv_heads, sizes));
    let tensors = NsaBackwardTensors {
        query: of_q(&inputs.query),
        key: of_kv(&inputs.key),
        value: of_kv(&inputs.value),
        gates: inputs.gates(&call),
        parameters: inputs.parameters.each_ref().map(Parameters::spans),
        saved: state.tensors(sizes),
        topk_indices: lists.span(),
        grad_out: of_q(&grad_out),
        grad_query: of_q(&gradients.query),
        grad_key: of_kv(&gradients.key),
        grad_value: of_kv(&gradients.value),
        grad_gates: gradients.gates.span(),
        grad_parameters: gradients.parameters.each_ref().map(Parameters::spans),
    };
    planned.launch(&context, &inputs.batch.get(), &tensors, call.scale.size)?;
    gradients.write(&call, grads, &transfer)
}

/// Scratch memory of a forward that saves nothing.
pub(super) fn workspace_bytes(backend: &CudaBackend, args: &NsaArgs<'_>) -> Result<usize> {
    let call = Call::new(backend, args, args.shape()?)?;
    let (set, facts) = (backend.kernels().set(), backend.device().facts());
    call.problem.check(facts)?;
    let options = backend.kernels().routed(&call.problem.selected(), Pass::Forward, &backend.options());
    let plan = NsaForwardPlan::new(&call.problem, set, facts, &options, false)?;
    Ok(plan.workspace.size_bytes())
}
