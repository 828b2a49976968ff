"""The whole operation on PyTorch tensors: ``torch.ops.fsa_rs.nsa`` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, _torch_cuda
from ._torch_operator import Operator
from ._torch_state import layout

# What both operators take: packed inputs, gates, the parameters of the compressions, the options.
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor gates, "
    "Tensor? k_weight, Tensor? k_position, Tensor? v_weight, Tensor? v_position, "
    "int[] sizes, float[]? rope, float? softmax_scale, bool deterministic"
)
#: Where in ARGUMENTS the tensors are that have gradients.
DIFFERENTIABLE = (0, 1, 2, 5, 6, 7, 8, 9)
INPUTS = 10


def _native_arguments(arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Options and inputs as the extension takes them."""
    sizes, rope, softmax_scale = arguments[10:13]
    inputs = (arguments[:5], arguments[5], arguments[6:8], arguments[8:10])
    return (sizes, rope or [], softmax_scale), inputs


def _allocate(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``topk_indices`` and, if the last argument but one asks for it, the state for the backward."""
    q, k, v = arguments[:3]
    sizes, save, recompute = arguments[10], *arguments[14:]
    shape = (*q.shape[:-1], *v.shape[-1:])
    topk_indices = q.new_empty((*k.shape[1:2], *q.shape[:1], sizes[3]), dtype=torch.int32)
    state = layout(arguments, recompute).allocate(q) if save else q.new_empty((0,), dtype=torch.uint8)
    return q.new_empty(shape), topk_indices, state


def _nsa(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, topk_indices, state = outputs = _allocate(*arguments)
    save, recompute = arguments[14:]
    options, inputs = _native_arguments(arguments)
    parts = layout(arguments, "none")
    saves = save and recompute != "all"
    # The extension writes all parts or none.
    whole = parts.allocate(out) if saves and recompute == "rotated" else state
    _native.nsa(options, inputs, (out, topk_indices), parts.cleared(whole) if saves else ())
    if whole is not state:
        state.copy_(whole[: len(state)])
    return outputs


def _allocate_grads(*arguments: Any) -> list[Tensor]:
    given = (arguments[at] for at in DIFFERENTIABLE)
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given if x is not None]


def _nsa_backward(*arguments: Any) -> list[Tensor]:
    grads = _allocate_grads(*arguments)
    options, inputs = _native_arguments(arguments)
    topk_indices, state, grad_out, recompute = arguments[14:]
    parts = layout(arguments, "none")
    if recompute != "none":
        state = parts.allocate(grad_out)
        again = (torch.empty_like(grad_out), torch.empty_like(topk_indices))
        _native.nsa(options, inputs, again, parts.cleared(state))
    by_input = _spread(arguments, grads)
    parameters = (by_input[6:8], by_input[8:10])
    required = (*by_input[:3], by_input[5])
    given = (topk_indices, parts.views(state))
    _native.nsa_backward(options, inputs, given, grad_out, (required, *parameters))
    return grads


def _spread(inputs: tuple[Any, ...], grads: list[Tensor]) -> tuple[Any, ...]:
    """Gradients at the places of their inputs, ``None`` at the others."""
    remaining = iter(grads)
    given = [at for at in DIFFERENTIABLE if inputs[at] is not None]
    return tuple(next(remaining) if at in given else None for at in range(INPUTS))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, ctx.save, ctx.recompute = inputs
    ctx.options = given[INPUTS:]
    # The state has no gradient: zeros in its place would be as large as itself.
    ctx.set_materialize_grads(False)
    if ctx.save:
        ctx.save_for_backward(*given[:INPUTS], *output[1:])


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError("fsa_rs::nsa kept no state for the backward: call it with save=True")
    saved = ctx.saved_tensors  # once: under activation checkpointing a second access is an error
    inputs, (topk_indices, state) = saved[:INPUTS], saved[INPUTS:]
    if grad_out is None:
        q, v = inputs[0], inputs[2]
        grad_out = q.new_zeros((*q.shape[:-1], *v.shape[-1:]))
    found = _NSA_BACKWARD(*inputs, *ctx.options, topk_indices, state, grad_out, ctx.recompute)
    return (*_spread(inputs, found), *(None for _ in range(6)))


_NSA = Operator(
    "nsa",
    f"({ARGUMENTS}, bool save, str recompute) -> (Tensor, Tensor, Tensor)",
    (_nsa, _torch_cuda.nsa),
    _allocate,
    _save,
    _differentiate,
)
_NSA_BACKWARD = Operator(
    "nsa_backward",
    f"({ARGUMENTS}, Tensor topk_indices, Tensor state, Tensor grad_out, str recompute) -> Tensor[]",
    (_nsa_backward, _torch_cuda.nsa_backward),
    _allocate_grads,
)


def nsa(
    options: tuple[list[int], list[float], float | None],
    packed: tuple[Tensor, ...],
    gates: Tensor,
    parameters: tuple[Tensor | None, ...],
    deterministic: bool,
    recompute: str,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``topk_indices`` of the whole operation."""
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    differentiable = (*packed[:3], gates, *parameters)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    sizes, rope, softmax_scale = options
    # An empty list among the arguments would be one of tensors to autograd.
    options_of_op = (sizes, rope or None, softmax_scale, deterministic, save, recompute)
    out, topk_indices, _ = _NSA(*packed, gates, *parameters, *options_of_op)
    return out, topk_indices
