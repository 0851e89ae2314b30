"""Lines over x."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .axes import Axis, linear_axis, log_axis
from .drawing import WIDTH, Drawing, colour, label
from .element import Svg, tag, text
from .figures import Band, Key, Limit, Line, LinePlot, number_text

HEIGHT = 340
RIGHT, TOP, BOTTOM = 20, 12, 46
NAMED = 28  # px left of the ticks, for the label of the y axis
DOTS = 40  # points of a line beyond which they have no dots

Point = tuple[float, float]


def draw_lines(plot: LinePlot, width: float = WIDTH) -> Drawing:
    """Draw the lines, with a dot and a tooltip at each point of the short ones."""
    runs = [(line, list(_runs(line, plot.log))) for line in plot.lines]
    areas = [(band, list(_areas(band, plot.log))) for band in plot.bands]
    points = [point for _, parts in [*runs, *areas] for part in parts for point in part]
    if not points:
        nothing = "nothing above zero to plot" if plot.log else "no finite number to plot"
        elements = label(text(nothing), width / 2, 30)
        return Drawing(plot.title, plot.description, width, 50, elements, ())
    make = log_axis if plot.log else linear_axis
    limits = [x for x in plot.limits if math.isfinite(x.value) and (not plot.log or x.value > 0)]
    y = make([*(value for _, value in points), *(x.value for x in limits)], HEIGHT - BOTTOM, TOP)
    left = NAMED + 8 + y.label_width()
    marks = [] if plot.x_mark is None else [plot.x_mark]
    x = make([*(value for value, _ in points), *marks], left, width - RIGHT)
    parts = [*_grid(plot, x, y), *_labels(plot, x, y)]
    parts += [part for band, drawn in areas for part in _band(band, drawn, x, y)]
    if plot.x_mark is not None:
        at = x.at(plot.x_mark)
        parts.append(tag("line", cls="mark", x1=at, x2=at, y1=float(TOP), y2=float(HEIGHT - BOTTOM)))
    parts += [part for number, limit in enumerate(limits) for part in _limit(limit, x, y, number)]
    keys = []
    for number, (line, drawn) in enumerate(runs):
        if drawn:
            shade = number if line.colour is None else line.colour
            parts += _line(line, drawn, x, y, colour(shade))
            keys.append(Key(line.name, "dashed" if line.dashed else "line", shade))
    keys += [Key(band.legend, "band", band.colour) for band, drawn in areas if drawn]
    legend = tuple(key for key in keys if key.name)
    return Drawing(plot.title, plot.description, width, HEIGHT, Svg("".join(parts)), legend)


def _runs(line: Line, log: bool) -> Iterator[list[Point]]:
    """Stretches of points that have a place on the axes."""
    run: list[Point] = []
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (not log or (x > 0 and y > 0)):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _areas(band: Band, log: bool) -> Iterator[list[Point]]:
    """Stretches of a band as closed outlines: along its lower line, and back along the upper one."""
    lows, highs = (
        dict(point for run in _runs(Line("", band.xs, ys), log) for point in run)
        for ys in (band.lows, band.highs)
    )
    whole = tuple(low if x in highs else math.nan for x, low in zip(band.xs, band.lows, strict=True))
    for run in _runs(Line("", band.xs, whole), log):
        yield [*((x, lows[x]) for x, _ in run), *((x, highs[x]) for x, _ in reversed(run))]


def _band(band: Band, areas: list[list[Point]], x: Axis, y: Axis) -> Iterator[Svg]:
    for area in areas:
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in area)
        yield tag("polygon", tag("title", text(band.name)), cls=f"band {colour(band.colour)}", points=path)


def _grid(plot: LinePlot, x: Axis, y: Axis) -> Iterator[Svg]:
    named = [(place, text(name)) for place, name in plot.x_ticks]
    for place, name in named or [(tick, x.label(tick)) for tick in x.ticks]:
        at = x.at(place)
        yield tag("line", cls="grid", x1=at, x2=at, y1=y.end, y2=y.start)
        yield label(name, at, y.start + 16)
    for tick in y.ticks:
        at = y.at(tick)
        yield tag("line", cls="grid", x1=x.start, x2=x.end, y1=at, y2=at)
        yield label(y.label(tick), x.start - 6, at + 4, "end")


def _labels(plot: LinePlot, x: Axis, y: Axis) -> Iterator[Svg]:
    yield label(text(plot.x_label), (x.start + x.end) / 2, HEIGHT - 8)
    middle = f"translate(16 {(y.start + y.end) / 2:g}) rotate(-90)"
    yield tag("text", text(plot.y_label), transform=middle, text_anchor="middle")


def _limit(limit: Limit, x: Axis, y: Axis, number: int) -> Iterator[Svg]:
    """A dashed line with its name above it: at the right end for the first, at the left for the next."""
    at = y.at(limit.value)
    yield tag("line", cls="limit", x1=x.start, x2=x.end, y1=at, y2=at)
    name = text(f"{limit.name} {number_text(limit.value)}")
    place, anchor = (x.start + 4, "start") if number % 2 else (x.end - 4, "end")
    yield label(name, place, at - 5 if at - 5 > TOP + 9 else at + 14, anchor, "value")


def _line(line: Line, runs: list[list[Point]], x: Axis, y: Axis, shade: str) -> Iterator[Svg]:
    count = sum(map(len, runs))
    for run in runs:
        path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in run)
        yield tag("polyline", cls=f"line {shade}{' dashed' if line.dashed else ''}", points=path)
        for a, b in run if count <= DOTS or len(run) == 1 else ():
            tip = tag("title", text(f"{line.name}: {number_text(b)} at {a:g}"))
            yield tag("circle", tip, cls=f"fill {shade}", cx=x.at(a), cy=y.at(b), r=3.0)
