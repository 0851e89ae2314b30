"""Writes the evidence of a sensitivity search: recipe, JSON, CSV, and a plot."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ..atomic import staged_file, write_json
from .plot import draw
from .result import COLUMNS, Sensitivity
from .search import Candidate

FOLDER = "sensitivity"  # in the run folder
RECIPE, EVIDENCE, TABLE, PICTURE = "recipe.yaml", "evidence.json", "evidence.csv", "evidence.svg"


def write_evidence(result: Sensitivity, out: Path) -> None:
    """Write all files, each atomically.

    Raises:
        SetupError: the folder cannot be written, or the disk is full.
    """
    write_json(out / EVIDENCE, result.to_json())
    _replace(out / TABLE, _table(result).encode())
    with staged_file(out / RECIPE) as temporary:
        result.recipe.write(temporary, note(result))
    _replace(out / PICTURE, draw(result).encode())


def note(result: Sensitivity) -> str:
    """Summary of the measurements, as a comment for the recipe file."""
    about, limits, naive, found = result.about, result.limits, result.general, result.found
    lines = [
        f"Found by measuring {len(result.candidates)} candidates on {about['rows']} × {about['positions']} "
        f"positions, drift at {about['horizon']}.",
        f"{result.metric} of the FP32 export {result.reference:.6g}; limit {limits.max_drop:.3%} worse.",
        f"this recipe: {_line(found)}",
        f"everything:  {_line(naive)}",
        f"base type:   {_line(result.base)}",
    ]
    return "\n".join(lines)


def _line(candidate: Candidate) -> str:
    found = candidate.measured
    if found.failure:
        return f"cannot be built: {found.failure.splitlines()[0]}"
    return (
        f"{candidate.drop:+.3%}, drift of outputs {found.drift:.2e}, of states {found.state_drift:.2e}, "
        f"growth {found.growth:.2f}, {found.bytes:,} bytes"
    )


def _table(result: Sensitivity) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows())
    return text.getvalue()


def _replace(path: Path, content: bytes) -> None:
    with staged_file(path) as temporary:
        temporary.write_bytes(content)
