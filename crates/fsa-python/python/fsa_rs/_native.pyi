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
# stream, workspace
Context: TypeAlias = tuple[int, Described]
# (topk_indices, block_size), (kernel_size, kernel_stride), (window_size,), () for dense
CudaStage: TypeAlias = tuple[Described, int] | tuple[int, int] | tuple[int] | tuple[()]
# q, k, v, cu_seqlens_q, cu_seqlens_k; out, lse
Tensors: TypeAlias = Sequence[Described]
# weight, position
CudaParameters: TypeAlias = tuple[Described | None, Described | None]
# weight, position
Parameters: TypeAlias = tuple[Array | None, Array | None]
# sizes, rope, softmax_scale
Options: TypeAlias = tuple[Sequence[int], Sequence[float], float | None]
# packed inputs, gates, parameters of keys, of values
NsaInputs: TypeAlias = tuple[Packed, Array, Parameters, Parameters]

__version__: str
#: Dimensions of the CUDA kernels; vectors are padded to the next.
HEAD_DIMS: list[int]

def attention(stage: Stage, inputs: Packed, softmax_scale: float | None, outputs: tuple[Array, Array]) -> None: ...
def attention_backward(
    stage: Stage,
    inputs: Packed,
    softmax_scale: float | None,
    forward: tuple[Array, Array, Array, Array | None],
    grads: tuple[Array, Array, Array],
) -> None: ...
def validate(rows: Sequence[int], block_size: int, topk_indices: Array, cu_seqlens: tuple[Array, Array]) -> None: ...
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
def check_options(options: Options, heads: tuple[int, int], head_dim: int) -> None:
    """Checks what a layer is made of; `heads` are those of queries and of keys."""

def nsa_backward(
    options: Options,
    inputs: NsaInputs,
    forward: tuple[Array, Sequence[Array]],
    grad_out: Array,
    grads: tuple[tuple[Array, Array, Array, Array], Parameters, Parameters],
) -> None: ...

class CudaPlan:
    """A call on a CUDA device, planned."""

# Functions that plan return the plan, the dimension that it takes vectors padded to, and the size of its workspace in
# bytes. They take tensors as the user gave them; the others take padded ones.

def cuda_attention_plan(
    inputs: Tensors, stage: CudaStage, backward: bool, deterministic: bool
) -> tuple[CudaPlan, int, int]: ...
def cuda_attention(
    plan: CudaPlan, context: Context, softmax_scale: float, tensors: Tensors, topk_indices: Described | None
) -> None: ...
def cuda_attention_backward(
    plan: CudaPlan,
    context: Context,
    softmax_scale: float,
    tensors: Tensors,
    topk_indices: Described | None,
    gradients: Sequence[Described | None],
) -> None:
    """`gradients` are `grad_out`, `grad_lse`, and the three that are written."""

def cuda_select_plan(inputs: Tensors, sizes: Sequence[int]) -> tuple[CudaPlan, int, int]: ...
def cuda_select(
    plan: CudaPlan, context: Context, softmax_scale: float, tensors: Tensors, topk_indices: Described
) -> None: ...
def cuda_compress_plan(
    name: str, geometry: Sequence[int], input: Tensors, parameters: CudaParameters, backward: bool
) -> tuple[CudaPlan, int, int]: ...
def cuda_compress(plan: CudaPlan, context: Context, tensors: Tensors, parameters: CudaParameters) -> None:
    """`tensors` are the input, `cu_seqlens_k` and the output."""

def cuda_compress_backward(
    plan: CudaPlan,
    context: Context,
    tensors: Tensors,
    parameters: CudaParameters,
    grad_input: Described,
    grad_parameters: CudaParameters,
) -> None: ...
def cuda_nsa_plan(
    options: tuple[Sequence[int], Sequence[float]], inputs: Any, saves: bool, backward: bool, deterministic: bool
) -> tuple[CudaPlan, int, int]: ...
def cuda_nsa(
    plan: CudaPlan,
    context: Context,
    softmax_scale: float,
    inputs: Any,
    outputs: tuple[Described, Described],
    saved: Any,
    recompute: str | None,
) -> None:
    """With `recompute`, `"rotated"` or `"all"`, the second of `outputs` is read, and that of `saved` is written."""

def cuda_nsa_backward(
    plan: CudaPlan,
    context: Context,
    softmax_scale: float,
    inputs: Any,
    forward: tuple[Described, Any, Described],
    grads: Any,
) -> None: ...
