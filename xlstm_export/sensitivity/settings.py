"""Settings of a search for a recipe, besides export, data and ranges."""

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
    """Settings that only Python callers can change: how candidates are chosen and measured.

    Attributes:
        smooth: as in `Recipe`, for "int8"; used if it does less harm than no smoothing.
        positions: most positions per row of a data file that are used for the metric.
        group: "site" tries each site alone, "block" sites of one block and role together; by default the
            second if there are more than 64 sites.
        budget: candidates of the search, besides one per site or group.
        threads_per_job: CPU threads of ONNX Runtime; results are repeatable only with the same number.

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
                f"positions {self.positions}, budget {self.budget}", "the metric needs at least 2 positions"
            )
        if self.group not in (None, "site", "block"):
            raise UsageError(f"group {self.group!r} is unknown", "site or block")
        if self.threads_per_job < 1:
            raise UsageError(f"{self.threads_per_job} threads per job", "give at least one")


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
                f"max_drop is {options.max_drop}", "give a share, such as 0.005 for half a percent"
            )
        if options.horizon < MIN_HORIZON:
            raise UsageError(f"horizon {options.horizon}", f"give at least {MIN_HORIZON} positions")
        if options.jobs == 0 or options.jobs < -1:
            raise UsageError(f"{options.jobs} jobs", "give at least one, or -1 for one per core")
        _ = self.recipe  # checks the rest

    @property
    def precision(self) -> Choice:
        """Precision of quantized weights."""
        return cast(Choice, self.options.precision)

    @property
    def smooth(self) -> float | None:
        """Strength of smoothing; None unless the precision is "int8"."""
        return self.search.smooth if self.precision == "int8" else None

    @property
    def recipe(self) -> Recipe:
        """The recipe without rules."""
        options = self.options
        return Recipe(self.precision, options.base, smooth=self.smooth, max_drop=options.max_drop)

    def smoothed(self, strength: float | None) -> Settings:
        """The same settings with another strength of smoothing."""
        return replace(self, search=replace(self.search, smooth=strength))
