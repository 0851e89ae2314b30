"""Limits where PyTorch's own FP32 is far from float64: multiples of that, as long as faults would show."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from bisect_faults import tamper_with
from mutations import gate_order, slightly_larger
from safetensors.torch import load_file, save_file

from xlstm_export.checks import Check
from xlstm_export.load import checkpoint
from xlstm_export.options import Context, ExportOptions, VerifyOptions
from xlstm_export.runfolder import RunFolder
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32
from xlstm_export.verify.limits import (
    ILL_CONDITIONED,
    LIMITS,
    MOST_OWN,
    ONE_POSITION,
    OWN_POSITIONS,
    OwnError,
    most_own,
    wider_by_own_error,
)
from xlstm_export.verify.own_error import DRAWS, roundings
from xlstm_export.verify.positions import NAMED


def test_a_limit_follows_the_error_of_pytorch() -> None:
    own = OwnError(1e-4, 2e-4, {("y", 50): 1e-4, ("y", 100): 1e-3})
    state = wider_by_own_error(Check("step: states", 3e-4, 1e-5), own)
    assert state.passed
    assert state.limit == ILL_CONDITIONED * 2e-4
    assert (state.detail["pytorch_fp32"], state.detail["usual_limit"]) == (2e-4, 1e-5)
    assert not wider_by_own_error(Check("step: y", 5e-4, 5e-6), own).passed
    unchanged = Check("step: y", 1e-5, 5e-6)
    assert wider_by_own_error(unchanged, OwnError(1e-7, 1e-7)) is unchanged
    broken = wider_by_own_error(Check("step: y", 0.5, 5e-6), OwnError(float("inf"), 0.0))
    assert broken.limit == MOST_OWN
    assert not broken.passed


def test_a_short_call_stays_wider_by_the_same_factor() -> None:
    """One position that is ill-conditioned is all of a call; in a usual one it is a small part."""
    about = {"short_call": 13.0, "positions": 2, "rows": 2}
    check = Check("prefill of other rows and lengths: y", 1e-4, 6.5e-5, about)
    assert wider_by_own_error(check, OwnError(1.4e-5, 0.0)).limit == ILL_CONDITIONED * 13.0 * 1.4e-5
    assert wider_by_own_error(check, OwnError(1.0, 0.0)).limit == 13.0 * MOST_OWN
    one = wider_by_own_error(check, OwnError(1e-6, 0.0, {("y", 100): 2e-4}))
    assert one.limit == OWN_POSITIONS[100] * 2e-4 / 2  # one of four positions


def test_a_limit_of_positions_follows_their_own_quantile() -> None:
    own = OwnError(0.5, 0.5, {("y", 50): 1e-4, ("y", 100): 5e-4})

    def limit(quantile: int) -> float:
        about = {"output": "y", "quantile": quantile}
        return wider_by_own_error(Check("positions of y", 1.0, 1e-5, about), own).limit

    assert limit(50) == OWN_POSITIONS[50] * 1e-4
    assert limit(100) == OWN_POSITIONS[100] * 5e-4
    assert limit(99) == 1e-5  # nothing known


def test_one_position_may_be_far_off_and_no_more() -> None:
    """Where a normalizer cancels at one position. Its share of the relative L2 is wider too, no state is."""
    own = OwnError(1e-3, 1e-3, {("y", 50): 3e-7, ("y", 99): 6e-5, ("y", 100): 1e-2})
    assert wider_by_own_error(Check("prefill 199: y", 3e-3, 5e-6), own).passed
    assert wider_by_own_error(Check("prefill 199: states", 1e-2, 1e-5), own).limit == MOST_OWN
    conv = Check("long stream 135: states", 1e-4, 1e-5, {"worst": "past_1_conv"})
    assert wider_by_own_error(conv, OwnError(0.0, 1e-5)).limit == OWN_POSITIONS[100] * 1e-5
    about = {"output": "y", "quantile": 100}
    assert wider_by_own_error(Check("positions of y", 0.07, 1e-5, about), own).passed
    most = {**own.positions, ("y", 99): 1e-2}  # more than a few
    assert (
        wider_by_own_error(Check("prefill 199: y", 3e-3, 5e-6), OwnError(1e-3, 1e-3, most)).limit == MOST_OWN
    )


def test_a_call_that_is_exact_by_luck_does_not_decide() -> None:
    """Beside the plain call in FP32 there are calls whose last places are moved, each in another way."""
    plain, *moved = roundings(DRAWS)
    assert plain[1] == math.inf
    assert len(moved) >= 3
    results = []
    for mode, most in moved:
        assert most == ONE_POSITION * MOST_OWN
        with mode:
            results.append(torch.ones(64) * 3.0)
    assert len({tuple(x.tolist()) for x in results}) == len(moved)
    assert all(0 < (x - 3.0).abs().max() <= 3 * 1.2e-7 for x in results)


@pytest.mark.parametrize("context_length", [64, 400], ids=["shorter than calls", "longer than calls"])
def test_an_export_of_the_last_position_is_judged_by_that_position(
    small_loaded: checkpoint.Loaded, tmp_path: Path, context_length: int
) -> None:
    """PyTorch's outputs of all positions are cut to it; else its own error would be no rounding at all."""
    folder = trace.export(small_loaded, tmp_path / "run", ExportOptions(last_logits=True))
    checked = fp32._Fp32(RunFolder.of(folder), small_loaded, VerifyOptions(), Context(threads=1), None)
    checked.limit_context = context_length
    with closing(checked):
        checked.limits = checked.streams.limits = checked._limits()
        checked.check_long()
        own = checked._own_error(exact=True, long=checked._long)
    assert own.output < LIMITS["output"]


@pytest.mark.slow
def test_a_fault_in_the_bulk_is_seen_beside_ill_conditioned_positions(tmp_path: Path) -> None:
    """Some positions of this model are 1e-4 from float64 in PyTorch; they are named, and no excuse."""
    torch.manual_seed(0)
    loaded = with_biases(tmp_path, -20.0, 20.0)
    folder = trace.export(loaded, tmp_path / "run")
    verdict = fp32.verify(folder, loaded, context=Context(threads=1))
    assert verdict.passed
    worst = verdict.coverage["ill_conditioned"]["worst"]
    assert 0 < len(worst) <= NAMED
    assert worst[0]["pytorch_fp32"] > 1e-5
    place = f"{worst[0]['output']}, row {worst[0]['row']}, position {worst[0]['position']}"
    assert place in verdict.coverage["sentence"]
    tamper_with(folder, lambda model: slightly_larger(model, 1 + 1e-5) and None)
    again = fp32.verify(folder, loaded, context=Context(threads=1))
    assert "positions of logits: quantile 50" in {c.name for c in again.checks if not c.passed}


def test_a_fault_that_no_rounding_explains_is_judged_at_once(
    own_export: Path, small_loaded: checkpoint.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*given: object, **options: object) -> OwnError:
        raise AssertionError("PyTorch's own error was measured")

    monkeypatch.setattr(fp32, "own_error", measured)
    tamper_with(own_export, lambda model: gate_order(model, np.random.default_rng(0)) and None)
    assert not fp32.verify(own_export, small_loaded, context=Context(threads=1)).passed


def with_biases(tmp_path: Path, forget: float, enter: float) -> checkpoint.Loaded:
    folder = models.make(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for name, value in state.items():
        if name.endswith("bias") and ("fgate" in name or "igate" in name):
            value.fill_(forget if "fgate" in name else enter)
            value += 0.5 * torch.randn(value.shape)
        if "slstm_cell" in name and "bias" in name:
            value += forget  # of all four gates: the output gate is shut too
    save_file(state, folder / "model.safetensors")
    return checkpoint.load_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("forget", "enter"), [(20.0, -20.0), (-20.0, 20.0), (20.0, 20.0)])
def test_strong_gate_biases_are_no_fault(tmp_path: Path, forget: float, enter: float) -> None:
    torch.manual_seed(0)
    loaded = with_biases(tmp_path, forget, enter)
    verdict = fp32.verify(trace.export(loaded, tmp_path / "run"), loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    assert all(check.limit <= most_own(check) or check.limit == LIMITS["top1"] for check in verdict.checks)
