"""Two runs of `bench` side by side: ratios per cell and contestant, and what differs between the machines."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..specs import Json, JsonMapping
from .result import DECODE, EXPORTED, PREFILL, RESULT, SCHEMA, too_busy

CellKey = tuple[str, int, int]  # mode, batch, length
AGAIN = "run `xlstm-export bench` again"


@dataclass(frozen=True)
class Row:
    """Times of a contestant in a cell that both runs have, in milliseconds."""

    cell: CellKey
    contestant: str
    p50_a: float
    p50_b: float
    p99_a: float
    p99_b: float

    def slower_than(self, limit: float) -> bool:
        """Whether this is the export, and its median grew by more than the factor `limit`."""
        return self.contestant == EXPORTED and self.p50_b / self.p50_a > limit

    def to_json(self, trustworthy: bool) -> Json:
        """With ratios, or null where they do not count."""
        mode, batch, length = self.cell
        return {
            **{"mode": mode, "batch": batch, "length": length, "contestant": self.contestant},
            "p50_ms": [self.p50_a, self.p50_b],
            "p50_ratio": self.p50_b / self.p50_a if trustworthy else None,
            "p99_ms": [self.p99_a, self.p99_b],
            "p99_ratio": self.p99_b / self.p99_a if trustworthy else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Run B against the baseline A.

    Attributes:
        only_before, only_after: (mode, batch, length, contestant) that the other run lacks.
        differences: entry of environment, model or settings → values in A and B.
        busy: for A and B, cores that others used while it was timed, if that was too much; else None.
        fail_over: how many times slower the export may be.
        allow_busy: ratios count although others used a machine meanwhile.
    """

    before: Path
    after: Path
    rows: tuple[Row, ...]
    only_before: tuple[tuple[str, int, int, str], ...]
    only_after: tuple[tuple[str, int, int, str], ...]
    differences: dict[str, tuple[Any, Any]]
    busy: tuple[float | None, float | None] = (None, None)
    fail_over: float | None = None
    allow_busy: bool = False

    @property
    def trustworthy(self) -> bool:
        """Whether ratios count: both machines were left alone, or it was said that they need not be."""
        return self.allow_busy or not any(self.busy)

    @property
    def slower(self) -> tuple[Row, ...]:
        """Rows of the export whose median grew by more than `fail_over`."""
        limit = self.fail_over
        return () if limit is None else tuple(row for row in self.rows if row.slower_than(limit))

    @property
    def passed(self) -> bool:
        return not self.slower

    def to_json(self) -> Json:
        return {
            "before": str(self.before),
            "after": str(self.after),
            "rows": [row.to_json(self.trustworthy) for row in self.rows],
            "trustworthy": self.trustworthy,
            "only_before": [list(key) for key in self.only_before],
            "only_after": [list(key) for key in self.only_after],
            "differences": {key: list(values) for key, values in self.differences.items()},
            "busy_cores": list(self.busy),
            "fail_over": self.fail_over,
            "passed": self.passed,
        }


def compare(
    before: Path, after: Path, *, fail_over: float | None = None, allow_busy: bool = False
) -> Comparison:
    """Compare two runs of `bench`.

    Args:
        before: run folder or bench.json of the baseline.
        after: run folder or bench.json that is compared with it.
        fail_over: `passed` is False if the median of the export grew by more than this factor in any cell.
        allow_busy: judge also by times of a machine that others used meanwhile.

    Raises:
        InputError: a file is missing, damaged or of another schema; the two have no cell in common; there is
            a limit and one was timed on a busy machine.
        UsageError: `fail_over` is not a positive number.
    """
    if fail_over is not None and not (math.isfinite(fail_over) and fail_over > 0):
        raise UsageError(f"fail-over: {fail_over:g}", "give a factor, for example 1.1")
    a, b = read_bench(before), read_bench(after)
    times_a, times_b = _times(a), _times(b)
    common = [key for key in times_a if key in times_b]
    if not any(name == EXPORTED for *_, name in common):
        raise InputError(
            f"{before} and {after} have no cell in common", "run bench with the same --batch and --length"
        )
    busy = (_busy(a), _busy(b))
    if fail_over is not None and not allow_busy and any(busy):
        cores, path = (busy[0], before) if busy[0] else (busy[1], after)
        raise InputError(
            f"{path} was timed while others used {cores:.1f} cores: its times do not count",
            "run bench again on an idle machine, or give --allow-busy",
        )
    rows = [Row(key[:3], key[3], *_pairs(times_a[key], times_b[key])) for key in common]
    return Comparison(
        before=before,
        after=after,
        rows=tuple(rows),
        only_before=tuple(key for key in times_a if key not in times_b),
        only_after=tuple(key for key in times_b if key not in times_a),
        differences=_differences(_settings(a), _settings(b)),
        busy=busy,
        fail_over=fail_over,
        allow_busy=allow_busy,
    )


def read_bench(path: Path) -> Json:
    """Read what `bench` wrote, and check the entries that a comparison needs.

    Args:
        path: run folder, or the file itself.

    Raises:
        InputError: it is missing, damaged or of another schema.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing", "run `xlstm-export bench` first") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}", AGAIN) from error
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if schema != SCHEMA or isinstance(schema, bool):
        raise InputError(f"{file} has schema {schema!r}, this version reads {SCHEMA}", AGAIN)
    problem = _problem(data)
    if problem:
        raise InputError(f"{file} is damaged: {problem}", AGAIN)
    return dict(data)


def _problem(data: JsonMapping) -> str:
    """What is wrong with the data of a file with the right schema; empty if nothing is."""
    for name in ("environment", "model"):
        if not isinstance(data.get(name), dict):
            return f"{name} is no object"
    grid = data.get("grid")
    if not isinstance(grid, list) or not grid:
        return "grid holds no cells"
    seen: set[CellKey] = set()
    for place, cell in enumerate(grid):
        problem = _cell_problem(cell)
        key = None if problem else _key(cell)
        if key in seen:
            problem = "is there twice"
        if problem:
            return f"grid[{place}] {problem}"
        assert key is not None
        seen.add(key)
    return ""


def _cell_problem(cell: Any) -> str:
    if not isinstance(cell, dict):
        return "is no object"
    if cell.get("mode") not in (DECODE, PREFILL):
        return f"has mode {cell.get('mode')!r}, which is neither {DECODE} nor {PREFILL}"
    for name in ("batch", "length"):
        count = cell.get(name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            return f"has {name} {count!r}"
    contestants = cell.get("contestants")
    if not isinstance(contestants, dict) or EXPORTED not in contestants:
        return f"has no contestant {EXPORTED}"
    for name, figures in contestants.items():
        for figure in ("p50_ms", "p99_ms"):
            value = figures.get(figure) if isinstance(figures, dict) else None
            if not _is_time(value):
                return f"has {figure} {value!r} of {name}"
    return ""


def _is_time(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer beyond every float
        return False


def _key(cell: JsonMapping) -> CellKey:
    return cell["mode"], cell["batch"], cell["length"]


def _busy(data: JsonMapping) -> float | None:
    """Cores that others used while a run was timed, if that is too much for its times to count."""
    return too_busy(data["environment"], [cell.get("busy_cores") for cell in data["grid"]])


def _times(data: JsonMapping) -> dict[tuple[str, int, int, str], tuple[float, float]]:
    return {
        (*_key(cell), name): (figures["p50_ms"], figures["p99_ms"])
        for cell in data["grid"]
        for name, figures in cell["contestants"].items()
    }


def _pairs(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float, float, float]:
    return a[0], b[0], a[1], b[1]


def _settings(data: JsonMapping) -> Json:
    """Everything that the times depend on, with flat names: versions.torch, …"""
    flat = {f"model.{name}": value for name, value in data["model"].items()}
    flat["threads"] = data.get("threads")
    for name, value in data["environment"].items():
        if name == "busy_cores":  # is never the same twice
            continue
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _differences(a: JsonMapping, b: JsonMapping) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
