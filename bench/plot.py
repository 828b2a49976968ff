"""Draws a record of `compare.py --what nsa`: time against length, forward and backward.

    python bench/plot.py bench/records/h200/DATE-nsa.json docs/nsa.svg

Both axes are logarithmic. Colours follow the reader's light or dark mode. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
PANELS = (("fwd", "forward"), ("bwd", "backward"))
WIDTH, HEIGHT, GAP = 380, 330, 52
LEFT, TOP, BOTTOM, RIGHT = 56, 64, 30, 106


@dataclass
class Series:
    """A line: rows of an implementation and a kind of the whole, its label, its class in the style sheet."""

    impl: str
    what: str
    label: str
    style: str


# fsa_rs is drawn last, over the others.
SERIES = (
    Series("CUDNN_ATTENTION", "dense", "dense (cuDNN)", "dense"),
    Series("FSA", "linear + rope", "FSA", "fsa"),
    Series("SFNSA", "mean", "SFNSA, mean", "sfnsa"),
    Series("fsa_rs", "linear + rope", "fsa", "ours"),
)

# Of the palette of Okabe and Ito, lightened on dark; dashes tell the lines apart without colours.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 } .note { fill: #57606a; font-size: 12px }
.grid { stroke: #d0d7de; stroke-width: 1 } .line { fill: none; stroke-width: 2 } .ours.line { stroke-width: 3 }
.dense { stroke: #57606a; stroke-dasharray: 7 4 } .fsa { stroke: #bc5a00 }
.sfnsa { stroke: #9a3f86; stroke-dasharray: 2 3 } .ours { stroke: #0a69c7 }
circle { stroke-dasharray: none !important; stroke: none !important }
circle.dense { fill: #57606a } circle.fsa { fill: #bc5a00 } circle.sfnsa { fill: #9a3f86 } circle.ours { fill: #0a69c7 }
text.dense { fill: #57606a; stroke: none } text.fsa { fill: #bc5a00; stroke: none }
text.sfnsa { fill: #9a3f86; stroke: none } text.ours { fill: #0a69c7; stroke: none; font-weight: 600 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9198a1 } .grid { stroke: #30363d }
.dense { stroke: #9198a1 } .fsa { stroke: #e69f00 } .sfnsa { stroke: #e58fca } .ours { stroke: #56b4e9 }
circle.dense, text.dense { fill: #9198a1 } circle.fsa, text.fsa { fill: #e69f00 }
circle.sfnsa, text.sfnsa { fill: #e58fca } circle.ours, text.ours { fill: #56b4e9 } }
"""


@dataclass
class Axis:
    """A logarithmic scale from a range of numbers to one of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def points(rows: list[dict[str, Any]], series: Series, phase: str, group: int) -> Points:
    keys = (series.impl, series.what, phase, group)
    found = [row for row in rows if tuple(row.get(name) for name in ("impl", "what", "phase", "g")) == keys]
    return sorted((float(row["N"]), float(row["ms"])) for row in found if row["section"] in ("nsa", "dense"))


def tokens(n: float) -> str:
    return f"{n / 1024:.0f}K" if n >= 1024 else f"{n:.0f}"


def panel(lines: list[tuple[Series, Points]], x: Axis, y: Axis, title: str) -> Iterator[str]:
    yield f'<text class="title" x="{x.start:.0f}" y="{y.end - 14:.0f}">{title}, ms</text>'
    exponents = range(round(math.log10(y.low)), round(math.log10(y.high)) + 1)
    for value in (10.0**exponent for exponent in exponents):
        at = y(value)
        yield f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>'
        yield f'<text x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>'
    lengths = sorted({n for _, line in lines for n, _ in line})
    for n in (n for n in lengths if math.log2(n).is_integer()):
        yield f'<path class="grid" d="M{x(n):.1f} {y.start:.1f}v5"/>'
        yield f'<text x="{x(n):.1f}" y="{y.start + 20:.1f}" text-anchor="middle">{tokens(n)}</text>'
    for series, line in lines:
        path = "L".join(f"{x(n):.1f} {y(ms):.1f}" for n, ms in line)
        yield f'<path class="line {series.style}" d="M{path}"/>'
        yield from (f'<circle class="{series.style}" cx="{x(n):.1f}" cy="{y(ms):.1f}" r="3"/>' for n, ms in line)
    yield from labels(lines, x, y)


def labels(lines: list[tuple[Series, Points]], x: Axis, y: Axis) -> Iterator[str]:
    """The names at the ends of the lines, pushed apart where they would overlap."""
    below = math.inf
    for series, line in sorted(lines, key=lambda pair: -y(pair[1][-1][1])):
        n, ms = line[-1]
        below = min(y(ms) + 4, below - 16)
        yield f'<text class="{series.style}" x="{x(n) + 8:.1f}" y="{below:.1f}">{series.label}</text>'


def draw(rows: list[dict[str, Any]], about: dict[str, str], group: int) -> str:
    lines = {phase: [(series, points(rows, series, phase, group)) for series in SERIES] for phase, _ in PANELS}
    lines = {phase: [(series, line) for series, line in found if line] for phase, found in lines.items()}
    every = [point for found in lines.values() for _, line in found for point in line]
    if not every:
        raise SystemExit(f"the record has no rows of the whole operation with g = {group}")
    low, high = (math.log10(edge(ms for _, ms in every)) for edge in (min, max))
    scale = (10.0 ** math.floor(low), 10.0 ** max(math.ceil(high), math.floor(low) + 1))
    shortest, longest = min(n for n, _ in every), max(n for n, _ in every)
    width = LEFT + 2 * WIDTH + GAP + 2 * RIGHT
    body: list[str] = []
    for at, (phase, title) in enumerate(PANELS):
        start = LEFT + at * (WIDTH + GAP + RIGHT)
        x = Axis(shortest, max(longest, 2 * shortest), start, start + WIDTH)
        body += panel(lines[phase], x, Axis(*scale, TOP + HEIGHT, TOP), title)
    row = next(row for row in rows if row["section"] == "nsa")
    shape = f"{row['hq']}/{row['hq'] // group} heads of {row['d']}, {row['T']} blocks of {row['bk']}, bfloat16"
    where = ", ".join(about[name] for name in ("gpu", "date") if name in about)
    where += f", commit {about['commit']}" if "commit" in about else ""
    note = f"Native sparse attention over one sequence, tokens; {shape}; {where}"
    body.append(f'<text class="note" x="{LEFT}" y="20">{escaped(note)}</text>')
    size = f'viewBox="0 0 {width} {TOP + HEIGHT + BOTTOM}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escaped(note)}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>", ""])


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file; the text beside it says machine and date")
    parser.add_argument("out", type=Path, help="SVG file to write")
    parser.add_argument("--group", type=int, default=4, help="query heads per kv head (default: 4)")
    options = parser.parse_args()
    text = options.record.with_suffix(".txt")
    lines = text.read_text().splitlines() if text.exists() else []
    about = dict(line.split(": ", 1) for line in lines[: lines.index("") if "" in lines else None] if ": " in line)
    options.out.write_text(draw(json.loads(options.record.read_text()), about, options.group))


if __name__ == "__main__":
    main()
