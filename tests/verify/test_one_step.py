"""The model's own sensitivity to a step of a type: how it is made, and that it hides no fault."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from bisect_faults import tamper_with
from onnx import ModelProto, load, numpy_helper

from xlstm_export.checks import Check, Replay
from xlstm_export.distance import difference
from xlstm_export.load import checkpoint
from xlstm_export.options import Context, VerifyOptions
from xlstm_export.quantize.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import one_call, precision
from xlstm_export.verify.fp32 import verify
from xlstm_export.verify.limits import (
    GROWTHS,
    MOST_RELATIVE,
    STEPS,
    steps_of_a_state,
    wider_by_sensitivity,
    wider_way,
)
from xlstm_export.verify.one_step import DRAWS, EPS, by_sensitivity, moved_export
from xlstm_export.verify.precision import verify_precision

SHORT = VerifyOptions(horizon=300, free_horizon=20)


def test_weights_and_activations_are_moved_by_half_a_step(small_export: Path, tmp_path: Path) -> None:
    run = quantize(small_export, preset("bf16"), out=tmp_path / "bf16")
    moved = moved_export(small_export, RunFolder.open(run), tmp_path / "moved")
    before, after = (
        {t.name: t for t in load(x / "model.onnx").graph.initializer} for x in (small_export, moved.path)
    )
    some = 0
    for name in before:
        old, new = numpy_helper.to_array(before[name]), numpy_helper.to_array(after[name])
        if not np.array_equal(old, new):
            some += 1
            assert (np.abs(new - old) <= 0.5001 * EPS["bf16"] * np.abs(old)).all()
    assert some > 10
    tokens = {"tokens": np.arange(40).reshape(1, 40)}
    with OrtSession(small_export, 1, 1) as a, OrtSession(moved.path, 1, 1) as b:
        far = difference(b.prefill(tokens)["logits"], a.prefill(tokens)["logits"]).relative_l2
    assert 1e-4 < far < 3e-2


def test_limits_follow_the_sensitivity() -> None:
    level = wider_by_sensitivity(Check("teacher-forced: y: level", 0.03, 0.02), 0.01)
    assert (level.passed, level.limit, level.detail["one_step"]) == (True, STEPS * 0.01, 0.01)
    assert wider_by_sensitivity(Check("teacher-forced: y: level", 9.0, 0.02), 1.0).limit == MOST_RELATIVE
    growth = wider_by_sensitivity(Check("teacher-forced: y: growth", 1.6, 1.5), 1.2)
    assert growth.limit == pytest.approx(GROWTHS * 1.2)
    assert wider_by_sensitivity(Check("teacher-forced: y: KL", 1.0, 0.1), 0.05).limit == STEPS**2 * 0.05
    state = wider_by_sensitivity(Check("teacher-forced: block 1 states: level", 57.0, 0.3), 0.8)
    assert state.limit == pytest.approx(1.8**STEPS - 1)  # a memory is a sum of exponentials
    assert steps_of_a_state(1e-4) == pytest.approx(STEPS * 1e-4, rel=1e-3)
    unchanged = Check("memory length: block 0", 0.2, 0.1)
    assert wider_by_sensitivity(unchanged, 0.001) is unchanged


def test_zeros_stay(small_export: Path, tmp_path: Path) -> None:
    """Between merged blocks, say: an integer weight of zero is exact, and so is the candidate there."""
    run = RunFolder.open(quantize(small_export, preset("int4-wo"), out=tmp_path / "int4"))
    moved = moved_export(small_export, run, tmp_path / "moved")
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in load(x / "model.onnx").graph.initializer}
        for x in (small_export, moved.path)
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    with_zeros = [name for name in changed if (before[name] == 0).any()]
    assert with_zeros
    assert all((after[name][before[name] == 0] == 0).all() for name in with_zeros)


def test_a_way_of_calling_follows_the_activations_alone(small_export: Path, tmp_path: Path) -> None:
    """An export that is called in two ways has the same weights in both."""
    run = RunFolder.open(quantize(small_export, preset("int4-wo"), out=tmp_path / "int4"))
    tokens = {"tokens": np.arange(40).reshape(1, 40)}
    far = {}
    for weights in (True, False):
        moved = moved_export(small_export, run, tmp_path / str(weights), weights=weights)
        with OrtSession(small_export, 1, 1) as a, OrtSession(moved.path, 1, 1) as b:
            far[weights] = difference(b.prefill(tokens)["logits"], a.prefill(tokens)["logits"]).relative_l2
    assert far[False] < 3e-3 < 3e-2 < far[True]
    limit = wider_way(Check("step: states", 6.6e-3, 5e-3), 0.01)
    assert (limit.passed, limit.limit, limit.detail["usual_limit"]) == (True, 0.02, 5e-3)
    assert wider_way(Check("step: states", 9.0, 5e-3), 50.0).limit == MOST_RELATIVE


@pytest.mark.parametrize(("name", "value"), [("teacher-forced: y: level", 0.2), ("step: y", 0.15)])
def test_one_move_in_some_decides(name: str, value: float) -> None:
    """Where a gate is steep, most moves do little; what is far beyond them is not tried further."""
    draws: list[tuple[bool, int]] = []

    def moved(weights: bool, seed: int) -> dict[str, float]:
        draws.append((weights, seed))
        return {name: 0.1 if seed == 3 else 0.01}

    ways = {"step: y"}
    [judged] = by_sensitivity([Check(name, value, 0.06)], ways, moved)
    assert (judged.passed, judged.detail["one_step"]) == (True, 0.1)
    assert draws == [(name not in ways, seed) for seed in range(4)]
    draws.clear()
    [judged] = by_sensitivity([Check(name, 0.6, 0.06)], ways, moved)
    assert (judged.passed, len(draws)) == (False, 1)
    assert by_sensitivity([Check(name, 0.01, 0.06)], ways, moved) == [Check(name, 0.01, 0.06)]
    assert len(draws) == 1


def test_a_divergence_is_far_where_an_error_is() -> None:
    """It grows with the square of an error: seven times a limit is as near as an error of 2.6 times."""
    name = "teacher-forced: y: KL"
    [judged] = by_sensitivity(
        [Check(name, 0.014, 0.001)], (), lambda weights, seed: {name: 1.5e-4 if seed == 2 else 2e-5}
    )
    assert (judged.passed, judged.detail["one_step"]) == (True, 1.5e-4)


def test_one_call_is_judged_by_sensitivity_alone(small_export: Path, tmp_path: Path) -> None:
    """What rounding hardly moves has narrow limits; a decision that falls otherwise gets more draws."""
    outputs, replay = RunFolder.open(small_export).io.outputs, Replay({}, (), lambda x, a, b: x)
    right = {"logits": np.random.default_rng(0).normal(size=(3, 199, 256)).astype(np.float32)}
    near = {"logits": right["logits"] * np.float32(1.001)}
    token = {"logits": right["logits"].copy()}
    token["logits"][1, 7] *= -1  # 2 / √597 of the whole
    moved = one_call.errors(outputs, right, near)
    assert moved["logits", None] == pytest.approx(1e-3, rel=1e-3)
    found = one_call.checks(moved, lambda seed: moved, 1e-3, replay)
    assert all(check.passed for check in found)
    wrong = one_call.checks(one_call.errors(outputs, right, token), lambda seed: moved, 1e-3, replay)
    assert [x.name for x in wrong if not x.passed] == [
        "one call against FP32: logits",
        "one call against FP32: logits, quantile 100",
    ]
    other = one_call.errors(outputs, right, token)
    draws: list[int] = []

    def drawn(seed: int) -> one_call.Errors:
        draws.append(seed)
        return other if seed == 2 else moved

    assert all(check.passed for check in one_call.checks(other, drawn, 1e-3, replay))
    assert draws == [0, 1, 2]
    classes = {"logits": np.ones((3, 199, 256), np.float32)}
    assert one_call.errors(outputs, classes, classes) == {}


@pytest.mark.slow
def test_moved_exports_are_on_disk_one_at_a_time(
    small_export: Path,
    small_loaded: checkpoint.Loaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is as large as the FP32 export, and there may be thirty-two."""
    run = RunFolder.open(quantize(small_export, preset("bf16"), out=tmp_path / "bf16"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    there: list[int] = []

    def drawn(found: one_call.Errors, moved: Callable[[int], one_call.Errors], *_: object) -> list[Check]:
        for seed in range(3):
            moved(seed)
            there.append(len(list(scratch.iterdir())))
        return []

    monkeypatch.setattr(one_call, "checks", drawn)
    verified = precision._Precision(run, small_loaded, SHORT, Context(threads=1), None)
    with closing(verified):
        verified.reference = precision.Reference(
            "FP32 export", lambda batch: OrtSession(small_export, batch, 1), small_export
        )
        verified.check_one_call()
    assert there == [0, 0, 0]


def test_one_position_in_some_moves_gets_many(small_export: Path) -> None:
    """Where all other positions are within their limits, and only there."""
    outputs, replay = RunFolder.open(small_export).io.outputs, Replay({}, (), lambda x, a, b: x)
    right = {"logits": np.random.default_rng(0).normal(size=(3, 199, 256)).astype(np.float32)}
    moved = one_call.errors(outputs, right, {"logits": right["logits"] * np.float32(1.001)})
    token = {"logits": right["logits"].copy()}
    token["logits"][1, 7] *= -1
    jumped = one_call.errors(outputs, right, token)
    found = one_call.checks(jumped, lambda seed: jumped if seed == 20 else moved, 1e-3, replay)
    assert all(check.passed for check in found)
    draws: list[int] = []

    def drawn(seed: int) -> one_call.Errors:
        draws.append(seed)
        return moved

    wrong = one_call.errors(outputs, right, {"logits": right["logits"] * np.float32(1.1)})
    assert not any(check.passed for check in one_call.checks(wrong, drawn, 1e-3, replay))
    assert len(draws) == DRAWS


def test_a_model_with_outliers_neither_fails_nor_hides_a_fault(tmp_path: Path) -> None:
    config = models.lm_config(num_blocks=2, embedding_dim=16, heads=2, vocab_size=64, slstm_at=[])
    model = models.build(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2 and value.shape[0] > 4:
                value[:: max(5, value.shape[0] // 3)] *= 20
    loaded = checkpoint.load_checkpoint(models.write(tmp_path / "model", config, model))
    context, run = Context(threads=1), trace.export(loaded, tmp_path / "run")
    assert verify(run, loaded, context=context).passed
    half = quantize(run, preset("bf16"))
    verdict = verify_precision(half, loaded, SHORT, context)
    assert verdict.passed
    assert any("one_step" in check.detail for check in verdict.checks)

    def change(graph: ModelProto) -> None:
        tensor = next(t for t in graph.graph.initializer if "proj_down" in t.name)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(-values, tensor.name))

    tamper_with(half, change)
    assert not verify_precision(half, loaded, SHORT, context).passed
