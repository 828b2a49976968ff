"""Which blocks every row lists: as a scorer chooses on random input, and as trained models choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Rows for which a stripe of a clustered selection stays: 13 of 16 blocks that move every 8 rows in turn leave
#: neighbouring rows about nine blocks in ten in common.
PERIOD = 8
INIT, LOCAL = 1, 2


def scored(q: Tensor, k: Tensor, v: Tensor, block_size: int, topk: int) -> Tensor:
    """The real top-k of compressed scores, by the scorer of NSA's reference code with random weights.

    It takes groups whose size is a power of two: of others the largest such part votes.
    """
    from nsa_ref.ops import compressed_attention, linear_compress

    n, heads, dim = k.shape
    group = q.shape[1] // heads
    votes = 1 << (group.bit_length() - 1)
    if votes < group:
        q = q.view(n, heads, group, dim)[:, :, :votes].reshape(n, heads * votes, dim)
    cu = torch.tensor([0, n], device=q.device, dtype=torch.int32)
    weight = torch.nn.init.xavier_uniform_(torch.empty(heads, dim * 32, dim, device=q.device, dtype=q.dtype))
    position = torch.nn.init.xavier_uniform_(torch.empty(heads, 32, dim, device=q.device, dtype=q.dtype))
    k_cmp, cu_cmp = linear_compress(k, weight, cu, 32, 16, position)
    v_cmp, _ = linear_compress(v, weight, cu, 32, 16, None)
    longest = int((cu_cmp[1:] - cu_cmp[:-1]).max())
    arguments: tuple[Any, ...] = (q, k_cmp, v_cmp, 32, 16, block_size, topk, cu, cu_cmp, n, longest, None, INIT, LOCAL)
    return compressed_attention(*arguments, parallel_topk_compute=False)[1]


def clustered(n: int, heads: int, block_size: int, topk: int, device: str = "cuda", seed: int = 0) -> Tensor:
    """The first block, the last two, and stripes that stay for some rows: ``[heads, n, topk]`` int32.

    A stripe's slot has the blocks of one residue class to itself, so that no row lists a block twice; early blocks
    are more popular than late ones.
    """
    stripes = topk - INIT - LOCAL
    rows = torch.arange(n, device=device)
    own = rows // block_size
    slots = torch.arange(stripes, device=device)
    past = (own - INIT - LOCAL + 1).clamp(min=0)  # blocks 1 .. own - 2
    count = (past[:, None] - slots + stripes - 1).div(stripes, rounding_mode="floor").clamp(min=0)
    forced = torch.stack([torch.where(own > 0, 0, -1), torch.where(own > 1, own - 1, -1), own], dim=1)
    ids = torch.empty(heads, n, topk, device=device, dtype=torch.int32)
    for head in range(heads):
        epoch = (rows[:, None] + slots * PERIOD // max(stripes, 1)) // PERIOD
        chance = _uniform(epoch * stripes + slots, seed * heads + head)
        place = (chance * chance * count).long().minimum((count - 1).clamp(min=0))
        chosen = torch.where(count > 0, INIT + slots + stripes * place, -1)
        row = torch.cat([forced, chosen], dim=1)
        row = torch.where(row < 0, n, row).sort(dim=1).values
        ids[head] = torch.where(row == n, -1, row)
    return ids


def _uniform(number: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) that depend on ``number`` and ``seed`` alone."""
    x = (number + seed * 1_000_003) * 0x2545F491 & 0xFFFFFFFF
    for shift in (15, 13, 16):
        x = (x ^ (x >> shift)) * 0x2C1B3C6D & 0xFFFFFFFF
    return x.double() / 2**32


def shared(ids: Tensor) -> float:
    """Share of a row's blocks that the next row lists too."""
    rows = slice(ids.shape[1] // 2, ids.shape[1] // 2 + 4096)
    a, b = ids[:, rows][:, :-1], ids[:, rows][:, 1:]
    same = (a[..., None] == b[..., None, :]).any(dim=-1) & (a >= 0)
    return float(same.sum() / (a >= 0).sum())
