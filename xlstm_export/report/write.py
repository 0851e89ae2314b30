"""Writes the report of a run folder, or the comparison of two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..atomic import write_text
from ..errors import InputError
from .compare import comparison
from .data import RunData, read_run
from .document import Document
from .markdown import markdown
from .page import page
from .sections import document

NAME = "report"


def _made(run: RunData, other: RunData | None) -> tuple[Document, str, str]:
    """The document, as HTML and Markdown; values that no stage writes are an InputError."""
    try:
        made = comparison(run, other) if other is not None else document(run)
        return made, page(made), markdown(made)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        where = f"{run.folder.path}" if other is None else f"{run.folder.path} or {other.folder.path}"
        raise InputError(
            f"a file in {where} holds a value that no stage writes: {error!r}",
            "run verify, bench and calibrate again",
        ) from error


@dataclass(frozen=True)
class Written:
    """The written files, and the verdict of the report."""

    paths: tuple[Path, ...]
    verdict: str
    passed: bool | None


def write_report(
    folder: Path,
    *,
    compare: Path | None = None,
    html: Path | None = None,
    md: Path | None = None,
    json_path: Path | None = None,
) -> Written:
    """Write a run's report as HTML, Markdown and JSON. The same files give the same bytes.

    Args:
        folder: run folder.
        compare: run folder to compare it with; the default names are then `comparison.…`.
        html, md, json_path: files to write; by default `report.…` in the run folder.

    Raises:
        InputError: a file of the run is damaged, or the folder is not a run folder.
        SetupError: a file cannot be written.
    """
    run = read_run(folder)
    other = read_run(compare) if compare is not None else None
    made, as_html, as_markdown = _made(run, other)
    name = "comparison" if other is not None else NAME
    found = {"a": run.to_json(), "b": other.to_json()} if other is not None else run.to_json()
    data = {"verdict": made.verdict, "summary": {fact.name: fact.text for fact in made.facts}, **found}
    contents = {
        html or folder / f"{name}.html": as_html,
        md or folder / f"{name}.md": as_markdown,
        json_path or folder / f"{name}.json": json.dumps(data, indent=1) + "\n",
    }
    for path, content in contents.items():
        write_text(path, content)
    return Written(tuple(contents), made.verdict, made.passed)
