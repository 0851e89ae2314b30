"""The content of plots, independent of how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line of a plot. It has a gap where y is not finite, or not above zero on a logarithmic axis.

    Attributes:
        name: in the legend; an empty name is left out of it.
        colour: of the palette; by default the number of the line.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    dashed: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Band:
    """The area between two lines over the same x; bands that lie on each other are darker.

    Attributes:
        name: what lies between the lines, shown under a pointer.
        legend: its name in the legend; an empty one is left out of it.
        colour: of the palette.
    """

    name: str
    xs: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    legend: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Limit:
    """A dashed line across a plot, with its name on it: values beyond it fail."""

    name: str
    value: float


@dataclass(frozen=True)
class LinePlot:
    """Lines over x.

    Attributes:
        title, description: a short title; a sentence on the content, for readers who cannot see the plot.
        x_label, y_label: units included.
        log: both axes are logarithmic; otherwise both are linear.
        x_mark: a vertical line here.
        x_ticks: places and texts of the ticks of a linear x axis; by default round numbers.
        bands: areas behind the lines.
        limits: at most two, one named at each end; those that have no place on the axis are left out.
        reading: how to read the plot and what is good, for the caption in a report.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log: bool = True
    x_mark: float | None = None
    x_ticks: tuple[tuple[float, str], ...] = ()
    bands: tuple[Band, ...] = ()
    limits: tuple[Limit, ...] = ()
    reading: str = ""


@dataclass(frozen=True)
class Bar:
    """A bar of a group.

    Attributes:
        name: in the legend.
        mark: a second value, drawn as a line across the bar.
        colour: of the palette; by default each name has its own.
    """

    name: str
    value: float
    mark: float | None = None
    colour: int | None = None


@dataclass(frozen=True)
class BarPlot:
    """Horizontal bars from zero, in groups, over a linear axis.

    Attributes:
        title, description, reading: as of `LinePlot`.
        unit: of the values, beside each of them; `axis` is the label of the axis, by default the unit.
        groups: label → bars.
        mark: what a bar's mark is.
        limit: a dashed line across all bars, named `limit_name` in the legend.
    """

    title: str
    description: str
    unit: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    mark: str = ""
    axis: str = ""
    limit: float | None = None
    limit_name: str = ""
    reading: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `kind` is the swatch: "line", "dashed", "band", "mark" or "limit"."""

    name: str
    kind: str
    colour: int = 0


def number_text(value: float) -> str:
    """A number as it is printed: three significant digits."""
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "no number")
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e5:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.2e}"
