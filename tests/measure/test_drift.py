"""Drift: the figures are those of two recurrences worked out by hand, and the gate sees what grows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from refusals import refused

from xlstm_export.checks import Check
from xlstm_export.errors import InputError, UsageError
from xlstm_export.load import checkpoint
from xlstm_export.measure.drift import measure_drift
from xlstm_export.measure.drift_plan import DriftPlan
from xlstm_export.measure.drift_result import (
    FREE,
    TEACHER,
    Drift,
    Feedback,
    FreeRun,
    Series,
    judged_growth,
    token_feedback,
)
from xlstm_export.options import Context, ExportOptions
from xlstm_export.sessions import OrtSession, Session, TorchSession
from xlstm_export.specs import IoSpec, StateSpec, TensorSpec
from xlstm_export.trace import export as trace
from xlstm_export.verify.drift_gate import drift_checks, first_failing_block
from xlstm_export.verify.limits import DRIFT_LIMITS, DriftLimits

Arrays = dict[str, np.ndarray]
LIMITS = DriftLimits(output=0.02, state=0.02, kl=1e-3)


class Linear(Session):
    """s ← decay·s + gain·x, y = scale·s; one value per row. `spoil` makes y NaN from a position on."""

    def __init__(
        self,
        decay: float = 0.5,
        gain: float = 1.0,
        scale: float = 1.0,
        batch: int = 2,
        spoil: float = math.inf,
    ) -> None:
        self.decay, self.gain, self.scale, self.spoil = decay, gain, scale, spoil
        io = IoSpec(
            (TensorSpec("x", "float64", ("B", "S")),),
            (TensorSpec("y", "float64", ("B", "S")),),
            (StateSpec(0, "y", (1,), "float64"),),
        )
        super().__init__(io, batch)
        self.read: list[np.ndarray] = []  # what prefill was given since the last reset
        self._s = np.zeros((batch, 1))
        self._at = 0

    def _prefill(self, inputs: Arrays) -> Arrays:
        y = np.empty_like(inputs["x"])
        for t in range(y.shape[1]):
            self._s = self.decay * self._s + self.gain * inputs["x"][:, t : t + 1]
            self._at += 1
            y[:, t] = np.nan if self._at > self.spoil else self.scale * self._s[:, 0]
        self.read.append(inputs["x"])
        return {"y": y}

    def _state(self) -> Arrays:
        return {"past_0_y": self._s.copy()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._s = value.copy()
        if not value.any():
            self._at, self.read = 0, []


def stream(decay: float, gain: float, x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """States (B, S) after every position, from s (B,)."""
    states = []
    for t in range(x.shape[1]):
        s = decay * s + gain * x[:, t]
        states.append(s)
    return np.stack(states, axis=1)


def noise(length: int, batch: int = 2) -> Arrays:
    return {"x": np.random.default_rng(0).standard_normal((batch, length))}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a - b).sum() / np.square(b).sum()))


def one(drift: Drift, tensor: str, mode: str = TEACHER, block: int | None = None) -> Series:
    (series,) = [s for s in drift.series if (s.mode, s.tensor, s.block) == (mode, tensor, block)]
    return series


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


# --- figures by hand ----------------------------------------------------------------------------------


def test_errors_are_those_of_the_recurrence_written_out() -> None:
    x = noise(700)
    # 300 and 400 have windows that overlap, 7 and 60 windows that begin with the stream.
    horizons = (7, 60, 300, 400, 700)
    drift = measure_drift(Linear(0.99), Linear(0.98, 1.1), x, DriftPlan(horizons, window=128, piece=50))
    true, ours = stream(0.99, 1.0, x["x"], np.zeros(2)), stream(0.98, 1.1, x["x"], np.zeros(2))
    outputs, states = one(drift, "y"), one(drift, "y", block=0)
    assert outputs.horizons == horizons
    for i, end in enumerate(horizons):
        start = max(0, end - 128)
        begun = true[:, start - 1] if start else np.zeros(2)
        forced = stream(0.98, 1.1, x["x"][:, start:end], begun)
        assert outputs.errors[i] == pytest.approx(relative(ours[:, start:end], true[:, start:end]), rel=1e-12)
        assert outputs.state_forced[i] == pytest.approx(relative(forced, true[:, start:end]), rel=1e-12)
        sampled = [start + math.ceil((end - start) * k / 8) - 1 for k in range(1, 9)]
        by_hand = [relative(ours[:, t], true[:, t]) ** 2 for t in sorted(set(sampled))]
        assert states.errors[i] == pytest.approx(math.sqrt(np.mean(by_hand)), rel=1e-12)
        by_hand = [relative(forced[:, t - start], true[:, t]) ** 2 for t in sorted(set(sampled))]
        assert states.state_forced[i] == pytest.approx(math.sqrt(np.mean(by_hand)), rel=1e-12)
    assert drift.at(400)["teacher-forced: y"] == outputs.errors[3]
    assert not drift.repeated
    assert (drift.batch, drift.window, drift.positions) == (2, 128, 700)


def test_a_constant_error_stays_what_it_is() -> None:
    drift = measure_drift(Linear(0.99), Linear(0.99, scale=1.01), noise(4000), DriftPlan((1, 10, 1000, 4000)))
    assert one(drift, "y").errors == pytest.approx([0.01] * 4)
    assert one(drift, "y").state_forced == pytest.approx([0.01] * 4)
    assert one(drift, "y", block=0).errors == (0.0,) * 4
    assert drift.growth == pytest.approx({"teacher-forced: y": 1.0, "teacher-forced: block 0 y": 1.0})
    assert failed(drift_checks(drift, LIMITS)) == []
    assert failed(drift_checks(drift, replace(LIMITS, output=0.009))) == ["teacher-forced: y: level"]


def test_a_memory_that_never_ends_makes_the_error_grow() -> None:
    ones = {"x": np.ones((2, 8000))}
    candidate = Linear(1 - 1e-6)
    drift = measure_drift(Linear(1.0), candidate, ones, DriftPlan((1, 100, 1000, 8000)))
    series = one(drift, "y", block=0)
    # Σ (1 − δ)ᵗ is t − δ·t²/2 in first order: the relative error is δ·t/2.
    assert series.errors[-1] == pytest.approx(1e-6 * 8000 / 2, rel=0.03)
    assert 7 < series.growth < 10
    # From the reference's state on there are at most 256 positions to lose anything in.
    assert series.state_forced[-1] < 3e-4
    bad = failed(drift_checks(drift, LIMITS))
    assert bad == ["teacher-forced: y: growth", "teacher-forced: block 0 states: growth"]


def test_a_memory_that_ends_does_not() -> None:
    drift = measure_drift(Linear(0.9), Linear(0.9 * 0.999), noise(4000), DriftPlan((100, 1000, 4000)))
    checks = drift_checks(drift, LIMITS)
    assert failed(checks) == []
    assert judged_growth(one(drift, "y"), 1e-5) < 1.1


class Half(Linear):
    """Stores its state in FP16 after every call, however long."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.io = replace(self.io, states=(StateSpec(0, "y", (1,), "float16"),))

    def _prefill(self, inputs: Arrays) -> Arrays:
        outputs = super()._prefill(inputs)
        self._s = self._s.astype(np.float16).astype(np.float64)
        return outputs


def test_a_narrow_state_is_rounded_at_every_position() -> None:
    # From 2048 on FP16 holds even numbers only: 2048 + 1 is 2048 again.
    ones = {"x": np.ones((2, 4000))}
    plan = DriftPlan((100, 1000, 4000))
    drift = measure_drift(Linear(1.0), Half(1.0), ones, plan)
    assert drift.stepwise
    assert drift.to_json()["stepwise"] is True
    state = one(drift, "y", block=0)
    assert state.errors[:2] == (0.0, 0.0)
    assert state.errors[2] == pytest.approx(1 - 2048 / (4000 - 112), abs=1e-3)
    assert "teacher-forced: block 0 states: level" in failed(drift_checks(drift, LIMITS))
    # The reference's state of 3744 is representable, from there the window's positions are lost.
    assert state.state_forced[2] == pytest.approx(144 / 3888, abs=5e-3)
    seldom = measure_drift(Linear(1.0), Half(1.0), ones, replace(plan, stepwise=False))
    assert not seldom.stepwise
    assert one(seldom, "y", block=0).errors[2] < 1e-3
    always = measure_drift(Linear(1.0), Linear(1.0), ones, replace(plan, stepwise=True))
    assert always.stepwise
    assert one(always, "y").errors == (0.0,) * 3


# --- data, memory, refusals -----------------------------------------------------------------------------


def test_short_data_begins_anew_and_says_so() -> None:
    reference, x = Linear(), noise(30)
    drift = measure_drift(reference, Linear(scale=1.1), x, DriftPlan((10, 100)))
    assert drift.repeated
    assert drift.to_json()["repeated"] is True
    read = np.concatenate(reference.read, axis=1)
    assert np.array_equal(read, np.tile(x["x"], (1, 4))[:, :100])


def test_no_call_is_longer_than_a_piece() -> None:
    reference, candidate = Linear(), Linear()
    measure_drift(reference, candidate, noise(1000), DriftPlan((1, 1000), piece=64))
    assert sum(x.shape[1] for x in reference.read) == 1000
    assert max(x.shape[1] for x in (*reference.read, *candidate.read)) <= 64


def test_progress_names_mode_and_position() -> None:
    seen: list[str] = []
    measure_drift(Linear(), Linear(), noise(100), DriftPlan((100,)), Context(progress=seen.append))
    assert seen[0] == "teacher-forced, 0 of 100 positions"


def stateless() -> Linear:
    session = Linear()
    session.io = replace(session.io, states=())
    return session


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"horizons": ()}, ["horizons", "nothing to compare"]),
        ({"horizons": (10, 10)}, ["10, 10", "ascending"]),
        ({"horizons": (0, 10)}, ["0, 10", "positive"]),
        ({"free_horizons": (5, 2)}, ["free_horizons", "5, 2"]),
        ({"window": 0}, ["window 0"]),
        ({"candidate": Linear(batch=3)}, ["batch 3", "batch 2", "same batch"]),
        ({"candidate": stateless()}, ["no states"]),
        ({"feedback": Feedback("tokens", "y")}, ["tokens", "inputs are x"]),
        ({"feedback": Feedback("x", "logits")}, ["no output logits", "y"]),
        ({"feedback": Feedback("x", "y", prompt=0)}, ["prompt 0"]),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: list[str]) -> None:
    arguments = {"horizons": (1, 10), "candidate": Linear(), **change}
    with refused(UsageError, *words):
        measure_drift(Linear(), arguments.pop("candidate"), noise(10), DriftPlan(**arguments))


def test_wrong_data_is_refused() -> None:
    with refused(InputError, "no data for input x", "z"):
        measure_drift(Linear(), Linear(), {"z": np.zeros((2, 3))}, DriftPlan((1,)))
    with refused(InputError, "at least one"):
        measure_drift(Linear(), Linear(), {"x": np.zeros((2, 0))}, DriftPlan((1,)))
    with refused(InputError, "input x"):
        measure_drift(Linear(), Linear(), noise(10, batch=5), DriftPlan((1,)))


# --- broken candidates ------------------------------------------------------------------------------------


def test_nan_is_infinitely_far_and_fails() -> None:
    drift = measure_drift(Linear(), Linear(spoil=500), noise(1000), DriftPlan((10, 100, 1000)))
    assert one(drift, "y").errors == (0.0, 0.0, math.inf)
    assert {"teacher-forced: y: level", "teacher-forced: y: growth"} == set(
        failed(drift_checks(drift, LIMITS))
    )
    text = json.dumps(drift.to_json(), allow_nan=False)
    assert json.loads(text)["rows"][2]["error"] is None


def test_a_nan_state_fails_its_block() -> None:
    drift = measure_drift(Linear(), Linear(gain=math.nan), noise(300), DriftPlan((10, 300)))
    assert one(drift, "y", block=0).errors == (math.inf, math.inf)
    checks = drift_checks(drift, LIMITS)
    assert first_failing_block(checks) == 0
    json.dumps(drift.to_json(), allow_nan=False)


class Whole(Linear):
    """Its output is one value of a whole call, that of the last position."""

    def __init__(self, decay: float) -> None:
        super().__init__(decay)
        self.io = replace(self.io, outputs=(TensorSpec("y", "float64", ("B", 1)),))

    def _prefill(self, inputs: Arrays) -> Arrays:
        return {"y": super()._prefill(inputs)["y"][:, -1:]}


def test_outputs_of_a_whole_call_are_compared_position_by_position() -> None:
    plan = DriftPlan((5, 300), window=50)
    ours = measure_drift(Whole(0.9), Whole(0.8), noise(300), plan)
    theirs = measure_drift(Linear(0.9), Linear(0.8), noise(300), plan)
    assert ours.series == theirs.series


def test_a_reference_of_zeros() -> None:
    zeros = {"x": np.zeros((2, 50))}
    same = measure_drift(Linear(), Linear(scale=2), zeros, DriftPlan((1, 50)))
    assert one(same, "y").errors == (0.0, 0.0)


# --- language models --------------------------------------------------------------------------------------


class Table(Session):
    """A language model of a few tokens: logits are a row of a table plus a fading memory of rows."""

    def __init__(self, table: np.ndarray, batch: int = 2) -> None:
        self.table = table
        tokens = len(table)
        io = IoSpec(
            (TensorSpec("tokens", "int64", ("B", "S")),),
            (TensorSpec("logits", "float64", ("B", "S", tokens)),),
            (StateSpec(0, "y", (tokens,), "float64"),),
        )
        super().__init__(io, batch)
        self.read: list[np.ndarray] = []
        self._s = np.zeros((batch, tokens))

    def _prefill(self, inputs: Arrays) -> Arrays:
        logits = []
        for t in range(inputs["tokens"].shape[1]):
            self._s = 0.8 * self._s + self.table[inputs["tokens"][:, t]]
            logits.append(self._s)
        self.read.append(inputs["tokens"])
        return {"logits": np.stack(logits, axis=1)}

    def _state(self) -> Arrays:
        return {"past_0_y": self._s.copy()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._s = value.copy()
        if not value.any():
            self.read = []


def table(seed: int = 0, tokens: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, tokens))


def prompt(length: int = 40, batch: int = 2) -> Arrays:
    return {"tokens": np.random.default_rng(1).integers(0, 7, (batch, length))}


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_kl_and_first_rank_by_hand() -> None:
    other = table() + 0.3 * table(5)
    feedback = Feedback("tokens", "logits")
    drift = measure_drift(
        Table(table()), Table(other), prompt(), DriftPlan((3, 40), feedback=feedback, window=16)
    )
    true = Table(table()).prefill(prompt())["logits"][:, 24:]
    ours = Table(other).prefill(prompt())["logits"][:, 24:]
    p, q = softmax(true), softmax(ours)
    series = one(drift, "logits")
    assert series.kl[1] == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    agree = (true.argmax(-1) == ours.argmax(-1)).mean()
    assert series.top1[1] == pytest.approx(agree)
    assert 0 < agree < 1
    assert one(drift, "y", block=0).kl == ()


def test_kl_of_a_common_offset_is_zero() -> None:
    drift = measure_drift(
        Table(table()), Table(table() + 3), prompt(), DriftPlan((40,), feedback=Feedback("tokens", "logits"))
    )
    assert one(drift, "logits").kl == pytest.approx((0.0,), abs=1e-12)
    assert one(drift, "logits").top1 == (1.0,)
    assert one(drift, "logits").errors[0] > 0.1


def test_kl_has_a_limit() -> None:
    drift = measure_drift(
        Table(table()),
        Table(1.5 * table()),
        prompt(),
        DriftPlan((40,), feedback=Feedback("tokens", "logits")),
    )
    names = failed(drift_checks(drift, DriftLimits(output=1.0, state=1.0, kl=1e-3)))
    assert names == ["teacher-forced: logits: KL", "free-running: logits: KL"]


def test_free_running_reads_what_the_candidate_chose() -> None:
    other = table() + 0.1 * table(5)
    reference, candidate = Table(table()), Table(other)
    greedy = Feedback("tokens", "logits", temperature=0, prompt=5)
    drift = measure_drift(
        reference, candidate, prompt(), DriftPlan((10,), free_horizons=(10, 60), feedback=greedy)
    )
    read = np.concatenate(reference.read, axis=1)
    assert np.array_equal(read[:, :5], prompt()["tokens"][:, :5])
    ours, true = (
        Table(other).prefill({"tokens": read})["logits"],
        Table(table()).prefill({"tokens": read})["logits"],
    )
    assert np.array_equal(read[:, 5:], ours.argmax(-1)[:, 4:-1])
    series = one(drift, "logits", FREE)
    assert series.horizons == (10, 60)
    assert series.errors[1] == pytest.approx(relative(ours, true))
    assert isinstance(drift.free_running, FreeRun)
    other_rank = ours.argmax(-1) != true.argmax(-1)
    expected = tuple(int(row.argmax()) + 1 if row.any() else None for row in other_rank)
    assert drift.free_running.first_other == expected
    assert any(expected)


def test_equal_models_never_part() -> None:
    drift = measure_drift(
        Table(table()), Table(table()), prompt(), DriftPlan((50,), feedback=Feedback("tokens", "logits"))
    )
    assert isinstance(drift.free_running, FreeRun)
    assert drift.free_running.first_other == (None, None)
    assert one(drift, "logits", FREE).errors == (0.0,)
    assert drift.to_json()["free_running"]["first_other"] == [None, None]


def test_the_seed_decides_what_is_drawn() -> None:
    def drawn(seed: int) -> np.ndarray:
        reference = Table(table())
        feedback = Feedback("tokens", "logits", seed=seed, prompt=3)
        measure_drift(reference, Table(table()), prompt(), DriftPlan((80,), feedback=feedback))
        return np.concatenate(reference.read, axis=1)

    assert np.array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    assert len(np.unique(drawn(0)[:, 3:])) > 1


def test_draws_follow_the_softmax() -> None:
    # A candidate whose memory is overruled by one token's offset: the share drawn is its probability.
    fixed = np.tile(np.log([0.5, 0.3, 0.2]) * 0.2, (3, 1))  # Σ 0.8ᵗ = 5 makes it log p in the end
    reference = Table(fixed, batch=1)
    measure_drift(
        reference,
        Table(fixed, batch=1),
        {"tokens": np.zeros((1, 9), np.int64)},
        DriftPlan((4000,), feedback=Feedback("tokens", "logits")),
    )
    shares = np.bincount(np.concatenate(reference.read, axis=1)[0, 100:]) / 3900
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_broken_logits_still_choose_tokens() -> None:
    broken = table()
    broken[3] = np.nan
    drift = measure_drift(
        Table(table()), Table(broken), prompt(), DriftPlan((5, 40), feedback=Feedback("tokens", "logits"))
    )
    assert one(drift, "logits", FREE).errors[1] == math.inf
    assert one(drift, "logits", FREE).kl[1] == math.inf
    json.dumps(drift.to_json(), allow_nan=False)


def test_without_feedback_there_is_a_reason() -> None:
    drift = measure_drift(Linear(), Linear(), noise(10), DriftPlan((10,)))
    assert isinstance(drift.free_running, str)
    assert "x float64 (B, S)" in drift.free_running
    assert {s.mode for s in drift.series} == {TEACHER}
    feedback = Feedback("tokens", "logits")
    skipped = measure_drift(
        Table(table()), Table(table()), prompt(), DriftPlan((10,), free_horizons=(), feedback=feedback)
    )
    assert skipped.free_running == "not asked for"


def test_only_language_models_have_a_natural_feedback() -> None:
    assert token_feedback(Table(table()).io, 7) == Feedback("tokens", "logits")
    assert token_feedback(Table(table()).io, 8) is None  # classes of something else
    assert token_feedback(Table(table()).io, None) is None
    assert token_feedback(Linear().io, 7) is None


# --- real models ------------------------------------------------------------------------------------------

HORIZONS = (1, 10, 100, 400)


def tokens(length: int, batch: int = 2) -> Arrays:
    return {"tokens": np.random.default_rng(3).integers(0, 256, (batch, length))}


@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_fp32_passes_the_limits_of_fp32(
    kind: str, small_loaded: checkpoint.Loaded, small_export: Path
) -> None:
    candidate: Session = (
        TorchSession(small_loaded, 2, "float32")
        if kind == "torch"
        else OrtSession(small_export, 2, threads=1)
    )
    reference = TorchSession(small_loaded, 2, "float64")
    feedback = Feedback("tokens", "logits")
    drift = measure_drift(
        reference, candidate, tokens(400), DriftPlan(HORIZONS, feedback=feedback, free_horizons=(1, 40))
    )
    assert failed(drift_checks(drift, DRIFT_LIMITS["fp32"])) == []
    assert all(0 < e < 1e-5 for e in one(drift, "logits").errors)
    assert {s.block for s in drift.series} == {None, 0, 1, 2}
    assert token_feedback(OrtSession(small_export, 2).io, 256) == feedback


class Shifted(TorchSession):
    """Tells its states in another gauge: (C·eᵃ, n·eᵃ, m − a) is the same state."""

    def _state(self) -> Arrays:
        a = 2.5
        factor = {"C": math.exp(a), "n": math.exp(a), "c": math.exp(a)}
        plain = super()._state()
        kinds = {s.past: s.kind for s in self.io.states}
        return {k: v - a if kinds[k] == "m" else v * factor.get(kinds[k], 1.0) for k, v in plain.items()}


def test_another_gauge_is_no_error(small_loaded: checkpoint.Loaded) -> None:
    # Windows that begin with the stream: nothing is put into the candidate, whose eps knows its gauge.
    drift = measure_drift(
        TorchSession(small_loaded, 2), Shifted(small_loaded, 2), tokens(64), DriftPlan((1, 10, 64), window=64)
    )
    assert max(max(s.errors) for s in drift.series) < 1e-12


@pytest.fixture(scope="module")
def long_memory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float, float], checkpoint.Loaded]:
    """forget bias, factor of everything recurrent → a model with mLSTM blocks and one sLSTM."""

    def make(forget: float, recurrent: float = 1.0) -> checkpoint.Loaded:
        config = models.lm_config()
        model = models.build(config)
        for block in (0, 2):
            gate = model.xlstm_block_stack.blocks[block].xlstm.mlstm_cell.fgate
            gate.weight.data.zero_()
            gate.bias.data.fill_(forget)
        model.xlstm_block_stack.blocks[1].xlstm.slstm_cell._recurrent_kernel_.data.mul_(recurrent)
        folder = tmp_path_factory.mktemp("long") / "model"
        return checkpoint.load_checkpoint(models.write(folder, config, model))

    return make


def test_a_forget_gate_one_percent_off_grows(
    long_memory: Callable[[float, float], checkpoint.Loaded],
) -> None:
    reference, candidate = long_memory(10.0, 1.0), long_memory(9.9, 1.0)
    sessions = [TorchSession(x, 1, "float32") for x in (reference, candidate)]
    drift = measure_drift(*sessions, tokens(3000, 1), DriftPlan((1, 100, 500, 3000)))
    generous = DriftLimits(output=1.0, state=1.0, kl=1.0)
    checks = drift_checks(drift, generous)
    assert "teacher-forced: block 0 states: growth" in failed(checks)
    assert first_failing_block(checks) == 0


def test_a_recurrent_matrix_one_percent_off_fails_its_level(
    long_memory: Callable[[float, float], checkpoint.Loaded],
) -> None:
    reference, candidate = long_memory(3.0, 1.0), long_memory(3.0, 1.01)
    sessions = [TorchSession(x, 1, "float64") for x in (reference, candidate)]
    drift = measure_drift(*sessions, tokens(100, 1), DriftPlan((10, 100)))
    checks = drift_checks(drift, DRIFT_LIMITS["fp32"])
    assert first_failing_block(checks) == 1  # the block before it is untouched
    assert "teacher-forced: logits: level" in failed(checks)


class LastOnly(TorchSession):
    """Like an export with --last-logits: logits of a call's last position."""

    def __init__(self, loaded: checkpoint.Loaded, batch: int) -> None:
        super().__init__(loaded, batch, "float32")
        self.io = replace(self.io, outputs=(TensorSpec("logits", "float32", ("B", 1, 256)),))

    def _prefill(self, inputs: Arrays) -> Arrays:
        return {name: x[:, -1:] for name, x in super()._prefill(inputs).items()}


def test_logits_of_the_last_position_are_compared_at_each(small_loaded: checkpoint.Loaded) -> None:
    feedback = Feedback("tokens", "logits", temperature=0)
    plan = DriftPlan((3, 60), feedback=feedback, window=20)
    reference = TorchSession(small_loaded, 2)
    ours, theirs = (
        measure_drift(reference, candidate, tokens(60), plan)
        for candidate in (LastOnly(small_loaded, 2), TorchSession(small_loaded, 2, "float32"))
    )
    for a, b in zip(ours.series, theirs.series, strict=True):
        assert a.name == b.name
        assert 0 < max(a.errors) < 1e-5
        assert a.top1 == b.top1
    assert ours.free_running == theirs.free_running


@pytest.mark.slow
def test_an_export_of_the_last_logits_only(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    last = OrtSession(
        trace.export(small_loaded, tmp_path / "last", ExportOptions(last_logits=True)), 2, threads=1
    )
    drift = measure_drift(TorchSession(small_loaded, 2), last, tokens(60), DriftPlan((3, 60), window=20))
    assert 0 < max(one(drift, "logits").errors) < 1e-5
