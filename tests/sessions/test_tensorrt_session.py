"""The TensorRT session against ONNX Runtime's, on stand-ins that are stricter than TensorRT and CUDA."""

from __future__ import annotations

import gc
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest

from xlstm_export.board.build import profile_shapes
from xlstm_export.distance import compare_states, difference
from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.inputs import cut
from xlstm_export.runfolder import MODEL, read_io
from xlstm_export.sessions import OrtSession, load_state, save_state
from xlstm_export.sessions.cpu.fused import states_in_place
from xlstm_export.sessions.cuda import Cuda
from xlstm_export.sessions.tensorrt import Device, Engine, TensorRtSession

LONGEST = 16
SAME = 1e-6


class Board:
    """One device with an engine of the small export on it."""

    def __init__(self, export: Path, folder: Path, batch: int = 1) -> None:
        self.io = read_io(export)
        shapes = profile_shapes(self.io, LONGEST, batch)
        self.engine = fake_tensorrt.write_engine(folder / "model.engine", export / MODEL, shapes)
        self.cudart = fake_tensorrt.Cudart()
        self.trt = fake_tensorrt.TensorRt(self.cudart)
        self.batch = batch

    def session(
        self, batch: int | None = None, *, graphs: bool = True, in_place: frozenset[str] = frozenset()
    ) -> TensorRtSession:
        return TensorRtSession(
            Engine(self.engine, in_place=in_place),
            self.io,
            batch or self.batch,
            graphs=graphs,
            device=Device(self.trt, Cuda(self.cudart)),
        )


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(5).integers(0, 256, (batch, length))}


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("aliased", [False, True], ids=["ping-pong", "in place"])
@pytest.mark.parametrize("pieces", [[7, 1, 1, 1, 40, 1, 16, 1], [1, 1, 1, 33]])
def test_equal_to_onnxruntime(
    small_export: Path, tmp_path: Path, pieces: list[int], graphs: bool, aliased: bool
) -> None:
    """Prefill longer than the profile, single steps in both directions of the swap, in any order."""
    board = Board(small_export, tmp_path, batch=2)
    model = load_graph(small_export / MODEL)
    names = states_in_place(model, {s.past: s.present for s in board.io.states}) if aliased else frozenset()
    assert len(names) == (10 if aliased else 0)
    ours = board.session(graphs=graphs, in_place=names)
    theirs = OrtSession(small_export, 2, 1, fused=False)
    stream = tokens(2, sum(pieces))
    start = 0
    for piece in pieces:
        part = cut(stream, board.io, start, start + piece)
        call = "step" if piece == 1 else "prefill"
        found, expected = getattr(ours, call)(part)["logits"], getattr(theirs, call)(part)["logits"]
        assert difference(found, expected).relative_l2 <= SAME, start
        start += piece
    for name, error in compare_states(ours.state(), theirs.state(), board.io.states).items():
        assert error.relative_l2 <= SAME, name


def test_a_context_has_the_memory_of_its_own_profile(small_export: Path, tmp_path: Path) -> None:
    """By default the one for steps would have as much as the one for prefill."""
    board = Board(small_export, tmp_path)
    with board.session():
        wanted = fake_tensorrt.TensorRt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        assert board.cudart.strategies == [wanted, wanted]


def test_steps_allocate_nothing_and_are_captured_once(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    session = board.session()
    stream = tokens(1, 12)
    session.step(cut(stream, board.io, 0, 1))
    before = board.cudart.memory.allocations
    for place in range(1, 12):
        session.step(cut(stream, board.io, place, place + 1))
    assert board.cudart.memory.allocations == before
    assert board.cudart.launches == 12
    assert len(board.cudart.graphs) == 2  # one for each direction of the swap


def test_one_row_is_reset_on_the_device(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path, batch=3)
    session = board.session()
    stream = tokens(3, 5)
    first = session.prefill(stream)["logits"]
    before = session.state()
    session.reset(rows=[1])
    after = session.state()
    for name in before:
        assert not after[name][1].any()
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
    again = session.prefill(stream)["logits"]
    assert difference(again[1], first[1]).relative_l2 <= SAME
    assert difference(again[0], first[0]).relative_l2 > 1e-3
    with pytest.raises(UsageError, match="no batch row 3"):
        session.reset(rows=[3])


def test_a_state_is_saved_and_loaded(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    session = board.session()
    stream = tokens(1, 30)
    session.prefill(cut(stream, board.io, 0, 11))
    save_state(session, tmp_path / "state.npz")
    expected = session.prefill(cut(stream, board.io, 11, 30))["logits"]
    fresh = board.session()
    load_state(fresh, tmp_path / "state.npz")
    found = fresh.prefill(cut(stream, board.io, 11, 30))["logits"]
    np.testing.assert_array_equal(found, expected)


def test_what_does_not_fit_is_refused(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    with pytest.raises(InputError, match="takes 1 streams, not 2") as caught:
        board.session(batch=2)
    assert caught.value.hint == "python3 deploy.py build --max-batch 2"
    board.engine.write_bytes(b"\0 not an engine")
    with pytest.raises(BuildError, match="does not accept"):
        board.session()


def test_errors_of_cuda_say_which_call(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    board.cudart.fail["cudaMalloc"] = 2
    with pytest.raises(BuildError, match=r"cudaMalloc failed: out of memory \(2\)"):
        board.session()


def test_a_step_is_one_launch_with_its_copies(
    small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once captured, nothing is enqueued beside the graph."""
    board = Board(small_export, tmp_path)
    stream = tokens(1, 6)
    with board.session() as session:
        for place in range(2):
            session.step(cut(stream, board.io, place, place + 1))
        for name in ("cudaMemcpyAsync", "cudaMemsetAsync", "cudaMalloc"):
            monkeypatch.delattr(fake_tensorrt.Cudart, name)
        monkeypatch.delattr(fake_tensorrt.Context, "execute_async_v3")
        for place in range(2, 6):
            session.step(cut(stream, board.io, place, place + 1))
        assert board.cudart.launches == 6


def test_what_a_step_returned_outlives_the_session(small_export: Path, tmp_path: Path) -> None:
    """The next step overwrites it; closing the session does not free it under the caller."""
    board = Board(small_export, tmp_path)
    with board.session() as session:
        logits = session.step(tokens(1, 1))["logits"]
        before = logits.copy()
    gc.collect()
    assert board.cudart.left() == {"pinned blocks": 1}
    np.testing.assert_array_equal(logits, before)
    del logits
    gc.collect()
    assert board.cudart.left() == {}


@pytest.mark.parametrize(
    "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"]
)
def test_steps_that_cannot_be_captured_are_enqueued(
    small_export: Path, tmp_path: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The C++ runner does the same; it is said once, and nothing is lost or left."""
    board = Board(small_export, tmp_path)
    stream = tokens(1, 6)
    pieces = [cut(stream, board.io, place, place + 1) for place in range(6)]
    with board.session(graphs=False) as plain:
        expected = [plain.step(piece)["logits"].copy() for piece in pieces]
    board.cudart.fail[call] = 2
    with board.session() as session:
        for piece, logits in zip(pieces, expected, strict=True):
            np.testing.assert_array_equal(session.step(piece)["logits"], logits)
    gc.collect()
    assert (board.cudart.launches, board.cudart.forgotten, board.cudart.left()) == (0, 1, {})
    (said,) = caplog.messages
    assert said.startswith("steps are enqueued layer by layer, without a CUDA graph: " + call)


# --- What is given back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("aliased", [False, True], ids=["ping-pong", "in place"])
def test_closing_frees_all_that_was_made(
    small_export: Path, tmp_path: Path, graphs: bool, aliased: bool
) -> None:
    board = Board(small_export, tmp_path, batch=2)
    names = frozenset(s.past for s in board.io.states if s.kind != "conv") if aliased else frozenset()
    stream = tokens(2, 22)
    with board.session(graphs=graphs, in_place=names) as session:
        session.prefill(cut(stream, board.io, 0, 20))
        for place in (20, 21):
            session.step(cut(stream, board.io, place, place + 1))
        assert len(board.cudart.executables) == (2 if graphs else 0)
        assert len(board.cudart.memory.blocks) == board.cudart.memory.allocations
        assert len(board.cudart.contexts) == 2
    gc.collect()
    assert board.cudart.left() == {}
    session.close()  # once more is fine
    with pytest.raises(UsageError, match="the session is closed"):
        session.step(cut(stream, board.io, 0, 1))


def test_sessions_free_only_their_own(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    stream = tokens(1, 3)
    first = board.session()
    expected = first.prefill(stream)["logits"]
    before = {**board.cudart.left(), "blocks": board.cudart.memory.allocations}
    with board.session() as second:
        np.testing.assert_array_equal(second.prefill(stream)["logits"], expected)
    gc.collect()
    assert board.cudart.left() == before
    first.reset()
    np.testing.assert_array_equal(first.prefill(stream)["logits"], expected)


@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_opening_that_fails_frees_what_it_made(small_export: Path, tmp_path: Path, number: int) -> None:
    board = Board(small_export, tmp_path)
    board.cudart.fail_at["cudaMalloc"] = number
    with pytest.raises(BuildError, match="cudaMalloc failed"):
        board.session()
    gc.collect()
    assert board.cudart.memory.allocations == number - 1
    assert board.cudart.left() == {}


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("create_execution_context", 1),
        ("create_execution_context", 2),
        ("cudaStreamCreate", 1),
        ("cudaMemsetAsync", 3),
    ],
)
def test_any_call_that_fails_while_opening(
    small_export: Path, tmp_path: Path, call: str, number: int
) -> None:
    board = Board(small_export, tmp_path)
    board.cudart.fail_at[call] = number
    with pytest.raises(BuildError):
        board.session()
    gc.collect()
    assert board.cudart.left() == {}


def test_an_engine_for_fewer_streams_is_given_back(small_export: Path, tmp_path: Path) -> None:
    board = Board(small_export, tmp_path)
    with pytest.raises(InputError, match="takes 1 streams"):
        board.session(batch=2)
    gc.collect()
    assert board.cudart.left() == {}


def test_closing_goes_on_after_a_failure(small_export: Path, tmp_path: Path) -> None:
    """CUDA reports an error again at every later call: the rest is given back all the same."""
    board = Board(small_export, tmp_path)
    session = board.session()
    board.cudart.fail["cudaFree"] = 2
    with pytest.raises(BuildError, match="cudaFree failed"):
        session.close()
    gc.collect()
    assert board.cudart.left() == {}
    session.close()


def test_tokens_beyond_the_vocabulary(small_export: Path, tmp_path: Path) -> None:
    """A device reads past the table without a word, so nothing may get there."""
    board = Board(small_export, tmp_path)
    session = TensorRtSession(
        Engine(board.engine),
        board.io,
        vocab_size=256,
        device=Device(board.trt, Cuda(board.cudart)),
    )
    with session:
        session.prefill({"tokens": [[0, 255]]})
        with pytest.raises(InputError, match="holds 256 at row 0, position 1"):
            session.prefill({"tokens": [[0, 256]]})
