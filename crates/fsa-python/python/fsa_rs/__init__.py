"""Flash Sparse Attention: native sparse attention for PyTorch and NumPy, computed in Rust.

Every function takes packed sequences, as the ``varlen`` functions of FlashAttention do: the tokens of a batch
lie end to end and ``cu_seqlens`` (int32, ``[batch + 1]``) says where each sequence begins. ``torch.Tensor`` in,
``torch.Tensor`` out, with gradients; ``numpy.ndarray`` in, ``numpy.ndarray`` out. PyTorch is optional.

All functions take CUDA tensors, too, in bfloat16 and float16. ``python -m fsa_rs.check`` proves an installation.

The whole operation is :func:`nsa_attn_varlen_func`; its parts are functions of their own:

==============================  ===========================================================
:func:`compress_kv`             one key and value per window of 32 tokens
:func:`compressed_attn_varlen_func`  attention to these, and the blocks that it points to
:func:`topk_blocks`             only the blocks
:func:`selected_attn_varlen_func`    attention to the blocks that each row lists
:func:`window_attn_varlen_func`      attention to the last tokens
:func:`dense_attn_varlen_func`       attention to all earlier tokens: the yardstick
==============================  ===========================================================

:mod:`fsa_rs.nn` has a PyTorch layer around it, with the parameters of the original FSA project's, and
:mod:`fsa_rs.compat` that project's function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._api import (
    compress_kv,
    compressed_attn_varlen_func,
    dense_attn_varlen_func,
    nsa_attn_varlen_func,
    selected_attn_varlen_func,
    topk_blocks,
    window_attn_varlen_func,
)
from ._native import __version__

if TYPE_CHECKING:
    from . import compat as compat
    from . import nn as nn

__all__ = [
    "__version__",
    "compress_kv",
    "compressed_attn_varlen_func",
    "dense_attn_varlen_func",
    "nsa_attn_varlen_func",
    "selected_attn_varlen_func",
    "topk_blocks",
    "window_attn_varlen_func",
]


def __getattr__(name: str) -> Any:
    """The submodules, imported when they are first asked for: `nn` imports PyTorch."""
    if name in ("compat", "nn"):
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
