"""The document as one HTML file that contains its styles, script and plots.

The templates are in `templates/`. They escape everything except the results of `_markup`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..plot.drawing import Drawing, colour
from ..plot.file import draw, style
from ..plot.names import shortened_apart
from .document import Document, Table, Value, text_of
from .glossary import about

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ASSETS = Path(__file__).parent
PATH = 44  # longest path of a module that is shown whole; a pointer on others shows it
LONG = 24  # a table with more rows is folded
STATES = {True: ("pass", "✓ pass"), False: ("fail", "✗ FAIL"), None: ("none", "not verified")}


@dataclass(frozen=True)
class Cell:
    """A cell of an HTML table.

    Attributes:
        text: text that is shown.
        kind: CSS class; empty for words.
        sort: number that it sorts by; empty if it sorts as text.
        about: what a heading means, or the whole of a shortened text; shown where a pointer rests on it.
    """

    text: str
    kind: str = ""
    sort: str = ""
    about: str = ""


def page(document: Document) -> str:
    """The whole file."""
    state, mark = STATES[document.passed]
    template = _environment().get_template("page.html.j2")
    return template.render(
        document=document,
        state=state,
        mark=mark,
        styles=_markup(style() + _asset("page.css")),
        script=_markup(_asset("page.js")),
    )


def _environment() -> Environment:
    """Templates that escape; an undefined name in a template is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cells": _cells,
        "colour": colour,
        "drawing": draw,
        "folded": _folded,
        "heads": _heads,
        "svg": _svg,
    }
    return environment


def _markup(made_here: str) -> Markup:
    """Text that is not escaped: the package's own styles and script, and SVG, which is escaped already."""
    from markupsafe import Markup

    return Markup(made_here)


def _svg(drawing: Drawing, identifier: str) -> Markup:
    return _markup(drawing.element(identifier))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _folded(table: Table) -> bool:
    return len(table.rows) > LONG


def _heads(table: Table) -> list[Cell]:
    """Headings, above numbers as these are: on the right."""
    kinds = [
        {_cell(value).kind for value in column if value is not None}
        for column in zip(*table.rows, strict=True)
    ]
    numeric = [kind == {"number"} for kind in kinds] or [False] * len(table.columns)
    return [
        Cell(name, "number" if right else "", about=about(name))
        for name, right in zip(table.columns, numeric, strict=True)
    ]


def _cells(table: Table) -> list[list[Cell]]:
    right = [head.kind for head in _heads(table)]
    paths = list(dict.fromkeys(text for row in table.rows for text in map(text_of, row) if _is_long(text)))
    short = dict(zip(paths, shortened_apart(paths, PATH), strict=True))
    return [[_cell(value, kind, short) for value, kind in zip(row, right, strict=True)] for row in table.rows]


def _is_long(text: str) -> bool:
    """Whether this is the path of a module that is not shown whole."""
    return len(text) > PATH and re.fullmatch(r"[\w.+]*\.[\w.+]*", text) is not None


def _cell(value: Value, missing: str = "", short: Mapping[str, str] = MappingProxyType({})) -> Cell:
    """The cell of a value; `missing` is the kind of one without a value, `short` has the long paths."""
    text = text_of(value)
    if value is None:
        return Cell(text, missing)
    if text in short:
        return Cell(short[text], about=text)
    if isinstance(value, bool):
        return Cell(f"✓ {text}", "pass", "1") if value else Cell(f"✗ {text}", "fail", "0")
    if isinstance(value, (int, float)):
        infinite = math.isnan(value) or value == math.inf
        return Cell(text, "number", "Infinity" if infinite else str(value).replace("inf", "Infinity"))
    return Cell(text)
