"""Recorded streams: a right session passes, and each planted fault fails in the check made for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xlstm_export.board import replay
from xlstm_export.bundle import recordings as goldens
from xlstm_export.errors import InputError
from xlstm_export.inputs import Arrays
from xlstm_export.load import checkpoint
from xlstm_export.options import BundleOptions, Context
from xlstm_export.sessions import OrtSession, Session
from xlstm_export.specs import TensorSpec

HORIZON = 700


@pytest.fixture(scope="module")
def recorded(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    goldens.write_goldens(
        small_export, small_loaded, folder, BundleOptions(horizon=HORIZON), Context(threads=1)
    )
    return folder


class Faulty(Session):
    """A session with a fault planted in one of its methods."""

    def __init__(self, session: Session, fault: str) -> None:
        super().__init__(session.io, session.batch)
        self._session, self._fault, self._count = session, fault, 0

    def _prefill(self, inputs: Arrays) -> Arrays:
        if self._fault == "prefill forgets":
            self._session.reset()
        outputs = self._session.prefill(inputs)
        length = next(iter(inputs.values())).shape[1]
        self._count += length
        if self._fault == "scaled":
            return {name: value * 1.001 for name, value in outputs.items()}
        if self._fault == "drifts":
            return {name: value * (1 + 1e-7 * self._count) for name, value in outputs.items()}
        if self._fault == "one position":
            for value in outputs.values():
                value[:, length // 2] *= -1
        return outputs

    def _step(self, inputs: Arrays) -> Arrays:
        if self._fault == "step forgets":
            self._session.reset()
        self._count += 1
        outputs = self._session.step(inputs)
        if self._fault == "nan":
            return {name: value * np.nan for name, value in outputs.items()}
        return outputs

    def _state(self) -> Arrays:
        state = self._session.state()
        if self._fault == "wrong state":
            return {name: value * 1.01 if name.endswith("_C") else value for name, value in state.items()}
        return state

    def _store(self, name: str, value: np.ndarray) -> None:
        if self._fault != "does not resume":
            self._session.set_state({**self._session.state(), name: value})

    def _clear(self, rows: np.ndarray) -> None:
        # The first call finds a fresh session; what is judged is the one in mid-stream.
        if self._fault != "does not reset":
            self._session.reset(rows)

    def _close(self) -> None:
        self._session.close()


def failed(recorded: Path, open_session: Callable[[], Session], backend: str = "onnxruntime") -> set[str]:
    return {check.name for check in replay.replay(recorded, open_session, backend) if not check.passed}


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_right_session_passes(recorded: Path, small_export: Path, backend: str) -> None:
    checks = replay.replay(recorded, lambda: OrtSession(small_export, 1, 1), backend)
    assert [check.name for check in checks if not check.passed] == []
    assert len({check.name for check in checks}) == len(checks) == 12


FAULTS = {
    "scaled": {"prefill, this export", "pieces, this export"},
    "one position": {"prefill, this export"},
    "prefill forgets": {"pieces, this export"},
    "step forgets": {"steps, this export", "step by step"},
    "nan": {"steps, this export", "stream, the model in float64"},
    "wrong state": {"prefill, this export: states", "end, this export: states", "reset: states"},
    "does not resume": {"resumed from a file"},
    "does not reset": {"reset", "reset: states"},
    "drifts": {"drift"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(recorded: Path, small_export: Path, fault: str) -> None:
    found = failed(recorded, lambda: Faulty(OrtSession(small_export, 1, 1), fault))
    assert FAULTS[fault] <= found, found


def test_a_shorter_horizon_makes_fewer_calls(recorded: Path, small_export: Path) -> None:
    assert replay.read_goldens(recorded, "onnxruntime").until(150) == 1 + 22
    checks = replay.replay(recorded, lambda: OrtSession(small_export, 1, 1), "onnxruntime", horizon=150)
    assert all(check.passed for check in checks)
    assert "end, this export: states" not in {check.name for check in checks}


def test_calls_cover_the_stream() -> None:
    for length in (1, 5, 128, 129, 160, 300, 361, 700, 2048):
        calls = goldens.call_lengths(length)
        assert sum(calls) == length
        assert min(calls) >= 1
    assert goldens.call_lengths(700)[:2] == [128, 1]


def test_kept_positions() -> None:
    small, large = TensorSpec("y", "float32", ("B", "S", 8)), TensorSpec("y", "float32", ("B", "S", 50304))
    assert replay.kept_positions(256, small) == list(range(256))
    assert replay.kept_positions(3, large) == [0, 1, 2]
    for length in (17, 64, 256):
        kept = replay.kept_positions(length, large)
        assert (kept[0], kept[-1], len(set(kept))) == (0, length - 1, 4)


@pytest.mark.parametrize("name", ["goldens.npz", "goldens.json"])
def test_damaged_goldens(recorded: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "goldens").mkdir()
    for path in (recorded / "goldens").iterdir():
        content = path.read_bytes()
        if path.name == name:
            content = content[: len(content) // 2]
        (tmp_path / "goldens" / path.name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        replay.read_goldens(tmp_path, "onnxruntime")
    with pytest.raises(InputError):
        replay.read_goldens(tmp_path / "none", "onnxruntime")
