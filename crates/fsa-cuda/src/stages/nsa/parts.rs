//! What the stages of a call of the whole read and write of its tensors.

use super::tensors::{NsaForwardTensors, NsaSavedTensors};
use crate::driver::{DeviceBatch, DeviceSpan};
use crate::launch::{LaunchContext, TensorSpan};
use crate::plan::{ForwardTemporaries, NsaProblem, Sizes, Slot};
use crate::stages::{AttentionTensors, CompressTensors};
use fsa_core::{Error, Result};

/// What the compression of keys, or of values, takes.
pub(super) fn compress_tensors<'a>(
    tensors: &NsaForwardTensors<'a>,
    c: usize,
    out: &TensorSpan<'a>,
) -> CompressTensors<'a> {
    let (input, parameters) = ([tensors.key, tensors.value][c], tensors.parameters[c]);
    CompressTensors { input, out: *out, weight: parameters.weight, position: parameters.position }
}

/// Query and key as attention reads them.
fn rotated<'a>(tensors: &NsaForwardTensors<'a>, state: &NsaSavedTensors<'a>) -> [TensorSpan<'a>; 2] {
    state.rotated.unwrap_or([tensors.query, tensors.key])
}

/// What attention to the selected blocks, or to the window, reads and writes.
pub(super) fn local_attention<'a>(
    branch: usize,
    tensors: &NsaForwardTensors<'a>,
    state: &NsaSavedTensors<'a>,
) -> AttentionTensors<'a> {
    attention(branch, [rotated(tensors, state)[1], tensors.value], tensors, state)
}

/// What a branch reads and writes.
pub(super) fn attention<'a>(
    branch: usize,
    [key, value]: [TensorSpan<'a>; 2],
    tensors: &NsaForwardTensors<'a>,
    state: &NsaSavedTensors<'a>,
) -> AttentionTensors<'a> {
    let [query, _] = rotated(tensors, state);
    AttentionTensors { query, key, value, out: state.branches[branch], lse: state.lse[branch] }
}

/// Compressed keys and values of all heads of `sizes`, in the workspace or in its scratch.
pub(super) fn compressed<'a>(
    temporaries: &ForwardTemporaries,
    sizes: &Sizes,
    memory: &DeviceSpan<'a>,
) -> [TensorSpan<'a>; 2] {
    let tensor = |slot: &Slot| TensorSpan::contiguous(slot.span(memory), sizes.num_kv_heads, sizes.head_dim);
    temporaries.compressed.each_ref().map(tensor)
}

/// A rotary embedding is there if the problem says so.
pub(super) fn check_rope(problem: &NsaProblem, given: bool) -> Result<()> {
    let word = |there| if there { "a rotary embedding" } else { "none" };
    if problem.rope == given { Ok(()) } else { Err(Error::input("rope", word(problem.rope), word(given))) }
}

/// Everything that a call gives to the device.
pub(super) fn call(
    mut numbers: Vec<u64>,
    context: &LaunchContext<'_>,
    batch: &DeviceBatch<'_>,
    softmax_scale: f32,
) -> Vec<u64> {
    numbers.extend(batch.spans().map(|span| span.address().0));
    numbers.extend([context.workspace.address().0, softmax_scale.to_bits().into()]);
    numbers
}
