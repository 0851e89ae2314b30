"""A document without a format: sections of text, tables and plots, which HTML and Markdown are made of."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        caption: says what the table shows.
        columns: their names, units included.
        rows: of as many values; numbers sort as numbers, None is shown as a dash.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Line:
    """A line of a plot; points whose y is no finite number are left out."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Lines over a logarithmic x and a logarithmic y.

    Attributes:
        title: short; `description` says in a sentence what is to be seen, for those who cannot see it.
        x_label, y_label: units included.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Bar:
    """A bar of a group; `mark` is a second value, drawn as a line across."""

    name: str
    value: float
    mark: float | None = None


@dataclass(frozen=True)
class BarPlot:
    """Horizontal bars from zero, in groups.

    Attributes:
        title, description: as of `LinePlot`.
        unit: of the values.
        groups: label → bars.
        mark: what a bar's mark is.
    """

    title: str
    description: str
    unit: str
    groups: tuple[tuple[str, tuple[Bar, ...]], ...]
    mark: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what is below it, in this order: text, plots, tables, commands in their `language`."""

    title: str
    text: tuple[str, ...] = ()
    plots: tuple[LinePlot | BarPlot, ...] = ()
    tables: tuple[Table, ...] = ()
    commands: tuple[str, ...] = ()
    language: str = "sh"


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the page.
        verdict: one sentence; `passed` is its colour, None where there is none yet.
        details: what belongs right below it.
    """

    title: str
    verdict: str
    passed: bool | None
    details: tuple[str, ...] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def missing(folder: Path, title: str, command: str) -> Section:
    """A section that is empty until `command` was run."""
    line = f"xlstm-export {command} {shlex.quote(str(folder))}"
    return Section(title, ("Nothing yet: run the command below.",), commands=(line,))


def text_of(value: Value) -> str:
    """A value as it is printed: three significant digits, verdicts in words."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "pass" if value else "FAIL"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else "no number")
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e5:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.2e}"


def bytes_of(count: float) -> str:
    """A size with its unit, 10³ based."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
