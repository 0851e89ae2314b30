"""Reading calibration data: what arrives of each kind of file, and what is said of those that do not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from specs import PLAIN, POLICY, SERIES, TOKENS
from xlstm_export.calibration.sources import Reader

from xlstm_export.errors import InputError, SetupError, UsageError
from xlstm_export.specs import IoSpec

HEADER = "time,a,b,c\n"


def read(source: str | Path, io: IoSpec, **options: Any) -> dict[str, np.ndarray]:
    """The only part of a source."""
    (part,) = Reader(io, **options).read(source, 32).parts
    return part


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# --- Arrays ---------------------------------------------------------------------------------------------


def test_arrays_by_name_in_the_model_s_types(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((6, 7, 4))
    path = npz(tmp_path / "a.npz", image=image, mask=image[..., 0] > 0, goal=np.ones((6, 2), int), target=[1])
    found = read(path, POLICY)
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == {
        "image": ((6, 7, 4), "float32"),
        "mask": ((6, 7), "bool"),
        "goal": ((6, 2), "float32"),
    }
    assert np.array_equal(found["image"], image.astype(np.float32))
    assert Reader(POLICY).read(path, 32).name == "a.npz"


def test_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for index, name in enumerate(["b", "a", "c"]):
        npz(tmp_path / f"{name}.npz", x=np.full((1, 5 + index, 3), index))
    (tmp_path / "readme.txt").write_text("not data")
    parts = Reader(SERIES).read(tmp_path, 1).parts
    assert [(int(part["x"][0, 0, 0]), part["x"].shape[1]) for part in parts] == [(1, 6), (0, 5), (2, 7)]


def test_npy_with_and_without_the_leading_axis(tmp_path: Path) -> None:
    tokens = np.arange(20, dtype=np.int32)
    np.save(tmp_path / "one.npy", tokens)
    np.save(tmp_path / "two.npy", tokens.reshape(2, 10))
    assert read(tmp_path / "one.npy", TOKENS, vocab_size=20)["tokens"].shape == (1, 20)
    found = read(tmp_path / "two.npy", TOKENS, vocab_size=20)["tokens"]
    assert found.dtype == np.int64
    assert np.array_equal(found, tokens.reshape(2, 10))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 5, 2)), ["x has shape (2, 5, 2)", "(N, S, 3)"]),
        (np.zeros(5), ["x has shape (5,)"]),
        (np.zeros((2, 0, 3)), ["x has shape (2, 0, 3)"]),
        (np.full((2, 5, 3), "a"), ["x holds <U1", "float32"]),
        (np.zeros((2, 5, 3), complex), ["x holds complex128"]),
        (np.where(np.arange(30).reshape(2, 5, 3) == 19, np.nan, 0), ["x holds nan at index [1, 1, 1]"]),
        (np.where(np.arange(30).reshape(2, 5, 3) == 2, -np.inf, 0), ["x holds -inf at index [0, 0, 2]"]),
        (np.where(np.arange(30).reshape(2, 5, 3) == 2, 1e39, 0), ["x holds inf at index [0, 0, 2]"]),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, array: np.ndarray, words: list[str]) -> None:
    with refused(InputError, "data.npz", *words):
        read(npz(tmp_path / "data.npz", x=array), SERIES)


def test_inputs_that_do_not_fit_each_other(tmp_path: Path) -> None:
    good = {"image": np.zeros((6, 7, 4)), "mask": np.zeros((6, 7), bool), "goal": np.zeros((6, 2))}
    read(npz(tmp_path / "a.npz", **good), POLICY)
    with refused(InputError, "goal has shape (5, 2), but image has shape (6, 7, 4)"):
        read(npz(tmp_path / "a.npz", **{**good, "goal": np.zeros((5, 2))}), POLICY)
    with refused(InputError, "mask has shape (6, 8)"):
        read(npz(tmp_path / "a.npz", **{**good, "mask": np.zeros((6, 8), bool)}), POLICY)
    with refused(InputError, "mask holds int64, the model takes bool"):
        read(npz(tmp_path / "a.npz", **{**good, "mask": np.zeros((6, 7), int)}), POLICY)
    del good["goal"]
    with refused(InputError, "lacks input goal", "it holds image, mask"):
        read(npz(tmp_path / "a.npz", **good), POLICY)


@pytest.mark.parametrize("token", [-1, 50])
def test_tokens_outside_the_vocabulary(tmp_path: Path, token: int) -> None:
    tokens = np.arange(40).reshape(2, 20)
    tokens[1, 3] = token
    np.save(tmp_path / "t.npy", tokens)
    with refused(InputError, f"tokens holds {token} at row 1, position 3", "tokens are 0 … 49"):
        read(tmp_path / "t.npy", TOKENS, vocab_size=50)
    assert token not in (0, 49)


def test_floats_are_no_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((2, 20)))
    with refused(InputError, "tokens holds float64, the model takes int64"):
        read(tmp_path / "t.npy", TOKENS)


def test_pickles_and_garbage(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04garbage")
    with refused(InputError, "a.npz is not a readable .npz file"):
        read(tmp_path / "a.npz", SERIES)
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    with refused(InputError, "a.npy is not a readable .npy file"):
        read(tmp_path / "a.npy", SERIES)


def test_nothing_there(tmp_path: Path) -> None:
    with refused(InputError, "nowhere.npz does not exist", "give an .npz"):
        read(tmp_path / "nowhere.npz", SERIES)
    with refused(InputError, "holds no .npz file"):
        read(tmp_path, SERIES)


def test_files_for_one_input_where_the_model_has_three(tmp_path: Path) -> None:
    for name in ("a.npy", "a.txt", "a.csv"):
        (tmp_path / name).write_bytes(b"")
        with refused(UsageError, name, "has 3: image, mask, goal", ".npz"):
            read(tmp_path / name, POLICY)


# --- Text -----------------------------------------------------------------------------------------------


def test_text_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\n€".encode())
    assert read(tmp_path / "a.txt", TOKENS, vocab_size=256)["tokens"].tolist() == [list("é\r\n€".encode())]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token per known word; a class token in front that calibration must not add."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "it": 1, "rains": 2, "[CLS]": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 3)]
    )
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_text_through_a_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("it rains it snows")
    for path in (tokenizer, tokenizer / "tokenizer.json"):
        found = read(tmp_path / "a.txt", TOKENS, vocab_size=4, tokenizer=path)["tokens"]
        assert found.tolist() == [[1, 2, 1, 0]]
        assert found.dtype == np.int64
    with refused(InputError, "tokens holds 2 at row 0, position 1", "tokenizer of another model"):
        read(tmp_path / "a.txt", TOKENS, vocab_size=2, tokenizer=tokenizer)


def test_text_that_cannot_be_read(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"it \xff")
    with refused(UsageError, "of 50304 tokens", "tokenizer.json"):
        read(text, TOKENS, vocab_size=50304)
    with refused(UsageError, "of unknown size"):
        read(text, TOKENS)
    with refused(UsageError, "the model takes no tokens"):
        read(text, SERIES)
    with refused(InputError, "a.txt is not UTF-8 text"):
        read(text, TOKENS, tokenizer=tokenizer)
    text.write_text("it")
    with refused(InputError, "nowhere does not exist"):
        read(text, TOKENS, tokenizer=tmp_path / "nowhere")
    (tokenizer / "tokenizer.json").write_text("{}")
    with refused(InputError, "tokenizer.json is no tokenizer"):
        read(text, TOKENS, tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with refused(SetupError, "tokenizers cannot be imported", "pip install tokenizers"):
        read(text, TOKENS, tokenizer=tokenizer)


# --- Time series ----------------------------------------------------------------------------------------


def csv(tmp_path: Path, text: str) -> Path:
    (tmp_path / "a.csv").write_text(text)
    return tmp_path / "a.csv"


def test_csv_rows_are_positions(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b,c\n1,2,3\n-4.5,1e3,0\n")
    assert read(path, SERIES)["x"].tolist() == [[[1, 2, 3], [-4.5, 1000, 0]]]
    assert Reader(SERIES).read(path, 32).notes == ()


def test_csv_with_a_column_of_times(tmp_path: Path) -> None:
    path = csv(tmp_path, "\ufeff" + HEADER + "2013-01-01,1,2,3\n2013-01-02,4,5,6\n")
    assert read(path, SERIES)["x"].tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert Reader(SERIES).read(path, 32).notes == ("column time of a.csv is text and was left out",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no rows"]),
        (HEADER, ["no rows"]),
        ("a,b\n1,2\n", ["2 columns of numbers (a, b)", "the model reads 3"]),
        (HEADER + "0,1,2,3\n", ["4 columns of numbers (time, a, b, c)"]),
        (HEADER + "t,1,2,3\nt,1,,3\n", ["line 3, column b: an empty cell"]),
        (HEADER + "t,1,2,3\nt,1,2,nan\n", ["line 3, column c: nan is no finite number"]),
        (HEADER + "t,1,2,3\nt,NA,2,3\n", ["line 3, column a: NA"]),
        (HEADER + "t,1,2,3\nt,1,inf,3\n", ["line 3, column b: inf"]),
        ("a,b,c\n,2,3\n", ["line 2, column a: an empty cell"]),
        (HEADER + "t,1,2,3\nt,1,2\n", ["line 3: 3 cells, the header has 4"]),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, text: str, words: list[str]) -> None:
    with refused(InputError, "a.csv", *words):
        read(csv(tmp_path, text), SERIES)


def test_csv_without_a_header(tmp_path: Path) -> None:
    assert read(csv(tmp_path, "1,2,3\n4,5,6\n"), SERIES)["x"].tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_csv_with_gaps_for_a_model_that_takes_them(tmp_path: Path) -> None:
    io = IoSpec((replace(SERIES.inputs[0], gaps=True),), (), ())
    found = read(csv(tmp_path, "a;b;c\n1,5;2;3\nNA;;6\n"), io)["x"]
    np.testing.assert_array_equal(found, np.array([[[1.5, 2, 3], [np.nan, np.nan, 6]]], np.float32))


def test_csv_with_several_series(tmp_path: Path) -> None:
    rows = [f"{place},2024-01-0{day},{day},2,3" for place in "ab" for day in (1, 2)]
    path = csv(tmp_path, "\n".join(["place,day,a,b,c", *rows[:3]]))
    assert [part["x"].shape for part in Reader(SERIES).read(path, 32).parts] == [(1, 2, 3), (1, 1, 3)]


@pytest.mark.parametrize("io", [TOKENS, PLAIN])
def test_csv_for_a_model_without_series(tmp_path: Path, io: IoSpec) -> None:
    with refused(UsageError, "a.csv is read as a time series"):
        read(csv(tmp_path, "a,b,c\n1,2,3\n"), io)


# --- Generators -----------------------------------------------------------------------------------------

MODULE = """
import itertools
import numpy as np

def endless():
    for index in itertools.count():
        yield {"x": np.full((5, 3), index), "target": 0}

def batches():
    return [{"x": np.zeros((4, 5, 3))}] * 3

def nothing():
    return []

def tuples():
    yield (1, 2)

def broken():
    yield {"x": np.zeros((5, 3))}
    raise KeyError("gone")

def misshapen():
    yield {"x": np.zeros((5, 3))}
    yield {"x": np.zeros((5, 2))}

def needs(argument):
    return []

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "generators_of_a_user.py").write_text(MODULE)
    (tmp_path / "failing_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "generators_of_a_user"
    sys.modules.pop("generators_of_a_user", None)  # the next test has a folder of its own


def test_generator_stops_when_there_are_enough(module: str) -> None:
    source = Reader(SERIES).read(f"{module}:endless", 3)
    assert [int(part["x"][0, 0, 0]) for part in source.parts] == [0, 1, 2]
    assert {part["x"].shape for part in source.parts} == {(1, 5, 3)}
    assert source.name == f"{module}:endless"
    assert len(Reader(SERIES).read(f"{module}:batches", 5).parts) == 2


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nothing", InputError, ["yields nothing"]),
        ("tuples", InputError, ["item 0 is tuple"]),
        ("broken", InputError, ["raised KeyError: 'gone'"]),
        ("misshapen", InputError, ["item 1: x has shape (5, 2)"]),
        ("needs", InputError, ["raised TypeError", "takes no arguments"]),
        ("number", InputError, ["raised TypeError"]),
        ("absent", UsageError, ["absent"]),
    ],
)
def test_generators_that_do_not_work(module: str, name: str, kind: type, words: list[str]) -> None:
    with refused(kind, f"{module}:{name}", *words):
        Reader(SERIES).read(f"{module}:{name}", 9)


def test_modules_that_do_not_import(module: str) -> None:
    with refused(UsageError, "no_such_module_at_all"):
        Reader(SERIES).read("no_such_module_at_all:f", 9)
    with refused(InputError, "failing_on_import", "ZeroDivisionError"):
        Reader(SERIES).read("failing_on_import:f", 9)
