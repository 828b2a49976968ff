"""Rows of selected attention and of its gradients in f64, and what a naive program in bfloat16 makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows whose keys are gathered at a time.
CHUNK = 64
#: A key block that more rows list is not sampled: its gradient would take too long.
MOST_ROWS = 2048


@dataclass
class Case:
    """One sequence, its selection, and a gradient of the result."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    block_size: int
    grad_out: Tensor

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def scale(self) -> float:
        return float(self.q.shape[2]) ** -0.5


@dataclass
class Arithmetic:
    """f64, or f32 whose stored results are rounded to bfloat16."""

    exact: bool

    def load(self, x: Tensor) -> Tensor:
        return x.double() if self.exact else x.float()

    def stored(self, x: Tensor) -> Tensor:
        return x if self.exact else x.bfloat16().float()


@dataclass
class Terms:
    """What some rows of one kv head give: ``[rows, group, ...]``."""

    keys: Tensor
    out: Tensor
    lse: Tensor
    weights: Tensor
    grad_logits: Tensor
    grad_q: Tensor


def terms(case: Case, at: Arithmetic, kv: int, rows: Tensor) -> Terms:
    """Forward and backward of ``rows`` in one kv head, by the definition."""
    heads = slice(kv * case.group, (kv + 1) * case.group)
    ids = case.ids[kv, rows].long()
    keys = (ids[..., None] * case.block_size + torch.arange(case.block_size, device=ids.device)).flatten(1)
    seen = (ids >= 0).repeat_interleave(case.block_size, dim=1) & (keys <= rows[:, None])
    keys = torch.where(seen, keys, 0)
    q, grad = at.load(case.q[rows][:, heads]), at.load(case.grad_out[rows][:, heads])
    k, v = at.load(case.k[keys, kv]), at.load(case.v[keys, kv])
    logits = torch.einsum("rgd,rsd->rgs", q, k) * case.scale
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    weights = at.stored(logits.softmax(dim=2))
    out = at.stored(torch.einsum("rgs,rsd->rgd", weights, v))
    delta = (grad * out).sum(dim=2, keepdim=True)
    grad_logits = at.stored(weights * (torch.einsum("rgd,rsd->rgs", grad, v) - delta))
    grad_q = at.stored(torch.einsum("rgs,rsd->rgd", grad_logits, k) * case.scale)
    return Terms(torch.where(seen, keys, -1), out, logits.logsumexp(dim=2), weights, grad_logits, grad_q)


def sampled_rows(case: Case, at: Arithmetic, rows: Tensor) -> dict[str, Tensor]:
    """``out``, ``lse`` and ``grad_q`` of some rows, all heads."""
    parts = [terms(case, at, kv, rows) for kv in range(case.k.shape[1])]
    return {
        "out": torch.cat([part.out for part in parts], dim=1),
        "lse": torch.cat([part.lse for part in parts], dim=1),
        "grad_q": torch.cat([part.grad_q for part in parts], dim=1),
    }


def sampled_block(case: Case, at: Arithmetic, kv: int, block: int) -> dict[str, Tensor]:
    """``grad_k`` and ``grad_v`` of the keys of one block in one kv head."""
    first = block * case.block_size
    size = min(case.block_size, case.k.shape[0] - first)
    grads = [at.load(case.k.new_zeros(size, case.k.shape[2])) for _ in range(2)]
    heads = slice(kv * case.group, (kv + 1) * case.group)
    for rows in listing(case.ids[kv], block).split(CHUNK):
        part = terms(case, at, kv, rows)
        inside = (part.keys >= first) & (part.keys < first + size)
        target = torch.where(inside, part.keys - first, 0).flatten()
        sources = ((part.grad_logits * case.scale, case.q), (part.weights, case.grad_out))
        for grad, (factors, vectors) in zip(grads, sources, strict=True):
            given = torch.einsum("rgs,rgd->rsd", factors * inside[:, None], at.load(vectors[rows][:, heads]))
            grad.index_add_(0, target, given.flatten(0, 1))
    return {"grad_k": at.stored(grads[0]), "grad_v": at.stored(grads[1])}


def listing(ids: Tensor, block: int) -> Tensor:
    """Rows that list a block."""
    return (ids == block).any(dim=1).nonzero().flatten()


def sampled_blocks(case: Case, count: int) -> Iterator[tuple[int, int]]:
    """Some blocks that are listed, but not too often, in heads that differ."""
    for at in range(count):
        kv = at * case.k.shape[1] // count
        ids = case.ids[kv]
        popularity = torch.bincount(ids[ids >= 0].long(), minlength=case.k.shape[0] // case.block_size)
        fit = ((popularity > 0) & (popularity <= MOST_ROWS)).nonzero().flatten()
        if len(fit):
            yield kv, int(fit[(2 * at + 1) * len(fit) // (2 * count)])


@dataclass
class Finding:
    """An error, and how large it may be: twice that of the naive program, and four ulps."""

    name: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound


def judge(name: str, got: Tensor, exact: Tensor, naive: Tensor, epsilon: float = 2.0**-7) -> Finding:
    finite = exact.isfinite()
    if not bool((got.isfinite() == finite).all()):
        return Finding(name, float("inf"), 0.0)
    got, exact, naive = (x.double()[finite] for x in (got, exact, naive))
    bound = 2 * float((naive - exact).abs().max()) + 4 * epsilon * float(exact.abs().max())
    return Finding(name, float((got - exact).abs().max()), bound)


def check(case: Case, out: Tensor, lse: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> list[Finding]:
    """Holds results and gradients against f64: 32 rows of all heads, and the keys of 4 blocks."""
    n = case.q.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.tensor([0, 1, n - 1]), torch.randint(n, (29,), generator=generator)]).to(case.q.device)
    exact, naive = (sampled_rows(case, Arithmetic(kind), rows) for kind in (True, False))
    got = {"out": out[rows], "lse": lse[:, rows].T, "grad_q": grad_q[rows]}
    findings = []
    for name, value in got.items():
        epsilon = 2.0**-23 if name == "lse" else 2.0**-7
        findings.append(judge(name, value, exact[name], naive[name], epsilon))
    for kv, block in sampled_blocks(case, 4):
        keys = slice(block * case.block_size, (block + 1) * case.block_size)
        exact, naive = (sampled_block(case, Arithmetic(kind), kv, block) for kind in (True, False))
        for name, grad in (("grad_k", grad_k), ("grad_v", grad_v)):
            where = f"{name} of block {block}, head {kv}"
            findings.append(judge(where, grad[keys, kv], exact[name], naive[name]))
    return findings


def difference(a: Tensor, b: Tensor) -> float:
    """Root of the mean square of ``a - b`` over that of ``b``."""
    total = [0.0, 0.0]
    for x, y in zip(a.split(8192), b.split(8192), strict=True):
        total[0] += float((x.float() - y.float()).square().sum())
        total[1] += float(y.float().square().sum())
    return (total[0] / max(total[1], 1e-30)) ** 0.5
