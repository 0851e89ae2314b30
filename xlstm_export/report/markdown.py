"""The document as Markdown, for reviews and model cards. Plots are described, not drawn."""

from __future__ import annotations

from .document import Document, Table, text_of


def markdown(document: Document) -> str:
    """The whole document."""
    marks = {True: "**pass**", False: "**FAIL**", None: "**not verified**"}
    lines = [f"# {_plain(document.title)}", "", f"{marks[document.passed]}: {_plain(document.verdict)}", ""]
    for detail in document.details:
        lines += [_plain(detail), ""]
    if document.facts:
        lines += [*(f"- {_plain(fact.name)}: {_plain(fact.text)}" for fact in document.facts), ""]
    for section in document.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for paragraph in section.text:
            lines += [_plain(paragraph), ""]
        for plot in section.plots:
            words = " ".join(filter(None, (plot.description, plot.reading)))
            lines += [f"*{_plain(plot.title)}.* {_plain(words)}", ""]
        for table in section.tables:
            lines += [*_table(table), ""]
        if section.commands:
            lines += [f"```{section.language}", *section.commands, "```", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(table: Table) -> list[str]:
    cells = [[_plain(text_of(value)) for value in row] for row in (table.columns, *table.rows)]
    cells.insert(1, ["---"] * len(table.columns))
    return [
        f"{_plain(table.caption)}:",
        "",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]


def _plain(text: str) -> str:
    """Text on one line, with the characters escaped that have a meaning in Markdown."""
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)
    return " ".join(escaped.split())
