"""A document without a format: sections of text, tables and plots; HTML and Markdown are made from it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..plot.figures import BarPlot, LinePlot, number_text

Value = str | float | int | bool | None


@dataclass(frozen=True)
class Table:
    """A table: rows under named columns.

    Attributes:
        caption: what the table shows.
        columns: names of the columns, with units.
        rows: one value per column; numbers sort as numbers, None is shown as a dash.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Fact:
    """A line of the verdict's box: what it is about, and what was found."""

    name: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading and, in this order: text, plots, tables, and commands in `language`."""

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
        title: title of the page.
        verdict: one sentence; `passed` decides its colour, None if there is no verdict yet.
        details: sentences directly below the verdict, such as the checks that failed.
        facts: what the verdict rests on and what the export costs, in the same box.
    """

    title: str
    verdict: str
    passed: bool | None
    details: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def missing(folder: Path, title: str, command: str) -> Section:
    """A section for results that do not exist yet; it names the command that makes them."""
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
    return number_text(value)


def bytes_of(count: float) -> str:
    """A size with its unit, 10³ based."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError
