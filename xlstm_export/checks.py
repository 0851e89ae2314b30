"""Checks and their verdict: comparisons with limits; whether all pass decides the exit code.
The limits are in `verify/limits.py`, each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .distance import Difference, difference
from .errors import UsageError
from .inputs import Arrays
from .specs import Json, JsonMapping

CHECK = ("name", "passed", "value", "limit")  # keys of a check in JSON; all others are its detail

HELD_OUT, CALIBRATION, MADE_UP = "held-out data", "calibration data", "made-up inputs"  # what checks run on


@dataclass(frozen=True, eq=False)
class Replay:
    """Consecutive calls of a graph from a fresh state; what a check ran, so that it can be repeated.

    Attributes:
        inputs: by name, (rows, S, ...).
        pieces: positions of each call, from the first on.
        cut: gives positions start … end - 1 of inputs, as a call of their own.
    """

    inputs: Arrays
    pieces: tuple[int, ...]
    cut: Callable[[Arrays, int, int], Arrays]

    @property
    def ends(self) -> list[int]:
        """Positions after each call."""
        return np.cumsum(self.pieces).tolist()  # type: ignore[no-any-return]

    def parts(self) -> Iterator[tuple[int, Arrays]]:
        """The first position and the inputs of each call."""
        start = 0
        for piece in self.pieces:
            yield start, self.cut(self.inputs, start, start + piece)
            start += piece


@dataclass(frozen=True)
class Check:
    """One comparison: `value` must not exceed `limit`. `replay` are its calls of the graph, if it has any."""

    name: str
    value: float
    limit: float
    detail: dict[str, Any] = field(default_factory=dict)
    replay: Replay | None = field(default=None, compare=False, repr=False)

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # False for NaN

    @staticmethod
    def from_json(data: JsonMapping) -> Check:
        """The inverse of `to_json`; null is read as NaN."""
        detail = {key: x for key, x in data.items() if key not in CHECK}
        value, limit = (float("nan") if data[key] is None else float(data[key]) for key in ("value", "limit"))
        return Check(str(data["name"]), value, limit, detail)

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "passed": self.passed,
            "value": self.value,
            "limit": self.limit,
            **{key: x for key, x in self.detail.items() if key not in CHECK},
        }


@dataclass(frozen=True)
class Verdict:
    """The outcome of `verify`."""

    checks: tuple[Check, ...]
    metric: dict[str, Any]
    files: dict[str, Any]  # hashes and sizes of the verified files
    inputs: str = "made-up inputs"  # what the checks ran on
    # Upstream's own forward, unmodified, in FP32: per output its distance (relative L2) from the float64
    # reference and from the export. Reported, without a limit.
    as_it_comes: dict[str, dict[str, float]] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)  # of `gates.Gates.to_json`
    bisect: dict[str, Any] = field(default_factory=dict)  # of `bisect.search.Bisection.to_json`, on failure
    gate: dict[str, Any] = field(default_factory=dict)  # the gate file, where one was given
    # How the PyTorch model of an FP32 verification computed, one of `lift.precise.REFERENCES`, and why it is
    # not the first of them.
    reference: str = ""
    reference_reason: str = ""
    # Of a half or quantized export: precision, base, reference, sites, drift. Empty for FP32.
    precision: dict[str, Any] = field(default_factory=dict)
    # In what this verification rests on less than the one whose verdict stands (`verify.evidence.weaker`).
    weaker: tuple[str, ...] = ()
    # What the checks touched, of `verify.coverage.coverage`.
    coverage: dict[str, Any] = field(default_factory=dict)
    # Proof that the files are what the checkpoint gives, of `verify.identity.Identity.to_json`. Empty where
    # only a part of the model was verified.
    identity: dict[str, Any] = field(default_factory=dict)

    def with_weaker(self, why: tuple[str, ...]) -> Verdict:
        """The same verdict, with what makes it weaker than the one that stands."""
        return replace(self, weaker=why)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> Json:
        return _finite(
            {
                "schema": 1,
                "passed": self.passed,
                "metric": self.metric,
                "files": self.files,
                "inputs": self.inputs,
                "upstream_as_it_comes": self.as_it_comes,
                **({"reference": self.reference} if self.reference else {}),
                **({"reference_reason": self.reference_reason} if self.reference_reason else {}),
                "gates": self.gates or None,
                "bisect": self.bisect or None,
                **({"gate": self.gate} if self.gate else {}),
                **({"precision": self.precision} if self.precision else {}),
                **({"weaker": list(self.weaker)} if self.weaker else {}),
                **({"coverage": self.coverage} if self.coverage else {}),
                **({"identity": self.identity} if self.identity else {}),
                "checks": [check.to_json() for check in self.checks],
            }
        )

    @staticmethod
    def from_json(data: JsonMapping) -> Verdict:
        """The inverse of `to_json`, whose result `verify/report.json` holds."""
        return Verdict(
            checks=tuple(Check.from_json(check) for check in data["checks"]),
            metric=data["metric"],
            files=data["files"],
            inputs=data["inputs"],
            as_it_comes=data["upstream_as_it_comes"],
            gates=data["gates"] or {},
            bisect=data["bisect"] or {},
            reference=data.get("reference", ""),
            reference_reason=data.get("reference_reason", ""),
            gate=data.get("gate", {}),
            precision=data.get("precision", {}),
            weaker=tuple(data.get("weaker", ())),
            coverage=data.get("coverage", {}),
            identity=data.get("identity", {}),
        )


def scored(metric: JsonMapping) -> str:
    """How many held-out positions a metric is computed on, and of how many, for a sentence.

    Args:
        metric: `Verdict.metric`, not empty.
    """
    used = int(metric["positions"])
    held = int(metric.get("available") or used)
    return f"{used:,}" if held <= used else f"{used:,} of {held:,}"


def pytorch(reference: str) -> str:
    """The PyTorch model that an export is compared with, for a sentence.

    Args:
        reference: how it computes, one of `lift.precise.REFERENCES`.
    """
    return f"PyTorch {'with' if 'cells' in reference else 'in'} {reference}"


def _finite(data: Any) -> Any:
    """The data with null in place of NaN and Infinity, which JSON lacks; `passed` is false beside it."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def output_check(name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> Check:
    """Compare an output of the export with the expected one of the same shape, by relative L2.

    Raises:
        UsageError: the shapes differ.
    """
    if found.shape != expected.shape:
        raise UsageError(
            f"{name}: the export gives shape {found.shape}, the model {expected.shape}",
            "verify against the checkpoint it was made from",
        )
    result: Difference = difference(found, expected)
    return Check(name, result.relative_l2, limit, result.to_json())
