"""The CUDA kernels of the operators of `_torch` and `_torch_nsa`, which take their arguments in order.

The extension does the whole of a call: it reads addresses, shapes and strides from the tensors, copies those that
kernels cannot read as they lie, and lets PyTorch allocate outputs and scratch memory. So a call may be recorded into a
CUDA graph, and memory is shared with everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._torch_state import known_layout


def native_stage(topk_indices: Tensor | None, stage: list[int] | None) -> Any:
    """A stage as the extension takes it."""
    if stage is None:
        return ()
    return tuple(stage) if topk_indices is None else (topk_indices, stage[0], bool(stage[1]))


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a stage."""
    scale, topk_indices, stage = arguments[5:8]
    return _native.cuda_attention(native_stage(topk_indices, stage), arguments[:5], scale)


def attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    scale, topk_indices, stage, deterministic = arguments[5:9]
    native = native_stage(topk_indices, stage)
    return _native.cuda_attention_backward(native, arguments[:5], scale, deterministic, arguments[9:])


def select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``lse`` and ``topk_indices`` of compressed attention."""
    scale, sizes, _ = arguments[5:]
    return _native.cuda_select(sizes, arguments[:5], scale)


def compress(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed keys and values, zeros after the last, and their prefix sums."""
    geometry = tuple(arguments[7])
    return _native.cuda_compress(geometry, arguments[:3], (arguments[3:5], arguments[5:7]))


def compress_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the inputs whose results have one, and of their parameters that are there."""
    geometry = tuple(arguments[7])
    return _native.cuda_compress_backward(geometry, arguments[:3], (arguments[3:5], arguments[5:7]), arguments[8:])


def _nsa_arguments(arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    sizes, rope, scale = arguments[10:13]
    return (sizes, rope or [], scale), (arguments[:5], arguments[5], arguments[6:8], arguments[8:10])


def nsa(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``topk_indices`` and, if the last argument but one asks for it, the state for the backward."""
    q, (save, recompute) = arguments[0], arguments[14:]
    state = rest = saved = None
    # Where the backward computes all of it again, no branch is kept.
    if save and recompute != "all":
        layout = known_layout(arguments, recompute)
        # What is not kept lives until the call was given to the stream.
        state, rest = layout.kept_room(q), layout.allocate(q, again=True) if recompute == "rotated" else None
        saved = layout.described(state, rest)
    out, topk_indices = _native.cuda_nsa(*_nsa_arguments(arguments), saved)
    return out, topk_indices, q.new_empty((0,), dtype=torch.uint8) if state is None else state


def nsa_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of ``q``, ``k``, ``v``, the gates, and of the parameters that are there."""
    topk_indices, state, grad_out, recompute = arguments[14:]
    layout = known_layout(arguments, recompute)
    again = None if recompute == "none" else layout.allocate(arguments[0], again=True)
    given = (topk_indices, layout.described(state, again), recompute)
    return _native.cuda_nsa_backward(*_nsa_arguments(arguments), arguments[13], given, grad_out)
