"""The calls on PyTorch tensors: custom operators ``torch.ops.fsa_rs.*`` with fake kernels and gradients.

An operator allocates its outputs and hands tensors to the extension, which reads address, shape, strides and
device from them. Sizes follow from shapes alone: nothing is copied to the host to learn one. On CUDA tensors
they have kernels of their own, in `_torch_cuda`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, _torch_cuda
from ._torch_nsa import nsa

__all__ = ["Tensor", "attention", "compress", "compressed_cu_seqlens", "nsa", "select"]

PACKED = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"


def _contiguous_zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


# Stages dense, window, compressed, selected. `stage` is None, [window_size], [kernel_size, kernel_stride], or,
# with topk_indices, [block_size, validate]. An empty list would be one of tensors to autograd.

ATTENTION = f"{PACKED}, float? softmax_scale, Tensor? topk_indices, int[]? stage, bool deterministic"


def _native_stage(topk_indices: Tensor | None, stage: list[int] | None) -> Any:
    if stage is None:
        return ()
    return tuple(stage) if topk_indices is None else (topk_indices, stage[0], bool(stage[1]))


def _allocate_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], *v.shape[-1:]))
    return out, q.new_empty((*q.shape[1:2], *q.shape[:1]), dtype=torch.float32)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None,
    topk_indices: Tensor | None,
    stage: list[int] | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    outputs = _allocate_attention(q, k, v)
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    _native.attention(_native_stage(topk_indices, stage), packed, softmax_scale, outputs)
    return outputs


def _allocate_grads(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    # Zeros, because the rows of `k` and `v` after the last compressed one are not written.
    return _contiguous_zeros(q, k, v)


def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None,
    topk_indices: Tensor | None,
    stage: list[int] | None,
    deterministic: bool,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, ...]:
    grads = _allocate_grads(q, k, v)
    packed, forward = (q, k, v, cu_seqlens_q, cu_seqlens_k), (out, lse, grad_out, grad_lse)
    native_stage = _native_stage(topk_indices, stage)
    _native.attention_backward(native_stage, packed, softmax_scale, forward, grads)  # type: ignore[arg-type]
    return grads


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.softmax_scale, topk_indices, stage, ctx.deterministic = inputs
    ctx.stage = stage if topk_indices is None else [stage[0], 0]  # validated by the forward
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, topk_indices, *output[:2])
    ctx.set_materialize_grads(False)


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *packed, softmax_scale, sizes = inputs
    _save_attention(ctx, (*packed, softmax_scale, None, sizes[:2], False), output)
    ctx.mark_non_differentiable(output[2])


def _differentiate_attention(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *packed, topk_indices, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = (ctx.softmax_scale, topk_indices, ctx.stage, ctx.deterministic)
    grads = _ATTENTION_BACKWARD(*packed, *options, out, lse, grad_out, grad_lse)
    return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


_ATTENTION = torch.library.custom_op(
    "fsa_rs::attention", _attention, mutates_args=(), schema=f"({ATTENTION}) -> (Tensor, Tensor)"
)
_ATTENTION.register_fake(_allocate_attention)
_ATTENTION.register_autograd(_differentiate_attention, setup_context=_save_attention)

_ATTENTION_BACKWARD = torch.library.custom_op(
    "fsa_rs::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=f"({ATTENTION}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse) -> (Tensor, Tensor, Tensor)",
)
_ATTENTION_BACKWARD.register_fake(_allocate_grads)


_ATTENTION.register_kernel("cuda")(_torch_cuda.attention)
_ATTENTION_BACKWARD.register_kernel("cuda")(_torch_cuda.attention_backward)


def attention(stage: tuple[Any, ...], packed: tuple[Tensor, ...], scale: float | None, deterministic: bool) -> Any:
    """``out`` and ``lse`` of an attention stage."""
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    selected = len(stage) == 3
    topk_indices, sizes = (stage[0], [stage[1], int(stage[2])]) if selected else (None, list(stage) or None)
    return _ATTENTION(*packed, scale, topk_indices, sizes, deterministic)


# Stage select: compressed attention that also lists blocks. Its gradient is that of compressed attention.


def _allocate_select(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    topk_indices = q.new_empty((*k.shape[1:2], *q.shape[:1], sizes[3]), dtype=torch.int32)
    return (*_allocate_attention(q, k, v), topk_indices)


def _select(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_select(q, k, v, cu_q, cu_k, scale, sizes)
    _native.select(sizes, (q, k, v, cu_q, cu_k), scale, outputs)
    return outputs


_SELECT = torch.library.custom_op(
    "fsa_rs::select",
    _select,
    mutates_args=(),
    schema=f"({PACKED}, float? softmax_scale, int[] sizes) -> (Tensor, Tensor, Tensor)".replace("cu_seqlens", "cu"),
)
_SELECT.register_fake(_allocate_select)
_SELECT.register_kernel("cuda")(_torch_cuda.select)
_SELECT.register_autograd(_differentiate_attention, setup_context=_save_select)


def select(sizes: list[int], packed: tuple[Tensor, ...], scale: float | None) -> Any:
    """``out``, ``lse`` and ``topk_indices`` of compressed attention."""
    return _SELECT(*packed, scale, sizes)


# Stage compress, of keys (`name` "k") or of values ("v").

COMPRESS = "str name, int[] geometry, Tensor input, Tensor cu_seqlens_k, Tensor? weight, Tensor? position"


def _allocate_compressed(
    name: str,
    geometry: list[int],
    input: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    # Rows after the last compressed one are not written.
    return input.new_zeros((input.shape[0] // max(geometry[1], 1), *input.shape[1:]))


def _compress(
    name: str,
    geometry: list[int],
    input: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    out = _allocate_compressed(name, geometry, input, cu_seqlens_k, weight, position)
    _native.compress(name, (geometry[0], geometry[1]), (input, cu_seqlens_k), (weight, position), out)
    return out


def _allocate_compress_grads(
    name: str,
    geometry: list[int],
    input: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
    grad_out: Tensor,
) -> list[Tensor]:
    return list(_contiguous_zeros(*(tensor for tensor in (input, weight, position) if tensor is not None)))


def _compress_backward(
    name: str,
    geometry: list[int],
    input: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
    grad_out: Tensor,
) -> list[Tensor]:
    grads = _allocate_compress_grads(name, geometry, input, cu_seqlens_k, weight, position, grad_out)
    grad_input, grad_weight, grad_position = (*grads, None, None)[:3]
    _native.compress_backward(
        name,
        (geometry[0], geometry[1]),
        (input, cu_seqlens_k),
        (weight, position),
        grad_out,
        (grad_input, grad_weight, grad_position),
    )
    return grads


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name, ctx.geometry, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_compress(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = _COMPRESS_BACKWARD(ctx.name, ctx.geometry, *ctx.saved_tensors, grad_out)
    grad_input, grad_weight, grad_position = (*grads, None, None)[:3]
    return None, None, grad_input, None, grad_weight, grad_position


_COMPRESS = torch.library.custom_op("fsa_rs::compress", _compress, mutates_args=(), schema=f"({COMPRESS}) -> Tensor")
_COMPRESS.register_fake(_allocate_compressed)
_COMPRESS.register_kernel("cuda")(_torch_cuda.compress)
_COMPRESS.register_autograd(_differentiate_compress, setup_context=_save_compress)

_COMPRESS_BACKWARD = torch.library.custom_op(
    "fsa_rs::compress_backward",
    _compress_backward,
    mutates_args=(),
    schema=f"({COMPRESS}, Tensor grad_out) -> Tensor[]",
)
_COMPRESS_BACKWARD.register_fake(_allocate_compress_grads)
_COMPRESS_BACKWARD.register_kernel("cuda")(_torch_cuda.compress_backward)


def compress(
    name: str,
    geometry: tuple[int, int],
    input: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
) -> Any:
    """Compressed rows, zeros after the last."""
    return _COMPRESS(name, list(geometry), input, cu_seqlens_k, weight, position)


def compressed_cu_seqlens(cu_seqlens_k: Tensor, geometry: tuple[int, int]) -> Tensor:
    """Prefix sums of the compressed rows."""
    kernel_size, kernel_stride = geometry
    windows = ((cu_seqlens_k.diff() - kernel_size) // kernel_stride + 1).clamp(min=0)
    return torch.nn.functional.pad(windows.cumsum(0, dtype=torch.int32), (1, 0))
