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

# The calls on CUDA tensors allocate what they return with PyTorch's allocator, and run on its current stream.

def cuda_attention(stage: Stage, inputs: Packed, softmax_scale: float | None) -> tuple[Array, Array]: ...
def cuda_attention_backward(
    stage: Stage,
    inputs: Packed,
    softmax_scale: float | None,
    deterministic: bool,
    forward: tuple[Array, Array, Array, Array | None],
) -> tuple[Array, Array, Array]:
    """`forward` is `out`, `lse`, `grad_out` and `grad_lse`."""

def cuda_select(sizes: Sequence[int], inputs: Packed, softmax_scale: float | None) -> tuple[Array, Array, Array]: ...
def cuda_compress(
    geometry: tuple[int, int], inputs: tuple[Array, Array, Array], parameters: tuple[Parameters, Parameters]
) -> tuple[Array, Array, Array]: ...
def cuda_compress_backward(
    geometry: tuple[int, int],
    inputs: tuple[Array, Array, Array],
    parameters: tuple[Parameters, Parameters],
    grads_out: tuple[Array | None, Array | None],
) -> list[Array]: ...
def cuda_nsa(options: Options, inputs: NsaInputs, saved: Any) -> tuple[Array, Array]: ...
def cuda_nsa_backward(
    options: Options, inputs: NsaInputs, deterministic: bool, state: tuple[Array, Any, str], grad_out: Array
) -> list[Array]:
    """`state` is `topk_indices`, the parts of the state, and what of them is computed again."""
