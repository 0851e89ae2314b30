"""What sessions are given: conversions are NumPy's own, and what would lose its meaning is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xlstm_export.errors import InputError, UsageError
from xlstm_export.sessions.arrays import checked_inputs, checked_state, row_numbers
from xlstm_export.sessions.cpu_graph import vocabulary
from xlstm_export.specs import IoSpec, StateSpec, TensorSpec

# Several inputs, one of them without positions, one with positions on two axes.
IO = IoSpec(
    (
        TensorSpec("x", "float32", ("B", "S", 3)),
        TensorSpec("flag", "bool", ("B", "S")),
        TensorSpec("count", "int32", ("B", "S")),
        TensorSpec("goal", "float32", ("B", 2)),
        TensorSpec("pairs", "float16", ("B", "S", "S")),
    ),
    (),
    (StateSpec(0, "n", (2,), "float32"), StateSpec(1, "m", (2,), "bfloat16")),
)
TOKENS = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (), ())


def inputs(batch: int = 2, length: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((batch, length, 3)).astype(np.float32),
        "flag": rng.random((batch, length)) < 0.5,
        "count": rng.integers(-9, 9, (batch, length)).astype(np.int32),
        "goal": rng.standard_normal((batch, 2)).astype(np.float32),
        "pairs": rng.standard_normal((batch, length, length)).astype(np.float16),
    }


def test_what_fits_is_passed_on_as_it_is() -> None:
    given = inputs()
    found = checked_inputs(IO, 2, given)
    assert list(found) == [spec.name for spec in IO.inputs]
    assert all(found[name] is given[name] for name in given)


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("x", ["float16", "float64", ">f4", "int8", "int64", "uint64", ml_dtypes.bfloat16]),
        ("goal", ["float16", "float64", "int64"]),
        ("pairs", ["float32", "float64", "uint8"]),
        ("count", ["int64", "uint64", "int8", ">i4"]),
    ],
)
def test_conversions_are_numpys(name: str, dtypes: list[Any]) -> None:
    for dtype in dtypes:
        given = inputs()
        given[name] = np.abs(given[name]).astype(dtype)
        found = checked_inputs(IO, 2, given)[name]
        wanted = next(spec.dtype for spec in IO.inputs if spec.name == name)
        assert found.dtype == np.dtype(wanted)
        np.testing.assert_array_equal(found, given[name].astype(wanted))


def test_lists_are_arrays() -> None:
    given = {name: value.tolist() for name, value in inputs().items()}
    for name, value in checked_inputs(IO, 2, given).items():
        np.testing.assert_array_equal(value, inputs()[name])


def test_values_that_are_no_numbers_are_kept_where_the_model_takes_them() -> None:
    """A missing value is NaN for some models, and infinity is infinity in any type."""
    x, *rest = IO.inputs
    given = inputs()
    given["x"] = given["x"].astype(np.float64)
    given["x"][0, 0] = [np.nan, np.inf, -np.inf]
    for gaps, infinite, words in (
        (True, True, ""),
        (False, True, r"x holds nan at index \[0, 0, 0\]"),
        (True, False, r"x holds inf at index \[0, 0, 1\]"),
    ):
        io = replace(IO, inputs=(replace(x, gaps=gaps, infinite=infinite), *rest))
        if words:
            with pytest.raises(InputError, match=words):
                checked_inputs(io, 2, given)
            continue
        found = checked_inputs(io, 2, given)["x"]
        np.testing.assert_array_equal(found, given["x"].astype(np.float32))
        assert IoSpec.from_json(io.to_json()) == io


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "goal", "pairs"])
def test_what_would_stay_in_the_state_is_refused(name: str, value: float) -> None:
    given = inputs()
    given[name].flat[-1] = value
    with pytest.raises(InputError, match=f"input {name} holds {value} at") as caught:
        checked_inputs(IO, 2, given)
    given[name].flat[-1] = given[name].flat[-2]  # the advice, and for infinity what should have been there
    checked_inputs(IO, 2, given)
    assert ("value before" in caught.value.hint) == np.isnan(value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", np.full((2, 4, 3), 1e39), r"x holds 1e\+39 at index \[0, 0, 0\], which float32 cannot hold"),
        ("x", np.zeros((2, 4, 3), complex), "x is complex128, expected float32"),
        ("x", np.zeros((2, 4, 3), bool), "x is bool, expected float32"),
        ("x", np.zeros((2, 4, 3), "datetime64[s]"), r"x is datetime64\[s\], expected float32"),
        ("x", np.zeros((2, 4, 3), object), "x is object, expected float32"),
        ("x", np.zeros((2, 4)), r"x has shape \[2, 4\], expected \[2, S, 3\]"),
        ("x", np.zeros((2, 4, 2)), r"x has shape \[2, 4, 2\], expected \[2, 4, 3\]"),
        ("flag", np.zeros((2, 4), np.int64), "flag is int64, expected bool"),
        ("flag", np.zeros((2, 4)), "flag is float64, expected bool"),
        ("flag", np.zeros((2, 5), bool), r"flag has shape \[2, 5\], expected \[2, 4\]"),
        ("count", np.zeros((2, 4)), "count is float64, expected int32"),
        ("count", np.full((2, 4), 2**31), "count holds 2147483648 at row 0, position 0, which int32"),
        ("count", np.full((2, 4), -(2**31) - 1), "count holds -2147483649 at row 0, position 0"),
        ("goal", np.zeros((1, 2)), r"goal has shape \[1, 2\], expected \[2, 2\]"),
        ("goal", 1.0, r"goal has shape \[\], expected \[2, 2\]"),
        ("pairs", np.zeros((2, 4, 3)), r"pairs has shape \[2, 4, 3\], expected \[2, 4, 4\]"),
        ("pairs", np.full((2, 4, 4), 70000.0), r"pairs holds 70000.0 at index \[0, 0, 0\], which float16"),
        ("goal", [[1, 2], [3]], "goal is no array"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        checked_inputs(IO, 2, {**inputs(), name: value})


def test_names_are_listed() -> None:
    given = inputs()
    del given["goal"]
    with pytest.raises(InputError, match="input: missing goal") as caught:
        checked_inputs(IO, 2, given)
    assert caught.value.hint == "the model has x, flag, count, goal, pairs"
    with pytest.raises(InputError, match="input: unknown 7, target"):
        checked_inputs(IO, 2, {**inputs(), "target": 1, 7: 2})  # type: ignore[dict-item]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_step_is_one_position(length: int) -> None:
    given = {"tokens": np.zeros((2, length), np.int64)}
    if length == 1:
        assert checked_inputs(TOKENS, 2, given, length=1)["tokens"].shape == (2, 1)
        return
    with pytest.raises(InputError, match=rf"shape \[2, {length}\], expected \[2, 1\]"):
        checked_inputs(TOKENS, 2, given, length=1)


@pytest.mark.parametrize("vocab_size", [None, 10])
@pytest.mark.parametrize("dtype", [np.int64, np.int8])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_every_value_of_a_token(vocab_size: int | None, dtype: Any, shape: tuple[int, int]) -> None:
    """At each place, from below zero to above the vocabulary."""
    for place in np.ndindex(shape):
        for token in range(-3, 14):
            given = np.zeros(shape, dtype)
            given[place] = token
            arguments = (TOKENS, shape[0], {"tokens": given})
            if 0 <= token < (vocab_size or 100):
                found = checked_inputs(*arguments, vocab_size=vocab_size)["tokens"]
                np.testing.assert_array_equal(found, given)
                continue
            where = f"holds {token} at row {place[0]}, position {place[1]}, which is no token"
            with pytest.raises(InputError, match=where):
                checked_inputs(*arguments, vocab_size=vocab_size)


def test_integers_that_are_no_tokens_may_be_negative() -> None:
    """Nobody knows which of several are tokens; without a vocabulary, features or counts may be none."""
    two = IoSpec(tuple(TensorSpec(name, "int64", ("B", "S")) for name in "ab"), (), ())
    given = np.array([[-1, 300]])
    assert checked_inputs(two, 1, {"a": given, "b": given}, vocab_size=10)["a"] is given
    features = IoSpec((TensorSpec("x", "int64", ("B", "S", 2)),), (), ())
    assert checked_inputs(features, 1, {"x": given[None]})["x"].min() == -1


def test_states_take_the_type_they_are_stored_in() -> None:
    state = {"past_0_n": np.arange(4.0).reshape(2, 2), "past_1_m": [[0.1, 0.2], [1.0, 2.0]]}
    found = checked_state(IO, 2, state)
    assert [value.dtype for value in found.values()] == [np.float32, ml_dtypes.bfloat16]
    np.testing.assert_array_equal(found["past_1_m"], np.array(state["past_1_m"]).astype(ml_dtypes.bfloat16))
    with pytest.raises(InputError, match="past_1_m is no array"):
        checked_state(IO, 2, {**state, "past_1_m": [[1], [1, 2]]})


def test_rows_of_any_numpy_index() -> None:
    """Against NumPy: what the index selects of the row numbers."""
    rng = np.random.default_rng(0)
    for batch in range(1, 6):
        every = np.arange(batch)
        indices: list[Any] = [rng.integers(-batch, batch, rng.integers(0, 7)) for _ in range(50)]
        indices += [rng.random(batch) < 0.5 for _ in range(20)]
        indices += [slice(a, b, c) for a in (None, -2, 1) for b in (None, 3, -1) for c in (None, 2, -1)]
        for index in indices:
            np.testing.assert_array_equal(row_numbers(index, batch), np.unique(every[index]))
        np.testing.assert_array_equal(row_numbers(None, batch), every)
        for bad in (batch, -batch - 1):
            with pytest.raises(UsageError, match=f"no batch row {bad}"):
                row_numbers([0, bad], batch)


def test_a_vocabulary_is_a_number() -> None:
    assert vocabulary({}) is vocabulary({"vocab_size": None}) is None
    assert vocabulary({"vocab_size": 256}) == 256


def test_the_package_imports_nothing_heavy() -> None:
    """Sessions travel to boards: the standard library and NumPy are enough until one is opened."""
    code = (
        "import sys, xlstm_export.sessions as s; s.Session, s.save_state; "
        "import xlstm_export.sessions.ort, xlstm_export.sessions.tensorrt; "
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'tensorrt', 'ml_dtypes'}; "
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_names_that_the_package_lacks() -> None:
    import xlstm_export.sessions as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_an_input_that_is_signed_is_not_tokens() -> None:
    """Offsets and times below zero; io.json keeps the word, and says nothing of other inputs."""
    offsets = IoSpec((TensorSpec("t", "int64", ("B", "S"), signed=True),), (), ())
    given = np.array([[-3, 300]])
    again = IoSpec.from_json(json.loads(json.dumps(offsets.to_json())))
    assert again == offsets
    assert checked_inputs(again, 1, {"t": given})["t"] is given
    assert "signed" not in json.dumps(TOKENS.to_json())
    with pytest.raises(InputError, match="is no token of the model") as refusal:
        checked_inputs(TOKENS, 1, {"tokens": given})
    assert "an example that has values below zero" in refusal.value.hint
