"""Definitions in NumPy, and how large an error may be. Slow, small, and independent of the Rust code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import ml_dtypes
except ModuleNotFoundError:
    ml_dtypes = None

#: Distance from 1 to the next larger value.
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def numpy_dtype(name: str) -> Any:
    """The dtype of a name, or ``None`` if this machine has none."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16) if ml_dtypes else None
    return np.dtype(name)


def rounded(values: Any, dtype: str) -> Any:
    """f64 values, rounded to ``dtype``. bfloat16 by hand, so that it needs no package."""
    values = np.asarray(values, np.float64)
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


@dataclass
class Case:
    """A packed batch. The second sequence is empty; the last has fewer query rows than keys."""

    q_lens: tuple[int, ...] = (70, 0, 23)
    k_lens: tuple[int, ...] = (70, 0, 61)
    heads: tuple[int, int] = (6, 2)
    dims: tuple[int, int] = (16, 24)
    seed: int = 0
    scale: float = 0.25
    rng: Any = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    @property
    def cu_q(self) -> Any:
        return np.cumsum((0, *self.q_lens)).astype(np.int32)

    @property
    def cu_k(self) -> Any:
        return np.cumsum((0, *self.k_lens)).astype(np.int32)

    def normal(self, *shape: int, dtype: str = "float32") -> Any:
        """Random values that ``dtype`` holds exactly, as f64."""
        return rounded(self.rng.standard_normal(shape), dtype)

    def qkv(self, dtype: str = "float32") -> tuple[Any, Any, Any]:
        total_q, total_k = sum(self.q_lens), sum(self.k_lens)
        q = self.normal(total_q, self.heads[0], self.dims[0], dtype=dtype)
        k = self.normal(total_k, self.heads[1], self.dims[0], dtype=dtype)
        return q, k, self.normal(total_k, self.heads[1], self.dims[1], dtype=dtype)

    def positions(self) -> list[Any]:
        pairs = zip(self.q_lens, self.k_lens, strict=True)
        return [np.arange(k_len - q_len, k_len) for q_len, k_len in pairs]

    def mask(self, sees: Any, k_lens: tuple[int, ...] | None = None) -> Any:
        """``[total_q, total_k]``: ``sees(positions [rows, 1], keys [1, keys])`` inside a sequence, else not."""
        k_lens = self.k_lens if k_lens is None else k_lens
        mask = np.zeros((sum(self.q_lens), sum(k_lens)), bool)
        row = column = 0
        for positions, k_len in zip(self.positions(), k_lens, strict=True):
            block = sees(positions[:, None], np.arange(k_len)[None, :])
            mask[row : row + len(positions), column : column + k_len] = block
            row, column = row + len(positions), column + k_len
        return mask

    def windows(self, size: int, stride: int) -> tuple[int, ...]:
        return tuple(max(0, (n - size) // stride + 1) for n in self.k_lens)

    def dense(self) -> Any:
        return self.mask(lambda p, t: t <= p)[None]

    def window(self, window_size: int) -> Any:
        return self.mask(lambda p, t: (t <= p) & (t >= p - window_size))[None]

    def compressed(self, size: int, stride: int) -> Any:
        return self.mask(lambda p, i: i * stride + size - 1 <= p, self.windows(size, stride))[None]

    def selected(self, topk_indices: Any, block_size: int) -> Any:
        """``[num_kv_heads, total_q, total_k]``."""
        listed = []
        blocks = self.mask(lambda p, t: np.broadcast_to(t // block_size, (len(p), t.shape[1])) + 1)
        local = np.concatenate([np.arange(n) // block_size for n in self.k_lens])
        for ids in topk_indices:
            listed.append(np.stack([np.isin(local, row[row >= 0]) for row in ids]))
        return np.stack(listed) & self.dense() & blocks

    def topk_indices(self, block_size: int, topk: int, hostile: bool = False) -> Any:
        """Distinct random ids per row, in random order; hostile ones are negative, huge or in the future too."""
        most = max(self.k_lens) // block_size + 2
        shape = (self.heads[1], sum(self.q_lens))
        ids = np.argsort(self.rng.random((*shape, max(most, topk))), axis=-1)[..., :topk].astype(np.int32)
        if not hostile:
            own = np.concatenate(self.positions()) // block_size
            return np.where(ids <= own[None, :, None], ids, np.int32(-1))
        ids[..., 0] = self.rng.choice(np.array([-(2**31), -7, 2**31 - 1, 10**6], np.int32), shape)
        return ids


def attend(q: Any, k: Any, v: Any, mask: Any, scale: float, dtype: str | None = None) -> tuple[Any, Any]:
    """``out`` and ``lse`` in f64; with ``dtype`` as a naive program does it: in f32, weights and result rounded."""
    real = np.float64 if dtype is None else np.float32
    q, k, v = (x.astype(real) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]), real)
    lse = np.full((q.shape[1], q.shape[0]), -np.inf, real)
    for head in range(q.shape[1]):
        kv = head // group
        sees = mask[min(kv, len(mask) - 1)]
        logits = np.where(sees, (q[:, head] @ k[:, kv].T) * real(scale), -np.inf)
        rows = sees.any(axis=1)
        if not rows.any():
            continue
        top = logits[rows].max(axis=1, keepdims=True)
        weights = np.exp(logits[rows] - top)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / total
        if dtype is not None:
            weights = rounded(weights, dtype).astype(real)
        out[rows, head] = weights @ v[:, kv]
        lse[head, rows] = (top + np.log(total))[:, 0]
    return (out, lse) if dtype is None else (rounded(out, dtype), lse.astype(np.float64))


def compress(case: Case, x: Any, size: int, stride: int, weight: Any = None, position: Any = None) -> Any:
    """Compressed rows of all sequences, in f64."""
    rows, start = [], 0
    for n, count in zip(case.k_lens, case.windows(size, stride), strict=True):
        for i in range(count):
            window = x[start + i * stride : start + i * stride + size].astype(np.float64)
            if weight is None:
                rows.append(window.mean(axis=0))
            elif weight.ndim == 2:
                rows.append(np.einsum("thd,ht->hd", window, weight))
            else:
                moved = window if position is None else window + position.swapaxes(0, 1)
                flat = moved.swapaxes(0, 1).reshape(x.shape[1], -1)
                rows.append(np.einsum("hk,hkd->hd", flat, weight))
        start += n
    return np.stack(rows)


def rotate(x: Any, positions: Any, theta: float) -> Any:
    """Rotary embedding of ``[rows, heads, dim]`` in f64."""
    half = x.shape[2] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)


def close(got: Any, exact: Any, naive: Any, dtype: str, ulps: float = 4.0) -> None:
    """The project's bound: twice the largest error of the naive evaluations, plus ``ulps`` of the dtype.

    ``naive`` is one array or several of them.
    """
    got, exact = (np.asarray(x, np.float64) for x in (got, exact))
    naive = np.asarray(naive, np.float64).reshape(-1, *exact.shape)
    assert got.shape == exact.shape
    finite = np.isfinite(exact)
    assert (np.isfinite(got) == finite).all()
    assert (got[~finite] == exact[~finite]).all()
    if not finite.any():
        return
    size = max(np.abs(exact[finite]).max(), 1e-30)
    bound = 2 * np.abs(naive[:, finite] - exact[finite]).max() + ulps * EPSILON[dtype] * size
    error = np.abs(got[finite] - exact[finite]).max()
    assert error <= bound, f"error {error:.3g} above the bound {bound:.3g}"
