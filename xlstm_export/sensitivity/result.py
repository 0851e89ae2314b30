"""The outcome of a sensitivity search as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..quantize.recipe import Choice, Recipe
from ..specs import Json
from .search import Candidate, Limits, Unit

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
        recipe: the recipe within the limits that quantizes the most bytes; `found` is its measurement.
        metric: name of the task metric; its values are losses, lower is better.
        reference: metric of the FP32 export.
        limits: limits that candidates had to keep.
        units: weights that were tried together, in the order of the graph.
        choices: unit name → its precision in the recipe.
        alone: unit name → the candidate where only this unit is quantized.
        base: nothing quantized, all in the base type.
        general: everything quantized.
        default: what the precision quantizes by default.
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
        """All measured candidates in order: those without search, each unit alone, those of the search."""
        first = (self.base, self.general, self.default, *self.rejected)
        return (*first, *self.alone.values(), *self.tried)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Units that the recipe leaves in the base type, the most harmful first."""
        names = [name for name, choice in self.choices.items() if choice == "float"]
        return tuple(sorted(names, key=lambda name: -self.alone[name].harm))

    def rows(self) -> Iterator[Json]:
        """One dictionary with `COLUMNS` per candidate."""
        for candidate in self.candidates:
            values = {**vars(candidate.measured), "name": candidate.name}
            values |= {"drop": candidate.drop, "saved": candidate.saved}
            values["within"] = self.limits.keeps(candidate)
            values["rules"] = "; ".join(f"{rule.match} → {rule.to}" for rule in candidate.recipe.rules)
            yield {column: values[column] for column in COLUMNS}

    def to_json(self) -> Json:
        """Plain data; NaN and infinity are null."""
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
