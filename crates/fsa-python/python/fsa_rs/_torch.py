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
from ._torch_cuda import native_stage
from ._torch_nsa import nsa
from ._torch_operator import Operator

__all__ = ["Tensor", "attention", "compress", "nsa", "select"]

PACKED = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"


def _contiguous_zeros(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


# Stages dense, window, compressed, selected. `stage` is None, [window_size], [kernel_size, kernel_stride], or,
# with topk_indices, [block_size, validate]. An empty list would be one of tensors to autograd.

ATTENTION = f"{PACKED}, float? softmax_scale, Tensor? topk_indices, int[]? stage, bool deterministic"


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
    _native.attention(native_stage(topk_indices, stage), packed, softmax_scale, outputs)
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
    native = native_stage(topk_indices, stage)
    _native.attention_backward(native, packed, softmax_scale, forward, grads)  # type: ignore[arg-type]
    return grads


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.softmax_scale, topk_indices, stage, ctx.deterministic = inputs
    ctx.stage = stage if topk_indices is None else [stage[0], 0]  # validated by the forward
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, topk_indices, *output[:2])
    ctx.set_materialize_grads(False)


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *packed, softmax_scale, sizes, deterministic = inputs
    _save_attention(ctx, (*packed, softmax_scale, None, sizes[:2], deterministic), output)
    ctx.mark_non_differentiable(output[2])


def _differentiate_attention(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *packed, topk_indices, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = (ctx.softmax_scale, topk_indices, ctx.stage, ctx.deterministic)
    grads = _ATTENTION_BACKWARD(*packed, *options, out, lse, grad_out, grad_lse)
    return (*grads, *(None,) * (len(ctx.needs_input_grad) - 3))


_ATTENTION = Operator(
    "attention",
    f"({ATTENTION}) -> (Tensor, Tensor)",
    (_attention, _torch_cuda.attention),
    _allocate_attention,
    _save_attention,
    _differentiate_attention,
)
_ATTENTION_BACKWARD = Operator(
    "attention_backward",
    f"({ATTENTION}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse) -> (Tensor, Tensor, Tensor)",
    (_attention_backward, _torch_cuda.attention_backward),
    _allocate_grads,
)


def attention(stage: tuple[Any, ...], packed: tuple[Tensor, ...], scale: float | None, deterministic: bool) -> Any:
    """``out`` and ``lse`` of an attention stage."""
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    selected = len(stage) == 3
    topk_indices, sizes = (stage[0], [stage[1], int(stage[2])]) if selected else (None, list(stage) or None)
    return _ATTENTION(*packed, scale, topk_indices, sizes, deterministic)


# Stage select: compressed attention that also lists blocks. Its gradient is that of compressed attention.


def _allocate_select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v), sizes = arguments[:3], arguments[6]
    topk_indices = q.new_empty((*k.shape[1:2], *q.shape[:1], sizes[3]), dtype=torch.int32)
    return (*_allocate_attention(q, k, v), topk_indices)


def _select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    scale, sizes, _ = arguments[5:]
    outputs = _allocate_select(*arguments)
    _native.select(sizes, arguments[:5], scale, outputs)
    return outputs


_SELECT = Operator(
    "select",
    f"({PACKED}, float? softmax_scale, int[] sizes, bool deterministic) -> (Tensor, Tensor, Tensor)",
    (_select, _torch_cuda.select),
    _allocate_select,
    _save_select,
    _differentiate_attention,
)


def select(sizes: list[int], packed: tuple[Tensor, ...], scale: float | None, deterministic: bool) -> Any:
    """``out``, ``lse`` and ``topk_indices`` of compressed attention."""
    return _SELECT(*packed, scale, sizes, deterministic or torch.are_deterministic_algorithms_enabled())


# Stage compress, of keys and of values.

COMPRESS = (
    "Tensor k, Tensor v, Tensor cu_seqlens_k, Tensor? k_weight, Tensor? k_position, Tensor? v_weight, "
    "Tensor? v_position, int[] geometry"
)


def _sides(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What is compressed, of keys and of values: name, input, weight, position."""
    k, v, _, k_weight, k_position, v_weight, v_position, *_ = arguments
    return ("k", k, k_weight, k_position), ("v", v, v_weight, v_position)


def _allocate_compressed(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    stride = max(options[-1][1], 1)
    # Rows after the last compressed one are not written.
    k_cmp, v_cmp = (x.new_zeros((x.shape[0] // stride, *x.shape[1:])) for x in (k, v))
    return k_cmp, v_cmp, cu_seqlens_k.new_empty(cu_seqlens_k.shape, dtype=torch.int32)


def _compress(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens_k, (kernel_size, kernel_stride) = arguments[2], arguments[7]
    k_cmp, v_cmp, cu_seqlens_cmp = _allocate_compressed(*arguments)
    for (name, input, *parameters), out in zip(_sides(arguments), (k_cmp, v_cmp), strict=True):
        given = ((input, cu_seqlens_k), tuple(parameters))
        _native.compress(name, (kernel_size, kernel_stride), *given, out)
    windows = ((cu_seqlens_k.diff() - kernel_size) // kernel_stride + 1).clamp(min=0)
    cu_seqlens_cmp[0] = 0
    torch.cumsum(windows, 0, dtype=torch.int32, out=cu_seqlens_cmp[1:])
    return k_cmp, v_cmp, cu_seqlens_cmp


def _allocate_compress_grads(*arguments: Any) -> list[Tensor]:
    """Of ``k`` and its parameters, if the gradient of its compressed rows is given, and of ``v`` and its."""
    given = zip(_sides(arguments), arguments[8:], strict=True)
    inputs = [x for (_, *inputs), grad in given if grad is not None for x in inputs if x is not None]
    return list(_contiguous_zeros(*inputs))


def _compress_backward(*arguments: Any) -> list[Tensor]:
    cu_seqlens_k, geometry, *grads_out = arguments[2], *arguments[7:]
    grads = _allocate_compress_grads(*arguments)
    remaining = iter(grads)
    for (name, input, *parameters), grad_out in zip(_sides(arguments), grads_out, strict=True):
        if grad_out is not None:
            outputs = tuple(None if x is None else next(remaining) for x in (input, *parameters))
            given = ((input, cu_seqlens_k), tuple(parameters), grad_out, outputs)
            _native.compress_backward(name, tuple(geometry), *given)  # type: ignore[arg-type]
    return grads


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.geometry = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate_compress(ctx: Any, *grads_out: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad
    grad_k = grads_out[0] if needed[0] or needed[3] or needed[4] else None
    grad_v = grads_out[1] if needed[1] or needed[5] or needed[6] else None
    remaining = iter(_COMPRESS_BACKWARD(*saved, ctx.geometry, grad_k, grad_v))
    grads: list[Tensor | None] = [None] * 8
    for grad, places in ((grad_k, (0, 3, 4)), (grad_v, (1, 5, 6))):
        if grad is not None:
            for at in places:
                if saved[at] is not None:
                    grads[at] = next(remaining)
    return tuple(grads)


_COMPRESS = Operator(
    "compress",
    f"({COMPRESS}) -> (Tensor, Tensor, Tensor)",
    (_compress, _torch_cuda.compress),
    _allocate_compressed,
    _save_compress,
    _differentiate_compress,
)
_COMPRESS_BACKWARD = Operator(
    "compress_backward",
    f"({COMPRESS}, Tensor? grad_k, Tensor? grad_v) -> Tensor[]",
    (_compress_backward, _torch_cuda.compress_backward),
    _allocate_compress_grads,
)


def compress(geometry: tuple[int, int], packed: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...]) -> Any:
    """Compressed keys and values, zeros after the last, and their prefix sums."""
    return _COMPRESS(*packed, *parameters, list(geometry))
