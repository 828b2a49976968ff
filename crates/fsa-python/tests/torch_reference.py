"""The definitions as differentiable PyTorch: in f64 they are the truth, in f32 with rounding the naive program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from reference import Case, close
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Arithmetic:
    """f64, or f32 whose stored results are rounded to ``dtype``.

    With a ``seed``, intermediate results also get random errors of the size of a rounding: other programs
    round in other places, and one evaluation alone may be lucky.
    """

    def __init__(self, dtype: torch.dtype | None, seed: int | None = None) -> None:
        self.dtype = dtype
        self.real = torch.float64 if dtype is None else torch.float32
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def shaken(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.generator is None:
            return x
        errors = (torch.rand(x.shape, generator=self.generator) - 0.5) * torch.finfo(dtype).eps
        return x * (1 + errors)

    def load(self, x: Tensor) -> Tensor:
        return x.to(self.real)

    def store(self, x: Tensor) -> Tensor:
        return x if self.dtype is None else x.to(self.dtype)

    def stored(self, x: Tensor) -> Tensor:
        return self.load(self.store(self.shaken(x, self.dtype or self.real)))

    def computed(self, x: Tensor) -> Tensor:
        return self.shaken(x, self.real)


def attend(at: Arithmetic, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    q, k, v = (at.load(x) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = torch.from_numpy(mask).expand(k.shape[1] // group, -1, -1).repeat_interleave(group, dim=0)
    logits = at.computed(torch.einsum("qhd,khd->hqk", q, k) * scale)
    logits = logits.masked_fill(~mask, float("-inf"))
    alive = mask.any(dim=2)
    logits = logits.masked_fill(~alive[..., None], 0.0)
    weights = at.stored(logits.softmax(dim=2)) * alive[..., None]
    out = torch.einsum("hqk,khd->qhd", weights, v)
    return at.stored(out), logits.logsumexp(dim=2).masked_fill(~alive, float("-inf"))


def compress(at: Arithmetic, case: Case, x: Tensor, geometry: tuple[int, int], *parameters: Tensor | None) -> Tensor:
    (size, stride), (weight, position) = geometry, parameters
    rows, start = [], 0
    for n, count in zip(case.k_lens, case.windows(size, stride), strict=True):
        rows += [x[start + i * stride : start + i * stride + size] for i in range(count)]
        start += n
    windows = at.load(torch.stack(rows))  # [rows, size, heads, dim]
    if weight is None:
        return at.stored(windows.mean(dim=1))
    if weight.ndim == 2:
        return at.stored(torch.einsum("rthd,ht->rhd", windows, at.load(weight)))
    if position is not None:
        windows = windows + at.load(position).transpose(0, 1)
    flat = windows.transpose(1, 2).flatten(2)
    return at.stored(torch.einsum("rhk,hkd->rhd", flat, at.load(weight)))


def rotate(at: Arithmetic, x: Tensor, positions: Any, theta: float, scale: Any = 1.0) -> Tensor:
    """``scale`` are factors of the frequencies, one or ``[dim / 2]``."""
    half = x.shape[2] // 2
    frequencies = theta ** (-np.arange(half) / half) * scale
    angles = torch.from_numpy(np.concatenate(positions)[:, None] * frequencies)[:, None]
    cos, sin = angles.cos().to(at.real), angles.sin().to(at.real)
    a, b = at.load(x).split(half, dim=2)
    return at.stored(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2))


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Gradients of ``sum(output * weight)``, where the output is finite."""
    finite = [torch.where(out.isfinite(), out, 0.0).double() for out in outputs]
    loss = sum(((out * weight).sum() for out, weight in zip(finite, weights, strict=True)), torch.zeros(()).double())
    return list(torch.autograd.grad(loss, inputs))


def check(
    got: Callable[..., tuple[Tensor, ...]],
    definition: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    dtype: str,
) -> None:
    """Holds results and gradients of ``got(*inputs)`` against ``definition(Arithmetic, *inputs)``.

    ``inputs`` are f64 and hold numbers that ``dtype`` holds. The second result of both, if any, is ``lse``.
    """

    def run(call: Callable[..., tuple[Tensor, ...]], kind: torch.dtype) -> tuple[Any, Any]:
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        outputs = call(*leaves)
        return outputs, gradients(outputs, leaves, weights)

    exact_arithmetic = Arithmetic(None)
    naive_arithmetics = [Arithmetic(DTYPES[dtype], seed) for seed in (None, 1, 2, 3)]
    generator = torch.Generator().manual_seed(1)
    shapes = [x.shape for x in definition(exact_arithmetic, *inputs)]
    # The gradient of a result has its dtype: a weight that it holds is the same for all three.
    kinds = [DTYPES[dtype], torch.float32]
    weights = [
        torch.randn(shape, generator=generator).to(kind).double() for shape, kind in zip(shapes, kinds, strict=False)
    ]
    exact = run(lambda *x: definition(exact_arithmetic, *x), torch.float64)
    naive = [run(lambda *x, at=at: definition(at, *x), DTYPES[dtype]) for at in naive_arithmetics]
    ours = run(got, DTYPES[dtype])
    for part in range(2):
        for at, (x, y, *z) in enumerate(zip(ours[part], exact[part], *(n[part] for n in naive), strict=True)):
            kind = "float32" if part == 0 and at == 1 else dtype
            x, y, *z = (tensor.detach().double().numpy() for tensor in (x, y, *z))
            close(x, y, z, kind)
