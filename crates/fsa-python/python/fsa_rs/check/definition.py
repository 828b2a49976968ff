"""What every function computes, in NumPy and float64: short, slow, and independent of everything else.

Arrays are ``[rows, heads, dim]``, sequences lie end to end. A mask is ``[heads or 1, rows, keys]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Batch:
    """Where sequences lie. The last query row of a sequence sits at its last key."""

    def __init__(self, q_lens: tuple[int, ...], k_lens: tuple[int, ...]) -> None:
        self.q_lens, self.k_lens = q_lens, k_lens
        self.cu_q, self.cu_k = (np.cumsum((0, *lens)).astype(np.int32) for lens in (q_lens, k_lens))
        pairs = zip(q_lens, k_lens, strict=True)
        self.positions = [np.arange(k_len - q_len, k_len) for q_len, k_len in pairs]
        self.key_positions = [np.arange(k_len) for k_len in k_lens]

    def windows(self, size: int, stride: int) -> tuple[int, ...]:
        """Compressed keys of every sequence."""
        return tuple(max(0, (n - size) // stride + 1) for n in self.k_lens)

    def mask(self, sees: Callable[[Any, Any], Any], counts: tuple[int, ...] | None = None) -> Array:
        """``sees(positions [rows, 1], keys [1, keys])`` inside a sequence, nothing across."""
        counts = self.k_lens if counts is None else counts
        mask = np.zeros((1, sum(self.q_lens), sum(counts)), bool)
        row = key = 0
        for positions, count in zip(self.positions, counts, strict=True):
            mask[0, row : row + len(positions), key : key + count] = sees(positions[:, None], np.arange(count)[None])
            row, key = row + len(positions), key + count
        return mask

    def dense(self) -> Array:
        return self.mask(lambda p, t: t <= p)

    def window(self, window_size: int) -> Array:
        return self.mask(lambda p, t: (t <= p) & (t >= p - window_size))

    def compressed(self, size: int, stride: int) -> Array:
        return self.mask(lambda p, i: i * stride + size - 1 <= p, self.windows(size, stride))

    def selected(self, topk_indices: Array, block_size: int) -> Array:
        blocks = np.concatenate([positions // block_size for positions in self.key_positions])
        listed: Array = (topk_indices[:, :, :, None] == blocks).any(axis=2)
        return listed & self.dense()


def attend(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, Array]:
    """``out`` and ``lse``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(group, axis=1) for x in (k, v))
    mask = mask.repeat(q.shape[1] // len(mask), axis=0)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    logits = np.where(mask, q @ k.swapaxes(1, 2) * scale, -np.inf)
    top = np.maximum(logits.max(axis=2, keepdims=True, initial=-np.inf), -1e300)
    weights = np.exp(logits - top)
    total = weights.sum(axis=2, keepdims=True)
    out = weights / np.where(total == 0, 1, total) @ v
    with np.errstate(divide="ignore"):
        return out.swapaxes(0, 1), (top + np.log(total))[:, :, 0]


def compress(batch: Batch, x: Array, size: int, stride: int, weight: Any = None, position: Any = None) -> Array:
    """A mean, a weighted sum, or a linear map of every window of ``size`` rows, a window every ``stride`` rows."""
    starts = [
        start + stride * np.arange(count) for start, count in zip(batch.cu_k, batch.windows(size, stride), strict=False)
    ]
    windows = x[np.concatenate(starts)[:, None] + np.arange(size)].swapaxes(1, 2)  # [rows, heads, size, dim]
    if weight is None:
        return windows.mean(axis=2)  # type: ignore[no-any-return]
    if weight.ndim == 2:
        return (windows * weight[:, :, None]).sum(axis=2)  # type: ignore[no-any-return]
    moved = windows if position is None else windows + position
    flat = moved.reshape(*moved.shape[:2], -1).swapaxes(0, 1)
    return (flat @ weight).swapaxes(0, 1)  # type: ignore[no-any-return]


def rotate(x: Array, positions: list[Array], theta: float, scaling: Any = None) -> Array:
    """Rotary embedding: pairs ``(x[i], x[i + dim / 2])``; ``scaling`` is Llama 3's."""
    half = x.shape[2] // 2
    frequencies = theta ** (-np.arange(half) / half)
    if scaling is not None:
        factor, low, high, length = (
            scaling[name]
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        kept = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = np.concatenate(positions)[:, None, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), axis=2)


def block_scores(batch: Batch, q: Array, k_cmp: Array, sizes: dict[str, Any], scale: float) -> list[Array]:
    """Per sequence ``[num_kv_heads, rows, blocks]``: softmax weights of compressed keys, summed over heads and windows.

    Block ``j`` gets the weights of windows ``j * block_size / stride + m - n``, for ``m`` below ``block_size / stride``
    and ``n`` below ``kernel_size / stride``.
    """
    size, stride, block = sizes["kernel_size"], sizes["kernel_stride"], sizes["block_size"]
    heads, counts = k_cmp.shape[1], batch.windows(size, stride)
    mask = batch.compressed(size, stride)[0]
    # Attention to unit vectors is the weights themselves.
    unit = np.broadcast_to(np.eye(len(k_cmp))[:, None], (len(k_cmp), heads, len(k_cmp)))
    weights = attend(q, k_cmp, unit, mask[None], scale)[0].reshape(len(q), heads, -1, len(k_cmp)).sum(axis=2)
    found, first = [], 0
    for at, (k_len, count) in enumerate(zip(batch.k_lens, counts, strict=True)):
        rows = weights[batch.cu_q[at] : batch.cu_q[at + 1], :, first : first + count]
        scores = np.zeros((heads, len(rows), -(-k_len // block)))
        for j in range(scores.shape[2]):
            for i in (j * (block // stride) + m - n for m in range(block // stride) for n in range(size // stride)):
                if 0 <= i < count:
                    scores[:, :, j] += rows[:, :, i].T
        found.append(scores)
        first += count
    return found


def misplaced(batch: Batch, ids: Array, scores: list[Array], sizes: dict[str, Any]) -> float:
    """By how much a block that was left out beats one that was taken; infinite if a row is not as promised.

    A row lists its first ``init_blocks``, the ``local_blocks`` up to its own and the best of the rest: ascending,
    ``min(topk, own + 1)`` of them, then -1.
    """
    worst, row = 0.0, 0
    for positions, score in zip(batch.positions, scores, strict=True):
        for at, position in enumerate(positions):
            own = int(position) // sizes["block_size"]
            first, last = min(sizes["init_blocks"], own + 1), max(0, own + 1 - sizes["local_blocks"])
            forced, count = {*range(first), *range(last, own + 1)}, min(sizes["topk"], own + 1)
            for head in range(len(ids)):
                chosen, rest = ids[head, row, :count].tolist(), ids[head, row, count:]
                ordered = sorted({*chosen}) == chosen and chosen[-1] <= own and (rest == -1).all()
                if not ordered or not forced <= {*chosen}:
                    return np.inf
                free = [score[head, at, j] for j in chosen if j not in forced]
                left = [score[head, at, j] for j in range(own + 1) if j not in chosen]
                if free and left:
                    worst = max(worst, max(left) - min(free))
            row += 1
    return float(worst)
