"""Holds selected attention of fsa_rs against the public implementations, on one GPU, in one process.

    python bench/compare.py --fsa PATH --sfnsa PATH --record bench/records/h200/DATE-selected.json

PATHs are checkouts of Relaxed-System-Lab/Flash-Sparse-Attention and mdy666/Scalable-Flash-Native-Sparse-Attention.
Every shape is checked first: our results and gradients against sampled rows in f64, and against the peers'. Then it
is timed: the peers by their own forward and backward functions, ours as a user calls it, through autograd, and as a
replay of a CUDA graph. Everything is saved as it comes. Exit code 1: a result of ours is wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fsa_rs
import torch
from torch import Tensor

from comparison import peers as public
from comparison import record as records
from comparison import reference, selections
from comparison.reference import Case

K = 1024
#: Relative difference to a peer, over all elements, from which it is pointed out: both round to bfloat16.
DIFFERENT = 0.02


@dataclass
class Shape:
    """A sequence of ``n`` tokens, ``heads`` query heads in groups of ``group``."""

    n: int
    group: int
    block_size: int = 64
    topk: int = 16
    heads: int = 32
    dim: int = 128
    selection: str = "random"
    with_peers: bool = True
    with_dense: bool = False

    def words(self) -> dict[str, Any]:
        keys = {"N": self.n, "g": self.group, "hq": self.heads, "d": self.dim}
        return {**keys, "bk": self.block_size, "T": self.topk, "selection": self.selection}

    def __str__(self) -> str:
        text = f"{self.n} tokens, {self.heads}/{self.heads // self.group} heads, ({self.block_size}, {self.topk})"
        return f"{text}, {self.selection}"


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


class Comparison:
    def __init__(self, peers: list[public.Peer], record: records.Record, deadline: float) -> None:
        self.peers, self.record, self.deadline = peers, record, deadline

    def run(self, shape: Shape) -> None:
        self.record.note(f"-- {shape}")
        torch.manual_seed(0)
        kv = shape.heads // shape.group
        q, grad_out = (randn(shape.n, shape.heads, shape.dim) for _ in range(2))
        k, v = (randn(shape.n, kv, shape.dim) for _ in range(2))
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

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; a failure is noted, and the rest goes on."""
        try:
            return work()
        except TimeoutError:
            self.record.note(f"   {name}: left out, no time left")
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            (self.record.fail if name == "ours" else self.record.note)(f"   {name}: {text}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def measure(self, shape: Shape, impl: str, phase: str, call: Callable[[], Any], section: str = "sel") -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError("out of budget")
        # What a replay needs was allocated when its graph was recorded.
        memory = None if impl == records.GRAPH else round(records.extra_mb(call), 1)
        ms = records.median_ms(call)
        words = {"section": section, "impl": impl, "phase": phase, **shape.words()}
        self.record.add(**words, ms=round(ms, 4), extra_mb=memory)
        print(f"   {impl:>12} {phase}: {ms:9.3f} ms {memory or 0.0:9.1f} MB", flush=True)

    def ours(self, shape: Shape, case: Case, cu: Tensor) -> tuple[Tensor, ...]:
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
        result = (out.detach(), *grads)
        del grads
        self.measure(shape, records.OURS, "fwd", lambda: forward(case.q, case.k, case.v))
        self.measure(shape, records.OURS, "bwd", backward)
        self.graphs(shape, case, cu, out.detach(), lse.detach())
        return result

    def graphs(self, shape: Shape, case: Case, cu: Tensor, out: Tensor, lse: Tensor) -> None:
        """Times replays of our operators without what Python and the driver need for a launch."""
        operators = torch.ops.fsa_rs
        inputs = (case.q, case.k, case.v, cu, cu, None, case.ids, [case.block_size, 0], False)
        calls = {
            "fwd": lambda: operators.attention(*inputs),
            "bwd": lambda: operators.attention_backward(*inputs, out, lse, case.grad_out, None),
        }
        for phase, call in calls.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = call()
            self.measure(shape, records.GRAPH, phase, graph.replay)
            del kept, graph

    def peer(self, shape: Shape, case: Case, cu: Tensor, peer: public.Peer, ours: tuple[Tensor, ...] | None) -> None:
        state = peer.forward(case, cu)
        if ours is not None:
            theirs = (state[0], *peer.backward(case, cu, state))
            names = ("out", "grad_q", "grad_k", "grad_v")
            pairs = zip(names, ours, theirs, strict=True)
            differences = {name: reference.difference(a, b) for name, a, b in pairs}
            text = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
            far = "" if max(differences.values()) <= DIFFERENT else " (DIFFERENT)"
            self.record.note(f"   differs from {peer.name} by: {text}{far}")
            del theirs, pairs
        del state
        self.measure(shape, peer.name, "fwd", lambda: peer.forward(case, cu))
        state = peer.forward(case, cu)
        self.measure(shape, peer.name, "bwd", lambda: peer.backward(case, cu, state))

    def dense(self, shape: Shape, case: Case) -> None:
        """Causal attention to everything by cuDNN."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(0, 1)[None].contiguous().requires_grad_() for x in (case.q, case.k, case.v))

        def forward() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                attend = torch.nn.functional.scaled_dot_product_attention
                return attend(q, k, v, is_causal=True, enable_gqa=shape.group > 1)

        self.measure(shape, "CUDNN_ATTENTION", "fwd", forward, "dense")
        out = forward()
        grad = case.grad_out.transpose(0, 1)[None].contiguous()
        call = lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
        self.measure(shape, "CUDNN_ATTENTION", "bwd", call, "dense")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsa", type=Path, help="checkout of Flash-Sparse-Attention; has the scorer, too")
    parser.add_argument("--sfnsa", type=Path, help="checkout of Scalable-Flash-Native-Sparse-Attention")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--record", type=Path, help="JSON file to write; a text of the same stem goes beside it")
    parser.add_argument("--budget", type=float, default=540, help="seconds; what would take longer is left out")
    parser.add_argument("--commit", default=os.environ.get("FSA_COMMIT", "unknown"), help="commit of fsa_rs")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("compare.py needs a GPU")
        return 2
    deadline = time.monotonic() + options.budget
    peers, commits = public.load(options.fsa, options.sfnsa)
    about = records.about(options.commit, commits)
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    record = records.Record(options.record, about)
    comparison = Comparison(peers, record, deadline)
    for name in options.sections:
        section, left = SECTIONS[name], deadline - time.monotonic()
        record.note(f"== {name}: about {section.seconds} s of {left:.0f} s left")
        if section.seconds > left:
            record.note("   left out")
            continue
        start = time.monotonic()
        for shape in section.shapes:
            if shape.selection == "random" and options.fsa is None:
                record.note(f"-- {shape}: left out, needs the scorer of --fsa")
                continue
            comparison.attempt("shape", partial(comparison.run, shape))
        record.note(f"   took {time.monotonic() - start:.0f} s")
    print(records.table(record.rows))
    record.note(f"{record.failures} failures")
    return int(record.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
