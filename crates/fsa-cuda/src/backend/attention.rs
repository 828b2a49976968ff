//! Attention over host tensors: Stage `dense`, Stage `window`, Stage `compressed` and Stage `selected`.

use super::host::{Rows, Transfer, store};
use super::{CudaBackend, Scale, check_batch, padded_dim, span};
use crate::driver::{DeviceBuffer, UploadedBatch};
use crate::plan::{BandProblem, Keys, PlanOptions, Problem, Sizes};
use crate::selected::{SelectedBackward, SelectedForward};
use crate::stages::{AttentionGradTensors, AttentionTensors, BandBackward, BandForward, LaunchContext};
use fsa_core::{
    AttentionArgs, AttentionGradArgs, AttentionGrads, AttentionOutput, AttentionShape, AttentionStage, DType, Result,
    TensorView,
};

/// What the stages differ in.
pub(super) enum Kind<'a> {
    Band(BandProblem),
    Selected { topk_indices: TensorView<'a>, problem: Problem },
}

/// A call, checked.
pub(super) struct Call<'a> {
    pub args: &'a AttentionArgs<'a>,
    pub shape: AttentionShape,
    pub sizes: Sizes,
    pub kind: Kind<'a>,
    pub scale: Scale,
}

impl<'a> Call<'a> {
    /// Checks the arguments. Rows are padded with zeros to the next dimension that the kernels have.
    pub(super) fn new(stage: &'a AttentionStage<'a>, args: &'a AttentionArgs<'a>) -> Result<Self> {
        let shape = args.shape(stage)?;
        check_batch(args.batch)?;
        let dim = padded_dim(shape.head_dim.max(shape.value_dim))?;
        let sizes = Sizes::new(&shape, args.batch.sequences().len(), args.batch.total_kv(), dim);
        let kind = match (stage, Keys::of(stage)) {
            (AttentionStage::Selected { topk_indices, block_size, .. }, _) => {
                let problem = sizes.selected(*block_size, topk_indices.shape()[2]);
                Kind::Selected { topk_indices: *topk_indices, problem }
            }
            (_, Some(keys)) => Kind::Band(BandProblem { sizes, keys }),
            (_, None) => unreachable!("only stage `selected` sees no interval"),
        };
        Ok(Self { args, shape, sizes, kind, scale: Scale::of(args) })
    }

    /// Rows that key and value have room for on the device.
    fn total_keys(&self) -> usize {
        match &self.kind {
            Kind::Band(problem) => problem.total_keys(),
            Kind::Selected { problem, .. } => problem.total_kv,
        }
    }

    /// Vectors on the device are padded to the kernels' dimension.
    pub(super) fn rows(&self) -> Rows {
        Rows::padded(self.sizes.head_dim)
    }
}

/// Tensors of a call on the device.
pub(super) struct Uploaded {
    pub batch: UploadedBatch,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
    topk_indices: Option<DeviceBuffer>,
    pub out: DeviceBuffer,
    pub lse: DeviceBuffer,
}

impl Uploaded {
    pub(super) fn new(call: &Call<'_>, transfer: &Transfer<'_>) -> Result<Self> {
        let (args, sizes) = (call.args, &call.sizes);
        let (dim, room) = (sizes.head_dim, sizes.tensor_bytes(call.total_keys(), sizes.num_kv_heads));
        let topk_indices = match &call.kind {
            Kind::Band(_) => None,
            Kind::Selected { topk_indices, .. } => Some(transfer.upload_plain("topk_indices", topk_indices)?),
        };
        Ok(Self {
            batch: UploadedBatch::new(transfer.device, args.batch, transfer.stream)?,
            query: transfer.upload("query", &args.query, dim, call.scale.sign)?,
            key: transfer.upload_with_room("key", &args.key, dim, room)?,
            value: transfer.upload_with_room("value", &args.value, dim, room)?,
            topk_indices,
            out: transfer.poisoned("out", sizes.tensor_bytes(sizes.total_q, sizes.num_q_heads))?,
            lse: transfer.poisoned("lse", sizes.lse_bytes())?,
        })
    }

    pub(super) fn tensors(&self, sizes: &Sizes) -> AttentionTensors<'_> {
        let (q, kv) = (sizes.num_q_heads, sizes.num_kv_heads);
        AttentionTensors {
            query: span(&self.query, q, sizes),
            key: span(&self.key, kv, sizes),
            value: span(&self.value, kv, sizes),
            out: span(&self.out, q, sizes),
            lse: self.lse.span(),
        }
    }
}

/// A forward of either kind.
enum Forward {
    Band(BandForward),
    Selected(SelectedForward),
}

impl Forward {
    fn plan(backend: &CudaBackend, call: &Call<'_>) -> Result<Self> {
        let kernels = backend.kernels();
        Ok(match &call.kind {
            Kind::Band(problem) => Self::Band(BandForward::plan(kernels, problem)?),
            Kind::Selected { problem, .. } => {
                Self::Selected(SelectedForward::plan(kernels, problem, &PlanOptions::default())?)
            }
        })
    }

    fn workspace_bytes(&self) -> usize {
        match self {
            Self::Band(planned) => planned.workspace_bytes(),
            Self::Selected(planned) => planned.workspace_bytes(),
        }
    }
}

/// Writes `out` and `lse`.
pub(super) fn forward(
    backend: &CudaBackend,
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    output: &mut AttentionOutput<'_>,
) -> Result<()> {
    let call = Call::new(stage, args)?;
    output.validate(&call.shape)?;
    let planned = Forward::plan(backend, &call)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let uploaded = Uploaded::new(&call, &transfer)?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let (batch, tensors) = (uploaded.batch.get(), uploaded.tensors(&call.sizes));
    match (&planned, &uploaded.topk_indices) {
        (Forward::Selected(planned), Some(ids)) => {
            planned.launch(&context, &batch, &tensors.selected(ids.span()), call.scale.size)?;
        }
        (Forward::Band(planned), _) => planned.launch(&context, &batch, &tensors, call.scale.size)?,
        (Forward::Selected(_), None) => unreachable!("uploaded with the others"),
    }
    write(&call, &uploaded, &transfer, output)
}

/// Copies `out` and `lse` to the caller. Everything that can fail comes before the first write.
pub(super) fn write(
    call: &Call<'_>,
    uploaded: &Uploaded,
    transfer: &Transfer<'_>,
    output: &mut AttentionOutput<'_>,
) -> Result<()> {
    let out = transfer.fetch("out", &uploaded.out, call.sizes.dtype)?;
    let lse = transfer.fetch("lse", &uploaded.lse, DType::F32)?;
    store(&out, call.rows(), &mut output.out, 1.0)?;
    store(&lse, Rows::plain(call.sizes.total_q), &mut output.lse, 1.0)
}

/// A backward of either kind.
enum Backward {
    Band(BandBackward),
    Selected(SelectedBackward),
}

impl Backward {
    fn plan(backend: &CudaBackend, call: &Call<'_>) -> Result<Self> {
        let (kernels, options) = (backend.kernels(), backend.options());
        Ok(match &call.kind {
            Kind::Band(problem) => Self::Band(BandBackward::plan(kernels, problem, &options)?),
            Kind::Selected { problem, .. } => Self::Selected(SelectedBackward::plan(kernels, problem, &options)?),
        })
    }

    fn workspace_bytes(&self) -> usize {
        match self {
            Self::Band(planned) => planned.workspace_bytes(),
            Self::Selected(planned) => planned.workspace_bytes(),
        }
    }
}

/// What a backward has on the device besides its forward's tensors.
struct Gradients {
    out: DeviceBuffer,
    lse: Option<DeviceBuffer>,
    query: DeviceBuffer,
    key: DeviceBuffer,
    value: DeviceBuffer,
}

impl Gradients {
    fn new(call: &Call<'_>, grad: &AttentionGradArgs<'_>, of: &Uploaded, transfer: &Transfer<'_>) -> Result<Self> {
        let lse = grad.grad_lse.as_ref().map(|grad| transfer.upload_plain("grad_lse", grad));
        Ok(Self {
            out: transfer.upload("grad_out", &grad.grad_out, call.sizes.head_dim, 1.0)?,
            lse: lse.transpose()?,
            query: transfer.like("grad_query", &of.query)?,
            key: transfer.like("grad_key", &of.key)?,
            value: transfer.like("grad_value", &of.value)?,
        })
    }

    fn tensors<'a>(&'a self, forward: AttentionTensors<'a>, sizes: &Sizes) -> AttentionGradTensors<'a> {
        let (q, kv) = (sizes.num_q_heads, sizes.num_kv_heads);
        AttentionGradTensors {
            forward,
            grad_out: span(&self.out, q, sizes),
            grad_lse: self.lse.as_ref().map(DeviceBuffer::span),
            grad_query: span(&self.query, q, sizes),
            grad_key: span(&self.key, kv, sizes),
            grad_value: span(&self.value, kv, sizes),
        }
    }
}

/// Writes the gradients of query, key and value.
pub(super) fn backward(
    backend: &CudaBackend,
    stage: &AttentionStage<'_>,
    args: &AttentionArgs<'_>,
    grad: &AttentionGradArgs<'_>,
    grads: &mut AttentionGrads<'_>,
) -> Result<()> {
    let call = Call::new(stage, args)?;
    grad.validate(&call.shape)?;
    grads.validate(&call.shape)?;
    let planned = Backward::plan(backend, &call)?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let mut uploaded = Uploaded::new(&call, &transfer)?;
    uploaded.out = transfer.upload("out", &grad.out, call.sizes.head_dim, 1.0)?;
    uploaded.lse = transfer.upload_plain("lse", &grad.lse)?;
    let gradients = Gradients::new(&call, grad, &uploaded, &transfer)?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let (batch, tensors) = (uploaded.batch.get(), gradients.tensors(uploaded.tensors(&call.sizes), &call.sizes));
    match (&planned, &uploaded.topk_indices) {
        (Backward::Selected(planned), Some(ids)) => {
            planned.launch(&context, &batch, &tensors.selected(ids.span()), call.scale.size)?;
        }
        (Backward::Band(planned), _) => planned.launch(&context, &batch, &tensors, call.scale.size)?,
        (Backward::Selected(_), None) => unreachable!("uploaded with the others"),
    }
    let Gradients { query, key, value, .. } = &gradients;
    let outputs = [("grad_query", query), ("grad_key", key), ("grad_value", value)];
    let fetched: Result<Vec<_>> =
        outputs.iter().map(|(name, buffer)| transfer.fetch(name, buffer, call.sizes.dtype)).collect();
    let AttentionGrads { grad_query, grad_key, grad_value } = grads;
    let targets = [(grad_query, call.scale.sign), (grad_key, 1.0), (grad_value, 1.0)];
    fetched?.iter().zip(targets).try_for_each(|(data, (target, factor))| store(data, call.rows(), target, factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::HEAD_DIMS;
    use fsa_core::Batch;

    #[test]
    fn ids_are_validated_on_the_host_where_that_is_asked_for() {
        let (batch, ids) = (Batch::single(32), vec![1; 32]);
        let query = fsa_core::Tensor::zeros("query", DType::Bf16, &[32, 1, 8]).expect("small");
        let (query, softmax_scale) = (query.view(), None);
        let args = AttentionArgs { query, key: query, value: query, batch: &batch, softmax_scale };
        let topk_indices = TensorView::new("topk_indices", &ids, &[1, 32, 1]).expect("shape");
        let call = |validate| {
            let stage = AttentionStage::Selected { topk_indices, block_size: 16, validate };
            Call::new(&stage, &args).map(|call| call.sizes)
        };
        assert_eq!(call(false).expect("any i32 is safe").head_dim, HEAD_DIMS[0]);
        let error = call(true).expect_err("block 1 is in the future of row 0");
        assert_eq!(error.argument(), Some("topk_indices"));
        assert!(error.to_string().contains("1 in row [0, 0]"), "{error}");
    }
}
