"""The public functions: names and defaults, checks that need Python, and the choice of NumPy or PyTorch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from . import _numpy

#: ``numpy.ndarray`` or ``torch.Tensor``; all arrays of a call are of one kind, and so are the results.
ArrayT = TypeVar("ArrayT")
Layout = Literal["hts", "ths"]
ScoreHeads = Literal["group_sum", "first_head"]
Recompute = Literal["none", "rotated", "all"]


def _library(names: str, arrays: tuple[Any, ...], optional: tuple[Any, ...] = ()) -> Any:
    """The module that computes on this kind of array. The first array decides; ``names`` are those of all."""
    first = arrays[0]
    library, kind = (_numpy, np.ndarray) if isinstance(first, np.ndarray) else _torch_library(names, first)
    for array in arrays:
        if not isinstance(array, kind):
            raise _other_kind(names, (*arrays, *optional), array, kind)
    for array in optional:
        if array is not None and not isinstance(array, kind):
            raise _other_kind(names, (*arrays, *optional), array, kind)
    return library


def _other_kind(names: str, arrays: tuple[Any, ...], array: Any, kind: Any) -> TypeError:
    name = next(name for name, other in zip(names.split(), arrays, strict=True) if other is array)
    return TypeError(f"{name}: expected {_name(kind)}, as the first argument, got {_name(type(array))}")


def _torch_library(names: str, first: Any) -> tuple[Any, Any]:
    """The PyTorch half of the package, imported when the first argument that is no NumPy array comes."""
    try:
        from . import _torch
    except ModuleNotFoundError:
        kinds = "numpy.ndarray (torch.Tensor, once PyTorch is installed)"
        raise TypeError(f"{names.split()[0]}: expected {kinds}, got {_name(type(first))}") from None
    if not isinstance(first, _torch.Tensor):
        raise TypeError(f"{names.split()[0]}: expected numpy.ndarray or torch.Tensor, got {_name(type(first))}")
    return _torch, _torch.Tensor


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if size < 0:
        raise ValueError(f"{name}: expected a non-negative integer, got {size}")
    return size


def _rows(name: str, array: Any) -> None:
    """Outputs are allocated by the first axis of these arguments, before the extension checks them."""
    if array.ndim != 3:
        raise ValueError(f"{name}: expected 3 axes, got shape {list(array.shape)}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def _scale(softmax_scale: float | None) -> float | None:
    return None if softmax_scale is None else _number("softmax_scale", softmax_scale)


def _layout(layout: str) -> None:
    if layout not in ("hts", "ths"):
        raise ValueError(f"layout: expected 'hts' or 'ths', got {layout!r}")


def _hts(layout: str, indices: Any) -> Any:
    """Swaps the first two axes of ``indices`` if ``layout`` is not that of the extension."""
    return indices.swapaxes(0, 1) if layout == "ths" else indices


def _sizes(
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    score_heads: str,
) -> list[int]:
    """The parameters in the order that the extension reads."""
    if score_heads not in ("group_sum", "first_head"):
        raise ValueError(f"score_heads: expected 'group_sum' or 'first_head', got {score_heads!r}")
    return [
        _size("kernel_size", kernel_size),
        _size("kernel_stride", kernel_stride),
        _size("block_size", block_size),
        _size("topk", topk),
        _size("init_blocks", init_blocks),
        _size("local_blocks", local_blocks),
        _size("window_size", window_size),
        int(score_heads == "first_head"),
    ]


def _recompute(recompute: Recompute) -> Recompute:
    if recompute not in ("none", "rotated", "all"):
        raise ValueError(f"recompute: expected 'none', 'rotated' or 'all', got {recompute!r}")
    return recompute


def _window(window_size: int | tuple[int, int]) -> int:
    """FlashAttention's pair, or its left half."""
    if isinstance(window_size, (tuple, list)):
        if len(window_size) != 2:
            raise ValueError(f"window_size: expected an integer or a pair (left, 0), got {window_size!r}")
        window_size, right = window_size
        if right != 0:
            raise NotImplementedError(f"window_size[1] is not supported: got {right!r}, supported: 0 (causal)")
    return _size("window_size", window_size)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(theta: float | None, scaling: Mapping[str, Any] | None) -> list[float]:
    """``[]``, ``[theta]`` or ``[theta, *llama3]``; ``scaling`` is the dictionary of Hugging Face's configurations."""
    if theta is None:
        if scaling is not None:
            raise ValueError("rope_scaling: expected None without rope_theta, got a mapping")
        return []
    base = _number("rope_theta", theta)
    if scaling is None:
        return [base]
    if not isinstance(scaling, Mapping):
        raise TypeError(f"rope_scaling: expected None or a mapping, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return [base]
    if kind != "llama3":
        raise NotImplementedError(f"rope_type is not supported: got {kind!r}, supported: 'default', 'llama3'")
    missing = [name for name in _LLAMA3 if name not in scaling]
    if missing:
        raise ValueError(f"rope_scaling: expected {', '.join(_LLAMA3)}, got a mapping without {', '.join(missing)}")
    return [base, *(_number(f"rope_scaling[{name!r}]", scaling[name]) for name in _LLAMA3)]


def _result(outputs: tuple[Any, Any], return_lse: bool) -> Any:
    return outputs if return_lse else outputs[0]


def selected_attn_varlen_func(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    topk_indices: ArrayT,
    block_size: int,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    validate: bool = False,
    layout: Layout = "hts",
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Any:
    """Causal attention of every row to the blocks of keys that it lists: the core of Flash Sparse Attention.

    Args:
        q: ``[total_q, num_q_heads, head_dim]``; float32, bfloat16 or float16; on CUDA one of the latter two.
            ``head_dim`` is a multiple of 8 up to 256; on CUDA other dimensions than 64, 96, 128, 192 and 256, or a
            ``value_dim`` of another size, cost a padded copy. May be strided.
        k: ``[total_k, num_kv_heads, head_dim]``; ``num_q_heads`` is any multiple of ``num_kv_heads``.
        v: ``[total_k, num_kv_heads, value_dim]``.
        topk_indices: ``[num_kv_heads, total_q, topk]`` int32: block ids inside the row's own sequence, in any
            order, each at most once in a row. An id that is negative or beyond the row's own block is absent. On
            CUDA ``topk`` is at most 64.
        block_size: keys in a block: 16, 32, 64, 128 or 256.
        cu_seqlens_q: ``[batch + 1]`` int32, prefix sums of the numbers of query rows, on the device of ``q``.
        cu_seqlens_k: ``[batch + 1]`` int32, prefix sums of the numbers of keys. A sequence has at least as many
            keys as query rows; its last row sits at its last key. On CUDA nobody looks at the numbers unless
            ``validate`` is set: wrong ones are undefined behaviour there.
        softmax_scale: factor of the logits; ``None`` is ``head_dim ** -0.5``.
        deterministic: ask for a backward that repeats bit for bit; ``torch.use_deterministic_algorithms`` asks,
            too. On the CPU it always does. On CUDA it costs time.
        return_lse: also return ``lse``.
        validate: refuse ids that are out of range or repeated in a row, and on CUDA wrong prefix sums. There this
            waits for the device.
        layout: ``"hts"`` for ``topk_indices`` as above, ``"ths"`` for ``[total_q, num_kv_heads, topk]``.
        max_seqlen_q, max_seqlen_k: accepted for compatibility, not needed.

    Returns:
        ``out`` ``[total_q, num_q_heads, value_dim]`` in the dtype of ``q``, or ``(out, lse)`` with ``lse``
        ``[num_q_heads, total_q]`` float32, the natural logarithm of the softmax denominator. A row that sees no
        key has ``out = 0`` and ``lse = -inf``. Tensors have gradients in ``q``, ``k`` and ``v``, also through
        ``lse``.

    Raises:
        ValueError: an argument has another shape, integer dtype or range than stated; the message names it.
        NotImplementedError: a floating-point dtype, head dimension or device that is not supported.
        TypeError: an argument is neither ``numpy.ndarray`` nor ``torch.Tensor``, or kinds are mixed.
    """
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    arrays = (q, k, v, topk_indices, cu_seqlens_q, cu_seqlens_k)
    library = _library("q k v topk_indices cu_seqlens_q cu_seqlens_k", arrays)
    _layout(layout)
    _rows("topk_indices", topk_indices)
    stage = (_hts(layout, topk_indices), _size("block_size", block_size), bool(validate))
    return _result(library.attention(stage, packed, _scale(softmax_scale), bool(deterministic)), return_lse)


def window_attn_varlen_func(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: int | tuple[int, int] = 512,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Causal attention of every row to its own key and the ``window_size`` keys before it.

    ``window_size`` is an integer ``w`` or FlashAttention's pair ``(w, 0)``. Other arguments, results and errors
    are those of :func:`selected_attn_varlen_func`.
    """
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    library = _library("q k v cu_seqlens_q cu_seqlens_k", packed)
    stage = (_window(window_size),)
    return _result(library.attention(stage, packed, _scale(softmax_scale), bool(deterministic)), return_lse)


def dense_attn_varlen_func(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Any:
    """Causal attention of every row to its own key and all keys before it.

    Arguments, results and errors are those of :func:`selected_attn_varlen_func`.
    """
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    library = _library("q k v cu_seqlens_q cu_seqlens_k", packed)
    return _result(library.attention((), packed, _scale(softmax_scale), bool(deterministic)), return_lse)


def compress_kv(
    k: ArrayT,
    v: ArrayT,
    cu_seqlens_k: ArrayT,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    *,
    k_weight: ArrayT | None = None,
    k_position: ArrayT | None = None,
    v_weight: ArrayT | None = None,
    v_position: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT, ArrayT]:
    """One key and one value per window of ``kernel_size`` tokens, a window every ``kernel_stride`` tokens.

    Windows are whole and cross no border of two sequences: a sequence of ``n`` tokens has
    ``max(0, (n - kernel_size) // kernel_stride + 1)``. The rank of a weight says how a window becomes one vector:

    - ``None``: the mean;
    - ``[num_kv_heads, kernel_size]``: a weighted sum;
    - ``[num_kv_heads, kernel_size * dim, dim]``: ``flatten(window + position) @ weight``, with ``position``
      ``[num_kv_heads, kernel_size, dim]`` or ``None``.

    Args:
        k: ``[total_k, num_kv_heads, head_dim]``, before rotary embedding.
        v: ``[total_k, num_kv_heads, value_dim]``.
        cu_seqlens_k: ``[batch + 1]`` int32.
        kernel_size: tokens in a window, a multiple of ``kernel_stride``.
        kernel_stride: tokens between the starts of neighbouring windows.

    Returns:
        ``(k_cmp, v_cmp, cu_seqlens_cmp)``. The first two have ``total_k // kernel_stride`` rows, a number that
        depends on shapes alone: the compressed rows of all sequences end to end, then zeros. ``cu_seqlens_cmp``
        ``[batch + 1]`` int32 says where each sequence begins; its last element is the number of compressed
        rows. Tensors have gradients in all floating-point arguments.

    Raises:
        ValueError, NotImplementedError, TypeError: as :func:`selected_attn_varlen_func`.
    """
    parameters = (k_weight, k_position, v_weight, v_position)
    library = _library("k v cu_seqlens_k k_weight k_position v_weight v_position", (k, v, cu_seqlens_k), parameters)
    _rows("k", k)
    _rows("v", v)
    geometry = (_size("kernel_size", kernel_size), _size("kernel_stride", kernel_stride))
    return library.compress(geometry, (k, v, cu_seqlens_k), parameters)  # type: ignore[no-any-return]


def compressed_attn_varlen_func(
    q: ArrayT,
    k_cmp: ArrayT,
    v_cmp: ArrayT,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    score_heads: ScoreHeads = "group_sum",
    softmax_scale: float | None = None,
    deterministic: bool = False,
    layout: Layout = "hts",
) -> tuple[ArrayT, ArrayT, ArrayT]:
    """Attention to compressed keys, and the blocks of original keys that its weights point to.

    A row at position ``p`` sees the compressed keys whose whole window lies at or before ``p``.

    Args:
        q: ``[total_q, num_q_heads, head_dim]``.
        k_cmp, v_cmp: compressed keys and values, as :func:`compress_kv` returns them.
        cu_seqlens_q, cu_seqlens_k: ``[batch + 1]`` int32, prefix sums of the query rows and of the **original**
            keys.
        kernel_size, kernel_stride: those of :func:`compress_kv`.
        block_size: original keys in a selectable block, a multiple of ``kernel_stride``.
        topk: blocks that a row lists at most, at least ``init_blocks + local_blocks``; on CUDA at most 64.
        init_blocks: blocks at the start of a sequence that every row lists.
        local_blocks: blocks up to and including a row's own that it always lists.
        score_heads: ``"group_sum"`` adds the weights of all query heads that share a kv head, as Native Sparse
            Attention defines it; ``"first_head"`` takes the first head's, as the original FSA code does.
        layout: of the returned ``topk_indices``.
        Others: as :func:`selected_attn_varlen_func`.

    Returns:
        ``(out, lse, topk_indices)``: ``out`` and ``lse`` as :func:`selected_attn_varlen_func`, and
        ``[num_kv_heads, total_q, topk]`` int32 (``layout="ths"``: ``[total_q, num_kv_heads, topk]``): ascending
        ids, left-packed, then -1. The choice has no gradient; ``out`` and ``lse`` have.

    Raises:
        ValueError, NotImplementedError, TypeError: as :func:`selected_attn_varlen_func`.
    """
    packed = (q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k)
    library = _library("q k_cmp v_cmp cu_seqlens_q cu_seqlens_k", packed)
    _layout(layout)
    sizes = _sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, 0, score_heads)
    out, lse, topk_indices = library.select(sizes, packed, _scale(softmax_scale), bool(deterministic))
    return out, lse, _hts(layout, topk_indices)


def topk_blocks(
    q: ArrayT,
    k_cmp: ArrayT,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    score_heads: ScoreHeads = "group_sum",
    softmax_scale: float | None = None,
    layout: Layout = "hts",
) -> ArrayT:
    """The blocks that every row selects: ``topk_indices`` of :func:`compressed_attn_varlen_func`, without values.

    Where the output of compressed attention is needed as well, that function gives both in one pass.

    Args:
        As :func:`compressed_attn_varlen_func`.

    Returns:
        ``[num_kv_heads, total_q, topk]`` int32 (``layout="ths"``: ``[total_q, num_kv_heads, topk]``): ascending
        ids, left-packed, then -1. Without a gradient.

    Raises:
        ValueError, NotImplementedError, TypeError: as :func:`selected_attn_varlen_func`.
    """
    packed = (q, k_cmp, k_cmp, cu_seqlens_q, cu_seqlens_k)
    library = _library("q k_cmp cu_seqlens_q cu_seqlens_k", (q, k_cmp, cu_seqlens_q, cu_seqlens_k))
    _layout(layout)
    sizes = _sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, 0, score_heads)
    topk_indices = library.select(sizes, packed, _scale(softmax_scale), False)[2]
    return _hts(layout, topk_indices)  # type: ignore[no-any-return]


def nsa_attn_varlen_func(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    gates: ArrayT,
    cu_seqlens_q: ArrayT,
    cu_seqlens_k: ArrayT,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    topk: int = 16,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int | tuple[int, int] = 512,
    score_heads: ScoreHeads = "group_sum",
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_topk_indices: bool = False,
    layout: Layout = "hts",
    *,
    k_weight: ArrayT | None = None,
    k_position: ArrayT | None = None,
    v_weight: ArrayT | None = None,
    v_position: ArrayT | None = None,
    rope_theta: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    recompute: Recompute = "none",
) -> Any:
    """Native sparse attention: the gated sum of compressed, selected and sliding-window attention, in one call.

    Args:
        q, k: ``[total, heads, head_dim]``, before rotary embedding.
        v: ``[total_k, num_kv_heads, value_dim]``.
        gates: ``[total_q, 3]`` or ``[total_q, num_q_heads, 3]``, dtype of ``q``: weights of the compressed,
            selected and window branch, already activated.
        kernel_size ... score_heads: as :func:`compressed_attn_varlen_func` and :func:`window_attn_varlen_func`.
        return_topk_indices: also return the chosen blocks, in ``layout``.
        k_weight, k_position, v_weight, v_position: as :func:`compress_kv`.
        rope_theta: base of a rotary embedding of ``q``, ``k`` and the compressed keys (at the start of their
            windows), pairs ``(x[i], x[i + head_dim / 2])``; ``None`` is none.
        rope_scaling: ``None`` or a Hugging Face dictionary with ``rope_type`` ``"default"`` or ``"llama3"``.
        recompute: what the backward computes again instead of keeping it: ``"none"``; ``"rotated"``, query and keys
            as the embedding rotated them; ``"all"`` but the chosen blocks, which takes most of a forward more.
        Others: as :func:`selected_attn_varlen_func`.

    Returns:
        ``out`` ``[total_q, num_q_heads, value_dim]``, or ``(out, topk_indices)``. Tensors have gradients in all
        floating-point arguments; the state for the backward is kept if one of them requires a gradient.

    Raises:
        ValueError, NotImplementedError, TypeError: as :func:`selected_attn_varlen_func`.
    """
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    parameters = (k_weight, k_position, v_weight, v_position)
    names = "q k v gates cu_seqlens_q cu_seqlens_k k_weight k_position v_weight v_position"
    library = _library(names, (q, k, v, gates, cu_seqlens_q, cu_seqlens_k), parameters)
    _rows("k", k)
    _layout(layout)
    window = _window(window_size)
    sizes = _sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window, score_heads)
    options = (sizes, _rope(rope_theta, rope_scaling), _scale(softmax_scale))
    given = (options, packed, gates, parameters, bool(deterministic), _recompute(recompute))
    out, topk_indices = library.nsa(*given)
    return (out, _hts(layout, topk_indices)) if return_topk_indices else out
