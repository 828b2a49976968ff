"""Selected attention beside FSA, the NSA that it compares with, SFNSA, and dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsa_rs
import torch
from torch import Tensor

from . import peers as public
from . import record as records
from . import reference, selections, work
from .reference import Case
from .session import Session

K = 1024


@dataclass
class Shape(work.Shape):
    """A shape, how its blocks are chosen, and whom it is measured with."""

    selection: str = "random"
    with_peers: bool = True
    with_dense: bool = False

    def words(self) -> dict[str, Any]:
        return {**super().words(), "selection": self.selection}

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.selection}"


@dataclass
class Section:
    """Shapes, and about how many seconds they take on an H200, compilation of the peers included."""

    seconds: int
    shapes: list[Shape] = field(default_factory=list)


SECTIONS = {
    "64k": Section(90, [Shape(64 * K, g, with_dense=g == 4) for g in (4, 1, 2, 8, 16)]),
    "64k-128x8": Section(45, [Shape(64 * K, g, 128, 8) for g in (4, 1)]),
    "clustered": Section(40, [Shape(64 * K, g, selection="clustered") for g in (4, 1)]),
    "8k": Section(20, [Shape(8 * K, g, with_dense=g == 4) for g in (4, 1)]),
    "16k": Section(22, [Shape(16 * K, g, with_dense=g == 4) for g in (4, 1)]),
    "32k": Section(25, [Shape(32 * K, g, with_dense=g == 4) for g in (4, 1)]),
    "g5": Section(10, [Shape(64 * K, 5, heads=40, with_peers=False)]),
    "1m": Section(40, [Shape(K * K, 4, selection="clustered", with_peers=False)]),
}


class Comparison(Session):
    """Runs the sections."""

    def __init__(self, peers: list[public.Peer], record: records.Record, deadline: float) -> None:
        super().__init__(record, deadline)
        self.peers = peers

    def sections(self, names: list[str], with_scorer: bool) -> None:
        for name in names:
            section = SECTIONS[name]
            if not self.begins(name, section.seconds):
                continue
            start = self.left
            for shape in section.shapes:
                if shape.selection == "random" and not with_scorer:
                    self.record.note(f"-- {shape}: left out, needs the scorer of --fsa")
                    continue
                self.attempt("shape", partial(self.run, shape))
            self.record.note(f"   took {start - self.left:.0f} s")

    def run(self, shape: Shape) -> None:
        self.record.note(f"-- {shape}")
        torch.manual_seed(0)
        kv = shape.heads // shape.group
        q, grad_out = (work.randn(shape.n, shape.heads, shape.dim) for _ in range(2))
        k, v = (work.randn(shape.n, kv, shape.dim) for _ in range(2))
        if shape.selection == "random":
            with torch.no_grad():
                ids = selections.scored(q, k, v, shape.block_size, shape.topk)
        else:
            ids = selections.clustered(shape.n, kv, shape.block_size, shape.topk)
        case = Case(q, k, v, ids.contiguous(), shape.block_size, grad_out)
        cu = torch.tensor([0, shape.n], device="cuda", dtype=torch.int32)
        self.record.note(f"   neighbouring rows share {selections.shared(case.ids):.0%} of their blocks")
        with_ours = self.attempt("ours", lambda: self.ours(shape, case, cu))
        for peer in self.peers if shape.with_peers else []:
            self.attempt(peer.name, partial(self.peer, shape, case, cu, peer, with_ours))
        if shape.with_dense:
            self.attempt("dense", lambda: self.dense(shape, case))

    def row(self, shape: Shape, impl: str, phase: str, call: Callable[[], Any]) -> None:
        self.measure({"section": "sel", "impl": impl, "phase": phase, **shape.words()}, call)

    def ours(self, shape: Shape, case: Case, cu: Tensor) -> dict[str, Tensor]:
        """Checks and times fsa_rs; its ``out`` and gradients."""

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fsa_rs.selected_attn_varlen_func(q, k, v, case.ids, case.block_size, cu, cu, return_lse=True)

        leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = forward(*leaves)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, case.grad_out, retain_graph=True)

        grads = backward()
        for finding in reference.check(case, out.detach(), lse.detach(), *grads):
            text = f"   f64: {finding.name}: error {finding.error:.3g}, bound {finding.bound:.3g}"
            self.record.note(text) if finding.holds else self.record.fail(text)
        result = named(out.detach(), *grads)
        del grads
        operators, saved = torch.ops.fsa_rs, (out.detach(), lse.detach())
        inputs = (case.q, case.k, case.v, cu, cu, None, case.ids, [case.block_size, 0], False)
        calls: dict[str, Callable[[], Any]] = {
            "fwd": lambda: operators.attention(*inputs),
            "bwd": lambda: operators.attention_backward(*inputs, *saved, case.grad_out, None),
        }
        self.row(shape, records.OURS, "fwd", lambda: forward(case.q, case.k, case.v))
        # As the peers', by the function that computes it, and as autograd calls it.
        self.row(shape, records.OURS, "bwd", calls["bwd"])
        self.row(shape, records.OURS + records.AUTOGRAD_SUFFIX, "bwd", backward)
        self.replay({"section": "sel", **shape.words()}, records.OURS, calls)
        return result

    def peer(self, shape: Shape, case: Case, cu: Tensor, peer: public.Peer, ours: dict[str, Tensor] | None) -> None:
        state = peer.forward(case, cu)
        if ours is not None:
            self.differs(peer.name, ours, named(state[0], *peer.backward(case, cu, state)))
        del state
        self.row(shape, peer.name, "fwd", lambda: peer.forward(case, cu))
        state = peer.forward(case, cu)
        self.row(shape, peer.name, "bwd", lambda: peer.backward(case, cu, state))

    def dense(self, shape: Shape, case: Case) -> None:
        words = {"section": "dense", **shape.words()}
        grads = (case.grad_out.transpose(0, 1)[None].contiguous(),)
        self.time(words, work.dense(case.q, case.k, case.v), grads, ("fwd", "bwd"), 0.4)


def named(*results: Tensor) -> dict[str, Tensor]:
    return dict(zip(("out", "grad_q", "grad_k", "grad_v"), results, strict=True))
