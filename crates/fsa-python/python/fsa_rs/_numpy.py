"""The calls on NumPy arrays, forward only: allocate the outputs, hand everything to the extension."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _native

Array = np.ndarray[Any, Any]


def _readable(array: Any) -> Any:
    """The array, or a copy where its memory cannot be read as it lies: byte-swapped, unaligned, backwards."""
    if not isinstance(array, np.ndarray):
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    size = array.dtype.itemsize or 1
    if not array.flags.aligned or any(stride < 0 or stride % size for stride in array.strides):
        array = array.copy(order="C")
    return array


def _readables(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(_readable, arrays))


def _outputs(q: Array, v: Array) -> tuple[Array, Array]:
    return np.empty((*q.shape[:-1], *v.shape[-1:]), q.dtype), np.empty(q.shape[-2::-1], np.float32)


def _indices(q: Array, k: Array, topk: int) -> Array:
    return np.empty((*k.shape[1:2], *q.shape[:1], topk), np.int32)


def attention(
    stage: tuple[Any, ...], packed: tuple[Array, ...], scale: float | None, deterministic: bool
) -> tuple[Array, Array]:
    """``out`` and ``lse`` of an attention stage."""
    stage, packed = _readables(stage), _readables(packed)
    outputs = _outputs(packed[0], packed[2])
    _native.attention(stage, packed, scale, outputs)  # type: ignore[arg-type]
    return outputs


def select(
    sizes: list[int], packed: tuple[Array, ...], scale: float | None, deterministic: bool
) -> tuple[Array, Array, Array]:
    """``out``, ``lse`` and ``topk_indices`` of compressed attention."""
    packed = _readables(packed)
    outputs = (*_outputs(packed[0], packed[2]), _indices(packed[0], packed[1], sizes[3]))
    _native.select(sizes, packed, scale, outputs)  # type: ignore[arg-type]
    return outputs


def compress(
    geometry: tuple[int, int], packed: tuple[Array, ...], parameters: tuple[Array | None, ...]
) -> tuple[Array, Array, Array]:
    """Compressed keys and values, zeros after the last, and their prefix sums."""
    kernel_size, kernel_stride = geometry
    *inputs, cu_seqlens_k = _readables(packed)
    outputs = []
    for name, input, given in zip("kv", inputs, (parameters[:2], parameters[2:]), strict=True):
        out = np.zeros((input.shape[0] // max(kernel_stride, 1), *input.shape[1:]), input.dtype)
        _native.compress(name, geometry, (input, cu_seqlens_k), _readables(given), out)
        outputs.append(out)
    windows = ((np.diff(cu_seqlens_k) - kernel_size) // kernel_stride + 1).clip(min=0)
    return outputs[0], outputs[1], np.concatenate(([0], windows.cumsum())).astype(np.int32)


def nsa(
    options: tuple[list[int], list[float], float | None],
    packed: tuple[Array, ...],
    gates: Array,
    parameters: tuple[Array | None, ...],
    deterministic: bool,
    recompute: str,
) -> tuple[Array, Array]:
    """``out`` and ``topk_indices`` of the whole operation."""
    packed, parameters = _readables(packed), _readables(parameters)
    outputs = (_outputs(packed[0], packed[2])[0], _indices(packed[0], packed[1], options[0][3]))
    inputs = (packed, _readable(gates), parameters[:2], parameters[2:])
    _native.nsa(options, inputs, outputs, ())  # type: ignore[arg-type]
    return outputs
