"""The plan of a drift measurement: horizons, window, and the feedback of the free-running mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import UsageError
from ..sessions.ort import PIECE
from .drift_result import Feedback

HORIZONS = (1, 10, 100, 1000, 4000, 16000)
WINDOW = 256


@dataclass(frozen=True)
class DriftPlan:
    """What `measure_drift` measures.

    Attributes:
        horizons: positions, ascending.
        feedback: how outputs are fed back; it also names the logits (`token_feedback`).
        free_horizons: horizons of the free-running mode; `horizons` by default, empty for none.
        stepwise: the candidate reads one position per call, as in decoding. By default this is so if it
            stores a state in less than FP32, because that is rounded only at the end of a call.
        window: positions that an error is taken over.
        piece: positions per call.

    Raises:
        UsageError: the horizons do not ascend, or there is nothing to compare.
    """

    horizons: Sequence[int] = HORIZONS
    feedback: Feedback | None = None
    free_horizons: Sequence[int] | None = None
    stepwise: bool | None = None
    window: int = WINDOW
    piece: int = PIECE

    def __post_init__(self) -> None:
        for name, values in (("horizons", self.horizons), ("free_horizons", self.free)):
            if any(later <= earlier for earlier, later in pairwise((0, *values))):
                raise UsageError(f"{name} are {list(values)}", "positive numbers in ascending order")
        if not self.horizons or self.window < 1 or self.piece < 1:
            sizes = f"horizons {list(self.horizons)}, window {self.window}, piece {self.piece}"
            raise UsageError(f"{sizes}: nothing to compare")

    @property
    def free(self) -> Sequence[int]:
        """Horizons of the free-running mode."""
        return self.horizons if self.free_horizons is None else self.free_horizons
