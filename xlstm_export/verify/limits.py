"""Every limit of a verification, and its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from ..checks import Check
from ..specs import Json

LIMITS = {
    # FP32 rounding through all blocks measured 2e-7 … 7e-7 on every mix of blocks; a wrong gate, mask or
    # carried state gives 1e-3 and more.
    "output": 5e-6,
    # Products of decays over the whole stream round more than one output does.
    "state": 1e-5,
    # Lifted against upstream, both float64. They differ where eps meets the stabilizer: the parallel form
    # has no m of the fresh state. That is at most eps = 1e-6 of the normalizer.
    "lift": 2e-6,
    # Rows computed beside other rows: the same kernels may split their work differently.
    "rows": 1e-6,
    # "Equal to four digits."
    "metric": 5e-5,
    # The difference that logits 1e-6 apart can have; another first choice needs a tie within that.
    "kl": 1e-8,
    "top1": 1e-3,
}

# Of outputs that forward returns in 16 bits. Where what is rounded differs a little, one value in some
# hundreds becomes its neighbour: measured 2e-4 and 5e-6 relative L2. One unit in all of them: 4e-3, 5e-4.
ROUNDED = {"bfloat16": 1e-3, "float16": 1e-4}


def output_limit(limit: float, *outputs: np.ndarray) -> float:
    """Limit of outputs, for one of FP32 outputs: more where all values of one are those of a 16-bit type.

    The graph returns them as FP32, so that the values tell. Integers, such as classes, tell nothing.
    """
    return max(limit, *(ROUNDED.get(_type_of(x), 0.0) for x in outputs))


def _type_of(values: np.ndarray) -> str:
    if values.dtype.kind != "f" or (values == np.round(values)).all():
        return ""
    single = values.astype(np.float32)
    if not (single == values).all():
        return ""
    if not (np.ascontiguousarray(single).view(np.uint32) & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if (single.astype(np.float16) == single).all() else ""


# Quantiles over the positions of a call of their errors (`positions.Positions`): a fault in most positions
# moves the lowest one, even where a few positions are ill-conditioned and decide the relative L2. Measured on
# 50 models: 50: 1.3e-7 … 1.1e-6; 99: up to 2e-6 and 100: up to 9e-6 where nothing is ill-conditioned.
POSITIONS = {50: 2e-6, 99: 5e-6, 100: 1e-5}

# Where the user's code does not run in float64, the reference rounds too, and the export is judged by the
# error of PyTorch's own FP32 from that reference: the larger one of a single call and of the same positions
# one by one (or row by row). These round differently; a single call alone rounds as the reference does, and
# its error may be zero. On seven models, two of them ill-conditioned, the export's outputs had 0.7 to 1.6
# times that error, its states 0.1 to 1.2 times.
OWN_ERRORS = 2.0
# Of a model that float64 shows to be ill-conditioned: a few positions decide, and differ from one order of
# additions to another. 3.2 (outputs) and 2.6 (states) times were measured of two good models with weights
# three times as large. Half of the positions stay at 2.
ILL_CONDITIONED = 4.0
# Of positions, the same by quantile. Measured: 1.0, 1.6 and 2.9. The worst position of all calls is a fifth
# further off than that of one, so it is not 8: a fault of 2e-5 in calls of two positions would pass.
OWN_POSITIONS = {50: 2.0, 99: 4.0, 100: 7.0}
# An error below these says nothing: 8 and 16 units of the last place of FP32 (1.2e-7). Measured on the same
# models were 2e-7 … 9e-7 and 1e-7 … 1.5e-6.
SMALLEST = {"output": 1e-6, "state": 2e-6}


@dataclass(frozen=True)
class OwnError:
    """Error of PyTorch's own FP32 from the reference.

    Attributes:
        output, state: relative L2 of the worst output and of the worst state.
        positions: output and quantile → the quantile of the errors of its positions.
        ill_conditioned: of `positions.ill_conditioned`.
    """

    output: float
    state: float
    positions: Mapping[tuple[str, int], float] = field(default_factory=dict)
    ill_conditioned: tuple[Json, ...] = ()

    @property
    def of_few_positions(self) -> bool:
        """Whether almost all of the error is that of less than 1 % of the positions."""
        most = [value for (_, quantile), value in self.positions.items() if quantile == 99]
        return bool(most) and max(most) < MOST_OWN / OWN_POSITIONS[99]

    def of(self, check: Check) -> float:
        """The error that a check is to be compared with."""
        if "quantile" in check.detail:
            return self.positions.get((check.detail["output"], check.detail["quantile"]), 0.0)
        return self.state if check.name.endswith(": states") else self.output


def limits_by_own_error(own: OwnError) -> dict[str, float]:
    """`LIMITS` with a reference that rounds, and with that error of PyTorch's own FP32 from it."""
    relative = {name: max(floor, OWN_ERRORS * getattr(own, name)) for name, floor in SMALLEST.items()}
    rows = max(LIMITS["rows"], OWN_ERRORS * own.output)  # a row alone rounds as another call does
    return {**LIMITS, **relative, "lift": max(LIMITS["lift"], relative["output"]), "rows": rows}


# A model whose own FP32 is further off than this cannot be judged by it: it would hide a wrong gate. Twenty
# times the worst of 50 models (5e-5: sLSTMs with very long memories).
MOST_OWN = 1e-3
# As many times as much of one position. With large outliers a normalizer may cancel almost wholly at one of
# 600 positions, which then moves by 1.1e-2 if the last places do. The relative L2 of a call in which one
# position is at that limit is five times as much. Other quantiles keep `MOST_OWN`: a fault in most shows.
ONE_POSITION, FEW_POSITIONS = 100.0, 5.0


def most_own(check: Check, own: OwnError | None = None) -> float:
    """The widest limit that PyTorch's own error can give a check; the widest of all while it is not known."""
    quantile = check.detail.get("quantile")
    if quantile is not None:
        return MOST_OWN * (ONE_POSITION if quantile == 100 else 1.0)
    few = not check.name.endswith(": states") and (own is None or own.of_few_positions)
    return MOST_OWN * _short(check) * (FEW_POSITIONS if few else 1.0)


def _short(check: Check) -> float:
    """How much wider the limit of a call of few positions is (`coverage.fewer_values`)."""
    return float(check.detail.get("short_call", 1.0))


def _of_one_position(check: Check, own: OwnError) -> float:
    """Relative L2 of a short call in which one position is at its limit, and all others are exact."""
    if "short_call" not in check.detail:
        return 0.0
    worst = own.positions.get((check.name.rpartition(": ")[2], 100), 0.0)
    return OWN_POSITIONS[100] * worst / math.sqrt(check.detail["positions"] * check.detail["rows"])


def wider_by_own_error(check: Check, own: OwnError) -> Check:
    """A check against the reference that fails, with the limit that an ill-conditioned model needs.

    Such a model has large forget biases or very long memories: PyTorch's own FP32 is far from float64, and so
    is any other FP32.

    Args:
        check: one of outputs, states, rows or positions.
        own: error of PyTorch's own FP32.
    """
    times = OWN_POSITIONS.get(check.detail.get("quantile", 0), ILL_CONDITIONED)
    if str(check.detail.get("worst", "")).endswith("_conv"):  # what a few positions left, not a sum over many
        times = OWN_POSITIONS[100]
    limit = min(
        most_own(check, own), max(times * _short(check) * own.of(check), _of_one_position(check, own))
    )
    if not limit > check.limit:
        return check
    detail = {**check.detail, "pytorch_fp32": own.of(check), "usual_limit": check.limit}
    return replace(check, limit=limit, detail=detail)


def metric_limits_by_own_error(own: Mapping[str, float]) -> dict[str, float]:
    """`LIMITS` of the task's metric with such a reference, from the same figures of PyTorch's own FP32."""
    return {name: max(LIMITS[name], OWN_ERRORS * value) for name, value in own.items()}


# Range of an activation on held-out data, as a multiple of the calibrated one. Measured on two trained
# models: 1.15 at most where both are of one kind, 4.8 where a language model was calibrated on random tokens.
RANGES = 2.0


@dataclass(frozen=True)
class PrecisionLimits:
    """Limits of a half or quantized export, beside `DRIFT_LIMITS` for the drift along a stream.

    Attributes:
        metric: relative change of the task metric against FP32.
        ways: relative L2 between two ways of calling the export itself. They differ where the last bit of a
            value decides in which direction it is rounded, and the recurrence carries the difference on.
        memory: |ln ratio| of half-lives, see `cell_gates.memory_checks`.
        kl, top1: mean KL divergence of a classifier's or language model's outputs from FP32 in nats, and the
            share of other first choices.
    """

    metric: float
    ways: float
    memory: float
    kl: float
    top1: float


# Metric: measured on held-out data of two trained models 4e-5 (fp16, bf16), 3e-3 (int8, all quantized),
# 2e-4 (int8-wo), 8e-3 (int4-wo). The others: over stretches from many places of these data. Ways: measured
# 6.7e-4 in fp16, 5.3e-3 in bf16, 0.020 in int8 and 7e-4 where only weights are integers; the limits, 2.5 to
# 8 times that, detect a lost state or a wrong gate, but not one more rounding step. Memory: measured
# 3.4e-4 in fp16, 4.0e-3 in bf16, 0.027 in int8, 2.8e-3 in int8-wo, 0.037 in int4-wo; KL and first choices
# (7e-7, 0.0012), (5e-5, 0.0063), (4e-3, 0.036), (7e-5, 0.0051), (3.4e-3, 0.031): 2 to 7 times that.
PRECISION_LIMITS = {
    "fp16": PrecisionLimits(metric=1e-3, ways=5e-3, memory=1e-3, kl=5e-6, top1=6e-3),
    "bf16": PrecisionLimits(metric=1e-3, ways=4e-2, memory=0.01, kl=2e-4, top1=0.03),
    "int8": PrecisionLimits(metric=5e-3, ways=5e-2, memory=0.1, kl=0.02, top1=0.15),
    "int8-wo": PrecisionLimits(metric=5e-3, ways=5e-3, memory=0.015, kl=3e-4, top1=0.02),
    "int4-wo": PrecisionLimits(metric=2e-2, ways=5e-3, memory=0.08, kl=0.02, top1=0.15),
}


# The same checks of an FP32 export whose weights and activations are moved by at most half a step of the
# precision (`one_step`) have this share of a good candidate's values, which are also rounded in between.
# Half types round all that is between products, too: of 672 good exports, one in fp16 had 9.2 times.
STEPS = 10.0
FREE = 2.0  # times as much where a model reads its own text: that of the moved export is another one
GROWTHS = 1.5  # of growth, which is a ratio already
# Errors of outputs relative to the values themselves: from here on, little of them is left.
MOST_RELATIVE = 0.7
# Of the outputs of one call against FP32 (`one_call`) and of its positions, by quantile. Measured against the
# largest of some draws: 1.4 times at most at quantile 50, and up to 3.4 times in the relative L2 and at the
# other quantiles, where gates that are wide open make a few positions ill-conditioned.
CALL_STEPS = {None: 5.0, 50: 2.0, 99: 6.0, 100: 12.0}


def limit_of_one_call(own: float, step: float, quantile: int | None = None) -> float:
    """Limit of an output of one call of a half or quantized export against FP32.

    Args:
        own: that error of the moved FP32 export.
        step: of the type of what is not quantized, relative: the outputs themselves are rounded to it.
        quantile: of the positions; None for relative L2.
    """
    return max(step, CALL_STEPS[quantile] * own)


def wider_by_sensitivity(check: Check, own: float) -> Check:
    """A check of a half or quantized export that fails, with the limit by the model's own sensitivity.

    Args:
        check: one whose limit is not zero.
        own: value of the same check for the moved FP32 export.
    """
    steps = STEPS * (FREE if check.name.startswith("free-running") else 1.0)
    if check.name.endswith(": growth"):
        limit = GROWTHS * own
    elif check.name.endswith(": KL"):
        limit = steps**2 * own  # it grows with the square of an error
    elif check.name.startswith("memory") or check.name.endswith("on held-out data"):
        limit = steps * own
    elif check.name.endswith(" states: level"):
        limit = steps_of_a_state(own, steps)
    else:
        limit = min(MOST_RELATIVE, steps * own)
    return _by_sensitivity(check, own, limit)


def steps_of_a_state(own: float, steps: float = STEPS) -> float:
    """Error of a state that so many errors of size `own` make.

    A memory is a sum of exp(pre-activations). So errors multiply: where gates are steep, half a step makes it
    several times as large. The outputs divide by its size, and have limits of their own.
    """
    with np.errstate(over="ignore"):
        return float(np.expm1(steps * np.log1p(own)))


def wider_way(check: Check, own: float) -> Check:
    """A check of a way of calling that fails, with the limit by the model's own sensitivity.

    Args:
        check: two ways of calling a half or quantized export, whose values may be rounded in the one
            direction or the other.
        own: error from FP32, called in this way, if every activation is rounded in another direction. Two
            ways that are so far from FP32 each are at most twice as far from each other.
    """
    return _by_sensitivity(check, own, min(MOST_RELATIVE, 2 * own))


def _by_sensitivity(check: Check, own: float, limit: float) -> Check:
    if not limit > check.limit:
        return check
    return replace(check, limit=limit, detail={**check.detail, "one_step": own, "usual_limit": check.limit})


@dataclass(frozen=True)
class DriftLimits:
    """Limits of `drift_checks`.

    Attributes:
        output, state: relative L2 of outputs and states at any horizon from `JUDGED_FROM` on.
        kl: KL divergence at the same horizons, nats per position.
        growth: error at the last horizon over that at 1000; `WHILE_FILLING` times as much if growth must be
            counted from an earlier horizon.
        floor: smaller errors count as this large when growth is judged.
    """

    output: float
    state: float
    kl: float
    growth: float = 1.5
    # FP32 rounding through all blocks: another order of additions alone can make an error below it ten times
    # larger at the end than at 1000.
    floor: float = LIMITS["state"]


# By the name of a precision. Levels are about three times the largest error from position 100 on over 16,000
# positions of two trained models, a language model and a forecaster: they detect faults (weights of forget
# gates 1% off give states 0.06 off); the cost of a precision is measured by the task's metric. A
# forecaster's relative error is large where its values pass through zero, hence the output of "int4-wo".
# Growth: on the same models, over stretches from many places of their data, no precision had more than 1.41
# (`judged_growth`) from 1000 positions on, and none more than 1.59 from 100 to 1000. Forget gates 20% off had
# 1.95, a matrix memory stored in BF16 after every position 1.53.
DRIFT_LIMITS: dict[str, DriftLimits] = {
    "fp32": DriftLimits(output=LIMITS["output"], state=LIMITS["state"], kl=1e-8),  # measured 3e-7, 1e-6
    "fp16": DriftLimits(output=2.5e-3, state=3e-3, kl=1e-5),  # measured 8e-4, 9e-4, 1e-6
    "bf16": DriftLimits(output=2e-2, state=2e-2, kl=2e-4),  # measured 6e-3, 7e-3, 6e-5
    "int8-wo": DriftLimits(output=0.03, state=0.05, kl=1e-3),  # measured 0.010, 0.017, 2e-4
    "int8": DriftLimits(output=0.1, state=0.3, kl=0.03),  # measured 0.04, 0.10, 0.011
    "int4-wo": DriftLimits(output=0.5, state=0.6, kl=0.15),  # measured 0.16, 0.21, 0.043
}


def drift_limits(*precisions: str) -> DriftLimits:
    """Limits of a candidate with several precisions, such as INT8 weights and BF16 states: the wider ones."""
    limits = [DRIFT_LIMITS[precision] for precision in precisions]
    widest = {field.name: max(getattr(x, field.name) for x in limits) for field in fields(DriftLimits)}
    return DriftLimits(**widest)
