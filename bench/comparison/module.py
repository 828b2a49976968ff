"""FSA's layer and ours with the same weights on the same input: outputs, gradients, chosen blocks.

What differs on purpose is in the text of :class:`fsa_rs.nn.FlashSparseAttention`. Here the original's frequencies are
put back into float32 after the layer became bfloat16 (it rounds that buffer with the weights), and ours takes the
scores of the first head of a group, as the original does. There remain:

- scores: the original rounds them to bfloat16 before it compares them, and `torch.topk` settles ties; ours compares
  them in f32, and ties go to the earlier block. Where another block is chosen an output may be any other, so that only
  a case whose rows select all blocks is held to a tolerance;
- rounding: of sine and cosine, of the compression's position embedding, of compressed, rotated and gated vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsa_rs.nn as ours
import torch
from torch import Tensor

from . import reference
from .record import Record
from .work import randn

HIDDEN, HEADS, DIM = 1024, 32, 128
SIZES = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 16, "init_blocks": 1, "local_blocks": 2}
#: Root of the mean square of a difference over that of the original: some roundings to 8 bits, one after another.
TOLERANCE = 0.02


@dataclass
class Case:
    kv_heads: int
    lengths: tuple[int, ...]
    original: str = "FlashSparseAttention"

    @property
    def all_blocks(self) -> bool:
        return max(self.lengths) <= SIZES["block_size"] * SIZES["topk"]

    def __str__(self) -> str:
        rows = " + ".join(map(str, self.lengths))
        return f"{self.original}, {HEADS}/{self.kv_heads} heads, {rows} tokens"


CASES = [
    Case(8, (1024,)),
    Case(32, (1024,)),
    Case(8, (1000, 517, 64)),
    Case(8, (1024,), "NativeSparseAttention"),
    Case(8, (8192,)),
    Case(32, (8192,)),
    Case(8, (4096, 3000)),
]


def compare(record: Record) -> None:
    """Compares all cases; what is out of tolerance is a failure."""
    for case in CASES:
        record.note(f"-- {case}")
        original, layer = _layers(case)
        torch.manual_seed(0)
        rows = sum(case.lengths)
        cu = torch.tensor([0, *case.lengths], device="cuda", dtype=torch.int32).cumsum(0).to(torch.int32)
        x, grad = randn(rows, HIDDEN), randn(rows, HIDDEN)
        try:
            mine = _results(layer, x, cu, grad, _tapped_ours)
        except Exception as error:
            record.fail(f"   ours: {type(error).__name__}: {str(error)[:300]}")
            continue
        try:
            theirs = _results(original, x, cu, grad, partial(_tapped, _namespace(case)))
        except Exception as error:
            record.note(f"   not compared, the original: {type(error).__name__}: {str(error)[:300]}")
            continue
        _report(record, case, mine, theirs, cu)


def _report(record: Record, case: Case, mine: dict[str, Tensor], theirs: dict[str, Tensor], cu: Tensor) -> None:
    same = _alike(theirs.pop("blocks"), mine.pop("blocks"), cu)
    record.note(f"   rows of all kv heads that choose the same blocks: {same:.2%}")
    for name, expected in theirs.items():
        distance = (mine[name].float() - expected.float()).abs()
        relative = reference.difference(mine[name], expected)
        text = f"   {name}: max {distance.max():.3g}, mean {distance.mean():.3g}, relative {relative:.3g}"
        if case.all_blocks and not relative <= TOLERANCE:
            record.fail(f"{text}, tolerance {TOLERANCE}")
        else:
            record.note(text + ("" if case.all_blocks else ", other blocks included"))


def _namespace(case: Case) -> Any:
    if case.original == "FlashSparseAttention":
        from fsa.module import fsa as module
    else:
        from nsa_ref.module import native_sparse_attention as module
    return module


def _layers(case: Case) -> tuple[torch.nn.Module, torch.nn.Module]:
    from nsa_ref.module.rope import RopeConfig

    arguments = {"hidden_size": HIDDEN, "num_q_heads": HEADS, "num_kv_heads": case.kv_heads, "head_dim": DIM}
    arguments = {**arguments, **SIZES, "window_size": 512}
    original = getattr(_namespace(case), case.original)(**arguments, rope_config=RopeConfig(head_dim=DIM)).to("cuda")
    # Its initial compressions are so small that all blocks would score alike.
    with torch.no_grad():
        for parameter in (original.compress_key, original.compress_value):
            parameter.normal_(std=(SIZES["kernel_size"] * DIM) ** -0.5)
    frequencies = original.rope.inv_freq.clone()
    original = original.to(torch.bfloat16)
    original.rope.inv_freq = frequencies
    layer = ours.FlashSparseAttention(**arguments, rope_config=ours.RopeConfig(head_dim=DIM), score_heads="first_head")
    layer = layer.to("cuda").to(torch.bfloat16)
    layer.load_state_dict(original.state_dict(), strict=True)
    return original, layer


Tap = Callable[[list[Tensor]], Any]


def _results(layer: torch.nn.Module, x: Tensor, cu: Tensor, grad: Tensor, tap: Tap) -> dict[str, Tensor]:
    """The output, the gradients by name, and the chosen blocks."""
    x = x.detach().requires_grad_()
    blocks: list[Tensor] = []
    with tap(blocks):
        out = layer(x, cu)
    names = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, (x, *names.values()), grad)
    named = zip(("x", *names), grads, strict=True)
    return {"out": out.detach(), **{f"grad of {name}": value for name, value in named}, "blocks": blocks[0]}


@contextmanager
def _replaced(namespace: Any, name: str, function: Any) -> Iterator[None]:
    kept = getattr(namespace, name)
    setattr(namespace, name, function)
    try:
        yield
    finally:
        setattr(namespace, name, kept)


def _tapped(namespace: Any, blocks: list[Tensor]) -> Any:
    """The original, while its blocks are written down."""
    call = namespace.compressed_attention

    def tap(*arguments: Any, **options: Any) -> Any:
        out, ids = call(*arguments, **options)
        blocks.append(ids)
        return out, ids

    return _replaced(namespace, "compressed_attention", tap)


def _tapped_ours(blocks: list[Tensor]) -> Any:
    """Our layer, while its blocks are written down."""
    call = ours.nsa_attn_varlen_func

    def tap(*arguments: Any, **options: Any) -> Any:
        out, ids = call(*arguments, **options, return_topk_indices=True)
        blocks.append(ids)
        return out

    return _replaced(ours, "nsa_attn_varlen_func", tap)


def _alike(theirs: Tensor, mine: Tensor, cu: Tensor) -> float:
    """Share of rows with the same blocks, in whatever order; ids beyond a row's own block are absent."""
    rows = torch.arange(mine.shape[1], device=mine.device)
    own = (rows - cu[torch.searchsorted(cu[1:-1].contiguous().long(), rows, right=True)]) // SIZES["block_size"]
    width = max(theirs.shape[2], mine.shape[2])
    lists = []
    for ids in (theirs, mine):
        ids = torch.nn.functional.pad(ids, (0, width - ids.shape[2]), value=-1)
        absent = (ids < 0) | (ids > own[None, :, None])
        lists.append(torch.where(absent, -1, ids).sort(dim=2).values)
    return float((lists[0] == lists[1]).all(dim=2).float().mean())
