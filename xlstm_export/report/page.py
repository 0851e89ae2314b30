"""The document as one HTML file: styles, script and plots inside, no network."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from .document import Document, Section, Table, Value, text_of
from .svg import draw

ASSETS = Path(__file__).parent
LONG = 24  # rows beyond which a table is folded


def page(document: Document) -> str:
    """The whole file."""
    css, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    state = {True: "pass", False: "fail", None: "none"}[document.passed]
    mark = {True: "✓ pass", False: "✗ FAIL", None: "not verified"}[document.passed]
    contents = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(document.sections)
    )
    details = "".join(f"<p>{escape(detail)}</p>" for detail in document.details)
    sections = "".join(_section(section, f"s{number}") for number, section in enumerate(document.sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(document.title)}</h1>\n"
        f'<div class="verdict {state}" role="status"><strong>{mark}</strong> '
        f"{escape(document.verdict)}{details}</div>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n'
        f"<main>\n{sections}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, identifier: str) -> str:
    parts = [f'<section id="{identifier}"><h2>{escape(section.title)}</h2>\n']
    parts += [f"<p>{escape(paragraph)}</p>\n" for paragraph in section.text]
    for number, plot in enumerate(section.plots):
        drawn = draw(plot, f"{identifier}p{number}")
        parts.append(f"<figure><figcaption>{escape(plot.title)}</figcaption>{drawn}</figure>\n")
    parts += [_table(table) for table in section.tables]
    if section.commands:
        parts.append(f'<pre tabindex="0"><code>{escape(chr(10).join(section.commands))}</code></pre>\n')
    return "".join([*parts, "</section>\n"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    made = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
        f"</table></div>\n"
    )
    if len(table.rows) <= LONG:
        return made
    return f"<details><summary>{escape(table.caption)}: {len(table.rows)} rows</summary>{made}</details>\n"


def _cell(value: Value) -> str:
    text = escape(text_of(value))
    if isinstance(value, bool):
        kind, mark = ("pass", "✓") if value else ("fail", "✗")
        return f'<td class="{kind}" data-sort="{int(value)}">{mark} {text}</td>'
    if isinstance(value, (int, float)):
        sort = value if not math.isnan(value) else "Infinity"
        return f'<td class="number" data-sort="{sort}">{text}</td>'.replace('"inf"', '"Infinity"')
    return f"<td>{text}</td>"
