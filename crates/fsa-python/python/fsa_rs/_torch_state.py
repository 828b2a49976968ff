"""What the whole operation keeps for its backward: one tensor of bytes, in which all parts lie one after the other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native

#: Names of dtypes in a description.
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
#: Address, device, dtype, shape and strides of a tensor, as the extension takes them.
Described = tuple[int, int, str, tuple[int, ...], tuple[int, ...]]

#: Parts by what they are, in the order in which they lie: what is computed again is at the end.
LSE, COMPRESSED, BRANCHES, ROTATED = slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 10)


class Part(NamedTuple):
    """A tensor without gaps among the bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.shape[0] * self.strides[0] * self.dtype.itemsize


class Layout:
    """Where the parts lie: `lse` of the branches, compressed keys and values, the branches, and with an embedding ``q``
    and ``k`` as it rotated them. Shapes are those that the kernels see, so on a CUDA device vectors are padded."""

    def __init__(
        self,
        sizes: tuple[Any, ...],
        dtype: torch.dtype,
        on_device: bool,
        kernel_stride: int,
        rotates: bool,
        recompute: str,
    ) -> None:
        (rows, heads, dim), (tokens, kv_heads, _), value_dim = sizes
        if on_device:
            widest = max(dim, value_dim)
            dim = value_dim = next((padded for padded in _native.HEAD_DIMS if padded >= widest), widest)
        compressed = tokens // max(kernel_stride, 1)
        shapes = [(compressed, kv_heads, dim), (compressed, kv_heads, value_dim)] + 3 * [(rows, heads, value_dim)]
        if rotates:
            shapes += [(rows, heads, dim), (tokens, kv_heads, dim)]
        self.parts: list[Part] = []
        end = 0
        for _ in range(3):
            self.parts.append(Part(end, torch.float32, (heads, rows), (rows, 1)))
            end = self.parts[-1].end
        written, end = end, -(-end // 16) * 16  # vectors are read in pieces of 16 bytes
        #: Bytes that no kernel writes.
        self.gap = slice(written, end)
        for shape in shapes:
            self.parts.append(Part(end, dtype, shape, (shape[1] * shape[2], shape[2], 1)))
            end = self.parts[-1].end
        #: Bytes that are kept, and in all.
        self.kept = {"none": end, "rotated": self.parts[BRANCHES][-1].end, "all": 0}[recompute]
        self.bytes = end

    def allocate(self, q: Tensor, again: bool = False) -> Tensor:
        """Room for what is kept, or for what is computed again."""
        return q.new_empty((self.bytes - self.kept if again else self.kept,), dtype=torch.uint8)

    def kept_room(self, q: Tensor) -> Tensor:
        """Room for what is kept, in which all is written: results have to be the same whenever a call's inputs are."""
        room = self.allocate(q)
        if self.gap.start < self.gap.stop:
            room[self.gap].zero_()
        return room

    def cleared(self, state: Tensor) -> list[Tensor]:
        """The parts before the extension writes them on the CPU: it leaves rows after the last compressed one alone."""
        state[self.gap].zero_()
        views = self.views(state)
        for compressed in views[:2]:
            compressed.zero_()
        return views

    def views(self, state: Tensor) -> list[Tensor]:
        """The parts as tensors, in the order of the extension on the CPU: `lse` behind the branches."""
        parts = [state[part.offset : part.end].view(part.dtype).view(part.shape) for part in self.parts]
        return parts[COMPRESSED] + parts[BRANCHES] + parts[LSE] + parts[ROTATED]

    def described(self, kept: Tensor, again: Tensor | None = None) -> Any:
        """The parts as the extension takes them on a CUDA device. What is computed again has a tensor of its own."""
        device, address = kept.get_device(), kept.data_ptr()
        address_again = address if again is None else again.data_ptr() - self.kept
        parts: list[Described] = []
        for offset, dtype, shape, strides in self.parts:
            start = address if offset < self.kept else address_again
            parts.append((start + offset, device, _NAMES[dtype], shape, strides))
        return parts[COMPRESSED], parts[BRANCHES], parts[LSE], parts[ROTATED] or None


def layout(arguments: tuple[Any, ...], recompute: str) -> Layout:
    """That of a call; ``arguments`` as `_torch_nsa` has them."""
    return Layout(*_about(arguments), recompute)


def known_layout(arguments: tuple[Any, ...], recompute: str) -> Layout:
    """The same, kept for the next call. Not for symbolic shapes."""
    return _known(*_about(arguments), recompute)


_known = lru_cache(maxsize=64)(Layout)


def _about(arguments: tuple[Any, ...]) -> tuple[Any, Any, Any, Any, Any]:
    q, k, v = arguments[:3]
    return (q.shape, k.shape, v.shape[-1]), q.dtype, q.is_cuda, arguments[10][1], bool(arguments[11])
