"""The whole operation and its stages beside those of FSA and SFNSA, and beside dense attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import inputs as given
from . import peer_stages as public
from . import record as records
from . import stages, whole_reference, work
from .inputs import Inputs
from .session import Session, Words
from .work import Shape, Work

K = 1024
#: Up to this length calls are so short that launches count: replays of CUDA graphs are measured, too.
GRAPH_LONGEST = 16 * K
#: Up to this length rows are held against f64 and against the peers.
CHECK_LONGEST = 64 * K
#: The length at which a step is measured whose backward computes again what its forward did not keep.
RECOMPUTED = 64 * K
#: Beyond this length a step of dense attention, which nobody needs for a break-even length, is left out.
STEP_LONGEST = 64 * K
PHASES = ("fwd", "bwd", "both")


@dataclass
class Section:
    """Shapes, what of them is measured, and about how many seconds that takes on an H200."""

    seconds: int
    shapes: list[Shape]
    parts: tuple[str, ...]


# The most important first: a run may be cut off.
SECTIONS = {
    "64k": Section(50, [Shape(64 * K, 4)], ("ours", "dense", "peers")),
    "8k": Section(20, [Shape(8 * K, 4)], ("ours", "dense", "peers")),
    "lengths": Section(25, [Shape(n * K, 4) for n in (1, 2, 4, 16, 32)], ("ours", "dense")),
    "between": Section(10, [Shape(n, 4) for n in (1280, 1536, 3072)], ("ours", "dense")),
    "branches": Section(30, [Shape(n * K, 4) for n in (64, 8)], ("branches",)),
    "128k": Section(10, [Shape(128 * K, 4)], ("ours", "dense")),
    "256k": Section(20, [Shape(256 * K, 4)], ("ours", "dense")),
    "g1": Section(25, [Shape(n * K, 1) for n in (64, 8)], ("ours", "dense", "peers")),
    "peers": Section(30, [Shape(n * K, 4) for n in (1, 2, 4, 16, 32)], ("peers",)),
    "branches-g1": Section(25, [Shape(n * K, 1) for n in (64, 8)], ("branches",)),
    "512k": Section(20, [Shape(512 * K, 4)], ("ours",)),
    "128k-peers": Section(20, [Shape(128 * K, 4)], ("peers",)),
}


class Comparison(Session):
    """Runs the sections."""

    def __init__(self, peers: list[public.Peer], record: records.Record, deadline: float) -> None:
        super().__init__(record, deadline)
        self.peers = peers

    def sections(self, names: list[str]) -> None:
        for name in names:
            section = SECTIONS[name]
            if not self.begins(name, section.seconds):
                continue
            start = self.left
            for shape in section.shapes:
                self.attempt("shape", partial(self.run, shape, section.parts))
            self.record.note(f"   took {start - self.left:.0f} s")

    def run(self, shape: Shape, parts: tuple[str, ...]) -> None:
        self.record.note(f"-- {shape}: {', '.join(parts)}")
        inputs = given.make(shape)
        if "ours" in parts:
            for what in (stages.WHOLE_MEAN, stages.LINEAR_ROPE):
                self.attempt(f"{records.OURS}, {what}", partial(self.ours, inputs, what))
        if "dense" in parts:
            self.attempt("dense", lambda: self.dense(inputs))
        if "peers" in parts:
            for peer in self.peers:
                self.attempt(peer.name, partial(self.peer, inputs, peer))
        if "branches" in parts:
            self.attempt(f"{records.OURS}, stages", lambda: self.branches(inputs))

    def words(self, inputs: Inputs, section: str, what: str) -> Words:
        return {"section": section, "what": what, **inputs.shape.words()}

    def ours(self, inputs: Inputs, what: str) -> None:
        if inputs.shape.n <= CHECK_LONGEST:
            with torch.no_grad():
                out, ids = stages.whole(inputs, what, return_topk_indices=True).outputs()
            finding = whole_reference.check(inputs, what, out, ids)
            text = f"   f64: {finding.name}: error {finding.error:.3g}, bound {finding.bound:.3g}"
            self.record.note(text) if finding.holds else self.record.fail(text)
            del out, ids
        computed, words, grads = stages.whole(inputs, what), self.words(inputs, "nsa", what), (inputs.grad_out,)
        self.whole(words, computed, grads)
        if inputs.shape.n <= GRAPH_LONGEST:
            self.replays(words, computed, grads)
        if what == stages.LINEAR_ROPE and inputs.shape.n == RECOMPUTED:
            for recompute in ("rotated", "all"):
                computed = stages.whole(inputs, what, recompute=recompute)
                self.whole({**words, "what": f"{what}, recompute {recompute}"}, computed, grads)

    def dense(self, inputs: Inputs) -> None:
        computed, words = work.dense(inputs.q, inputs.k, inputs.v), self.words(inputs, "dense", "dense")
        grads = (inputs.grad_out.transpose(0, 1)[None].contiguous(),)
        phases = PHASES if inputs.shape.n <= STEP_LONGEST else PHASES[:2]
        self.time(words, computed, grads, phases)
        if inputs.shape.n <= GRAPH_LONGEST:
            self.replays(words, computed, grads)

    def replays(self, words: Words, computed: Work, grads: tuple[Tensor, ...]) -> None:
        calls: dict[str, Callable[[], Any]] = {"fwd": computed.outputs, "fwd+bwd": lambda: computed.both(grads)}
        self.replay(words, computed.impl, calls)

    def whole(self, words: Words, computed: Work, grads: tuple[Tensor, ...]) -> None:
        """Times a whole operation; the step's row says, too, what it holds besides inputs and results."""
        self.time(words, computed, grads, PHASES)
        step = self.record.rows[-1]
        # Gradients are as large as their leaves, and outputs as their gradients.
        results = sum(x.nbytes for x in (*computed.leaves.values(), *grads)) / 2**20
        self.record.amend(step, beyond_mb=round(step["extra_mb"] - results, 1))

    def peer(self, inputs: Inputs, peer: public.Peer) -> None:
        if inputs.shape.n > peer.longest:
            self.record.note(f"   {peer.name}: left out, too long for it")
            return
        what = stages.LINEAR_ROPE if isinstance(peer, public.Fsa) else stages.WHOLE_MEAN
        for computed in peer.wholes(inputs):
            try:
                if inputs.shape.n in (8 * K, 64 * K):
                    self.against(inputs, what, computed)
                self.whole(self.words(inputs, "nsa", what), computed, (inputs.grad_out,))
                return
            except TimeoutError:
                raise
            except Exception as error:  # the next core, if there is one
                self.record.note(f"   {peer.name}: {type(error).__name__}: {str(error)[:200]}")

    def against(self, inputs: Inputs, what: str, theirs: Work) -> None:
        """Notes how far a peer is from us. Where another block is chosen, an output may be any other."""
        options = {"score_heads": "first_head"} if theirs.impl == "FSA" else {}
        grads = (inputs.grad_out,)
        ours = stages.whole(inputs, what, **options).results(grads)
        found = theirs.results(grads)
        self.differs(f"{theirs.impl}, {what}, all rows", ours, found)
        rows = slice(0, inputs.shape.topk * inputs.shape.block_size)
        self.differs(
            f"{theirs.impl}, {what}, rows that select all blocks",
            {name: ours[name][rows] for name in ("out", "grad_q")},
            {name: found[name][rows] for name in ("out", "grad_q")},
        )

    def branches(self, inputs: Inputs) -> None:
        compressed = inputs.compressed()
        ours = stages.of(inputs, *compressed)
        works = {records.OURS: ours}
        for peer in self.peers:
            theirs = self.attempt(peer.name, partial(peer.stages, inputs, *compressed))
            works.update({peer.name: theirs} if theirs else {})
        for what in ours:
            self.record.note(f"   {what}")
            grads = self.attempt(f"{records.OURS}, {what}", partial(self.gradients, ours[what], what))
            for name, computed in works.items():
                if what in computed and grads is not None:
                    label = f"{name}, {what}"
                    self.attempt(label, partial(self.branch, inputs, what, computed[what], ours[what], grads))

    def gradients(self, computed: Work, what: str) -> tuple[Tensor, ...]:
        """Random gradients of the outputs."""
        with torch.no_grad():
            outputs = computed.outputs()
        return () if what == stages.TOPK else tuple(torch.randn_like(x) for x in outputs)

    def branch(self, inputs: Inputs, what: str, computed: Work, ours: Work, grads: tuple[Tensor, ...]) -> None:
        words = self.words(inputs, "branch", what)
        if what == stages.TOPK:
            with torch.no_grad():
                if computed is not ours:
                    self.same_blocks(inputs, computed, ours)
                self.time(words, computed, (), ("fwd",))
                if computed is ours and inputs.shape.n <= GRAPH_LONGEST:
                    self.replay(words, computed.impl, {"fwd": computed.outputs})
            return
        with torch.no_grad():
            lengths = [len(x) for x in computed.outputs()]
        cut = tuple(grad[:length] for grad, length in zip(grads, lengths, strict=True))
        if computed is not ours and computed.leaves.keys() == ours.leaves.keys():
            self.differs(f"{computed.impl}, {what}", ours.results(self.filled(grads, inputs)), computed.results(cut))
        self.time(words, computed, cut, PHASES[:2])
        if computed is ours and inputs.shape.n <= GRAPH_LONGEST:
            self.replays(words, computed, cut)

    def filled(self, grads: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
        """Gradients as a peer without rows that fill up sees them."""
        rows = inputs.compressed_rows
        if len(grads[0]) == inputs.shape.n:
            return grads
        return tuple(torch.cat([grad[:rows], torch.zeros_like(grad[rows:])]) for grad in grads)

    def same_blocks(self, inputs: Inputs, theirs: Work, ours: Work) -> None:
        blocks = -(-inputs.shape.n // inputs.shape.block_size)
        a, b = (x.outputs()[0] for x in (ours, theirs))
        a, b = (torch.where((x < 0) | (x >= blocks), blocks, x).sort(dim=2).values for x in (a, b))
        alike = float((a == b).all(dim=2).float().mean())
        self.record.note(f"   {theirs.impl} chooses the same blocks in {alike:.1%} of all rows")
