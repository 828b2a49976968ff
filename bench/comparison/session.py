"""What every comparison does: attempts, measurements up to a deadline, sections."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import record as records
from . import reference
from .work import Work

#: Relative difference to a peer, over all elements, from which it is pointed out: both round to bfloat16.
DIFFERENT = 0.02

Words = dict[str, Any]


class Session:
    """Measures for a record until a deadline."""

    def __init__(self, record: records.Record, deadline: float) -> None:
        self.record, self.deadline = record, deadline

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def begins(self, name: str, seconds: int) -> bool:
        """Whether a section of about so many seconds has the time that it needs."""
        self.record.note(f"== {name}: about {seconds} s of {self.left:.0f} s left")
        if seconds > self.left:
            self.record.note("   left out")
        return seconds <= self.left

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; a failure is noted, and the rest goes on."""
        try:
            return work()
        except TimeoutError:
            self.record.note(f"   {name}: left out, no time left")
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            ours = name.split(",")[0] in ("ours", records.OURS)
            (self.record.fail if ours else self.record.note)(f"   {name}: {text}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return None

    def measure(self, words: Words, call: Callable[[], Any], seconds: float = 0.4) -> dict[str, Any]:
        """Adds a row of ``words``, which name ``section``, ``impl`` and ``phase``, and of what the call needs."""
        if self.left < 0:
            raise TimeoutError("out of budget")
        # What a replay needs was allocated when its graph was recorded.
        replayed = words["impl"].endswith(records.GRAPH_SUFFIX)
        memory = None if replayed else round(records.extra_mb(call), 1)
        row = {**words, "ms": round(records.median_ms(call, seconds), 4), "extra_mb": memory}
        self.record.add(row)
        what = f"{words.get('what', '')} {words['phase']}"
        print(f"   {words['impl']:>16} {what}: {row['ms']:9.3f} ms {memory or 0.0:9.1f} MB", flush=True)
        return row

    def differs(self, words: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        """Notes how far results of the same name are apart; compressed rows beyond the last differ in number."""
        found = {}
        for name in ours.keys() & theirs.keys():
            rows = min(len(ours[name]), len(theirs[name]))
            found[name] = reference.difference(ours[name][:rows], theirs[name][:rows])
        text = ", ".join(f"{name} {found[name]:.2g}" for name in sorted(found, key=list(ours).index))
        far = "" if max(found.values(), default=0.0) <= DIFFERENT else " (DIFFERENT)"
        self.record.note(f"   differs from {words} by: {text}{far}")

    def time(
        self, words: Words, work: Work, grads: tuple[Tensor, ...], phases: tuple[str, ...], seconds: float = 0.2
    ) -> None:
        """Times the phases ``fwd`` and ``bwd``, and ``both``, a forward and its backward in one call."""
        words = {**words, "impl": work.impl}
        if "fwd" in phases:
            self.measure({**words, "phase": "fwd"}, work.outputs, seconds)
        if "bwd" in phases:
            outputs = work.outputs()
            self.measure({**words, "phase": "bwd"}, lambda: work.gradients(outputs, grads), seconds)
            del outputs
        if "both" in phases:
            self.measure({**words, "phase": "fwd+bwd"}, lambda: work.both(grads), seconds)

    def replay(self, words: Words, impl: str, calls: dict[str, Callable[[], Any]]) -> None:
        """Times replays of calls: without what Python and the driver need for a launch."""
        for phase, call in calls.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = call()
            self.measure({**words, "impl": impl + records.GRAPH_SUFFIX, "phase": phase}, graph.replay)
            del kept, graph
