"""Result of `bench`: times per cell of the grid, and their form on disk, `bench/bench.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..specs import Json, JsonMapping
from .timing import Timing

SCHEMA = 2
RESULT = "bench/bench.json"
DECODE, PREFILL = "decode", "prefill"
EXPORTED, BODIES, EAGER, COMPILED = "exported", "function_bodies", "pytorch_eager", "torch_compile"


# Cores used by other processes. With more than this, PyTorch's threads wait for each other and its times grow
# several times more than those of the export, so that the ratios flatter it.
BUSY = 0.25


def too_busy(environment: JsonMapping, cells: Sequence[object]) -> float | None:
    """The most cores that others used, before the first call or during a cell, if times then do not count."""
    known = [n for n in (environment.get("busy_cores"), *cells) if isinstance(n, int | float)]
    most = max(known, default=0.0)
    return most if most > BUSY else None


@dataclass(frozen=True)
class Cell:
    """Measurements of one kind of call: `batch` streams, `length` positions each.

    Attributes:
        timings: by contestant; "exported" is always there.
        moved_bytes: the fewest bytes that a call moves: weights read once, states read and written once.
        bandwidth_gbs: bandwidth of reading a buffer of that size with the same threads, in the same turns.
        through: by contestant that runs PyTorch, the method of the model that it calls.
        compile_seconds: time that torch.compile took.
        busy_cores: cores that other processes used meanwhile; None if that is not known.
    """

    mode: str
    batch: int
    length: int
    timings: Mapping[str, Timing]
    moved_bytes: float
    bandwidth_gbs: float
    through: Mapping[str, str] = field(default_factory=dict)
    compile_seconds: Mapping[str, float] = field(default_factory=dict)
    busy_cores: float | None = None

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
            "busy_cores": self.busy_cores,
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

    @property
    def busy(self) -> float | None:
        """Cores that other processes used, if they were so many that times and ratios do not count."""
        return too_busy(self.environment, [cell.busy_cores for cell in self.grid])

    @property
    def trustworthy(self) -> bool:
        """Whether the machine was left alone, as far as that is known."""
        return self.busy is None

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
            "trustworthy": self.trustworthy,
        }
