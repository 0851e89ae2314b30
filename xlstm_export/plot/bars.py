"""Horizontal bars."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .axes import Axis, linear_axis
from .drawing import WIDTH, Drawing, colour, label, letters, text_width, with_whole
from .element import Svg, tag, text
from .figures import Bar, BarPlot, Key, number_text
from .names import shortened_apart

BAR, GAP, TOP, BOTTOM = 16, 10, 6, 44
RIGHT = 20
NAMES = (60.0, 280.0)  # px left of the bars, smallest and largest


def draw_bars(plot: BarPlot, width: float = WIDTH) -> Drawing:
    """Draw the bars with their values beside them. An infinite value fills the axis."""
    bars = [bar for _, group in plot.groups for bar in group]
    if not bars:
        elements = label(text("nothing to plot"), width / 2, 30)
        return Drawing(plot.title, plot.description, width, 50, elements, ())
    colours = _colours(bars)
    bottom = TOP + sum(len(group) * BAR + GAP for _, group in plot.groups)
    axis = _axis(plot, bars, width)
    parts, values = [*_grid(plot, axis, bottom)], []
    y = TOP + GAP / 2
    names = shortened_apart([name for name, _ in plot.groups], letters(axis.start - 16))
    for shown, (name, group) in zip(names, plot.groups, strict=True):
        parts.append(label(with_whole(shown, name), axis.start - 8, y + len(group) * BAR / 2 + 4, "end"))
        for bar in group:
            parts += _bar(plot, name, bar, axis, y, colour(colours[bar.name]))
            values.append(_number(plot, bar, axis, y))
            y += BAR
        y += GAP
    if plot.limit is not None:
        at = axis.at(plot.limit)
        parts.append(tag("line", cls="mark dashed", x1=at, x2=at, y1=float(TOP), y2=float(bottom)))
    elements = Svg("".join([*parts, *values]))
    return Drawing(plot.title, plot.description, width, bottom + BOTTOM, elements, _legend(plot, colours))


def _colours(bars: list[Bar]) -> dict[str, int]:
    colours: dict[str, int] = {}
    for bar in bars:
        colours.setdefault(bar.name, len(colours) if bar.colour is None else bar.colour)
    return colours


def _axis(plot: BarPlot, bars: list[Bar], width: float) -> Axis:
    """From the smallest value, or zero, to the largest; room at both ends for names and values."""
    names = max(text_width(name) for name, _ in plot.groups) + 16
    left = min(max(names, NAMES[0]), NAMES[1])
    room = max(text_width(_value(plot, bar)) for bar in bars) + RIGHT
    found = [plot.limit, *(value for bar in bars for value in (bar.value, bar.mark))]
    values = [value for value in found if value is not None and math.isfinite(value)]
    return linear_axis([0.0, *values] if any(values) else [0.0, 1.0], left, width - room, pad=False)


def _value(plot: BarPlot, bar: Bar) -> str:
    return f"{number_text(float(bar.value))} {plot.unit}".rstrip()


def _grid(plot: BarPlot, axis: Axis, bottom: float) -> Iterator[Svg]:
    for tick in axis.ticks:
        at = axis.at(tick)
        yield tag("line", cls="mark" if tick == 0 else "grid", x1=at, x2=at, y1=float(TOP), y2=bottom)
        yield label(axis.label(tick), at, bottom + 16)
    yield label(text(plot.axis or plot.unit), (axis.start + axis.end) / 2, bottom + BOTTOM - 8)


def _bar(plot: BarPlot, group: str, bar: Bar, axis: Axis, y: float, shade: str) -> Iterator[Svg]:
    zero, end, mark = _places(bar, axis)
    tip = tag("title", text(f"{group}, {bar.name}: {_value(plot, bar)}"))
    size = {"x": min(zero, end), "y": y + 1, "width": max(1.0, abs(end - zero)), "height": BAR - 2.0}
    yield tag("rect", tip, cls=f"fill {shade}", **size)
    if mark != zero:
        yield tag("line", cls="mark", x1=mark, x2=mark, y1=y - 1, y2=y + BAR + 1)


def _number(plot: BarPlot, bar: Bar, axis: Axis, y: float) -> Svg:
    """The value beside the bar, behind its mark too."""
    return label(text(_value(plot, bar)), max(_places(bar, axis)) + 6, y + BAR - 4, "start", "value")


def _places(bar: Bar, axis: Axis) -> tuple[float, float, float]:
    """Positions of zero, of the bar's end and of its mark (zero without a mark), in px."""
    zero = axis.at(0.0)
    end = axis.at(bar.value) if math.isfinite(bar.value) else axis.end
    mark = axis.at(bar.mark) if bar.mark is not None and math.isfinite(bar.mark) else zero
    return zero, end, mark


def _legend(plot: BarPlot, colours: dict[str, int]) -> tuple[Key, ...]:
    keys = [Key(name, "line", shade) for name, shade in colours.items() if name]
    if plot.mark:
        keys.append(Key(plot.mark, "mark"))
    if plot.limit_name:
        keys.append(Key(plot.limit_name, "limit"))
    return tuple(keys)
