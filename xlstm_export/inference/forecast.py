"""Plots of forecasts, see `sessions/forecast.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from ..atomic import write_text
from ..errors import UsageError
from ..plot.figures import Band, Line, LinePlot
from ..plot.file import require_svg, svg_file
from ..sessions.forecast import Forecast
from ..sessions.table import Table

HISTORY = 168  # rows before the forecast that the plot shows, or three times the forecast where that is more
WIDTH = 860  # px of the plot
TICKS = 5  # times that are written on the x axis
GREY, BLUE = 7, 0  # its colours


def plot(made: Sequence[Forecast], path: Path, target: str | None = None) -> None:
    """Write a plot of the end of each series and its forecast. The same forecasts give the same bytes.

    Args:
        made: forecasts, as from `forecast`.
        path: .svg file to write.
        target: the column that is drawn, or the series; by default the first column of each series.

    Raises:
        UsageError: the column is unknown, or the path has another suffix.
        SetupError: the file cannot be written.
    """
    require_svg(path)
    drawn = drawn_of([one.series for one in made], target)
    chosen = [one for one in made if any(one.series is series for series in drawn)]
    write_text(path, svg_file("", [_figure(one, target) for one in chosen], WIDTH, across=1))


def drawn_of(series: Sequence[Table], target: str | None) -> list[Table]:
    """The series that are drawn: all, or those with that name or with a column of that name.

    Raises:
        UsageError: there are none.
    """
    chosen = [one for one in series if target is None or target in (one.name, *one.columns)]
    if not chosen:
        names = dict.fromkeys(name for one in series for name in (one.name, *one.columns) if name)
        raise UsageError(f"no column {target}", f"there are {', '.join(names)}")
    return chosen


def _figure(made: Forecast, target: str | None) -> LinePlot:
    columns = made.series.columns
    place = columns.index(target) if target in columns else 0
    name = made.series.name if len(columns) == 1 and made.series.name else columns[place]
    ahead = len(made.values)
    past = made.series.values[-max(HISTORY, 3 * ahead) :, place].tolist()
    gaps = sum(map(math.isnan, past))
    start = [] if math.isnan(past[-1]) else past[-1:]  # the forecast is joined to the last row
    steps = tuple(float(x) for x in range(1 - len(start), ahead + 1))
    lines = [Line(name, tuple(float(x) for x in range(1 - len(past), 1)), tuple(past), colour=GREY)]
    # Of several columns that are forecast, the one that is drawn; of quantiles the median, of others all.
    shown = (
        [made.median] if made.quantiles else [place] if made.names == columns else range(made.values.shape[1])
    )
    title = f"median ({made.names[made.median]})" if made.quantiles else "forecast"
    for number, output in enumerate(shown):
        values = (*start, *made.values[:, output].tolist())
        lines.append(Line("" if number else title, steps, values, colour=BLUE))
    unit = f" ({made.unit})" if made.unit else ""
    return LinePlot(
        f"{name}: the last {len(past)} rows and the forecast",
        f"{ahead} rows ahead of the last one; {gaps} of the rows before are gaps. {made.how}.",
        _x_label(made),
        f"{name}{unit}",
        tuple(lines),
        log=False,
        x_mark=0.0,
        x_ticks=tuple(_x_ticks(made, len(past))),
        bands=tuple(_bands(made, start)),
    )


def _bands(made: Forecast, start: Sequence[float]) -> Iterator[Band]:
    """Areas between pairs of quantiles around the median, the widest first."""
    levels = made.quantiles
    steps = tuple(float(x) for x in range(1 - len(start), len(made.values) + 1))
    for low in range(made.median):
        high = len(levels) - 1 - low
        if high <= made.median:
            return
        between = f"{levels[low]:g} to {levels[high]:g}"
        lows, highs = ((*start, *made.values[:, at].tolist()) for at in (low, high))
        yield Band(between, steps, lows, highs, "" if low else f"quantiles {between}", BLUE)


def _x_label(made: Forecast) -> str:
    step = None if made.series.times is None else made.series.times.step
    if made.times and step is not None:
        return f"time, rows of {step_text(step)}"
    return "time" if made.times else "rows from the last one"


def _x_ticks(made: Forecast, past: int) -> Iterator[tuple[float, str]]:
    """Times as the file writes them, at some of the rows from the first that is drawn to the last ahead."""
    if not made.times:
        return
    labels = [*made.series.labels[-past:], *made.times]
    for number in range(TICKS):
        # Not at the very ends, where a long text would leave the plot.
        row = round((number + 0.5) / TICKS * (len(labels) - 1))
        yield float(row + 1 - past), labels[row]


def step_text(step: timedelta) -> str:
    """A step in the largest unit that it is a whole number of."""
    seconds = step.total_seconds()
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g} {name}"
    return f"{seconds:g} s"
