"""The whole operation on CUDA tensors: the CUDA kernels of ``torch.ops.fsa_rs.nsa`` and of its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._torch_cuda import Call, Parameters, described, described_if
from ._torch_state import Described, Layout

# Arguments are in the order of `_torch_nsa.ARGUMENTS`: packed inputs, gates, parameters of the compressions, options.


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


def nsa(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``topk_indices`` and, if the last argument but one asks for it, the state for the backward."""
    (q, k, v), sizes = arguments[:3], arguments[10]
    save, recompute = arguments[14:]
    # Where the backward computes all of it again, no branch is kept.
    saves = save and recompute != "all"
    call = _nsa_call(arguments, saves, False)
    out = call.like(q)
    topk_indices = q.new_empty((k.shape[1], q.shape[0], sizes[3]), dtype=torch.int32)
    state, saved = q.new_empty((0,), dtype=torch.uint8), None
    if saves:
        layout = Layout(arguments, recompute)
        state, rest = layout.allocate(q), layout.allocate(q, again=True)
        call.kept.append(rest)
        saved = layout.described(state, rest)
    inputs, _ = _inputs(call, arguments)
    outputs = (described(out), described(topk_indices))
    _native.cuda_nsa(call.plan, call.context(), abs(call.scale), inputs, outputs, saved, None)
    return call.cut(out, v.shape[2]), topk_indices, state


def _recompute(arguments: tuple[Any, ...], saved: Any, topk_indices: Described, spare: Described) -> None:
    """Writes the parts of the state that the forward did not keep. ``spare`` is memory of the shape of ``out``."""
    call = _nsa_call(arguments, True, False)
    inputs, _ = _inputs(call, arguments)
    outputs = (spare, topk_indices)
    _native.cuda_nsa(call.plan, call.context(), abs(call.scale), inputs, outputs, saved, arguments[17])


def nsa_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of ``q``, ``k``, ``v``, the gates, and of the parameters that are there."""
    (q, k, v), gates = arguments[:3], arguments[5]
    topk_indices, state, grad_out, recompute = arguments[14:]
    call = _nsa_call(arguments, False, True)
    inputs, parameters = _inputs(call, arguments)
    grads = [call.like(x) for x in (q, k, v)]
    grad_gates = gates.new_empty(gates.shape)
    required = (*map(described, grads), described(grad_gates))
    layout, again = Layout(arguments, recompute), None
    if recompute != "none":
        again = layout.allocate(q, again=True)
        call.kept.append(again)
    saved, lists = layout.described(state, again), call.plain(topk_indices)
    if again is not None and again.numel() > 0:
        _recompute(arguments, saved, lists, required[0])
    given = (inputs, (lists, saved, call.vectors(grad_out)), (required, *(pair.outputs() for pair in parameters)))
    _native.cuda_nsa_backward(call.plan, call.context(), abs(call.scale), *given)
    if call.negative:
        grads[0].neg_()
    results = [call.cut(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v), strict=True)]
    return [*results, grad_gates, *(grad for pair in parameters for grad in pair.results())]
