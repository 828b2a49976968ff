//! Stage `select` over host tensors, together with compressed attention.

use super::CudaBackend;
use super::attention::{Call, Uploaded, write};
use super::host::{Rows, store};
use crate::plan::SelectProblem;
use crate::stages::{LaunchContext, Select};
use fsa_core::{AttentionOutput, DType, Result, SelectArgs, TensorViewMut};

/// Writes `out`, `lse` and `topk_indices`.
pub(super) fn forward(
    backend: &CudaBackend,
    args: &SelectArgs<'_>,
    output: &mut AttentionOutput<'_>,
    topk_indices: &mut TensorViewMut<'_>,
) -> Result<()> {
    let shape = args.shape(topk_indices)?;
    output.validate(&shape)?;
    let stage = args.stage();
    let call = Call::new(&stage, &args.attention)?;
    let problem = SelectProblem::new(&call.sizes, args.config);
    let planned = Select::plan(backend.kernels(), &problem, &backend.options())?;
    let stream = backend.stream();
    let transfer = backend.transfer(&stream);
    let uploaded = Uploaded::new(&call, &transfer)?;
    let lists = transfer.poisoned("topk_indices", problem.topk_indices_bytes())?;
    let workspace = transfer.poisoned("workspace", planned.workspace_bytes())?;
    let context = LaunchContext { stream: &stream, workspace: workspace.span() };
    let tensors = uploaded.tensors(&call.sizes);
    planned.launch(&context, &uploaded.batch.get(), &tensors, &lists.span(), call.scale.size)?;
    let ids = transfer.fetch("topk_indices", &lists, DType::I32)?;
    write(&call, &uploaded, &transfer, output)?;
    store(&ids, Rows::plain(problem.topk), topk_indices, 1.0)
}
