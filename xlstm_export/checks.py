"""What a verification consists of: comparisons with limits, and the report whose verdict is the exit code.

Every limit stands in `LIMITS` with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .compare import Difference, difference
from .errors import UsageError

LIMITS = {
    # FP32 rounding through all blocks measured 2e-7 … 7e-7 on every mix of blocks; a wrong gate, mask or
    # carried state is 1e-3 and more.
    "output": 5e-6,
    # Products of decays over the whole stream round more than one output does.
    "state": 1e-5,
    # Lifted against upstream, both float64. They differ where eps meets the stabilizer: the parallel form
    # has no m of the fresh state. That is at most eps = 1e-6 of the normalizer.
    "lift": 2e-6,
    # Rows computed beside others: the same kernels may split their work differently.
    "rows": 1e-6,
    # "Equal to four digits."
    "metric": 5e-5,
    # What two sets of logits 1e-6 apart can differ by; another first choice needs a tie within that.
    "kl": 1e-8,
    "top1": 1e-3,
}


@dataclass(frozen=True)
class PrecisionLimits:
    """What a half or quantized export is held to, beside `drift_report.DRIFT_LIMITS` along a stream.

    Attributes:
        metric: relative change of the task metric against FP32.
        ways: relative L2 between two ways of calling the export itself. They differ where a last bit tips a
            value over the edge of a rounding step, and a recurrence carries that on.
        memory: |ln ratio| of half-lives, see `gates.memory_checks`.
        kl, top1: mean KL divergence of a classifier's or language model's outputs from FP32 in nats, and the
            share of other first choices.
    """

    metric: float
    ways: float
    memory: float
    kl: float
    top1: float


# Metric: seen on held-out data of two trained models 4e-5 (fp16, bf16), 3e-3 (int8, everything quantized),
# 2e-4 (int8-wo), 8e-3 (int4-wo). The others over stretches from many places of these data. Ways: seen
# 6.7e-4 apart in fp16, 5.3e-3 in bf16, 0.020 in int8 and 7e-4 where only weights are integers; the limits,
# 2.5 to 8 times that, find a state that is lost or a gate that is wrong, not a step of rounding more. Memory:
# 3.4e-4 in fp16, 4.0e-3 in bf16, 0.027 in int8, 2.8e-3 in int8-wo, 0.037 in int4-wo; KL and first choices
# (7e-7, 0.0012), (5e-5, 0.0063), (4e-3, 0.036), (7e-5, 0.0051), (3.4e-3, 0.031): 2 to 7 times that.
PRECISION_LIMITS = {
    "fp16": PrecisionLimits(metric=1e-3, ways=5e-3, memory=1e-3, kl=5e-6, top1=6e-3),
    "bf16": PrecisionLimits(metric=1e-3, ways=4e-2, memory=0.01, kl=2e-4, top1=0.03),
    "int8": PrecisionLimits(metric=5e-3, ways=5e-2, memory=0.1, kl=0.02, top1=0.15),
    "int8-wo": PrecisionLimits(metric=5e-3, ways=5e-3, memory=0.015, kl=3e-4, top1=0.02),
    "int4-wo": PrecisionLimits(metric=2e-2, ways=5e-3, memory=0.08, kl=0.02, top1=0.15),
}


@dataclass(frozen=True)
class Check:
    """One comparison: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # False for NaN

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "value": self.value,
            "limit": self.limit,
            **self.detail,
        }


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`."""

    checks: tuple[Check, ...]
    metric: dict[str, Any]
    files: dict[str, Any]  # hashes of what exactly was verified
    inputs: str = "made-up inputs"  # what the checks ran on
    # Upstream's forward as it comes, in FP32 and with whatever rounding of its own: per output its distance
    # (relative L2) from the float64 reference and from the export. Told, not judged.
    as_it_comes: dict[str, dict[str, float]] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)  # of `gates.Gates.to_json`
    bisect: dict[str, Any] = field(default_factory=dict)  # of `bisect.search.Bisection.to_json`, on failure
    gate: dict[str, Any] = field(default_factory=dict)  # the gate file, where one was given
    # Of a half or quantized export: precision, base, reference, sites, drift. Empty for FP32.
    precision: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return _finite(
            {
                "schema": 1,
                "passed": self.passed,
                "metric": self.metric,
                "files": self.files,
                "inputs": self.inputs,
                "upstream_as_it_comes": self.as_it_comes,
                "gates": self.gates or None,
                "bisect": self.bisect or None,
                **({"gate": self.gate} if self.gate else {}),
                **({"precision": self.precision} if self.precision else {}),
                "checks": [check.to_json() for check in self.checks],
            }
        )


def _finite(data: Any) -> Any:
    """JSON has neither NaN nor Infinity: null instead, next to a `passed` that is false."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def output_check(name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> Check:
    if found.shape != expected.shape:
        raise UsageError(
            f"{name}: the export gives shape {found.shape}, the model {expected.shape}",
            "verify against the checkpoint it was made from",
        )
    result: Difference = difference(found, expected)
    return Check(name, result.relative_l2, limit, result.to_json())
