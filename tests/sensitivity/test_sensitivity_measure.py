from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sensitivity_case as case

from xlstm_export import runfolder
from xlstm_export.errors import BuildError, InputError
from xlstm_export.measure import data as evaluation
from xlstm_export.measure.data import EvalData
from xlstm_export.measure.drift import measure_drift
from xlstm_export.measure.drift_plan import DriftPlan
from xlstm_export.quantize.quantize import quantize
from xlstm_export.quantize.recipe import Recipe, Rule
from xlstm_export.sensitivity import measure as sensitivity_measure
from xlstm_export.sensitivity.measure import (
    Measured,
    Replay,
    Setup,
    data_hash,
    horizons,
    measure,
    record,
    stretch,
)
from xlstm_export.sessions import OrtSession

WEIGHTS = Recipe("int8-wo")


@pytest.fixture(scope="module")
def data(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalData:
    path = case.write_targets(small_export, tmp_path_factory.mktemp("data") / "data.npz")
    return evaluation.load(path, runfolder.read_io(small_export))


@pytest.fixture(scope="module")
def setup(small_export: Path, data: EvalData, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Recorded, and ready to measure."""
    folder = tmp_path_factory.mktemp("setup")
    (folder / "scratch").mkdir()
    setup = Setup(
        str(small_export), str(folder / "r.npz"), data, None, 128, seed=1, scratch=str(folder / "scratch")
    )
    record(setup)
    return setup


def test_a_replayed_reference_is_the_live_one(setup: Setup, small_export: Path, tmp_path: Path) -> None:
    out = quantize(small_export, WEIGHTS, out=tmp_path / "wo")
    candidate = OrtSession(out, 1, 1, rounding=True)
    drifts = [
        measure_drift(reference, candidate, stretch(setup), DriftPlan(horizons(setup.horizon)))
        for reference in (
            OrtSession(small_export, 1, 1, rounding=True),
            Replay(candidate.io, 1, Path(setup.reference)),
        )
    ]
    assert drifts[0] == drifts[1]
    assert drifts[0].series[0].errors[-1] > 0.0


def test_measured_by_hand(setup: Setup, small_export: Path, tmp_path: Path) -> None:
    found = measure(setup, WEIGHTS)
    out = quantize(small_export, WEIGHTS, out=tmp_path / "wo")
    logits = evaluation.stream(OrtSession(out, 1, 1, rounding=True), setup.data.inputs)
    assert found.metric == setup.data.score(logits)
    tokens = {name: x[:, : setup.horizon] for name, x in stretch(setup).items()}
    a, b = (
        OrtSession(f, 1, 1, rounding=True).prefill(tokens)["logits"].astype(float)
        for f in (out, small_export)
    )
    # The window of a short horizon is all of it.
    assert found.drift == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-4)
    assert found.worst_state.startswith("block ")
    assert found.state_drift > 0.0


def test_nothing_quantized_at_fp32_is_the_reference(setup: Setup) -> None:
    found = measure(setup, Recipe("fp32"))
    assert found.metric == record(setup)
    assert (found.drift, found.state_drift, found.growth) == (0.0, 0.0, 1.0)


def test_bytes_are_those_of_the_weights(setup: Setup, small_export: Path) -> None:
    whole, narrow = measure(setup, Recipe("fp32")), measure(setup, WEIGHTS)
    size = (small_export / runfolder.MODEL_DATA).stat().st_size
    assert abs(whole.bytes - size) < 0.05 * size  # small constants stand in the graph itself
    assert narrow.bytes < whole.bytes


def test_a_candidate_is_gone_afterwards(setup: Setup) -> None:
    measure(setup, WEIGHTS)
    assert setup.scratch is not None
    assert not list(Path(setup.scratch).iterdir())


def test_what_cannot_be_built_is_a_finding(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise BuildError("no such kernel", "hint")

    monkeypatch.setattr(sensitivity_measure, "quantize", refuse)
    found = measure(setup, WEIGHTS)
    assert found.failure == "no such kernel"
    assert found.metric == math.inf


def test_what_is_wrong_with_the_export_is_an_error(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run folder"):
        measure(replace(setup, folder=str(tmp_path)), WEIGHTS)


def test_a_broken_candidate_is_no_number(setup: Setup) -> None:
    scoring = replace(setup.data.scoring, of=lambda *given: math.nan)
    nan = replace(setup, data=replace(setup.data, scoring=scoring))
    found = measure(nan, Recipe("fp16", base="fp16", rules=(Rule(".*", "float"),)))
    assert math.isnan(found.metric)
    assert Measured.from_json(found.to_json()).metric == math.inf  # JSON knows neither; both are too much


def test_json_round_trip() -> None:
    found = Measured(1.5, 0.1, math.inf, "block 0 C", 1.0, 10)
    assert Measured.from_json(found.to_json()) == found


def test_the_seed_chooses_the_stretch(setup: Setup) -> None:
    tokens = setup.data.inputs["tokens"]
    stretches = [stretch(replace(setup, seed=seed))["tokens"] for seed in range(4)]
    assert len({x.tobytes() for x in stretches}) > 1
    for x in stretches:
        windows = np.lib.stride_tricks.sliding_window_view(tokens[0], setup.horizon)
        assert (windows == x[0, : setup.horizon]).all(1).any()  # one piece of the data, in order


def test_the_hash_sees_inputs_and_targets(data: EvalData, small_export: Path, tmp_path: Path) -> None:
    io = runfolder.read_io(small_export)
    path = case.write_targets(small_export, tmp_path / "again.npz")
    assert data_hash(evaluation.load(path, io), io) == data_hash(data, io)
    arrays = dict(np.load(path))
    arrays["target"][0, 7, 3] += 0.01
    np.savez(tmp_path / "target.npz", **arrays)
    assert data_hash(evaluation.load(tmp_path / "target.npz", io), io) != data_hash(data, io)
    arrays["tokens"][0, 7] ^= 1
    np.savez(tmp_path / "tokens.npz", **arrays)
    hashes = {data_hash(evaluation.load(tmp_path / f"{n}.npz", io), io) for n in ("target", "tokens")}
    assert len(hashes) == 2
