"""What the whole operation keeps for its backward: one tensor of bytes, in which all parts lie one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native

#: Address, device, dtype, shape and strides of a tensor, as the extension takes them.
Described = tuple[int, int, str, tuple[int, ...], tuple[int, ...]]

#: Parts by what they are, in the order in which they lie: what is computed again is at the end.
LSE, COMPRESSED, BRANCHES, ROTATED = slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 10)


class Part(NamedTuple):
    """A tensor without gaps among the bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind it."""
        elements = 1
        for size in self.shape:
            elements *= size
        return self.offset + elements * self.dtype.itemsize


class Layout:
    """Where the parts lie: `lse` of the branches, compressed keys and values, the branches, and with an embedding ``q``
    and ``k`` as it rotated them. Shapes are those that the kernels see, so on a CUDA device vectors are padded."""

    def __init__(self, arguments: tuple[Any, ...], recompute: str) -> None:
        q, k, v = arguments[:3]
        sizes, rope = arguments[10:12]
        (rows, heads, dim), (tokens, kv_heads, _), value_dim = q.shape, k.shape, v.shape[-1]
        self.on_device = q.device.type == "cuda"
        if self.on_device:
            widest = max(dim, value_dim)
            dim = value_dim = next((padded for padded in _native.HEAD_DIMS if padded >= widest), widest)
        compressed = tokens // max(sizes[1], 1)
        shapes = [(compressed, kv_heads, dim), (compressed, kv_heads, value_dim)] + 3 * [(rows, heads, value_dim)]
        if rope:
            shapes += [(rows, heads, dim), (tokens, kv_heads, dim)]
        self.parts: list[Part] = []
        end = 0
        for _ in range(3):
            self.parts.append(Part(end, torch.float32, (heads, rows)))
            end = self.parts[-1].end
        self.lse_end, end = end, -(-end // 16) * 16  # vectors are read in pieces of 16 bytes
        for shape in shapes:
            self.parts.append(Part(end, q.dtype, shape))
            end = self.parts[-1].end
        #: Bytes that are kept, and in all.
        self.kept = {"none": end, "rotated": self.parts[BRANCHES][-1].end, "all": 0}[recompute]
        self.bytes = end

    def allocate(self, q: Tensor, again: bool = False) -> Tensor:
        """Room for what is kept, or for what is computed again."""
        first, end = (self.kept, self.bytes) if again else (0, self.kept)
        state = q.new_empty((end - first,), dtype=torch.uint8)
        # Rows after the last compressed one are not written.
        compressed = self.parts[COMPRESSED][-1].end
        if first < compressed <= end:
            state[self.lse_end - first : compressed - first].zero_()
        return state

    def _places(self, kept: Tensor, again: Tensor | None) -> list[tuple[Tensor, int, Part]]:
        """The tensor that holds each part, and where."""
        places = []
        for part in self.parts:
            if again is None or part.offset < self.kept:
                places.append((kept, part.offset, part))
            else:
                places.append((again, part.offset - self.kept, part))
        return places

    def views(self, kept: Tensor, again: Tensor | None = None) -> list[Tensor]:
        """The parts as tensors, in the order of the extension on the CPU: `lse` behind the branches."""
        parts = [
            memory[offset : offset + part.end - part.offset].view(part.dtype).view(part.shape)
            for memory, offset, part in self._places(kept, again)
        ]
        return parts[COMPRESSED] + parts[BRANCHES] + parts[LSE] + parts[ROTATED]

    def described(self, kept: Tensor, again: Tensor | None = None) -> Any:
        """The parts as the extension takes them on a CUDA device."""
        parts: list[Described] = []
        for memory, offset, (_, dtype, shape) in self._places(kept, again):
            strides = (shape[1] * shape[2], shape[2], 1) if len(shape) == 3 else (shape[1], 1)
            name = str(dtype).removeprefix("torch.")
            parts.append((memory.data_ptr() + offset, memory.get_device(), name, shape, strides))
        return parts[COMPRESSED], parts[BRANCHES], parts[LSE], parts[ROTATED] or None
