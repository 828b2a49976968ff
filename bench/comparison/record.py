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


def median_ms(call: Callable[[], Any], seconds: float = 0.4, warm: int = 2, most: int = 15) -> float:
    """Median time of a call between two events, over at least three calls."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < 3 or (time.monotonic() - start < seconds and len(times) < most):
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
    """What was measured so far, saved after every row."""

    def __init__(self, path: Path | None, about: dict[str, str]) -> None:
        self.path, self.about = path, about
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failures = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
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
        text = "\n".join([*about, "", *self.notes, "", table(self.rows), ""])
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


OURS = "fsa_rs"
GRAPH = "fsa_rs-graph"
COLUMNS = ("FSA", "NSA-ref", "SFNSA", "dense", OURS, GRAPH)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per shape and pass: times in ms, the best peer over ours, dense over ours."""
    lines: dict[tuple[Any, ...], dict[str, float]] = {}

    def size(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("N", "hq", "d", "phase"))

    # How many heads share keys changes little for dense attention: it is measured once.
    dense = {size(row): row["ms"] for row in rows if row["section"] == "dense"}
    for row in rows:
        if row["section"] == "sel":
            key = (
                row["selection"],
                row["N"],
                f"{row['hq']}/{row['hq'] // row['g']}",
                row["bk"],
                row["T"],
                row["phase"],
            )
            line = lines.setdefault(key, {})
            line[row["impl"]] = row["ms"]
            if size(row) in dense:
                line["dense"] = dense[size(row)]
    head = ["selection", "N", "heads", "block", "top", "pass", *COLUMNS, "peer/ours", "dense/ours"]
    text = [head]
    for key, line in lines.items():
        ours = line.get(OURS)
        peers = [line[name] for name in COLUMNS[:3] if name in line]
        best = f"{min(peers) / ours:.2f}" if peers and ours else ""
        speedup = f"{line['dense'] / ours:.2f}" if "dense" in line and ours else ""
        times = [f"{line[name]:.3f}" if name in line else "" for name in COLUMNS]
        text.append([*map(str, key), *times, best, speedup])
    widths = [max(len(line[at]) for line in text) for at in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in text)
