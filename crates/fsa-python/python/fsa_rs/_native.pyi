"""The Rust extension. Private: `fsa_rs` is the public face.

An `Array` is a `numpy.ndarray` or a `torch.Tensor`. Functions write into the arrays that they are given as
outputs and raise `ValueError` (an argument breaks its contract), `NotImplementedError` (a dtype, size or device
that is not supported), `MemoryError` or `RuntimeError`, before anything is written. They release the
interpreter lock while they compute.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

Array: TypeAlias = Any

# (topk_indices, block_size, validate), (kernel_size, kernel_stride), (window_size,), () for dense
Stage: TypeAlias = tuple[Array, int, bool] | tuple[int, int] | tuple[int] | tuple[()]
# q, k, v, cu_seqlens_q, cu_seqlens_k
Packed: TypeAlias = tuple[Array, Array, Array, Array, Array]
# data_ptr, device, dtype, shape, strides of a CUDA tensor
Described: TypeAlias = tuple[int, int, str, Sequence[int], Sequence[int]]
# q, k, v, topk_indices, cu_seqlens_q, cu_seqlens_k
Inputs: TypeAlias = tuple[Described, Described, Described, Described, Described, Described]
# the same, out, lse
ForwardTensors: TypeAlias = tuple[
    Described, Described, Described, Described, Described, Described, Described, Described
]
# grad_out, grad_lse, grad_q, grad_k, grad_v
BackwardTensors: TypeAlias = tuple[Described, Described | None, Described, Described, Described]
# weight, position
Parameters: TypeAlias = tuple[Array | None, Array | None]
# sizes, rope, softmax_scale
Options: TypeAlias = tuple[Sequence[int], Sequence[float], float | None]
# packed inputs, gates, parameters of keys, of values
NsaInputs: TypeAlias = tuple[Packed, Array, Parameters, Parameters]

__version__: str

def attention(stage: Stage, inputs: Packed, softmax_scale: float | None, outputs: tuple[Array, Array]) -> None: ...
def attention_backward(
    stage: Stage,
    inputs: Packed,
    softmax_scale: float | None,
    forward: tuple[Array, Array, Array, Array | None],
    grads: tuple[Array, Array, Array],
) -> None: ...
def validate(rows: Sequence[int], block_size: int, topk_indices: Array, cu_seqlens: tuple[Array, Array]) -> None: ...

class SelectedPlan:
    """Stage `selected` on a CUDA device, planned. A context is a stream's handle and the workspace."""

    def forward(self, context: tuple[int, Described], softmax_scale: float, tensors: ForwardTensors) -> None: ...
    def backward(
        self,
        context: tuple[int, Described],
        softmax_scale: float,
        tensors: ForwardTensors,
        gradients: BackwardTensors,
    ) -> None: ...

def selected_plan(
    inputs: Inputs, block_size: int, backward: bool, deterministic: bool
) -> tuple[SelectedPlan, int, int]:
    """The plan, the dimension that it takes vectors padded to, the size of its workspace in bytes."""

def select(
    sizes: Sequence[int],
    inputs: Packed,
    softmax_scale: float | None,
    outputs: tuple[Array, Array, Array],
) -> None: ...
def compress(
    name: str,
    geometry: tuple[int, int],
    input: tuple[Array, Array],
    parameters: Parameters,
    out: Array,
) -> None: ...
def compress_backward(
    name: str,
    geometry: tuple[int, int],
    input: tuple[Array, Array],
    parameters: Parameters,
    grad_out: Array,
    grads: tuple[Array, Array | None, Array | None],
) -> None: ...
def nsa(options: Options, inputs: NsaInputs, outputs: tuple[Array, Array], state: Sequence[Array]) -> None: ...
def nsa_backward(
    options: Options,
    inputs: NsaInputs,
    forward: tuple[Array, Sequence[Array]],
    grad_out: Array,
    grads: tuple[tuple[Array, Array, Array, Array], Parameters, Parameters],
) -> None: ...
