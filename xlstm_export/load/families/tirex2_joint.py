"""TiRex-2 for several variates that are forecast together, by upstream's own `predict`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError


class Multivariate(nn.Module):
    """Quantiles of the rows after several series that belong together.

    Variates are ordered: targets, covariates of the past, covariates whose future is known. All rows are of
    one time axis. Missing values are NaN, in the future too, so a horizon may be shorter than `future_len`.

    Args:
        model: a `TiRex2`, as from `tirex2.model_of`.
        targets, past, future: numbers of variates of each kind.

    Raises:
        UsageError: there is no target, or a number is negative.
    """

    def __init__(self, model: nn.Module, targets: int = 1, past: int = 0, future: int = 0) -> None:
        super().__init__()
        if targets < 1 or min(past, future) < 0:
            raise UsageError(
                f"{targets} targets, {past} covariates of the past and {future} with a known future",
                "there must be one target at least",
            )
        self.forecast = Joint(model, targets, past, future)
        self.config = SimpleNamespace(variates=targets + past + future, future=future)

    def forward(self, context: Tensor, future: Tensor | None = None) -> Tensor:
        """context (B, V, S), future (B, F, future_len) where F > 0 → (B, targets, Q, future_len)."""
        return self.forecast(context) if future is None else self.forecast(context, future)


class Joint(nn.Module):
    """`TiRex2.predict` for groups of variates; an adapter replaces it."""

    def __init__(self, model: nn.Module, targets: int, past: int, future: int) -> None:
        super().__init__()
        self.model = model
        self.targets, self.past, self.future = targets, past, future

    def forward(self, context: Tensor, future: Tensor | None = None) -> Tensor:
        from tirex2 import TimeseriesType

        model: Any = self.model
        first, second = self.targets, self.targets + self.past
        groups = []
        for number, rows in enumerate(context):
            known = None if future is None else torch.cat([rows[second:], future[number]], -1)
            groups.append(TimeseriesType(rows[:first], rows[first:second] if self.past else None, known))
        # Upstream compiles parts of the model at their first call, which takes seconds.
        with torch.compiler.set_stance("force_eager"):
            return torch.stack(model.predict(groups, model.future_len))
