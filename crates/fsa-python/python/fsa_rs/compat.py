"""Functions under the names of the original FSA project, for scripts written for it.

The layer is :class:`fsa_rs.nn.FlashSparseAttention`.
"""

from __future__ import annotations

from typing import Any

from ._api import ArrayT, Layout, selected_attn_varlen_func

__all__ = ["FSA_topk_sparse_attention", "topk_sparse_attention"]


def FSA_topk_sparse_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    topk_idx: ArrayT,
    block_size: int,
    cu_seqlens: ArrayT,
    softmax_scale: float | None = None,
    *,
    layout: Layout = "hts",
    validate: bool = False,
    deterministic: bool = False,
) -> Any:
    """:func:`fsa_rs.selected_attn_varlen_func` for as many query rows as keys, as the original calls it.

    Args:
        q: ``[total, num_q_heads, head_dim]``.
        k, v: ``[total, num_kv_heads, head_dim]``.
        topk_idx: ``[num_kv_heads, total, topk]`` int32, the original's only layout; with ``layout="ths"``
            ``[total, num_kv_heads, topk]``. Ids may stand in any order, and -1 anywhere.
        block_size: keys in a block.
        cu_seqlens: ``[batch + 1]`` int32, prefix sums of the lengths of the sequences.
        softmax_scale, layout, validate, deterministic: as :func:`fsa_rs.selected_attn_varlen_func`.

    Returns:
        ``[total, num_q_heads, head_dim]``. A row that lists no block is 0.

    Raises:
        ValueError, NotImplementedError, TypeError: as :func:`fsa_rs.selected_attn_varlen_func`, under its names of the
            arguments.
    """
    return selected_attn_varlen_func(
        q,
        k,
        v,
        topk_idx,
        block_size,
        cu_seqlens,
        cu_seqlens,
        softmax_scale,
        deterministic=deterministic,
        validate=validate,
        layout=layout,
    )


#: The original has two kernels for one result, this one for more than 8 query heads to a kv head.
topk_sparse_attention = FSA_topk_sparse_attention
