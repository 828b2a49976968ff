"""Flash Sparse Attention: native sparse attention for PyTorch and NumPy, computed in Rust.

Every function takes packed sequences, as the ``varlen`` functions of FlashAttention do: the tokens of a batch
lie end to end and ``cu_seqlens`` (int32, ``[batch + 1]``) says where each sequence begins. ``torch.Tensor`` in,
``torch.Tensor`` out, with gradients; ``numpy.ndarray`` in, ``numpy.ndarray`` out. PyTorch is optional.

On CUDA tensors :func:`selected_attn_varlen_func` runs, the core of Flash Sparse Attention; the rest runs on the CPU.

The whole operation is :func:`nsa_attn_varlen_func`; its parts are functions of their own:

==============================  ===========================================================
:func:`compress_kv`             one key and value per window of 32 tokens
:func:`compressed_attn_varlen_func`  attention to these, and the blocks that it points to
:func:`topk_blocks`             only the blocks
:func:`selected_attn_varlen_func`    attention to the blocks that each row lists
:func:`window_attn_varlen_func`      attention to the last tokens
:func:`dense_attn_varlen_func`       attention to all earlier tokens: the yardstick
==============================  ===========================================================
"""

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
