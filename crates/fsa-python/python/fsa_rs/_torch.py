"""The calls on PyTorch tensors: custom operators with fake kernels and gradients.

``torch.ops.fsa_rs.<stage>`` and ``<stage>_backward`` allocate their outputs and hand tensors to the extension,
which reads address, shape, strides and device from them. No operator copies a result to the host to learn a
size: all shapes follow from shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._torch_nsa import nsa

__all__ = ["Tensor", "attention", "compress", "compressed_cu_seqlens", "nsa", "select"]

Outputs = tuple[Tensor, ...]


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for ``out`` and ``lse``, for the operator and its fake kernel alike."""
    out = q.new_empty((*q.shape[:-1], *v.shape[-1:]))
    return out, q.new_empty((*q.shape[1:2], *q.shape[:1]), dtype=torch.float32)


def _grads(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    """Memory for the gradients: zeros, because rows after the last compressed one are not written."""
    return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _define(
    name: str,
    schema: str,
    stage_of: Callable[..., tuple[Any, ...]],
    run: Callable[..., None] | None = None,
    extra: Callable[..., Outputs] | None = None,
) -> Any:
    """Registers the operator of an attention stage and its backward.

    ``schema`` are the stage's own arguments, its tensors first; ``stage_of`` makes of them what the extension
    calls a stage. ``run`` and ``extra`` are for a forward that writes more than ``out`` and ``lse``.
    """
    packed = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float? softmax_scale"
    more = ", Tensor" if extra else ""

    def allocate(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Outputs:
        return *_outputs(q, v), *(extra(q, k, *rest) if extra else ())

    def forward(*args: Any) -> Outputs:
        outputs = allocate(*args)
        if run is None:
            _native.attention(stage_of(*args[6:]), args[:5], args[5], outputs)  # type: ignore[arg-type]
        else:
            run(args[:5], args[5], outputs, *args[6:])
        return outputs

    operator = torch.library.custom_op(
        f"fsa_rs::{name}", forward, mutates_args=(), schema=f"({packed}, {schema}) -> (Tensor, Tensor{more})"
    )
    operator.register_fake(allocate)

    def backward_forward(*args: Any) -> Outputs:
        saved, inputs, stage = args[:4], args[4:9], stage_of(*args[10:])
        grads = _grads(*args[4:7])
        _native.attention_backward(stage, inputs, args[9], saved, grads)  # type: ignore[arg-type]
        return grads

    backward_operator = torch.library.custom_op(
        f"fsa_rs::{name}_backward",
        backward_forward,
        mutates_args=(),
        schema=f"(Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, {packed}, {schema})"
        " -> (Tensor, Tensor, Tensor)",
    )
    backward_operator.register_fake(lambda *args: _grads(*args[4:7]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.count = sum(isinstance(value, Tensor) for value in inputs)
        ctx.save_for_backward(*output[:2], *(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        # Tensors of the schema stand before everything else, but for the scale in sixth place.
        scale, *others = ctx.others
        inputs = [*tensors[:5], scale, *tensors[5:], *others]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = backward_operator(out, lse, grad_out, grad_lse, *inputs)
        return *grads, *(None for _ in inputs[3:])

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


def _run_select(
    packed: Any, scale: float | None, outputs: Any, sizes: list[int]
) -> None:
    _native.select(sizes, packed, scale, outputs)


def _select_indices(q: Tensor, k: Tensor, *rest: Any) -> Outputs:
    sizes = rest[-1]
    return (q.new_empty((*k.shape[1:2], *q.shape[:1], sizes[3]), dtype=torch.int32),)
