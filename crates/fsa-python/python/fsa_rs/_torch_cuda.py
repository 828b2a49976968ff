"""The stages on CUDA tensors: the CUDA kernels of the operators of `_torch`.

PyTorch allocates: outputs and workspace are ordinary tensors, so a call may be recorded into a CUDA graph, and
memory is shared with everything else. The extension gets descriptions of tensors, and PyTorch's current stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _native
from ._torch_state import Described

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int32: "int32"}


def described(x: Tensor) -> Described:
    """Address, device, dtype, shape and strides, as the extension takes them."""
    dtype = _NAMES.get(x.dtype) or str(x.dtype).removeprefix("torch.")
    return x.data_ptr(), x.get_device(), dtype, x.shape, x.stride()


def described_if(x: Tensor | None) -> Described | None:
    """The same, if there is a tensor."""
    return None if x is None else described(x)


def current_stream(device: int) -> int:
    """The handle of PyTorch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


class Call:
    """A planned call: turns tensors into what its kernels read.

    Copies are kept until the call is dropped, after its launch: then PyTorch may give their memory to later work of
    the same stream.
    """

    def __init__(self, planned: tuple[_native.CudaPlan, int, int], q: Tensor, scale: float | None = None) -> None:
        self.plan, self.dim, self.workspace_bytes = planned
        self.device = q.device
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        # The kernels take no negative factor: its sign goes into the query.
        self.negative = self.scale < 0
        self.kept: list[Tensor] = []

    def _keep(self, x: Tensor) -> Described:
        self.kept.append(x)
        return described(x)

    def vectors(self, x: Tensor) -> Described:
        """``[rows, heads, dim]`` as it lies, or a copy where kernels cannot read it: padded, in pieces of 16 bytes."""
        address, _, _, shape, strides = about = described(x)
        if shape[2] != self.dim:
            return self._keep(pad(x, (0, self.dim - shape[2])))
        if strides[2] == 1 and not (address % 16 or strides[0] % 8 or strides[1] % 8):
            return about
        return self._keep(x.clone(memory_format=torch.contiguous_format))

    def query(self, q: Tensor) -> Described:
        """The query, with the sign of the factor of its logits."""
        if not self.negative:
            return self.vectors(q)
        self.kept.append(q.neg())
        return self.vectors(self.kept[-1])

    def plain(self, x: Tensor) -> Described:
        """A tensor as it lies, or a copy where it has gaps or begins between pieces of 16 bytes."""
        about = described(x)
        if about[0] % 16 == 0 and x.is_contiguous():
            return about
        return self._keep(x.clone(memory_format=torch.contiguous_format))

    def plain_if(self, x: Tensor | None) -> Described | None:
        """The same, if there is a tensor."""
        return None if x is None else self.plain(x)

    def packed(self, packed: tuple[Tensor, ...]) -> tuple[Described, ...]:
        """``q``, ``k``, ``v`` and the prefix sums."""
        q, k, v, cu_seqlens_q, cu_seqlens_k = packed
        return (self.query(q), self.vectors(k), self.vectors(v), self.plain(cu_seqlens_q), self.plain(cu_seqlens_k))

    def like(self, x: Tensor, zeros: bool = False) -> Tensor:
        """Room for a result of the shape of ``x``, with padded vectors."""
        shape = (*x.shape[:2], self.dim)
        return x.new_zeros(shape) if zeros else x.new_empty(shape)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """A result without the padding of its vectors."""
        return x if dim == self.dim else x[..., :dim].contiguous()

    def context(self) -> tuple[int, Described]:
        """The current stream and the workspace."""
        about = self._keep(torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device))
        return current_stream(about[1]), about


class Parameters:
    """Weight and position of a compression, padded like its vectors, and room for their gradients."""

    def __init__(self, call: Call, weight: Tensor | None, position: Tensor | None) -> None:
        self.call, self.weight, self.position = call, weight, position
        self.grads: tuple[Tensor | None, Tensor | None] = (None, None)

    def inputs(self) -> tuple[Described | None, Described | None]:
        weight, position, dim = self.weight, self.position, self.call.dim
        if weight is not None and weight.ndim == 3 and weight.shape[2] != dim:
            more = dim - weight.shape[2]
            weight = pad(weight.reshape(len(weight), -1, *2 * weight.shape[2:]), (0, more, 0, more)).flatten(1, 2)
        if position is not None and position.shape[2] != dim:
            position = pad(position, (0, dim - position.shape[2]))
        self.call.kept += [x for x in (weight, position) if x is not None]
        return self.call.plain_if(weight), self.call.plain_if(position)

    def outputs(self) -> tuple[Described | None, Described | None]:
        """Gradients for the kernels to write."""
        weight, position, dim = self.weight, self.position, self.call.dim
        grad_weight = grad_position = None
        if weight is not None:
            matrix = weight.ndim == 3
            rows = (weight.shape[1] // weight.shape[2] * dim, dim) if matrix else (weight.shape[1],)
            grad_weight = weight.new_empty((weight.shape[0], *rows))
        if position is not None:
            grad_position = position.new_empty((*position.shape[:2], dim))
        self.grads = (grad_weight, grad_position)
        return described_if(grad_weight), described_if(grad_position)

    def results(self) -> list[Tensor]:
        """The gradients, without padding."""
        (grad_weight, grad_position), dim = self.grads, self.call.dim
        results = []
        if grad_weight is not None and self.weight is not None:
            own = self.weight.shape[-1]
            if self.weight.ndim == 3 and own != dim:
                grad_weight = grad_weight.reshape(len(grad_weight), -1, dim, dim)[:, :, :own, :own].reshape(
                    self.weight.shape
                )
            results.append(grad_weight)
        if grad_position is not None and self.position is not None:
            results.append(self.call.cut(grad_position, self.position.shape[2]))
        return results


# The attention stages. `stage` is as `_torch` has it.


def _attention_call(arguments: tuple[Any, ...], backward: bool) -> Call:
    packed, scale, topk_indices, stage, deterministic = arguments[:5], *arguments[5:9]
    native = tuple(stage or ()) if topk_indices is None else (described(topk_indices), stage[0])
    inputs = tuple(map(described, packed))
    planned = _native.cuda_attention_plan(inputs, native, backward, backward and deterministic)
    return Call(planned, packed[0], scale)


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a stage."""
    q, _, v, *_ = packed = arguments[:5]
    topk_indices, stage = arguments[6:8]
    call = _attention_call(arguments, False)
    if topk_indices is not None and stage[1]:
        _validate(packed, topk_indices, stage[0])
    out = call.like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    tensors = (*call.packed(packed), described(out), described(lse))
    _native.cuda_attention(call.plan, call.context(), abs(call.scale), tensors, call.plain_if(topk_indices))
    return call.cut(out, v.shape[2]), lse


def attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    q, k, v, *_ = packed = arguments[:5]
    topk_indices, stage = arguments[6:8]
    out, lse, grad_out, grad_lse = arguments[9:]
    call = _attention_call(arguments, True)
    # Rows after the last compressed one are not written.
    compressed = topk_indices is None and stage is not None and len(stage) == 2
    grads = (call.like(q), call.like(k, compressed), call.like(v, compressed))
    tensors = (*call.packed(packed), call.vectors(out), call.plain(lse))
    gradients = (call.vectors(grad_out), call.plain_if(grad_lse), *map(described, grads))
    listed = call.plain_if(topk_indices)
    _native.cuda_attention_backward(call.plan, call.context(), abs(call.scale), tensors, listed, gradients)
    if call.negative:
        grads[0].neg_()
    grad_q, grad_k, grad_v = (call.cut(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def _validate(packed: tuple[Tensor, ...], topk_indices: Tensor, block_size: int) -> None:
    """Refuses wrong ids and wrong prefix sums. Copies them to the host, for which it waits for the device."""
    q, k, _, cu_seqlens_q, cu_seqlens_k = packed
    sums: Any = (cu_seqlens_q.cpu(), cu_seqlens_k.cpu())
    _native.validate([q.shape[0], k.shape[0]], block_size, topk_indices.cpu(), sums)


def select(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``lse`` and ``topk_indices`` of compressed attention."""
    q, k, v, *_ = packed = arguments[:5]
    scale, sizes = arguments[5:]
    call = Call(_native.cuda_select_plan(tuple(map(described, packed)), sizes), q, scale)
    out = call.like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    topk_indices = q.new_empty((k.shape[1], q.shape[0], sizes[3]), dtype=torch.int32)
    tensors = (*call.packed(packed), described(out), described(lse))
    _native.cuda_select(call.plan, call.context(), abs(call.scale), tensors, described(topk_indices))
    return call.cut(out, v.shape[2]), lse, topk_indices


# Stage compress.


def _compress_call(arguments: tuple[Any, ...], backward: bool) -> Call:
    name, geometry, input, cu_seqlens_k, weight, position = arguments[:6]
    given = ((described(input), described(cu_seqlens_k)), (described_if(weight), described_if(position)))
    return Call(_native.cuda_compress_plan(name, tuple(geometry), *given, backward), input)


def compress(*arguments: Any) -> Tensor:
    """Compressed rows, zeros after the last."""
    _, geometry, input, cu_seqlens_k, weight, position = arguments
    call = _compress_call(arguments, False)
    out = input.new_zeros((input.shape[0] // geometry[1], input.shape[1], call.dim))
    tensors = (call.vectors(input), call.plain(cu_seqlens_k), described(out))
    _native.cuda_compress(call.plan, call.context(), tensors, Parameters(call, weight, position).inputs())
    return call.cut(out, input.shape[2])


def compress_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the input, and of the parameters that are there."""
    _, _, input, cu_seqlens_k, weight, position, grad_out = arguments
    call = _compress_call(arguments, True)
    tensors = (call.vectors(input), call.plain(cu_seqlens_k), call.vectors(grad_out))
    parameters, grad_input = Parameters(call, weight, position), call.like(input)
    given = (tensors, parameters.inputs(), described(grad_input), parameters.outputs())
    _native.cuda_compress_backward(call.plan, call.context(), *given)
    return [call.cut(grad_input, input.shape[2]), *parameters.results()]
