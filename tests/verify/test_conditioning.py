"""Limits where PyTorch's own FP32 is far from float64: multiples of that, as long as faults would show."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from bisect_faults import tamper_with
from mutations import gate_order
from safetensors.torch import load_file, save_file

from xlstm_export.checks import Check
from xlstm_export.load import checkpoint
from xlstm_export.options import Context
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32
from xlstm_export.verify.limits import LIMITS, MOST_OWN, OWN_ERRORS, wider_by_own_error


def test_a_limit_follows_the_error_of_pytorch() -> None:
    own = {"output": 1e-4, "state": 2e-4}
    state = wider_by_own_error(Check("step: states", 3e-4, 1e-5), own)
    assert state.passed
    assert state.limit == OWN_ERRORS * 2e-4
    assert (state.detail["pytorch_fp32"], state.detail["usual_limit"]) == (2e-4, 1e-5)
    assert not wider_by_own_error(Check("step: y", 3e-4, 5e-6), own).passed
    unchanged = Check("step: y", 1e-5, 5e-6)
    assert wider_by_own_error(unchanged, {"output": 1e-7, "state": 1e-7}) is unchanged
    broken = wider_by_own_error(Check("step: y", 0.5, 5e-6), {"output": float("inf"), "state": 0.0})
    assert broken.limit == MOST_OWN
    assert not broken.passed


def test_a_fault_that_no_rounding_explains_is_judged_at_once(
    own_export: Path, small_loaded: checkpoint.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object) -> dict[str, float]:
        raise AssertionError("PyTorch's own error was measured")

    monkeypatch.setattr(fp32, "own_error", measured)
    tamper_with(own_export, lambda model: gate_order(model, np.random.default_rng(0)) and None)
    assert not fp32.verify(own_export, small_loaded, context=Context(threads=1)).passed


@pytest.mark.slow
@pytest.mark.parametrize(("forget", "enter"), [(20.0, -20.0), (-20.0, 20.0), (20.0, 20.0)])
def test_strong_gate_biases_are_no_fault(tmp_path: Path, forget: float, enter: float) -> None:
    torch.manual_seed(0)
    folder = models.make(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for name, value in state.items():
        if name.endswith("bias") and ("fgate" in name or "igate" in name):
            value.fill_(forget if "fgate" in name else enter)
            value += 0.5 * torch.randn(value.shape)
        if "slstm_cell" in name and "bias" in name:
            value += forget  # of all four gates: the output gate is shut too
    save_file(state, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    verdict = fp32.verify(trace.export(loaded, tmp_path / "run"), loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    assert all(check.limit <= MOST_OWN or check.limit == LIMITS["top1"] for check in verdict.checks)
