"""Draw docs/drift.svg, the picture of the README, from what `make demo` verified.

    python docs/draw_drift.py [--runs out] [--out docs/drift.svg]

It reads `verify/report.json` of the FP16 and INT8 run folders of both examples. The picture has a light and a
dark colour scheme, which the reader's browser chooses.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "austen_lm": "language model, 1.1M parameters",
    "weather_forecaster": "forecaster, 0.13M parameters",
}
PRECISIONS = ("int8", "fp16")
WIDTH, HEIGHT = 760, 300
LEFT, TOP, BOTTOM, GAP, PANEL = 62, 44, 52, 38, 320  # pixels
FIRST, LAST = 1.0, 1e4  # positions
LOW, HIGH = 1e-4, 1.0  # relative L2 errors

STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --grid: #d8dee4; --int8: #0a63c9; --fp16: #b35900 }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #e6edf3; --grid: #30363d; --int8: #58a6ff; --fp16: #f0a35e }
}
text { font: 12px system-ui, sans-serif; fill: var(--ink) }
.title { font-weight: 600 }
.grid { stroke: var(--grid) }
.int8 { stroke: var(--int8); fill: var(--int8) }
.fp16 { stroke: var(--fp16); fill: var(--fp16) }
text.int8, text.fp16 { stroke: none }
polyline { fill: none !important; stroke-width: 2 }
.limit { stroke-dasharray: 5 4 }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "out", help="where `make demo` wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "drift.svg")
    options = parser.parse_args()
    options.out.write_text(picture(options.runs), encoding="utf-8")
    print(f"wrote {options.out}")


def picture(runs: Path) -> str:
    """The SVG of all models, one panel each."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Error of FP16 and INT8 exports along a stream, and their limits</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--paper)"/>',
    ]
    for number, (model, title) in enumerate(MODELS.items()):
        left = LEFT + number * (PANEL + GAP)
        parts += _axes(left, title, labels=number == 0)
        for precision in PRECISIONS:
            report = json.loads((runs / model / precision / "verify" / "report.json").read_text())
            parts += _curve(left, precision, report)
    parts.append(
        f'<text transform="translate(15 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        "error (relative L2, FP32 = 0)</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def _axes(left: float, title: str, *, labels: bool) -> list[str]:
    parts = [f'<text class="title" x="{left}" y="24">{title}</text>']
    for power in range(round(math.log10(LAST)) + 1):
        x, value = _x(left, 10.0**power), f"{10**power:,}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x > WIDTH - 40 else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{value}</text>')
    for power in range(round(math.log10(LOW)), round(math.log10(HIGH)) + 1):
        y, value = _y(10.0**power), f"{10.0**power:g}"
        parts.append(f'<line class="grid" x1="{left}" x2="{left + PANEL}" y1="{y}" y2="{y}"/>')
        if labels:
            parts.append(f'<text x="{left - 7}" y="{y + 4}" text-anchor="end">{value}</text>')
    middle, below = left + PANEL / 2, HEIGHT - BOTTOM + 37
    parts.append(f'<text x="{middle}" y="{below}" text-anchor="middle">position in the stream</text>')
    return parts


def _curve(left: float, precision: str, report: dict[str, Any]) -> list[str]:
    """Errors of the outputs with the data's own inputs, and the limit that they are held to."""
    mode = "teacher-forced"
    rows = [r for r in report["precision"]["drift"]["rows"] if r["mode"] == mode and r["block"] is None]
    (limit,) = (
        check["limit"] for check in report["checks"] if check["name"] == f"{mode}: {rows[0]['tensor']}: level"
    )
    points = [(_x(left, row["horizon"]), _y(row["error"])) for row in rows]
    name, end, y = precision.upper(), left + PANEL, _y(limit)
    x_name, y_name = points[len(points) // 2]
    return [
        f'<polyline class="{precision}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>',
        *(f'<circle class="{precision}" cx="{x}" cy="{y}" r="3"/>' for x, y in points),
        f'<text class="{precision}" x="{x_name}" y="{y_name - 9}" text-anchor="middle">{name}</text>',
        f'<line class="{precision} limit" x1="{left}" x2="{end}" y1="{y}" y2="{y}"/>',
        f'<text class="{precision}" x="{end}" y="{y - 6}" text-anchor="end">limit of {name}</text>',
    ]


def _x(left: float, position: float) -> float:
    return round(left + PANEL * math.log10(position / FIRST) / math.log10(LAST / FIRST), 1)


def _y(error: float) -> float:
    height = HEIGHT - BOTTOM - TOP
    return round(HEIGHT - BOTTOM - height * math.log10(error / LOW) / math.log10(HIGH / LOW), 1)


if __name__ == "__main__":
    main()
