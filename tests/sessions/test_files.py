"""Files of data for a model: what is wrong with them is said in one line, and following the advice helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from xlstm_export.errors import InputError, UsageError
from xlstm_export.sessions.files import InputFiles
from xlstm_export.specs import IoSpec, TensorSpec

SERIES = IoSpec((TensorSpec("x", "float32", ("B", "S", 2)),), (), ())
TOKENS = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (), ())
X = np.arange(12.0).reshape(1, 6, 2)
IDS = np.arange(6)[None]


def ragged() -> np.ndarray:
    rows = np.empty(2, object)
    rows[:] = [[1.0, 2.0], [3.0]]
    return rows


@pytest.mark.parametrize(
    ("io", "bad", "words", "good"),
    [
        (SERIES, {"data": X}, ["lacks input x", "it holds data", "numpy.savez(", "x=…"], {"x": X}),
        (SERIES, {"arr_0": X}, ["lacks input x", "it holds arr_0"], {"x": X}),
        (SERIES, {"x": X[0, :, 0]}, ["x has shape (6,), expected (N, S, 2)"], {"x": X[0]}),
        (SERIES, {"x": X.transpose(0, 2, 1)}, ["x has shape (1, 2, 6), expected (N, S, 2)"], {"x": X}),
        (SERIES, {"x": X[:, :0]}, ["x has shape (1, 0, 2)", "it is empty"], {"x": X}),
        (SERIES, {"x": ragged()}, ["holds Python objects", "make arrays of numbers"], {"x": X}),
        (SERIES, {"x": X.astype(str)}, ["x holds <U", "give numbers"], {"x": X}),
        (SERIES, {"x": np.where(X == 5, np.nan, X)}, ["x holds nan at index [0, 2, 1]", "before"], {"x": X}),
        (SERIES, {"x": np.where(X == 5, np.inf, X)}, ["x holds inf at index [0, 2, 1]"], {"x": X}),
        (SERIES, {"x": X * 1e39}, ["x holds inf at index"], {"x": X}),
        (TOKENS, {"tokens": IDS * 1.0}, ["tokens.astype(numpy.int64)"], {"tokens": IDS.astype(np.int64)}),
        (TOKENS, {"tokens": IDS - 1}, ["holds -1 at row 0, position 0", "tokens are 0 … 9"], {"tokens": IDS}),
        (TOKENS, {"tokens": IDS + 5}, ["holds 10 at row 0, position 5", "tokenizer"], {"tokens": IDS}),
        (
            TOKENS,
            {"tokens": IDS.astype(np.uint64) + np.uint64(2**63)},
            ["tokens holds integers that int64 cannot hold"],
            {"tokens": IDS.astype(np.int32)},
        ),
    ],
)
def test_arrays_that_do_not_fit_and_the_advice(
    io: IoSpec, bad: dict[str, np.ndarray], words: list[str], good: dict[str, np.ndarray], tmp_path: Path
) -> None:
    files, path = InputFiles(io, 10), tmp_path / "data.npz"
    np.savez(path, **bad)  # type: ignore[arg-type]
    with refused(InputError, "data.npz", *words):
        files.read(path)
    np.savez(path, **good)  # type: ignore[arg-type]
    (part,) = files.read(path).parts
    (spec,) = io.inputs
    assert part[spec.name].dtype == np.dtype(spec.dtype)
    assert part[spec.name].shape[1:] == (6, *spec.shape[2:])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.pt", b"PK", ["another kind", "numpy.savez"]),
        ("data.PKL", b"\x80", ["another kind", "numpy.savez"]),
        ("data.parquet", b"PAR1", ["another kind", "save it as CSV"]),
        ("data.csv.gz", b"\x1f\x8b", ["another kind", "unpack it"]),
        ("data.npz", b"", ["not a readable .npz"]),
        ("data.npz", b"PK\x03\x04cut", ["not a readable .npz"]),
        ("data.npy", b"a,b\n1,2\n", ["not a readable .npy"]),
        ("data.csv", b"", ["no rows"]),
        ("data.csv", b"a,b\n1,x\n2,3\n", ["line 2, column b: x"]),
        ("nowhere.npz", None, ["does not exist", "give an .npz"]),
        ("folder", None, ["is a folder"]),
    ],
)
def test_files_of_other_kinds(name: str, content: bytes | None, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    with refused(InputError, name, *words):
        InputFiles(SERIES).read(path)


def test_text_for_tokens_only(tmp_path: Path) -> None:
    """An empty text is refused, and one in another encoding, unless the model reads bytes."""
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode("latin-1"))
    (part,) = InputFiles(TOKENS, 256).read(path).parts
    assert part["tokens"].tolist() == [[0xE9]]
    with refused(UsageError, "a.txt is text", "vocabulary, of 300 tokens"):
        InputFiles(TOKENS, 300).read(path)
    with refused(UsageError, "a.txt is read as text, but the model takes no tokens"):
        InputFiles(SERIES).read(path)
    path.write_bytes(b"")
    with refused(InputError, "a.txt is empty"):
        InputFiles(TOKENS, 256).read(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: np.savetxt(path, X[0], delimiter=","),
        lambda path: np.savetxt(path, X[0], delimiter=";", header="a;b"),
        lambda path: path.write_text(
            "a;b\n" + "".join(f"{a:.1f};{b:.1f}\n" for a, b in X[0]).replace(".", ",")
        ),
        lambda path: path.write_text(
            "\n".join(["day,a,b", *(f"2024-01-0{n + 1},{a},{b}" for n, (a, b) in enumerate(X[0]))])
        ),
    ],
)
def test_tables_of_any_kind_are_the_same_input(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write(path)
    (part,) = InputFiles(SERIES).read(path).parts
    np.testing.assert_array_equal(part["x"], X.astype(np.float32))


def test_tables_of_patches_and_of_one_channel(tmp_path: Path) -> None:
    """Where a position is a patch, each column is a series, padded in front; else columns are channels."""
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n" + "".join(f"{n},{n + 10}\n" for n in range(5)))
    (patches,) = (TensorSpec("x", "float32", ("B", "S", 3), gaps=True),)
    output = TensorSpec("y", "float32", ("B", "S", 9, 3))
    for outputs in ((output,), ()):  # as it is known after the export, and before
        found = InputFiles(IoSpec((patches,), outputs, ())).read(path).parts
        assert [part["x"].shape for part in found] == [(1, 2, 3)] * 2
        np.testing.assert_array_equal(found[1]["x"][0], [[np.nan, 10, 11], [12, 13, 14]])
    with refused(InputError, "2 columns of numbers (a, b)", "reads 3"):
        InputFiles(IoSpec((patches,), (replace(output, shape=("B", "S", 1)),), ())).read(path)
    told = (patches, *(TensorSpec(name, "float32", ("B", 1)) for name in ("loc", "scale")))
    found = InputFiles(IoSpec(told, (output,), ())).read(path)
    assert [part["loc"].tolist() for part in found.parts] == [[[2.0]], [[12.0]]], "of the whole series"
    assert found.parts[1]["scale"] == pytest.approx(2**0.5)
    assert found.notes == ("a position of the model is 3 rows of a column of rows.csv",)
    path.write_text("a\n" + "".join(f"{n}\n" for n in range(5)))
    (part,) = InputFiles(IoSpec((TensorSpec("x", "float32", ("B", "S")),), (), ())).read(path).parts
    assert part["x"].tolist() == [[0, 1, 2, 3, 4]]
