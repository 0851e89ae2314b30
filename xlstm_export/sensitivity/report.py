"""Evidence of a sensitivity search as files: recipe, JSON, CSV, and a picture."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import readable_os_errors, write_json
from ..quantize.recipe import Choice, Recipe
from .plot import draw
from .search import Candidate, Limits, Unit

FOLDER = "sensitivity"  # in the run folder
RECIPE, EVIDENCE, TABLE, PICTURE = "recipe.yaml", "evidence.json", "evidence.csv", "evidence.svg"
COLUMNS = (
    "name",
    "metric",
    "drop",
    "drift",
    "state_drift",
    "worst_state",
    "growth",
    "bytes",
    "saved",
    "within",
    "rules",
)


@dataclass(frozen=True)
class Sensitivity:
    """Outcome of `sensitivity`.

    Attributes:
        recipe: quantizes the most bytes that were found within the limits; `found` is its measurement.
        metric: name of the task's metric, lower is better.
        reference: that of the FP32 export.
        limits: what was to be kept.
        units: what was tried together, in the order of the graph.
        choices: unit name → what the recipe makes of it.
        alone: unit name → the candidate where only this unit is quantized.
        base: nothing quantized, all in the base type.
        general: everything quantized, as a tool without evidence would.
        default: what the precision quantizes without evidence.
        rejected: the same with the smoothing that did more harm.
        found: the recipe's own measurement.
        tried: the candidates of the search, in order.
        about: options and hashes.
    """

    recipe: Recipe
    metric: str
    reference: float
    limits: Limits
    units: tuple[Unit, ...]
    choices: Mapping[str, Choice]
    alone: Mapping[str, Candidate]
    base: Candidate
    general: Candidate
    default: Candidate
    rejected: tuple[Candidate, ...]
    found: Candidate
    tried: tuple[Candidate, ...]
    about: Mapping[str, Any]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them in order: what needs no search, each unit alone, the search."""
        first = (self.base, self.general, self.default, *self.rejected)
        return (*first, *self.alone.values(), *self.tried)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Units that the recipe leaves in the base type, the most harmful first."""
        names = [name for name, choice in self.choices.items() if choice == "float"]
        return tuple(sorted(names, key=lambda name: -self.alone[name].harm))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary with `COLUMNS` per candidate."""
        for candidate in self.candidates:
            values = {**vars(candidate.measured), "name": candidate.name}
            values |= {"drop": candidate.drop, "saved": candidate.saved}
            values["within"] = self.limits.keeps(candidate)
            values["rules"] = "; ".join(f"{rule.match} → {rule.to}" for rule in candidate.recipe.rules)
            yield {column: values[column] for column in COLUMNS}

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is no finite number is null."""
        return {
            "schema": 1,
            "metric": {"name": self.metric, "reference": self.reference},
            "limits": vars(self.limits),
            **self.about,
            "found": self.found.name,
            "recipe": self.recipe.to_json(),
            "units": [
                {
                    "name": unit.name,
                    "sites": list(unit.sites),
                    "role": unit.role,
                    "block": unit.block,
                    "choice": self.choices[unit.name],
                    "alone": self.alone[unit.name].name,
                }
                for unit in self.units
            ],
            "candidates": [c.to_json() | {"within": self.limits.keeps(c)} for c in self.candidates],
        }


def write_evidence(result: Sensitivity, out: Path) -> None:
    """Write all files, each atomically.

    Raises:
        SetupError: the folder cannot be written, or the disk is full.
    """
    write_json(out / EVIDENCE, result.to_json())
    _replace(out / TABLE, _table(result).encode())
    with readable_os_errors(out / RECIPE), _temporary(out / RECIPE) as temporary:
        result.recipe.write(temporary, note(result))
    _replace(out / PICTURE, draw(result).encode())


def note(result: Sensitivity) -> str:
    """What was measured, for a person who opens the recipe."""
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


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name that becomes `path` at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    with readable_os_errors(path), _temporary(path) as temporary:
        temporary.write_bytes(content)
