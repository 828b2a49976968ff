"""Times, and the record: a list of objects as JSON, and beside it a text that says what was measured where."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Rows = list[dict[str, Any]]
OURS = "fsa_rs"
#: What the name of an implementation ends with if a replay of a CUDA graph was timed.
GRAPH_SUFFIX = "-graph"
#: What it ends with if a backward was timed through autograd where its peers' are timed by themselves.
AUTOGRAD_SUFFIX = "-autograd"
#: A call that takes longer is timed once: what a clock and a launch add is nothing beside it.
LONG_S = 0.5


def median_ms(call: Callable[[], Any], seconds: float = 0.4, most: int = 15) -> float:
    """Median time of a call between two events, over at least three calls if they are short."""
    elapsed = 0.0
    for _ in range(2):
        start = time.monotonic()
        call()
        torch.cuda.synchronize()
        elapsed = time.monotonic() - start
        if elapsed > LONG_S:
            break
    least = 3 if elapsed <= LONG_S else 1
    times: list[float] = []
    start = time.monotonic()
    while len(times) < least or (time.monotonic() - start < seconds and len(times) < most):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def extra_mb(call: Callable[[], Any]) -> float:
    """Most memory that a call holds besides what was held before, its results included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class Record:
    """What was measured so far, saved after every row; `summary` says in text what the rows come to."""

    def __init__(self, path: Path | None, about: dict[str, str], summary: Callable[[Rows], str]) -> None:
        self.path, self.about, self.summary = path, about, summary
        self.rows: Rows = []
        self.notes: list[str] = []
        self.failures = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.save()

    def amend(self, row: dict[str, Any], **more: Any) -> None:
        row.update(more)
        self.save()

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.notes.append(text)
        self.save()

    def fail(self, text: str) -> None:
        self.failures += 1
        self.note(f"FAILED {text}")

    def save(self) -> None:
        if self.path is None:
            return
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        self.path.write_text(f"[\n{rows}\n]\n")
        about = [f"{name}: {value}" for name, value in self.about.items()]
        text = "\n".join([*about, "", *self.notes, "", self.summary(self.rows), ""])
        self.path.with_suffix(".txt").write_text(text)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(commit: str, commits: dict[str, str]) -> dict[str, str]:
    """Machine, versions, command and date."""
    import fsa_rs
    import triton

    query = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    return {
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "driver, clock, power limit": query,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "fsa_rs": fsa_rs.__version__,
        **{f"commit of {name}": value for name, value in commits.items()},
    }
