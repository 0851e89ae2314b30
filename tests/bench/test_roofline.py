"""The roofline against hand computations."""

from __future__ import annotations

import pytest

from xlstm_export.bench import roofline
from xlstm_export.specs import BlockSpec, ModelSpec, StateSpec
from xlstm_export.targets import TARGETS


def spec(parameters: int, state: int) -> ModelSpec:
    block = BlockSpec(0, "cell", "mlstm", 1, 1, (StateSpec(0, "C", (state,)),))
    return ModelSpec("model", parameters, parameters, (block,))


def test_weights_once_state_twice() -> None:
    model = spec(parameters=100, state=10)
    assert roofline.step_bytes(model, 2.0) == 100 * 2 + 2 * 10 * 4
    assert roofline.step_bytes(model, 2.0, batch=3) == 100 * 2 + 3 * 2 * 10 * 4


def test_125m_on_orin_nano_super() -> None:
    # 125.0 M parameters read, 49.7 MB of FP32 state: (250 + 99.4) MB / 102.4 GB/s
    bound = roofline.floor(spec(125_000_000, 49_700_000 // 4), TARGETS["orin-nano-super"], 2.0)
    assert bound.milliseconds == pytest.approx(3.412, rel=1e-3)
    assert bound.tokens_per_second == pytest.approx(293, rel=5e-3)
    assert bound.fits


def test_what_does_not_fit_and_what_computes() -> None:
    target = TARGETS["orin-nano-8gb"]
    assert not roofline.floor(spec(7_000_000_000, 1), target, 1.0).fits
    many = roofline.floor(spec(1_000_000, 1), target, 2.0, batch=10_000)
    assert many.milliseconds == pytest.approx(2 * 1e6 * 1e4 / 10e12 * 1e3), "bound by arithmetic"
