"""What shapes the outcome of a search for a recipe, apart from export, data and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast

from ..errors import UsageError
from ..options import SensitivityOptions
from ..quantize.recipe import Choice, Recipe

MIN_HORIZON = 32
Group = Literal["site", "block"]


@dataclass(frozen=True)
class Search:
    """How candidates are chosen and measured: what neither the command line nor a pipeline file sets.

    Attributes:
        smooth: as in `Recipe`, for "int8"; used where that does less harm than none.
        positions: at most so many per row of a data file are used for the metric.
        group: one candidate per site, or per block and role; by default the second where there are more
            than 64 sites.
        budget: candidates of the search, on top of one per site or group.
        threads_per_job: of ONNX Runtime; part of what makes results repeatable.

    Raises:
        UsageError: a number is out of range.
    """

    smooth: float | None = 0.5
    positions: int = 8192
    group: Group | None = None
    budget: int = 64
    threads_per_job: int = 1

    def __post_init__(self) -> None:
        if self.positions < 2 or self.budget < 0:
            raise UsageError(
                f"positions {self.positions}, budget {self.budget}", "the metric needs 2 positions"
            )
        if self.group not in (None, "site", "block"):
            raise UsageError(f"group {self.group!r} is unknown", "site or block")
        if self.threads_per_job < 1:
            raise UsageError(f"{self.threads_per_job} threads per job", "at least one")


@dataclass(frozen=True)
class Settings:
    """Options of the stage and of the search, checked together.

    Raises:
        UsageError: a number is out of range.
    """

    options: SensitivityOptions
    search: Search

    def __post_init__(self) -> None:
        options = self.options
        if not (math.isfinite(options.max_drop) and options.max_drop >= 0.0):
            raise UsageError(
                f"max_drop is {options.max_drop}", "a share of the metric, as 0.005 for half a percent"
            )
        if options.horizon < MIN_HORIZON:
            raise UsageError(f"horizon {options.horizon}", f"{MIN_HORIZON} positions at least")
        if options.jobs == 0 or options.jobs < -1:
            raise UsageError(f"{options.jobs} jobs", "at least one, or -1: one per core")
        _ = self.recipe  # which checks the rest

    @property
    def precision(self) -> Choice:
        """What weights become."""
        return cast(Choice, self.options.precision)

    @property
    def smooth(self) -> float | None:
        """Strength of smoothing, which is for "int8" only."""
        return self.search.smooth if self.precision == "int8" else None

    @property
    def recipe(self) -> Recipe:
        """The recipe without rules."""
        options = self.options
        return Recipe(self.precision, options.base, smooth=self.smooth, max_drop=options.max_drop)

    def smoothed(self, strength: float | None) -> Settings:
        """The same with another strength of smoothing."""
        return replace(self, search=replace(self.search, smooth=strength))
