"""Every limit of a verification, and its reason."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
class DriftLimits:
    """What `drift_checks` holds errors against.

    Attributes:
        output, state: relative L2 of outputs and states at any horizon from `JUDGED_FROM` on.
        kl: KL divergence at the same horizons, nats per position.
        growth: error at the last horizon over that at 1000; `WHILE_FILLING` times as much where it has to be
            counted from an earlier one.
        floor: errors count as this large at least where growth is judged.
    """

    output: float
    state: float
    kl: float
    growth: float = 1.5
    # FP32 rounding through all blocks; what stays below it may be ten times larger at the end than at 1000
    # without anything that another order of additions would not do as well.
    floor: float = LIMITS["state"]


# By the name of a precision. Levels are about three times the largest error from position 100 on over 16,000
# positions of two trained models, a language model and a forecaster: they find what is broken (weights of
# forget gates 1% off give states 0.06 off), not what a precision costs, which the task's metric tells. A
# forecaster's relative error is large where its values pass through zero, hence the output of "int4-wo".
# Growth: on the same models, over stretches from many places of their data, no precision had more than 1.41
# (`judged_growth`) from 1000 positions on, and none more than 1.59 from 100 to 1000. Forget gates 20% off had
# 1.95, a matrix memory stored in BF16 after every position 1.53.
DRIFT_LIMITS: dict[str, DriftLimits] = {
    "fp32": DriftLimits(output=LIMITS["output"], state=LIMITS["state"], kl=1e-8),  # seen 3e-7, 1e-6
    "fp16": DriftLimits(output=2.5e-3, state=3e-3, kl=1e-5),  # seen 8e-4, 9e-4, 1e-6
    "bf16": DriftLimits(output=2e-2, state=2e-2, kl=2e-4),  # seen 6e-3, 7e-3, 6e-5
    "int8-wo": DriftLimits(output=0.03, state=0.05, kl=1e-3),  # seen 0.010, 0.017, 2e-4
    "int8": DriftLimits(output=0.1, state=0.3, kl=0.03),  # seen 0.04, 0.10, 0.011
    "int4-wo": DriftLimits(output=0.5, state=0.6, kl=0.15),  # seen 0.16, 0.21, 0.043
}


def drift_limits(*precisions: str) -> DriftLimits:
    """The wider limit of each kind, for a candidate of several: INT8 weights with states stored in BF16."""
    limits = [DRIFT_LIMITS[precision] for precision in precisions]
    widest = {field.name: max(getattr(x, field.name) for x in limits) for field in fields(DriftLimits)}
    return DriftLimits(**widest)
