"""Check and convert the arguments of a session, once, to the arrays that its backend takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError, UsageError
from ..inputs import Arrays
from ..specs import IoSpec, TensorSpec

Rows: TypeAlias = "int | slice | Sequence[int] | Sequence[bool] | np.ndarray | None"


def numpy_type(dtype: str) -> np.dtype:
    """The NumPy type of that name, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def checked_inputs(
    io: IoSpec,
    batch: int,
    inputs: Mapping[str, ArrayLike],
    *,
    length: int | None = None,
    vocab_size: int | None = None,
) -> Arrays:
    """Inputs of one call, each in the type and shape of the model.

    Lists become arrays. An integer input accepts integers of any type; a float input accepts integers and
    floats of any type. Floats are never rounded to integers; booleans and numbers are not converted to each
    other. NaN and infinite values would stay in the state for ever, so they are refused where the model
    does not take them.

    Args:
        io: what the model takes.
        batch: streams of the session.
        inputs: by graph input name, each (batch, S, ...).
        length: S; None for any length of 1 or more that is the same for all inputs.
        vocab_size: number of tokens, where the model's only integer input holds tokens. Without it, an
            integer input (B, S) is treated as tokens if it is the model's only input and is not signed.

    Raises:
        InputError: a name, a shape, a type or a value does not fit.
    """
    _compare_names("input", inputs, [spec.name for spec in io.inputs])
    tokens = token_input(io, vocab_size)
    arrays: Arrays = {}
    for spec in io.inputs:
        array = _array(f"input {spec.name}", inputs[spec.name])
        if length is None and spec.time_axis is not None and array.ndim == len(spec.shape):
            length = array.shape[spec.time_axis] // spec.steps
        _check_shape(spec, array, batch, length)
        arrays[spec.name] = _converted(spec, array)
        if spec is tokens:
            check_tokens(f"input {spec.name}", arrays[spec.name], vocab_size)
        else:
            check_finite(f"input {spec.name}", spec, arrays[spec.name])
    return arrays


def checked_state(io: IoSpec, batch: int, state: Mapping[str, ArrayLike]) -> Arrays:
    """States (batch, ...) by past name, in the types of the model.

    Raises:
        InputError: a name, a shape or a type does not fit.
    """
    _compare_names("state", state, [spec.past for spec in io.states])
    arrays: Arrays = {}
    for spec in io.states:
        array, dtype = _array(f"state {spec.past}", state[spec.past]), numpy_type(spec.dtype)
        if array.dtype.kind == "c" or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise InputError(f"state {spec.past} holds {array.dtype}, expected {spec.dtype}")
        expected = (batch, *spec.shape)
        if array.shape != expected:
            raise InputError(
                f"state {spec.past} has shape {array.shape}, expected {expected}",
                "a state belongs to one model and one batch size",
            )
        arrays[spec.past] = array.astype(dtype, copy=False)
    return arrays


def check_state(where: Path, state: Mapping[str, np.ndarray]) -> None:
    """Refuse the state of a file that is not finite: no later input would make it finite again.

    Raises:
        InputError: it holds NaN or an infinite value.
    """
    for name, array in state.items():
        if array.dtype.kind in "fV" and (bad := ~np.isfinite(array)).any():
            raise InputError(
                f"{where}: state {name} holds {_first(array, bad)}",
                "what the stream was is lost: begin it again, from the state of an earlier file or from none",
            )


def check_finite(what: str, spec: TensorSpec, array: np.ndarray) -> None:
    """Refuse NaN and infinite values that the model does not take.

    Args:
        what: the input, for the message.
        spec: of the input.
        array: its values.

    Raises:
        InputError: with the first value and its place.
    """
    if array.dtype.kind not in "fV" or np.isfinite(array).all():
        return
    bad = np.isnan(array) & (not spec.gaps) | np.isinf(array) & (not spec.infinite)
    if bad.any():
        raise InputError(
            f"{what} holds {_first(array, bad)}",
            "the model takes no gaps: fill them, for example with the value before"
            if np.isnan(array[bad].flat[0])
            else "the model takes no infinite values: check what made them",
        )


def row_numbers(rows: Rows | Iterable[int], batch: int) -> np.ndarray:
    """The batch rows that an index selects, each once, ascending; all of them for None.

    Args:
        rows: what NumPy takes as an index of an axis of `batch` rows: an integer, a slice, a list or an array
            of integers, a mask of `batch` truth values. Negative numbers count from the end.
        batch: number of rows.

    Raises:
        UsageError: a row does not exist, or `rows` is not an index.
    """
    every = np.arange(batch)
    if rows is None:
        return every
    if isinstance(rows, slice):
        return np.sort(every[rows])
    hint = f"the batch is {batch}: rows are 0 … {batch - 1}; give an integer, a slice, a list or a mask"
    try:
        index = np.asarray(rows if isinstance(rows, np.ndarray | np.generic | int) else list(rows))
    except (TypeError, ValueError) as error:
        raise UsageError(f"rows {rows!r:.80} are no index: {error}", hint) from error
    if index.size == 0 and not isinstance(rows, np.ndarray):
        return every[:0]
    if index.dtype.kind == "b":
        if index.shape != (batch,):
            raise UsageError(f"the mask of rows has shape {list(index.shape)}, expected [{batch}]", hint)
    elif index.dtype.kind not in "iu":
        raise UsageError(f"rows {rows!r:.80} are {index.dtype}, which is no index", hint)
    elif (bad := index[(index < -batch) | (index >= batch)]).size:
        raise UsageError(f"no batch row {bad.flat[0]}", hint)
    return np.unique(every[index])


def _compare_names(what: str, given: Mapping[str, ArrayLike], expected: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{what}: {type(given).__name__} given, expected arrays by name", _names(expected))
    missing = [name for name in expected if name not in given]
    if not missing and len(given) == len(expected):
        return
    extra = sorted(str(name) for name in given if name not in expected)
    if missing or extra:
        found = f"missing {', '.join(missing[:5])}" if missing else f"unknown {', '.join(extra[:5])}"
        raise InputError(f"{what}: {found}", _names(expected))


def _names(expected: Sequence[str]) -> str:
    return f"the model has {', '.join(expected[:12]) or 'none'}"


def _array(what: str, value: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor of torch
        raise InputError(
            f"{what} is no array: {error}", "give an array, or lists of equal lengths"
        ) from error


def _check_shape(spec: TensorSpec, array: np.ndarray, batch: int, length: int | None) -> None:
    wanted = spec.sized(batch, length or 0)
    if array.shape != wanted or 0 in wanted:
        shown = ", ".join(str(size or dim) for size, dim in zip(wanted, spec.shape, strict=True))
        raise InputError(
            f"input {spec.name} has shape {list(array.shape)}, expected [{shown}]",
            f"the batch is {batch}, S at least 1 and the same for all inputs",
        )


def _converted(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The array in the type of its input, if no value changes by the conversion."""
    dtype = numpy_type(spec.dtype)
    if array.dtype == dtype:
        return array
    given, wanted = array.dtype.kind, dtype.kind
    if wanted in "iu" and given in "iu":
        limits = np.iinfo(dtype)
        _refuse(spec, array, (array < limits.min) | (array > limits.max))
        return array.astype(dtype)
    floats = wanted in "fV" and given in "iufV" and np.can_cast(array.dtype, dtype, "same_kind")
    if not floats:
        raise InputError(
            f"input {spec.name} is {array.dtype}, expected {spec.dtype}",
            "convert it, if the values have that meaning",
        )
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if given == "f":
        _refuse(spec, array, np.isinf(converted) & np.isfinite(array))
    return converted


def _refuse(spec: TensorSpec, array: np.ndarray, bad: np.ndarray) -> None:
    if bad.any():
        raise InputError(
            f"input {spec.name} holds {_first(array, bad)}, which {spec.dtype} cannot hold",
            "check the values",
        )


def token_input(io: IoSpec, vocab_size: int | None) -> TensorSpec | None:
    """The input whose values are tokens; None where that is not clear."""
    integers = [spec for spec in io.inputs if numpy_type(spec.dtype).kind in "iu"]
    if len(integers) != 1:
        return None
    alone = len(io.inputs) == 1 and integers[0].shape == ("B", "S") and not integers[0].signed
    return integers[0] if vocab_size is not None or alone else None


def check_tokens(what: str, array: np.ndarray, vocab_size: int | None) -> None:
    """Refuse integers that are no tokens of the model.

    Args:
        what: the input, for the message.
        array: integers.
        vocab_size: number of tokens; None where it is not known.

    Raises:
        InputError: with the first value and its place.
    """
    if array.size == 1:  # a step of one stream, where every microsecond counts
        lowest = highest = array.item()
    else:
        lowest, highest = array.min(), array.max()
    if lowest >= 0 and (vocab_size is None or highest < vocab_size):
        return
    bad = array < 0
    if vocab_size is not None:
        bad |= array >= vocab_size
    beyond = vocab_size is not None and highest >= vocab_size
    known = (
        "tokens begin at 0; for times or offsets, export with an example that has values below zero"
        if vocab_size is None
        else f"tokens are 0 … {vocab_size - 1}"
    )
    why = (
        "they were made with the tokenizer of another model"
        if beyond
        else "negative numbers mark targets that do not count, or padding: leave such positions out"
    )
    raise InputError(f"{what} holds {_first(array, bad)}, which is no token of the model", f"{known}; {why}")


def _first(array: np.ndarray, bad: np.ndarray) -> str:
    """The first value that `bad` selects, and its place, as text."""
    place = [int(axis[0]) for axis in np.nonzero(bad)]
    where = f"row {place[0]}, position {place[1]}" if len(place) == 2 else f"index {place}"
    return f"{array[tuple(place)]} at {where}"
