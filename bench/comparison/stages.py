"""Our stages and our whole operation, as a user calls them, and how stages are named in a record."""

from __future__ import annotations

from typing import Any

import fsa_rs
import torch
from torch import Tensor

from .inputs import INIT, KERNEL, LOCAL, STRIDE, Inputs
from .inputs import WINDOW as EARLIER
from .record import OURS
from .work import Work

#: Stages: compression of keys and values; compressed attention with scores and top-k; the latter alone; the window.
MEAN, LINEAR, COMPRESSED, TOPK, WINDOW = "compress mean", "compress linear", "compressed + top-k", "top-k", "window"
#: Kinds of the whole operation. That of means has no rotary embedding: SFNSA has none.
WHOLE_MEAN, LINEAR_ROPE = "mean", "linear + rope"


def parameters(inputs: Inputs) -> dict[str, Tensor]:
    """Those of a linear compression."""
    return {"k_weight": inputs.k_weight, "k_position": inputs.k_position, "v_weight": inputs.v_weight}


def compress_leaves(inputs: Inputs, what: str) -> dict[str, Tensor]:
    return {"k": inputs.k, "v": inputs.v, **(parameters(inputs) if what == LINEAR else {})}


def compressed_leaves(inputs: Inputs, k_cmp: Tensor, v_cmp: Tensor) -> dict[str, Tensor]:
    return {"q": inputs.q, "k_cmp": k_cmp, "v_cmp": v_cmp}


def whole_leaves(inputs: Inputs, what: str) -> dict[str, Tensor]:
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "gates": inputs.gates}
    return {**leaves, **(parameters(inputs) if what == LINEAR_ROPE else {})}


def of(inputs: Inputs, k_cmp: Tensor, v_cmp: Tensor) -> dict[str, Work]:
    """Our stages."""
    cu, sizes = inputs.cu, _sizes(inputs)

    def mean(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fsa_rs.compress_kv(k, v, cu, KERNEL, STRIDE)[:2]

    def linear(k: Tensor, v: Tensor, k_weight: Tensor, k_position: Tensor, v_weight: Tensor) -> tuple[Tensor, Tensor]:
        weights = {"k_weight": k_weight, "k_position": k_position, "v_weight": v_weight}
        return fsa_rs.compress_kv(k, v, cu, KERNEL, STRIDE, **weights)[:2]

    # Compressed rows are as many as the sequence may have: those after the last are not looked at.
    filled = inputs.shape.n // STRIDE - len(k_cmp)
    k_cmp, v_cmp = (torch.cat([x, x.new_zeros(filled, *x.shape[1:])]) for x in (k_cmp, v_cmp))

    def compressed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fsa_rs.compressed_attn_varlen_func(q, k, v, cu, cu, **sizes)[0]

    def topk(q: Tensor, k: Tensor) -> Tensor:
        return fsa_rs.topk_blocks(q, k, cu, cu, **sizes)

    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fsa_rs.window_attn_varlen_func(q, k, v, cu, cu, window_size=EARLIER)

    forms = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    return {
        COMPRESSED: Work(OURS, compressed_leaves(inputs, k_cmp, v_cmp), compressed),
        TOPK: Work(OURS, {"q": inputs.q, "k": k_cmp}, topk),
        WINDOW: Work(OURS, forms, window),
        LINEAR: Work(OURS, compress_leaves(inputs, LINEAR), linear),
        MEAN: Work(OURS, compress_leaves(inputs, MEAN), mean),
    }


def whole(inputs: Inputs, what: str, **options: Any) -> Work:
    """Our whole operation; with ``return_topk_indices`` its ``forward`` gives two results."""
    if what == LINEAR_ROPE:
        options = {**options, "rope_theta": inputs.rope.rope_theta, "rope_scaling": inputs.rope.rope_scaling}

    def forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *given: Tensor) -> Any:
        weights = dict(zip(parameters(inputs), given, strict=False))
        cu, sizes = inputs.cu, {**_sizes(inputs), "window_size": EARLIER}
        return fsa_rs.nsa_attn_varlen_func(q, k, v, gates, cu, cu, **sizes, **weights, **options)

    return Work(OURS, whole_leaves(inputs, what), forward)


def _sizes(inputs: Inputs) -> dict[str, Any]:
    sizes = {"kernel_size": KERNEL, "kernel_stride": STRIDE, "init_blocks": INIT, "local_blocks": LOCAL}
    return {**sizes, "block_size": inputs.shape.block_size, "topk": inputs.shape.topk}
