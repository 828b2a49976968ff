"""What an implementation computes: a function of leaves, which is timed forward, backward, and both in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Shape:
    """A sequence of ``n`` tokens, ``heads`` query heads in groups of ``group``."""

    n: int
    group: int
    block_size: int = 64
    topk: int = 16
    heads: int = 32
    dim: int = 128

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    def words(self) -> dict[str, Any]:
        keys = {"N": self.n, "g": self.group, "hq": self.heads, "d": self.dim}
        return {**keys, "bk": self.block_size, "T": self.topk}

    def __str__(self) -> str:
        return f"{self.n} tokens, {self.heads}/{self.kv_heads} heads, ({self.block_size}, {self.topk})"


@dataclass
class Work:
    """``forward`` takes the leaves, in order, and gives one result or several, which all have gradients."""

    impl: str
    leaves: dict[str, Tensor]
    forward: Callable[..., Any]

    def __post_init__(self) -> None:
        self.leaves = {name: x.detach().requires_grad_() for name, x in self.leaves.items()}

    def outputs(self) -> tuple[Tensor, ...]:
        outputs = self.forward(*self.leaves.values())
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def gradients(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = tuple(self.leaves.values())
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    def both(self, grads: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: the outputs, without what the backward needed, and the gradients."""
        outputs = self.outputs()
        gradients = torch.autograd.grad(outputs, tuple(self.leaves.values()), grads, allow_unused=True)
        return tuple(x.detach() for x in outputs), gradients

    def results(self, grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        outputs, gradients = self.both(grads)
        named = {f"out {at}" if at else "out": x for at, x in enumerate(outputs)}
        pairs = zip(self.leaves, gradients, strict=True)
        return {**named, **{f"grad_{name}": x for name, x in pairs if x is not None}}


DENSE = "CUDNN_ATTENTION"


def dense(q: Tensor, k: Tensor, v: Tensor) -> Work:
    """Causal attention to everything by cuDNN. Its leaves are ``[1, heads, n, dim]``."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = q.shape[1] > k.shape[1]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, is_causal=True, enable_gqa=grouped)

    leaves = {name: x.detach().transpose(0, 1)[None].contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
    return Work(DENSE, leaves, forward)


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(scale)
