"""Timing of calls in turns, and the probe of the memory bandwidth that is timed with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..sessions.timing import summary

Call = Callable[[], Any]
ROUNDS = 5
PAUSE = 0.05  # seconds between contestants: worker threads of the last one spin for a while
WARM_UP = 3  # most calls to warm up
MIN_BANDWIDTH_BYTES = 1 << 26  # larger than the caches


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))

    def to_json(self) -> dict[str, float]:
        """Percentiles and extremes in milliseconds, and the number of calls."""
        return summary(np.array(self.seconds))


def in_turns(
    contestants: Mapping[str, Call], calls: int, budget: float = math.inf, *, warm: bool = False
) -> dict[str, Timing]:
    """Time `calls` calls of each contestant per round, for `ROUNDS` rounds after a round to warm up.

    Args:
        contestants: by name.
        calls: per contestant and round.
        budget: seconds of the timed rounds; of slow calls there are as many as fit, one per round at least.
        warm: they have run just now, so there is no round to warm up.
    """
    if not warm:
        for run in contestants.values():
            _round(run, min(calls, WARM_UP), math.inf)
    share = budget / ROUNDS / len(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            seconds[name] += _round(run, calls, share)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def _round(run: Call, calls: int, limit: float) -> list[float]:
    """Seconds of each call; no further one once they took `limit` seconds together."""
    time.sleep(PAUSE)
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < calls and (not seconds or spent < limit):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        spent += seconds[-1]
    return seconds


def bandwidth_probe(size: float) -> Call:
    """A call that reads a buffer of `size` bytes with PyTorch's threads; of `probe_bytes(size)` if small."""
    import torch

    buffer = torch.ones(int(probe_bytes(size)) // 4)
    return lambda: buffer.sum()


def probe_bytes(size: float) -> float:
    """Bytes that the probe reads for `size`, which may be too small to measure."""
    return max(size, MIN_BANDWIDTH_BYTES)
