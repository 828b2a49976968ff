"""Stage `selected` on CUDA tensors: the CUDA kernels of the operators ``attention`` and ``attention_backward``.

PyTorch allocates: outputs and workspace are ordinary tensors, so a call may be recorded into a CUDA graph, and
memory is shared with everything else. The extension gets descriptions of tensors, and PyTorch's current stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native

Described = tuple[int, int, str, tuple[int, ...], tuple[int, ...]]

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int32: "int32"}


def _described(x: Tensor) -> Described:
    """Address, device, dtype, shape and strides, as the extension takes them."""
    dtype = _NAMES.get(x.dtype) or str(x.dtype).removeprefix("torch.")
    return x.data_ptr(), x.get_device(), dtype, x.shape, x.stride()


def _vectors(x: Tensor, described: Described, dim: int) -> tuple[Tensor, Described]:
    """``x``, or a copy where the kernels cannot read it as it lies: in pieces of 16 bytes, ``dim`` elements."""
    address, _, _, shape, strides = described
    if shape[2] == dim:
        if strides[2] == 1 and not (address % 16 or strides[0] % 8 or strides[1] % 8):
            return x, described
        x = x.clone(memory_format=torch.contiguous_format)
    else:
        x = torch.nn.functional.pad(x, (0, dim - shape[2]))
    return x, _described(x)


def _plain(x: Tensor, described: Described) -> tuple[Tensor, Described]:
    """``x``, or a copy where it has gaps or begins between pieces of 16 bytes."""
    if described[0] % 16 == 0 and x.is_contiguous():
        return x, described
    x = x.clone(memory_format=torch.contiguous_format)
    return x, _described(x)


class _Call:
    """What forward and backward share: the plan, inputs as the kernels take them, the factor of the logits."""

    def __init__(
        self,
        packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        scale: float | None,
        topk_indices: Tensor,
        block_size: int,
        backward: bool,
        deterministic: bool,
    ) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k = packed
        given = (q, k, v, topk_indices, cu_seqlens_q, cu_seqlens_k)
        described = tuple(map(_described, given))
        self.plan, self.dim, self.workspace_bytes = _native.selected_plan(
            described,  # type: ignore[arg-type]
            block_size,
            backward,
            deterministic,
        )
        self.scale = q.shape[2] ** -0.5 if scale is None else scale
        # The kernels take no negative factor: its sign goes into the query.
        self.negative = self.scale < 0
        vectors = [_vectors(x, about, self.dim) for x, about in zip(given[:3], described[:3], strict=True)]
        if self.negative:
            vectors[0] = self.vectors(vectors[0][0].neg())
        plain = [_plain(x, about) for x, about in zip(given[3:], described[3:], strict=True)]
        # Copies are kept until the launch is done giving them to the stream.
        self.kept, self.inputs = zip(*vectors, *plain, strict=True)
        self.device = q.device

    def vectors(self, x: Tensor) -> tuple[Tensor, Described]:
        return _vectors(x, _described(x), self.dim)

    def like(self, x: Tensor) -> Tensor:
        """Room for a result of the shape of ``x``, with padded vectors."""
        return x.new_empty((*x.shape[:2], self.dim))

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """A result without the padding of its vectors."""
        return x if dim == self.dim else x[..., :dim].contiguous()

    def context(self) -> tuple[int, Described, Tensor]:
        """The current stream and the workspace, which is kept by the third."""
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self.device)
        address, index = workspace.data_ptr(), workspace.get_device()
        about: Described = (address, index, "uint8", (self.workspace_bytes,), (1,))
        return torch.cuda.current_stream(index).cuda_stream, about, workspace


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None,
    topk_indices: Tensor,
    stage: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``."""
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    call = _Call(packed, softmax_scale, topk_indices, stage[0], False, False)
    if stage[1]:
        _validate(packed, topk_indices, stage[0])
    out = call.like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    stream, about, workspace = call.context()
    tensors = (*call.inputs, _described(out), _described(lse))
    call.plan.forward((stream, about), abs(call.scale), tensors)
    del workspace  # not before the launch
    return call.cut(out, v.shape[2]), lse


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None,
    topk_indices: Tensor,
    stage: list[int],
    deterministic: bool,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    packed = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    call = _Call(packed, softmax_scale, topk_indices, stage[0], True, deterministic)
    out, out_about = call.vectors(out)
    grad_out, grad_out_about = call.vectors(grad_out)
    lse, lse_about = _plain(lse, _described(lse))
    grad_lse_about = None
    if grad_lse is not None:
        grad_lse, grad_lse_about = _plain(grad_lse, _described(grad_lse))
    grads = [call.like(x) for x in (q, k, v)]
    about_q, about_k, about_v = map(_described, grads)
    stream, about, workspace = call.context()
    tensors = (*call.inputs, out_about, lse_about)
    gradients = (grad_out_about, grad_lse_about, about_q, about_k, about_v)
    call.plan.backward((stream, about), abs(call.scale), tensors, gradients)
    del workspace  # not before the launch
    if call.negative:
        grads[0].neg_()
    grad_q, grad_k, grad_v = (call.cut(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def _validate(packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], topk_indices: Tensor, block_size: int) -> None:
    """Refuses wrong ids and wrong prefix sums. Copies them to the host, for which it waits for the device."""
    q, k, _, cu_seqlens_q, cu_seqlens_k = packed
    sums: Any = (cu_seqlens_q.cpu(), cu_seqlens_k.cpu())
    _native.validate([q.shape[0], k.shape[0]], block_size, topk_indices.cpu(), sums)
