"""The whole operation on CUDA tensors: the CUDA kernels of ``torch.ops.fsa_rs.nsa`` and of its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._torch_cuda import Call, Described, Parameters, described, described_if

# Arguments are in the order of `_torch_nsa.ARGUMENTS`: packed inputs, gates, parameters of the compressions, options.


def padded_shapes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that stand for ``q``, ``k`` and ``v`` as the kernels take them. They have no memory of their own."""
    widest = max(x.shape[-1] for x in tensors)
    dim = next((dim for dim in _native.HEAD_DIMS if dim >= widest), widest)
    return tuple(x[..., :1].expand(*x.shape[:-1], dim) for x in tensors)


def _nsa_call(arguments: tuple[Any, ...], saves: bool, backward: bool) -> Call:
    sizes, rope, scale, deterministic = arguments[10:14]
    packed, gates, parameters = arguments[:5], arguments[5], tuple(map(described_if, arguments[6:10]))
    inputs = (tuple(map(described, packed)), described(gates), parameters[:2], parameters[2:])
    planned = _native.cuda_nsa_plan((sizes, rope or []), inputs, saves, backward, backward and deterministic)
    return Call(planned, packed[0], scale)


def _inputs(call: Call, arguments: tuple[Any, ...]) -> tuple[Any, list[Parameters]]:
    """Inputs as the kernels take them, and the parameters of the two compressions."""
    gates = arguments[5]
    if gates.stride(-1) != 1:
        gates = gates.contiguous()
    call.kept.append(gates)
    parameters = [Parameters(call, *arguments[6:8]), Parameters(call, *arguments[8:10])]
    key, value = (pair.inputs() for pair in parameters)
    return (call.packed(arguments[:5]), described(gates), key, value), parameters


def _saved(state: list[Tensor]) -> Any:
    """The state as the extension takes it."""
    about: list[Described] = list(map(described, state))
    return about[:2], about[2:5], about[5:8], about[8:] or None


def nsa(*arguments: Any, state: Callable[..., list[Tensor]]) -> list[Tensor]:
    """``out``, ``topk_indices`` and, if the last argument asks for it, the state for the backward."""
    (q, k, v), sizes, saves = arguments[:3], arguments[10], arguments[14]
    call = _nsa_call(arguments, saves, False)
    out = call.like(q)
    topk_indices = q.new_empty((k.shape[1], q.shape[0], sizes[3]), dtype=torch.int32)
    kept = state(*arguments) if saves else []
    inputs, _ = _inputs(call, arguments)
    outputs = (described(out), described(topk_indices))
    saved = _saved(kept) if saves else None
    _native.cuda_nsa(call.plan, call.context(), abs(call.scale), inputs, outputs, saved)
    return [call.cut(out, v.shape[2]), topk_indices, *kept]


def nsa_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of ``q``, ``k``, ``v``, the gates, and of the parameters that are there."""
    (q, k, v), gates = arguments[:3], arguments[5]
    topk_indices, state, grad_out = arguments[14:]
    call = _nsa_call(arguments, False, True)
    inputs, parameters = _inputs(call, arguments)
    grads = [call.like(x) for x in (q, k, v)]
    grad_gates = gates.new_empty(gates.shape)
    required = (*map(described, grads), described(grad_gates))
    forward = (call.plain(topk_indices), _saved(state), call.vectors(grad_out))
    given = (inputs, forward, (required, *(pair.outputs() for pair in parameters)))
    _native.cuda_nsa_backward(call.plan, call.context(), abs(call.scale), *given)
    if call.negative:
        grads[0].neg_()
    results = [call.cut(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v), strict=True)]
    return [*results, grad_gates, *(grad for pair in parameters for grad in pair.results())]
