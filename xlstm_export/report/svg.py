"""Plots as inline SVG. Colours are CSS variables of the page, which has a light and a dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from .document import BarPlot, LinePlot, text_of

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 46
COLOURS = 8  # --c0 … --c7 of the page
BAR, GAP, NAME = 16, 10, 190


def draw(plot: LinePlot | BarPlot, identifier: str) -> str:
    """An <svg> element with title and description."""
    return _lines(plot, identifier) if isinstance(plot, LinePlot) else _bars(plot, identifier)


def _open(identifier: str, title: str, description: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{identifier}-t {identifier}-d">'
        f'<title id="{identifier}-t">{escape(title)}</title><desc '
        f'id="{identifier}-d">{escape(description)}</desc>'
    )


def _lines(plot: LinePlot, identifier: str) -> str:
    drawn = [
        (
            line,
            [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if x > 0 and y > 0 and math.isfinite(y)],
        )
        for line in plot.lines
    ]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return "<p>Nothing above zero to plot.</p>"
    x_of, x_ticks = _axis([x for _, ps in drawn for x, _ in ps], LEFT, WIDTH - RIGHT)
    y_of, y_ticks = _axis([y for _, ps in drawn for _, y in ps], HEIGHT - BOTTOM, TOP)
    parts = [_open(identifier, plot.title, plot.description, HEIGHT)]
    for x in x_ticks:
        at = f"{x_of(x):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x == x_ticks[-1] and x_of(x) > WIDTH - 2 * RIGHT else "middle"
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{_power(x)}</text>')
    for y in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{_power(y)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(plot.x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(plot.y_label)}</text>"
    )
    for number, (line, points) in enumerate(drawn):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        style = f'style="stroke:var(--c{number % COLOURS})"' + (
            ' stroke-dasharray="6 4"' if line.dashed else ""
        )
        parts.append(f'<polyline class="line" points="{path}" {style}/>')
        for x, y in points:
            tip = escape(f"{line.name}: {text_of(y)} at {x:g}")
            parts.append(
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" '
                f'style="fill:var(--c{number % COLOURS})">'
                f"<title>{tip}</title></circle>"
            )
    parts.append("</svg>")
    return "".join(parts) + _legend([(line.name, line.dashed) for line, _ in drawn])


def _axis(values: list[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """Position of a value on a logarithmic axis that ends at powers of ten; its ticks."""
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    high = max(high, low + 1)
    every = max(1, math.ceil((high - low) / 8))

    def place(value: float) -> float:
        return start + (end - start) * (math.log10(value) - low) / (high - low)

    return place, [10.0**k for k in range(low, high + 1, every)]


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    if 0 <= exponent <= 5:
        return f"{10**exponent:,}"
    return f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'


def _bars(plot: BarPlot, identifier: str) -> str:
    names = list(dict.fromkeys(bar.name for _, bars in plot.groups for bar in bars))
    finite = [
        v for _, bars in plot.groups for b in bars for v in (b.value, b.mark or 0.0) if math.isfinite(v)
    ]
    top = max(finite, default=0.0) or 1.0
    height = sum(len(bars) * BAR + GAP for _, bars in plot.groups) + 8
    parts = [_open(identifier, plot.title, plot.description, height)]
    scale = (WIDTH - NAME - 110) / top
    y = 4.0
    for label, bars in plot.groups:
        parts.append(
            f'<text x="{NAME - 8}" y="{y + len(bars) * BAR / 2 + 4:.1f}" '
            f'text-anchor="end">{escape(label)}</text>'
        )
        for bar in bars:
            colour = f"var(--c{names.index(bar.name) % COLOURS})"
            width = max(1.0, bar.value * scale) if math.isfinite(bar.value) else WIDTH - NAME - 110
            said = f"{text_of(float(bar.value))} {plot.unit}"
            parts.append(
                f'<rect x="{NAME}" y="{y + 1:.1f}" width="{width:.1f}" height="{BAR - 2}" '
                f'style="fill:{colour}">'
                f"<title>{escape(f'{label}, {bar.name}: {said}')}</title></rect>"
            )
            parts.append(f'<text x="{NAME + width + 6:.1f}" y="{y + BAR - 4:.1f}">{escape(said)}</text>')
            if bar.mark is not None and math.isfinite(bar.mark):
                x = NAME + bar.mark * scale
                parts.append(
                    f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 1:.1f}" y2="{y + BAR + 1:.1f}"/>'
                )
            y += BAR
        y += GAP
    parts.append("</svg>")
    return "".join(parts) + _legend([(name, False) for name in names], plot.mark)


def _legend(names: list[tuple[str, bool]], mark: str = "") -> str:
    """Beside the colours the names; a plot with one is named by its title."""
    items = [
        f'<li><span class="swatch{" dashed" if dashed else ""}" style="--c:var(--c{number % COLOURS})">'
        f"</span>"
        f"{escape(name)}</li>"
        for number, (name, dashed) in enumerate(names)
    ]
    if mark:
        items.append(f'<li><span class="swatch across"></span>{escape(mark)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if len(items) > 1 else ""
