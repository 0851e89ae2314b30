"""Sessions: state stays between calls, whoever runs the model, and nothing wrong is taken silently."""

from __future__ import annotations

import gc
import json
import random
import shutil
import weakref
from pathlib import Path
from typing import IO, Any

import models
import numpy as np
import pytest
import torch

from xlstm_export import distance as compare
from xlstm_export import sessions
from xlstm_export.errors import ExportError, InputError, UsageError
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import OrtSession, Session, TorchSession, load_state, save_state
from xlstm_export.trace import export as trace

BATCH = 2
LIMITS = {"output": 5e-6, "state": 1e-5}  # those of verify: FP32 rounding, measured 5e-7
KINDS = ["torch64", "torch32", "ort"]


@pytest.fixture
def make(small_loaded: checkpoint.Loaded, small_export: Path) -> Any:
    """kind, batch → a session of the small model."""

    def make(kind: str, batch: int = BATCH) -> Session:
        if kind == "ort":
            return OrtSession(small_export, batch, threads=1)
        return TorchSession(small_loaded, batch, {"torch64": "float64", "torch32": "float32"}[kind])

    return make


def tokens(length: int, batch: int = BATCH, seed: int = 0) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(seed).integers(0, 256, (batch, length))}


def cut(inputs: dict[str, np.ndarray], start: int, end: int) -> dict[str, np.ndarray]:
    return {name: x[:, start:end] for name, x in inputs.items()}


def steps(session: Session, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of all positions, one by one."""
    length = inputs["tokens"].shape[1]
    return np.concatenate([session.step(cut(inputs, t, t + 1))["logits"].copy() for t in range(length)], 1)


def assert_same_output(found: np.ndarray, expected: np.ndarray) -> None:
    assert compare.difference(found, expected).relative_l2 <= LIMITS["output"]


def assert_same_state(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], session: Session
) -> None:
    for name, difference in compare.compare_states(found, expected, session.io.states).items():
        assert difference.relative_l2 <= LIMITS["state"], name


# --- What all kinds of session share --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_step_by_step(make: Any, kind: str) -> None:
    inputs = tokens(70)  # across a chunk border
    at_once, one_by_one = make(kind), make(kind)
    assert_same_output(steps(one_by_one, inputs), at_once.prefill(inputs)["logits"])
    assert_same_state(one_by_one.state(), at_once.state(), at_once)


@pytest.mark.parametrize("kind", ["torch32", "ort"])
def test_kinds_agree(make: Any, kind: str) -> None:
    reference, session = make("torch64"), make(kind)
    inputs = tokens(40)
    assert_same_output(session.prefill(inputs)["logits"], reference.prefill(inputs)["logits"])
    assert_same_output(session.step(tokens(1))["logits"], reference.step(tokens(1))["logits"])
    assert_same_state(session.state(), reference.state(), session)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_state_travels_between_kinds(make: Any, source: str, target: str) -> None:
    """A stream begun in one session goes on in any other as if nothing had happened."""
    inputs = tokens(50)
    whole = make("torch64").prefill(inputs)["logits"]
    first, second = make(source), make(target)
    second.prefill(tokens(9, seed=1))  # something else was there before
    first.prefill(cut(inputs, 0, 30))
    second.set_state(first.state())
    assert_same_output(second.prefill(cut(inputs, 30, 49))["logits"], whole[:, 30:49])
    second_step = second.step(cut(inputs, 49, 50))["logits"]
    assert_same_output(second_step, whole[:, 49:])


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_state_is_zero(make: Any, kind: str) -> None:
    session = make(kind)
    state = session.state()
    assert sorted(state) == sorted(s.past for s in session.io.states)
    assert all(not value.any() for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_a_copy_and_is_copied(make: Any, kind: str) -> None:
    session = make(kind)
    session.prefill(tokens(5))
    state = session.state()
    kept = {name: value.copy() for name, value in state.items()}
    session.step(tokens(1))
    session.step(tokens(1))
    assert all(np.array_equal(state[name], kept[name]) for name in kept)
    session.set_state(state)
    for value in state.values():
        value[...] = np.nan
    assert all(np.array_equal(value, kept[name]) for name, value in session.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_reset_leaves_nothing_behind(make: Any, kind: str) -> None:
    session = make(kind)
    first = session.prefill(tokens(20))["logits"]
    session.reset()
    assert all(not value.any() for value in session.state().values())
    assert np.array_equal(session.prefill(tokens(20))["logits"], first)
    session.step(tokens(1))
    session.reset()
    assert_same_output(steps(session, tokens(20)), first)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_of_single_rows(make: Any, kind: str) -> None:
    """The reset row starts afresh, the others go on."""
    session, fresh, untouched = make(kind, 3), make(kind, 3), make(kind, 3)
    before, after = tokens(20, 3), tokens(10, 3, seed=1)
    for one in (session, untouched):
        one.prefill(before)
    session.reset(rows=[1])
    state = session.state()
    assert all(not value[1].any() and value[0].any() and value[2].any() for value in state.values())
    found = session.prefill(after)["logits"]
    assert_same_output(found[1], fresh.prefill(after)["logits"][1])
    assert_same_output(found[[0, 2]], untouched.prefill(after)["logits"][[0, 2]])
    session.reset(rows=[])
    assert session.state()["past_0_C"].any()
    session.reset(rows=[0, 1, 2])
    assert all(not value.any() for value in session.state().values())


@pytest.mark.parametrize("kind", ["torch32", "ort"])
@pytest.mark.parametrize(
    "rows",
    [
        *(0, -1, np.int32(1), slice(None), slice(1, None), slice(5, 9), slice(None, None, -2), range(1, 3)),
        *([], [2, 0], (0, 1), [-1, -3], [1, 1], [True, False, True], [False] * 3),
        *(np.array(2), np.array([0, 2]), np.array([1], np.uint8), np.array([[0], [1]])),
        *(np.array([False, True, True]), np.arange(3)[:0]),
    ],
    ids=repr,
)
def test_reset_takes_what_numpy_takes_as_an_index(make: Any, kind: str, rows: Any) -> None:
    """The rows that NumPy itself would assign zeros to are zero afterwards, and no others."""
    session = make(kind, 3)
    session.prefill(tokens(4, 3))
    expected = session.state()
    for value in expected.values():
        value[list(rows) if isinstance(rows, tuple | range) else rows] = 0
    session.reset(rows)
    assert all(np.array_equal(value, expected[name]) for name, value in session.state().items())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, -3], "no batch row -3"),
        ([0, 2], "no batch row 2"),
        ([0, 100], "no batch row 100"),
        (2, "no batch row 2"),
        (np.array([[0], [7]]), "no batch row 7"),
        (np.array([2**63], np.uint64), "no batch row 9223372036854775808"),
        ([True], r"mask of rows has shape \[1\], expected \[2\]"),
        (np.ones(3, bool), r"mask of rows has shape \[3\], expected \[2\]"),
        (True, r"mask of rows has shape \[\]"),
        ([0.0], "are float64, which is no index"),
        (np.zeros(0), "are float64, which is no index"),
        (1.0, "are no index"),
        ("0", "which is no index"),
        ([None], "are object, which is no index"),
        ([[0], [0, 1]], "are no index"),
    ],
    ids=repr,
)
def test_reset_of_rows_that_are_not_there(make: Any, rows: Any, words: str) -> None:
    session = make("ort")
    session.prefill(tokens(3))
    before = session.state()
    with pytest.raises(UsageError, match=words) as caught:
        session.reset(rows)
    assert "the batch is 2" in caught.value.hint
    # Nothing was done by halves.
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items())


# --- Inputs that do not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch64", "ort"])
@pytest.mark.parametrize("call", ["prefill", "step"])
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "missing tokens.*"),
        ({"token": np.zeros((2, 1), np.int64)}, "missing tokens"),
        (
            {"tokens": np.zeros((2, 1), np.int64), "mask": np.zeros((2, 1), np.int64)},
            "unknown mask",
        ),
        ({"tokens": np.zeros((2, 1), np.float32)}, "tokens is float32, expected int64"),
        ({"tokens": np.zeros((2, 1), bool)}, "tokens is bool, expected int64"),
        ({"tokens": [[True], [False]]}, "tokens is bool, expected int64"),
        ({"tokens": [[1.0], [2.0]]}, "tokens is float64, expected int64"),
        ({"tokens": [["1"], ["2"]]}, "tokens is <U1, expected int64"),
        ({"tokens": [[1], [None]]}, "tokens is object, expected int64"),
        ({"tokens": [[1], [2**64]]}, "tokens is object, expected int64"),
        ({"tokens": [[1], [2, 3]]}, "tokens is no array"),
        ({"tokens": np.full((2, 1), 2**63, np.uint64)}, "9223372036854775808 at row 0, position 0"),
        ({"tokens": [[0], [-1]]}, "tokens holds -1 at row 1, position 0, which is no token"),
        ([("tokens", [[0], [1]])], "list given, expected arrays by name"),
        ({"tokens": []}, r"tokens has shape \[0\]"),
        ({"tokens": [[], []]}, r"tokens has shape \[2, 0\], expected \[2, (S|1)\]"),
        ({"tokens": np.zeros(2, np.int64)}, r"tokens has shape \[2\]"),
        ({"tokens": np.zeros((2, 1, 1), np.int64)}, r"tokens has shape \[2, 1, 1\]"),
        ({"tokens": np.zeros((2, 0), np.int64)}, r"tokens has shape \[2, 0\]"),
        ({"tokens": np.zeros((1, 1), np.int64)}, r"tokens has shape \[1, 1\], expected \[2, 1\]"),
        ({"tokens": np.zeros((3, 1), np.int64)}, r"tokens has shape \[3, 1\], expected \[2, 1\]"),
        ({"tokens": np.zeros((0, 1), np.int64)}, r"tokens has shape \[0, 1\]"),
    ],
)
def test_inputs_that_do_not_fit(
    make: Any, kind: str, call: str, inputs: dict[str, np.ndarray], words: str
) -> None:
    session = make(kind)
    session.prefill(tokens(3))
    before = session.state()
    with pytest.raises(InputError, match=words):
        getattr(session, call)(inputs)
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items())


@pytest.mark.parametrize("kind", ["torch64", "ort"])
def test_step_takes_one_position(make: Any, kind: str) -> None:
    with pytest.raises(InputError, match=r"tokens has shape \[2, 2\], expected \[2, 1\]"):
        make(kind).step(tokens(2))


@pytest.mark.parametrize("kind", ["torch64", "ort"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("past_0_C"), "missing past_0_C"),
        (lambda state: state.update(past_9_C=np.zeros(1)), "unknown past_9_C"),
        (lambda state: state.update(past_0_C=state["past_0_C"][:1]), "past_0_C has shape"),
        (lambda state: state.update(past_0_m=state["past_0_m"][..., None]), "past_0_m has shape"),
        (lambda state: state.update(past_0_m=state["past_0_m"].astype(str)), "past_0_m holds <U"),
        (lambda state: state.update(past_0_m=state["past_0_m"] + 1j), "past_0_m holds complex"),
    ],
)
def test_states_that_do_not_fit(make: Any, kind: str, change: Any, words: str) -> None:
    session = make(kind)
    session.prefill(tokens(3))
    before = session.state()
    state = session.state()
    change(state)
    with pytest.raises(InputError, match=words):
        session.set_state(state)
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items())


# --- What is converted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["prefill", "step"])
@pytest.mark.parametrize(
    "convert",
    [np.ndarray.tolist, *(np.dtype(t).type for t in ("uint8", "int32", "uint64", ">i8")), torch.from_numpy],
    ids=["lists", "uint8", "int32", "uint64", "big-endian", "torch"],
)
def test_tokens_of_any_integer_type(make: Any, kind: str, call: str, convert: Any) -> None:
    inputs = tokens(1 if call == "step" else 5)
    plain, other = make(kind), make(kind)
    expected = getattr(plain, call)(inputs)["logits"].copy()
    given = convert(inputs["tokens"])
    assert np.array_equal(getattr(other, call)({"tokens": given})["logits"], expected)


@pytest.mark.parametrize("kind", ["torch64", "ort"])
def test_states_may_be_lists(make: Any, kind: str) -> None:
    session, other = make(kind), make(kind)
    session.prefill(tokens(5))
    other.set_state({name: value.tolist() for name, value in session.state().items()})
    assert all(np.array_equal(value, session.state()[name]) for name, value in other.state().items())


@pytest.mark.parametrize("token", [256, 2**40])
def test_tokens_beyond_the_vocabulary(make: Any, token: int) -> None:
    """Of a loaded model the vocabulary is known; of a run folder the graph refuses what its table lacks."""
    inputs = tokens(4)
    inputs["tokens"][1, 2] = token
    with pytest.raises(InputError, match=f"holds {token} at row 1, position 2") as caught:
        make("torch64").prefill(inputs)
    assert "0 … 255" in caught.value.hint
    with pytest.raises(ExportError):
        make("ort").prefill(inputs)


def test_a_run_folder_knows_its_vocabulary(small_export: Path) -> None:
    """Beyond it nothing is looked up: the runtime would report a failed operator, or take another row."""
    with OrtSession(small_export) as session:
        session.prefill({"tokens": [[0, 255]]})
        for wrong in (256, -1, -100):
            with pytest.raises(InputError, match=f"holds {wrong} at row 0, position 1") as caught:
                session.prefill({"tokens": [[7, wrong]]})
            assert "tokens are 0 … 255" in caught.value.hint


def test_the_vocabulary_of_a_manifest(small_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_export, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 100}))
    with OrtSession(folder) as session:
        session.prefill({"tokens": [[0, 99]]})
        with pytest.raises(InputError, match="holds 100 at row 0, position 1"):
            session.prefill({"tokens": [[7, 100]]})
    for damaged in ("256", 0, -1, True, 2.5):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": damaged}))
        with pytest.raises(InputError, match="vocab_size"):
            OrtSession(folder)


# --- Opening and closing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_is_closed_by_its_block(make: Any, kind: str) -> None:
    with make(kind) as session:
        state = session.state()
        session.step(tokens(1))
    for call in (
        lambda: session.prefill(tokens(1)),
        lambda: session.step(tokens(1)),
        lambda: session.prefill({}),
        session.state,
        lambda: session.set_state(state),
        session.reset,
        session.__enter__,
    ):
        with pytest.raises(UsageError, match="the session is closed"):
            call()
    session.close()  # once more is fine


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_fails_closes_too(make: Any, kind: str) -> None:
    with pytest.raises(ZeroDivisionError), make(kind) as session:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="the session is closed"):
        session.state()


@pytest.mark.parametrize("kind", ["torch64", "ort"])
def test_closing_gives_memory_back(make: Any, kind: str) -> None:
    """Whoever still holds the session holds neither its buffers nor what runs the model."""
    session = make(kind)
    session.prefill(tokens(3))
    session.step(tokens(1))
    if kind == "ort":
        held = [session._prefill_session, session._decode_session, *session._bindings]
        held += [x for buffer in session._buffers for x in buffer.values()]
    else:
        held = [session._module, *session._past.values()]
    assert len(held) > 10
    gone = [weakref.ref(one) for one in held]
    assert all(one() is not None for one in gone)
    del held
    session.close()
    gc.collect()
    assert [one() for one in gone if one() is not None] == []


def test_what_was_returned_outlives_the_session(make: Any) -> None:
    with make("ort") as session:
        prefilled, stepped = session.prefill(tokens(4)), session.step(tokens(1))
        copies = [{name: x.copy() for name, x in outputs.items()} for outputs in (prefilled, stepped)]
    gc.collect()
    for outputs, copied in zip((prefilled, stepped), copies, strict=True):
        assert all(np.array_equal(x, copied[name]) for name, x in outputs.items())


@pytest.mark.parametrize("batch", [0, -1, True, 1.0, "2", None])
def test_batches_that_are_none(make: Any, batch: Any) -> None:
    for kind in ("torch32", "ort"):
        with pytest.raises(UsageError, match="a batch of"):
            make(kind, batch)


# --- States in files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch64", "ort"])
def test_saved_state_goes_on_in_another_session(make: Any, tmp_path: Path, kind: str) -> None:
    inputs = tokens(30)
    whole = make(kind).prefill(inputs)["logits"]
    first = make(kind)
    first.prefill(cut(inputs, 0, 20))
    save_state(first, tmp_path / "state.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    second = make(kind)
    load_state(second, tmp_path / "state.npz")
    assert all(np.array_equal(value, first.state()[name]) for name, value in second.state().items())
    assert_same_output(second.prefill(cut(inputs, 20, 30))["logits"], whole[:, 20:])


def test_file_names_are_taken_as_they_are(make: Any, tmp_path: Path) -> None:
    """NumPy alone would append .npz."""
    session = make("ort")
    session.prefill(tokens(3))
    save_state(session, tmp_path / "stream.state")
    load_state(session, tmp_path / "stream.state")
    assert [path.name for path in tmp_path.iterdir()] == ["stream.state"]


def test_saving_fails_whole(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make("ort")
    save_state(session, tmp_path / "state.npz")
    good = (tmp_path / "state.npz").read_bytes()

    def failing(file: IO[bytes], **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    session.prefill(tokens(3))
    monkeypatch.setattr(np, "savez", failing)
    with pytest.raises(ExportError, match="disk is full"):
        save_state(session, tmp_path / "state.npz")
    assert (tmp_path / "state.npz").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_a_state_file_that_stands_for_gigabytes(make: Any, tmp_path: Path) -> None:
    """It is refused by the sizes that it names, before anything is unpacked."""
    np.savez_compressed(tmp_path / "state.npz", x=np.zeros(100 << 20, np.uint8))
    assert (tmp_path / "state.npz").stat().st_size < 1 << 20
    with pytest.raises(InputError, match="stands for 105 MB"):
        load_state(make("ort"), tmp_path / "state.npz")


def test_damaged_state_files(make: Any, tmp_path: Path) -> None:
    """Cut, changed, or something else altogether: an InputError, and the session keeps its state."""
    session = make("ort")
    path = tmp_path / "state.npz"
    save_state(session, path)
    good = path.read_bytes()
    session.prefill(tokens(3))
    before = session.state()
    with pytest.raises(InputError, match="nowhere"):
        load_state(session, tmp_path / "nowhere.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = [good[: len(good) * k // 20] for k in range(20)]
    contents += [b"text", bytes(1000), b"PK\x03\x04" + bytes(100), (tmp_path / "array.npy").read_bytes()]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"state.npz is not a saved state"):
            load_state(session, path)
    rng = random.Random(0)
    header = good.rindex(b"PK\x01\x02")
    for _ in range(100):  # in the directory of the archive, where every byte matters
        data = bytearray(good)
        data[rng.randrange(header, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            load_state(session, path)
        except InputError:
            continue
        session.set_state(before)
    assert all(np.array_equal(value, before[name]) for name, value in session.state().items())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_state_that_is_not_finite_is_neither_saved_nor_loaded(
    make: Any, tmp_path: Path, value: float
) -> None:
    """What was saved before stays, and a session goes on from what it had."""
    session, path = make("ort"), tmp_path / "state.npz"
    session.prefill(tokens(5))
    save_state(session, path)
    saved, good = path.read_bytes(), session.state()
    name = next(iter(good))
    poisoned = {**good, name: good[name].copy()}
    poisoned[name].flat[3] = value
    session.set_state(poisoned)
    with pytest.raises(InputError, match=f"state.npz: state {name} holds {value} at"):
        save_state(session, path)
    assert path.read_bytes() == saved
    load_state(session, path)  # the advice: an earlier file
    np.savez(tmp_path / "bad.npz", **poisoned)
    with pytest.raises(InputError, match=f"bad.npz: state {name} holds {value} at"):
        load_state(session, tmp_path / "bad.npz")
    assert all(np.array_equal(session.state()[key], good[key]) for key in good)


def test_objects_in_state_files_are_not_unpickled(make: Any, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    session = make("ort")
    state = {name: value.astype(object) for name, value in session.state().items()}
    state["past_0_C"][0, 0, 0, 0] = Payload()
    np.savez(tmp_path / "state.npz", **state)
    with pytest.raises(InputError, match="is not a saved state"):
        load_state(session, tmp_path / "state.npz")
    assert not (tmp_path / "executed").exists()


def test_states_of_other_models_and_batches(make: Any, tmp_path: Path) -> None:
    save_state(make("ort", 3), tmp_path / "batch.npz")
    with pytest.raises(InputError, match=r"past_\w+ has shape \(3, .* expected \(2, "):
        load_state(make("ort"), tmp_path / "batch.npz")
    other = checkpoint.load_checkpoint(models.make(tmp_path / "wide", embedding_dim=32, heads=2))
    save_state(TorchSession(other, BATCH), tmp_path / "wide.npz")
    with pytest.raises(InputError, match=r"past_\w+ has shape"):
        load_state(make("ort"), tmp_path / "wide.npz")
    other = checkpoint.load_checkpoint(models.make(tmp_path / "deep", num_blocks=4))
    save_state(TorchSession(other, BATCH), tmp_path / "deep.npz")
    with pytest.raises(InputError, match="unknown past_3_C"):
        load_state(make("ort"), tmp_path / "deep.npz")
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(InputError, match="missing past_0_"):
        load_state(make("ort"), tmp_path / "empty.npz")


# --- PyTorch --------------------------------------------------------------------------------------------


def test_the_users_module_is_untouched(small_checkpoint: Path) -> None:
    """A float64 reference is made from a module that stays float32, bit by bit, in its own mode."""
    loaded = checkpoint.load_checkpoint(small_checkpoint)
    before = {name: (id(p), p.detach().clone()) for name, p in loaded.module.named_parameters()}
    classes = [type(module) for module in loaded.module.modules()]
    session = TorchSession(loaded, BATCH, "float64")
    assert session.prefill(tokens(5))["logits"].dtype == np.float64
    session.step(tokens(1))
    after = dict(loaded.module.named_parameters())
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert {name: id(p) for name, p in after.items()} == {name: entry[0] for name, entry in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in after.items())
    assert [type(module) for module in loaded.module.modules()] == classes
    assert TorchSession(loaded, BATCH, "float32").prefill(tokens(5))["logits"].dtype == np.float32


# --- ONNX Runtime ---------------------------------------------------------------------------------------


def test_results_of_a_step_are_overwritten_later(make: Any) -> None:
    """As documented: whoever needs them longer copies them. Those of prefill are the caller's own."""
    session = make("ort")
    prefilled = session.prefill(tokens(4))["logits"]
    kept = prefilled.copy()
    seen = [session.step(tokens(1, seed=t))["logits"] for t in range(6)]
    addresses = [x.ctypes.data for x in seen]
    assert addresses == addresses[:2] * 3
    assert len(set(addresses)) == 2
    session.prefill(tokens(4, seed=9))
    assert np.array_equal(prefilled, kept)


def test_state_is_never_copied(small_export: Path) -> None:
    """Two sets of buffers, allocated once, take turns as past and present; the runtime writes into them."""
    session = OrtSession(small_export, BATCH, 1, fused=False)

    def addresses() -> list[dict[str, int]]:
        return [{name: x.ctypes.data for name, x in buffer.items()} for buffer in session._buffers]

    before = addresses()
    values = [{name: v.data_ptr() for name, v in value.items()} for value in session._values]
    assert values == before
    for call in (session.step, session.prefill, session.step, session.step, session.prefill):
        past = session.state()
        now = session._now
        call(tokens(1))
        assert session._now == 1 - now
        assert addresses() == before
        # The past still lies in the set it was in: the present was written to the other one.
        assert all(np.array_equal(x, past[name]) for name, x in session._buffers[now].items())
        assert not np.array_equal(session._buffers[1 - now]["past_0_C"], past["past_0_C"])


def test_inputs_need_not_be_contiguous(make: Any) -> None:
    inputs = tokens(20)["tokens"]
    expected = make("ort").prefill({"tokens": inputs})["logits"]
    strided = np.asfortranarray(inputs)
    session = make("ort")
    assert not strided.flags.c_contiguous
    assert np.array_equal(session.prefill({"tokens": strided})["logits"], expected)
    session.reset()
    assert_same_output(steps(session, {"tokens": strided}), expected)


def test_long_prefill_is_one_stream(make: Any) -> None:
    """Longer than any piece the session may cut it into."""
    inputs = tokens(1100)
    session, pieces = make("ort"), make("ort")
    whole = session.prefill(inputs)["logits"]
    parts = [pieces.prefill(cut(inputs, s, s + 100))["logits"] for s in range(0, 1100, 100)]
    assert_same_output(whole, np.concatenate(parts, axis=1))
    assert_same_state(session.state(), pieces.state(), session)


def test_sessions_do_not_share_state(make: Any) -> None:
    one, other = make("ort"), make("ort")
    one.prefill(tokens(5))
    assert all(not value.any() for value in other.state().values())


@pytest.mark.parametrize("call", ["prefill", "step"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.onnx", lambda data: b""),
        ("model.onnx", lambda data: b"not a graph"),
        ("model.onnx", lambda data: bytes(len(data))),
        ("model.onnx", lambda data: data[: len(data) // 2]),
        ("model.onnx", lambda data: data[:-1]),
        ("model.onnx", lambda data: data[:100] + b"\xff" * 50 + data[150:]),
        ("model.onnx", lambda data: data.replace(b"LayerNormalization", b"LayerNormalizatioX")),
        ("model.onnx", lambda data: data.replace(b"past_0_C", b"last_0_C")),
        ("model.onnx", None),
        ("model.onnx.data", lambda data: b""),
        ("model.onnx.data", lambda data: data[: len(data) // 2]),
        ("model.onnx.data", lambda data: data[:-4096]),
        ("model.onnx.data", None),
        ("io.json", None),
        ("io.json", lambda data: data[:-9]),
        ("io.json", lambda data: data.replace(b'"past_0_C"', b'"past_9_C"')),
    ],
)
def test_damaged_exports(small_export: Path, tmp_path: Path, call: str, name: str, damage: Any) -> None:
    """An ExportError that is not the user's usage, and nothing else."""
    folder = shutil.copytree(small_export, tmp_path / "copy")
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ExportError) as caught:
        getattr(OrtSession(folder, BATCH, threads=1), call)(tokens(1))
    assert caught.value.exit_code in (4, 5)
    assert str(folder) in caught.value.message


def test_stateless_export(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    """Every call starts afresh; there is no state to save."""
    session = OrtSession(
        trace.export(small_loaded, tmp_path / "out", ExportOptions(stateless=True)), BATCH, threads=1
    )
    assert session.state() == {}
    first = session.prefill(tokens(9))["logits"]
    assert np.array_equal(session.prefill(tokens(9))["logits"], first)
    assert_same_output(first, TorchSession(small_loaded, BATCH).prefill(tokens(9))["logits"])
    session.reset()
    session.set_state({})


class Pooled(torch.nn.Module):
    """Outputs that are no sequence: a mean over all positions (B, 1, K), and positions on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = models.build({k: v for k, v in models.lm_config().items() if k != "vocab_size"})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.stack(x)
        return y.mean(1, keepdim=True), y.transpose(1, 2)


def test_outputs_that_are_no_sequence_are_never_computed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    # Such a mean does not stream, which export refuses; a session must not depend on that.
    monkeypatch.setattr(trace, "check_streams", lambda loaded: None)
    loaded = checkpoint.Loaded(Pooled().eval(), {"x": example}, "y", "Pooled", {})
    session = sessions.OrtSession(trace.export(loaded, tmp_path / "out"), 2)
    monkeypatch.setattr(sessions.ort, "PIECE", 5)
    found = session.prefill({"x": example.numpy()})
    with torch.no_grad():
        mean, transposed = loaded.module(example)
    np.testing.assert_allclose(found["y_0"], mean.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["y_1"], transposed.numpy(), rtol=1e-3, atol=1e-5)
