"""Result of `bench`: times per cell of the grid, and their form on disk, `bench/bench.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..specs import Json
from .timing import Timing

SCHEMA = 2
RESULT = "bench/bench.json"
DECODE, PREFILL = "decode", "prefill"
EXPORTED, BODIES, EAGER, COMPILED = "exported", "function_bodies", "pytorch_eager", "torch_compile"


@dataclass(frozen=True)
class Cell:
    """Measurements of one kind of call: `batch` streams, `length` positions each.

    Attributes:
        timings: by contestant; "exported" is always there.
        moved_bytes: the fewest bytes that a call moves: weights read once, states read and written once.
        bandwidth_gbs: bandwidth of reading a buffer of that size with the same threads, in the same turns.
        through: by contestant that runs PyTorch, the method of the model that it calls.
        compile_seconds: time that torch.compile took.
    """

    mode: str
    batch: int
    length: int
    timings: Mapping[str, Timing]
    moved_bytes: float
    bandwidth_gbs: float
    through: Mapping[str, str] = field(default_factory=dict)
    compile_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def achieved_gbs(self) -> float:
        return self.moved_bytes / self.timings[EXPORTED].percentile(50) / 1e9

    @property
    def roof_share(self) -> float:
        return self.achieved_gbs / self.bandwidth_gbs

    def speedup(self, over: str = EAGER) -> float | None:
        """Median of another contestant over that of the export; None where it did not run."""
        if over not in self.timings:
            return None
        return self.timings[over].percentile(50) / self.timings[EXPORTED].percentile(50)

    def tokens_per_second(self, contestant: str = EXPORTED) -> float:
        """Tokens per second of all streams together."""
        return self.batch * self.length / self.timings[contestant].percentile(50)

    def to_json(self) -> Json:
        contestants: dict[str, Any] = {}
        for name, timing in self.timings.items():
            contestants[name] = {**timing.to_json(), "tokens_per_second": self.tokens_per_second(name)}
            if name in self.through:
                contestants[name]["through"] = self.through[name]
            if name in self.compile_seconds:
                contestants[name]["compile_seconds"] = self.compile_seconds[name]
        return {
            "mode": self.mode,
            "batch": self.batch,
            "length": self.length,
            "moved_bytes": self.moved_bytes,
            "bandwidth_gbs": self.bandwidth_gbs,
            "achieved_gbs": self.achieved_gbs,
            "roof_share": self.roof_share,
            "contestants": contestants,
        }


@dataclass(frozen=True)
class BenchReport:
    """Result of `bench`; `bench/bench.json` holds its `to_json`.

    Attributes:
        environment: see `environment.environment`; "recurrences" are "fused operators" or "function bodies".
        model: name, parameters, precision.
        rate: decoding at a fixed rate, if `hz` is given: percentiles of the time from when a call is due to
            its end; `jitter_ms`, the standard deviation of the intervals between starts; `late`, the number
            of calls that end after the next one is due.
        memory: memory of a process that runs the export alone; state per stream; stored weights.
        skipped: contestant → why it is missing in some cells, or in all.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    threads: int
    grid: tuple[Cell, ...]
    rate: dict[str, float] | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> Cell:
        """Decode at the first batch."""
        return next(cell for cell in self.grid if cell.mode == DECODE)

    def to_json(self) -> Json:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "model": self.model,
            "threads": self.threads,
            "grid": [cell.to_json() for cell in self.grid],
            "rate": self.rate,
            "memory": self.memory,
            "skipped": self.skipped,
        }
