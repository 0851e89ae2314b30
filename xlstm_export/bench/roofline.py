"""Roofline of a decode step: the bytes that must be moved, divided by the memory bandwidth.

Weights are read once per step, whatever the batch; recurrent state is read and written once per stream.
Embedding tables are not counted: a step reads one row. At batch 1 arithmetic never limits the targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import ModelSpec
from ..targets import Target

STATE_BYTES = 4  # FP32


@dataclass(frozen=True)
class Floor:
    """The least time of one decode step on a target.

    Attributes:
        bytes: weights read + state read and written, per step.
        milliseconds: bytes / bandwidth, or FLOPs / rate where that is longer.
        fits: whether all weights and the state fit the target's memory.
    """

    target: Target
    bytes: float
    milliseconds: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Per stream."""
        return 1e3 / self.milliseconds


def step_bytes(spec: ModelSpec, weight_bytes: float = 4.0, batch: int = 1) -> float:
    """Bytes one decode step moves; `weight_bytes` per parameter."""
    return spec.parameters_read * weight_bytes + 2 * spec.state_elements * STATE_BYTES * batch


def floor(spec: ModelSpec, target: Target, weight_bytes: float = 2.0, batch: int = 1) -> Floor:
    """Roofline of a decode step; `weight_bytes` is 4 for FP32, 2 for FP16, 1 for INT8."""
    moved = step_bytes(spec, weight_bytes, batch)
    rate = target.int8_tops if weight_bytes <= 1 else target.fp16_tflops
    seconds = max(moved / (target.bandwidth_gbs * 1e9), 2 * spec.parameters_read * batch / (rate * 1e12))
    resident = spec.parameters * weight_bytes + spec.state_elements * STATE_BYTES * batch
    return Floor(target, moved, seconds * 1e3, resident <= target.ram_gb * 1e9)
