"""The search for the plan that quantizes the most bytes; a function `evaluate` measures candidates.

No result is predicted: the harm of each unit alone only decides the order of the trials. The steps are
    prefix    units by harm per byte saved; bisection over how many of them go together
    add back  every excluded unit on top of that; those that fit alone, one after the other, largest first
    weights   what cannot be INT8 with its activation: the same again with its weight alone as INT8

The result does not depend on how many candidates are measured at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..quantize.recipe import Choice, Recipe
from ..specs import Json
from .measure import Measured


@dataclass(frozen=True)
class Unit:
    """Sites that are quantized together: one, or those of one block and role.

    Attributes:
        sites: names of the sites.
        can: precisions of the sites if the unit is quantized; several kinds in a mixed group.
    """

    name: str
    sites: tuple[str, ...]
    role: str
    block: int
    can: frozenset[Choice]


@dataclass(frozen=True)
class Plan:
    """A candidate to be measured: unit name → choice; other units stay in the base type."""

    name: str
    choices: Mapping[str, Choice]

    def plus(self, name: str, more: Mapping[str, Choice]) -> Plan:
        return Plan(name, {**self.choices, **more})


@dataclass(frozen=True)
class Candidate:
    """A candidate that was measured.

    Attributes:
        drop: relative change of the metric against the FP32 export; positive is worse.
        saved: bytes saved compared with nothing quantized.
    """

    name: str
    recipe: Recipe
    measured: Measured
    drop: float
    saved: int

    @property
    def harm(self) -> float:
        """Drop of the metric plus squared drift: both add up over units whose errors are independent.

        A single unit changes the metric little, and by chance in either direction; drift ranks it better.
        """
        harm = max(self.drop, 0.0) + self.measured.drift**2
        return harm if math.isfinite(harm) else math.inf

    def to_json(self) -> Json:
        """Plain data; NaN and infinity are null."""
        return {
            "name": self.name,
            **self.measured.to_json(),
            "drop": self.drop if math.isfinite(self.drop) else None,
            "saved": self.saved,
            "recipe": self.recipe.to_json(),
        }


@dataclass(frozen=True)
class Limits:
    """Limits of a candidate: drop of the metric, and growth of errors over the horizon."""

    max_drop: float
    growth: float

    def keeps(self, candidate: Candidate) -> bool:
        """Whether a candidate is within the limits; False for NaN."""
        within = candidate.drop <= self.max_drop and candidate.measured.growth <= self.growth
        return within and not candidate.measured.failure


Evaluate = Callable[[Sequence[Plan]], list[Candidate]]


@dataclass(frozen=True)
class Found:
    """Result of a search: the best candidate within the limits, and all measured candidates in order."""

    plan: Plan
    candidate: Candidate
    tried: tuple[Candidate, ...]


def order(units: Sequence[Unit], alone: Mapping[str, Candidate]) -> list[str]:
    """Names of the units that save something, least harm per byte saved first.

    Args:
        units: all units.
        alone: unit name → the candidate where only this one is quantized.
    """
    useful = [u.name for u in units if alone[u.name].saved > 0 and not alone[u.name].measured.failure]
    return sorted(useful, key=lambda name: (alone[name].harm / alone[name].saved, name))


def search(
    names: Sequence[str],
    weights_only: Sequence[str],
    known: Sequence[tuple[Plan, Candidate]],
    evaluate: Evaluate,
    limits: Limits,
    *,
    precision: Choice,
    budget: int,
) -> Found:
    """Find the plan that saves most within the limits.

    Args:
        names: units in the order of `order`.
        weights_only: of these, the ones whose weight can be INT8 without their activation.
        known: plans that are measured already; at least one of them keeps the limits.
        evaluate: measures plans, in parallel if possible.
        limits: limits of a candidate.
        precision: precision of quantized units.
        budget: number of candidates that may still be measured.
    """
    run = _Search(evaluate, limits, budget)
    run.best = max(
        (pair for pair in known if limits.keeps(pair[1])), key=lambda pair: (pair[1].saved, -pair[1].drop)
    )
    run.prefix([(name, precision) for name in names])
    run.add_back([(name, precision) for name in names])
    left = [name for name in weights_only if name not in run.best[0].choices]
    if left:
        everything = run.best[0].plus("the rest with INT8 weights", dict.fromkeys(left, "int8-wo"))
        run.consider(everything)
        run.add_back([(name, "int8-wo") for name in names if name in left])
    return Found(*run.best, tuple(run.tried.values()))


class _Search:
    def __init__(self, evaluate: Evaluate, limits: Limits, budget: int) -> None:
        self.best: tuple[Plan, Candidate]
        self.tried: dict[frozenset[tuple[str, Choice]], Candidate] = {}
        self._evaluate, self._limits, self._budget = evaluate, limits, budget

    def prefix(self, moves: Sequence[tuple[str, Choice]]) -> None:
        """Bisect for the number of units, the least harmful first, that can be quantized together."""
        good, bad = 0, len(moves) + 1
        middle = len(moves)  # first all of them: often no search is needed
        while good < middle < bad:
            plan = Plan(f"the first {middle} of {len(moves)}", dict(moves[:middle]))
            candidates = self.measure([plan])
            if not candidates:
                return  # the budget is spent
            if self._limits.keeps(candidates[0]):
                good = middle
                self._take(plan, candidates[0])
            else:
                bad = middle
            middle = (good + bad) // 2

    def consider(self, plan: Plan) -> None:
        """Measure one plan; it becomes the best if it keeps the limits and saves more."""
        for candidate in self.measure([plan]):
            if self._limits.keeps(candidate):
                self._take(plan, candidate)

    def add_back(self, moves: Sequence[tuple[str, Choice]]) -> None:
        """Add units that keep the limits. One that does not is not tried again after others are added."""
        left = [move for move in moves if move[0] not in self.best[0].choices]
        plans = [self._plus(move) for move in left]
        fit = [
            (candidate.saved, move)
            for move, candidate in zip(left, self.measure(plans), strict=False)
            if self._limits.keeps(candidate)
        ]
        for _, move in sorted(fit, key=lambda pair: -pair[0]):
            self.consider(self._plus(move))

    def measure(self, plans: Sequence[Plan]) -> list[Candidate]:
        """Measure plans, each only once, and only the first ones if the budget ends."""
        keys = [frozenset(plan.choices.items()) for plan in plans]
        new = {k: p for k, p in zip(keys, plans, strict=True) if k not in self.tried}
        affordable = dict(list(new.items())[: max(self._budget, 0)])
        self._budget -= len(affordable)
        self.tried.update(zip(affordable, self._evaluate(list(affordable.values())), strict=True))
        end = next((i for i, key in enumerate(keys) if key not in self.tried), len(keys))
        return [self.tried[key] for key in keys[:end]]

    def _plus(self, move: tuple[str, Choice]) -> Plan:
        count = len(self.best[0].choices)
        return self.best[0].plus(f"{count} and {move[0]} as {move[1]}", dict([move]))

    def _take(self, plan: Plan, candidate: Candidate) -> None:
        if candidate.saved > self.best[1].saved:
            self.best = plan, candidate
