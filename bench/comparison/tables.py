"""What the rows of a record come to, as text: times side by side, break-even lengths, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from .record import AUTOGRAD_SUFFIX, GRAPH_SUFFIX, OURS, Rows
from .work import DENSE

GRAPH = OURS + GRAPH_SUFFIX
AUTOGRAD = OURS + AUTOGRAD_SUFFIX
PEERS = ("FSA", "NSA-ref", "SFNSA", "FA2")
Row = dict[str, Any]


def size(row: Row) -> tuple[Any, ...]:
    """What dense attention depends on, besides how many heads share keys, which changes it little."""
    return tuple(row[name] for name in ("N", "hq", "d", "phase"))


def heads(row: Row) -> str:
    return f"{row['hq']}/{row['hq'] // row['g']}"


def selected(rows: Rows) -> str:
    """One line per shape and pass: times in ms, the best peer over ours, dense over ours."""
    names = ("selection", "N", "heads", "block", "top", "pass")
    sections, columns = ("sel",), ("FSA", "NSA-ref", "SFNSA", "dense", OURS, AUTOGRAD, GRAPH)
    return _times(
        rows,
        sections,
        names,
        columns,
        lambda row: (row["selection"], row["N"], heads(row), row["bk"], row["T"], row["phase"]),
    )


def nsa(rows: Rows) -> str:
    """Times of the whole and of the stages, lengths from which on the whole is faster than dense, and memory."""
    names, key = ("N", "heads", "what", "pass"), lambda row: (row["N"], heads(row), row["what"], row["phase"])
    whole = ("FSA", "SFNSA", "dense", f"dense{GRAPH_SUFFIX}", OURS, GRAPH)
    parts = [
        _times(rows, ("nsa",), names, whole, key),
        "\n".join(_break_evens(rows)),
        "\n".join(_memory(rows)),
        _times(rows, ("branch",), names, (*PEERS, OURS, GRAPH), key),
    ]
    return "\n\n".join(part for part in parts if part)


def _times(
    rows: Rows,
    sections: tuple[str, ...],
    names: tuple[str, ...],
    columns: tuple[str, ...],
    key: Callable[[Row], tuple[Any, ...]],
) -> str:
    dense: dict[Any, float] = {}
    for row in rows:
        if row["section"] == "dense":
            dense[size(row), row["g"], row["impl"]] = row["ms"]
            dense.setdefault((size(row), None, row["impl"]), row["ms"])
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["section"] not in sections:
            continue
        line = lines.setdefault(key(row), {})
        line[row["impl"]] = row["ms"]
        for impl, name in ((DENSE, "dense"), (DENSE + GRAPH_SUFFIX, "dense" + GRAPH_SUFFIX)):
            ms = dense.get((size(row), row["g"], impl), dense.get((size(row), None, impl)))
            if ms is not None and name in columns:
                line[name] = ms
    if not lines:
        return ""
    ratios = ["peer/ours", *(["dense/ours"] if "dense" in columns else [])]
    text = [[*names, *columns, *ratios]]
    for cells, line in sorted(lines.items(), key=lambda item: tuple(map(_order, item[0]))):
        ours = line.get(OURS)
        best = min((line[name] for name in PEERS if name in line), default=None)
        times = [f"{line[name]:.3f}" if name in line else "" for name in columns]
        found = [_ratio(best, ours), _ratio(line.get("dense"), ours)][: len(ratios)]
        text.append([*map(str, cells), *times, *found])
    widths = [max(len(line[at]) for line in text) for at in range(len(text[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in text)


def _order(cell: Any) -> Any:
    """Longer sequences first, then the forward before the backward."""
    return (0, -cell, "") if isinstance(cell, int) else (1, {"fwd": 0, "bwd": 1}.get(cell, 2), cell)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def break_even(ours: dict[int, float], dense: dict[int, float]) -> str:
    """The length from which on ours is at least as fast, between measured ones by the ratio's power law."""
    lengths = sorted(ours.keys() & dense.keys())
    ratios = [ours[n] / dense[n] for n in lengths]
    if not lengths:
        return "not measured"
    if ratios[-1] > 1:
        return f"none up to {lengths[-1]}"
    slower = [at for at, ratio in enumerate(ratios) if ratio > 1]
    if not slower:
        return f"below {lengths[0]}"
    at = slower[-1]
    (a, b), (x, y) = (map(math.log, pair[at : at + 2]) for pair in (ratios, lengths))
    return f"{math.exp(x + (y - x) * a / (a - b)):.0f}"


def _break_evens(rows: Rows) -> Iterable[str]:
    steps = [row for row in rows if row["phase"] == "fwd+bwd"]

    def times(impl: str, what: str, groups: tuple[int, ...]) -> dict[int, float]:
        """By length; of several groups the last one's."""
        kind = [row for row in steps if (row["impl"], row["what"]) == (impl, what)]
        return {row["N"]: row["ms"] for group in groups for row in kind if row["g"] == group}

    kinds = {(row["impl"], row["what"], row["g"]): None for row in steps if row["section"] == "nsa"}
    for impl, what, group in kinds:
        if len(times(impl, what, (group,))) < 2:
            continue
        dense = DENSE + (GRAPH_SUFFIX if impl.endswith(GRAPH_SUFFIX) else "")
        groups = (*sorted({row["g"] for row in steps} - {group}), group)
        length = break_even(times(impl, what, (group,)), times(dense, "dense", groups))
        yield f"break-even with dense, forward + backward, tokens: {impl}, {what}, g = {group}: {length}"


def _memory(rows: Rows) -> Iterable[str]:
    """Memory of a step besides inputs, outputs and gradients, ours over FSA's."""
    steps = [row for row in rows if row["section"] == "nsa" and row.get("beyond_mb") is not None]
    theirs = {(row["N"], row["g"], row["what"]): row["beyond_mb"] for row in steps if row["impl"] == "FSA"}
    for row in steps:
        key = (row["N"], row["g"], row["what"])
        if row["impl"] == OURS and key in theirs:
            shape = f"{row['N']} tokens, g = {row['g']}, {row['what']}"
            shares = f"{row['beyond_mb']:.0f} MB, FSA {theirs[key]:.0f} MB: {_ratio(row['beyond_mb'], theirs[key])}"
            yield f"memory of forward + backward besides inputs and results: {shape}: {shares}"
