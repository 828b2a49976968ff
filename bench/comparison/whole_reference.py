"""Rows of the whole operation in f64 for given blocks, and what a naive program in bfloat16 makes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import stages
from .inputs import KERNEL, STRIDE, WINDOW, Inputs
from .reference import Arithmetic, Finding, judge


def check(inputs: Inputs, what: str, out: Tensor, ids: Tensor, count: int = 32) -> Finding:
    """Holds some rows of ``out``, all heads, against f64; ``ids`` are the blocks that they chose."""
    n = inputs.shape.n
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.tensor([0, KERNEL - 1, n - 1]), torch.randint(n, (count - 3,), generator=generator)])
    rows = rows.to(out.device)
    exact, naive = (_rows(inputs, what, ids, rows, Arithmetic(kind)) for kind in (True, False))
    return judge(f"out of {what}", out[rows], exact, naive)


def _rows(inputs: Inputs, what: str, ids: Tensor, rows: Tensor, at: Arithmetic) -> Tensor:
    """``[rows, heads, dim]``."""
    group, gates = inputs.shape.group, at.load(inputs.gates[rows])
    rotary = Rotary(inputs, at) if what == stages.LINEAR_ROPE else None
    heads = []
    for kv in range(inputs.shape.kv_heads):
        q = at.load(inputs.q[rows][:, kv * group : (kv + 1) * group])
        q = q if rotary is None else rotary(q, rows[:, None])
        ends = torch.arange(inputs.compressed_rows, device=rows.device) * STRIDE
        k_cmp, v_cmp = _compressed(inputs, what, kv, at)
        k_cmp = k_cmp if rotary is None else rotary(k_cmp, ends)
        listed = ids[kv, rows].long()
        keys = listed[..., None] * inputs.shape.block_size + torch.arange(inputs.shape.block_size, device=rows.device)
        keys = torch.where(listed[..., None] >= 0, keys, -1).flatten(1)
        near = rows[:, None] - torch.arange(WINDOW + 1, device=rows.device)
        branches = [_attend(at, q, k_cmp, v_cmp, ends + KERNEL - 1 <= rows[:, None])]
        for positions in (keys, near):
            seen = (positions >= 0) & (positions <= rows[:, None])
            positions = torch.where(seen, positions, 0)
            k, v = at.load(inputs.k[positions, kv]), at.load(inputs.v[positions, kv])
            branches.append(_attend(at, q, k if rotary is None else rotary(k, positions), v, seen))
        heads.append(sum(gates[:, branch, None, None] * out for branch, out in enumerate(branches)))
    return at.stored(torch.cat(heads, dim=1))


def _attend(at: Arithmetic, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of ``q`` ``[rows, group, dim]`` to keys that rows share, or that are each row's own."""
    keys = "sd" if k.ndim == 2 else "rsd"
    logits = torch.einsum(f"rgd,{keys}->rgs", q, k) * q.shape[2] ** -0.5
    weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(dim=2).nan_to_num(0.0)
    return at.stored(torch.einsum(f"rgs,{keys}->rgd", at.stored(weights), v))


def _compressed(inputs: Inputs, what: str, kv: int, at: Arithmetic) -> tuple[Tensor, Tensor]:
    """Compressed keys and values of one kv head, before their rotation."""
    k, v = (at.load(x[:, kv]).unfold(0, KERNEL, STRIDE).transpose(1, 2) for x in (inputs.k, inputs.v))
    if what != stages.LINEAR_ROPE:
        return at.stored(k.mean(dim=1)), at.stored(v.mean(dim=1))
    k = (k + at.load(inputs.k_position[kv])).flatten(1) @ at.load(inputs.k_weight[kv])
    return at.stored(k), at.stored(v.flatten(1) @ at.load(inputs.v_weight[kv]))


class Rotary:
    """The rotary embedding of Llama 3.1, whose angles are f64 for both arithmetics."""

    def __init__(self, inputs: Inputs, at: Arithmetic) -> None:
        dim, scaling = inputs.shape.dim, dict(inputs.rope.rope_scaling or {})
        pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=inputs.q.device)
        frequencies = inputs.rope.rope_theta ** (-pairs / dim)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((waves - low) / (high - low)).clamp(0, 1)
        self.at, self.frequencies = at, frequencies * ((1 - smooth) / scaling["factor"] + smooth)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates ``x`` ``[..., dim]``; ``positions`` are as its first axes, or broadcast to them."""
        angles = positions[..., None].double() * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return self.at.stored(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
