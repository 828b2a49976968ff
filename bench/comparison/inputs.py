"""Inputs of the whole operation and of its stages."""

from __future__ import annotations

from dataclasses import dataclass

import fsa_rs
import torch
from fsa_rs.nn import RopeConfig
from torch import Tensor

from .work import Shape, randn

KERNEL, STRIDE, WINDOW = 32, 16, 512
INIT, LOCAL = 1, 2


@dataclass
class Inputs:
    """One sequence. ``logits`` are those of the gates, one triple for all heads of a row."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    k_weight: Tensor
    v_weight: Tensor
    k_position: Tensor
    cu: Tensor
    grad_out: Tensor
    rope: RopeConfig

    @property
    def gates(self) -> Tensor:
        return self.logits.float().sigmoid().bfloat16()

    @property
    def compressed_rows(self) -> int:
        return (self.shape.n - KERNEL) // STRIDE + 1

    def compressed(self) -> tuple[Tensor, Tensor]:
        """Keys and values, linearly compressed, without the rows that fill them up."""
        weights = {"k_weight": self.k_weight, "k_position": self.k_position, "v_weight": self.v_weight}
        with torch.no_grad():
            k, v, _ = fsa_rs.compress_kv(self.k, self.v, self.cu, KERNEL, STRIDE, **weights)
        return k[: self.compressed_rows].contiguous(), v[: self.compressed_rows].contiguous()


def make(shape: Shape) -> Inputs:
    """Normal numbers. Compressed keys and values are as large as others, so that rows prefer some blocks."""
    torch.manual_seed(0)
    n, kv, dim = shape.n, shape.kv_heads, shape.dim
    q, grad_out = (randn(n, shape.heads, dim) for _ in range(2))
    k, v = (randn(n, kv, dim) for _ in range(2))
    weights = (randn(kv, KERNEL * dim, dim, scale=(KERNEL * dim) ** -0.5) for _ in range(2))
    position = randn(kv, KERNEL, dim, scale=0.1)
    cu = torch.tensor([0, n], device="cuda", dtype=torch.int32)
    return Inputs(shape, q, k, v, randn(n, 3), *weights, position, cu, grad_out, RopeConfig(head_dim=dim))
