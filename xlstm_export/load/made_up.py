"""Made-up inputs for a model without data, in the range of the example or in one that is known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserCodeError
from ..inputs import Arrays, per_position
from ..specs import IoSpec, TensorSpec

if TYPE_CHECKING:
    from .loaded import Loaded


def random_inputs(loaded: Loaded, io: IoSpec, batch: int, length: int, rng: np.random.Generator) -> Arrays:
    """Inputs (batch, length, ...) without data: uniform integers, or example positions with noise.

    The range of an input is that in `Loaded.ranges`, where it is there; that of the vocabulary, for tokens of
    a published model; else that of the example. Floats may exceed their example, unless it is never negative
    or stays between -1 and 1; those that rise from position to position in all of it, as times do, rise. A
    boolean that is the same in the whole example stays the same.
    """
    inputs: Arrays = {}
    integers = [spec.name for spec in io.inputs if np.issubdtype(spec.dtype, np.integer)]
    for spec in io.inputs:
        example = loaded.inputs[spec.name].numpy()
        known = loaded.ranges.get(spec.name)
        limits = None if known is None else known.at(length)
        shape = spec.sized(batch, length)
        if spec.dtype == "bool":
            inputs[spec.name] = rng.integers(example.min(), int(example.max()) + 1, shape).astype(bool)
        elif spec.name in integers:
            if limits is None and loaded.vocab_size and len(integers) == 1:
                limits = (0, loaded.vocab_size - 1)
            low, high = limits or (example.min(), example.max())
            inputs[spec.name] = rng.integers(int(low), int(high) + 1, shape).astype(spec.dtype)
        elif limits is None and (axis := _rising_axis(example, spec)) is not None:
            inputs[spec.name] = _rising(example, axis, spec.batched, shape, rng)
        else:
            noisy = _noisy(example, spec, shape, rng)
            low, high = limits or _bounds(example)
            inputs[spec.name] = np.asarray(np.clip(noisy, low, high))  # clip makes a scalar of no dimension
    return inputs


def explained(error: UserCodeError, loaded: Loaded, io: IoSpec) -> UserCodeError:
    """The error of the user's code with a hint that its inputs were made up, and how to give others."""
    hints = ["these inputs were made up", *([error.hint] if error.hint else [])]
    if "checkpoint" not in loaded.origin:
        hint = (
            "declare the values that forward takes as the fourth element that the factory returns (ranges=), "
        )
        if any(map(per_position, io.inputs)):
            hint += (
                f"or a fixed length as the third (dims=), such as {_ranges(loaded)} and {_dims(loaded, io)}"
            )
        else:
            hint += f"such as {_ranges(loaded)}"
        hints.append(hint)
    if io.states and all(map(per_position, io.inputs)):
        hints.append("or give real inputs with --data")
    return UserCodeError(error.message, "; ".join(hints))


def _ranges(loaded: Loaded) -> str:
    """The ranges of the example, rounded to wider ones, as a factory declares them."""
    shown = []
    for name, x in loaded.inputs.items():
        values = x.numpy()
        known = values[np.isfinite(values)]
        if known.size and values.dtype != bool:
            low, high = known.min(), known.max()
            if values.dtype.kind == "f":
                low, high = (f(v * 100) / 100 for f, v in ((math.floor, low), (math.ceil, high)))
            shown.append(f'"{name}": ({low}, {high})')
    return f"{{{', '.join(shown)}}}"


def _dims(loaded: Loaded, io: IoSpec) -> str:
    """The sizes of the example, as a factory declares them."""
    shown = [
        f'"{spec.name}": ("B", {", ".join(map(str, loaded.inputs[spec.name].shape[1:]))})'
        for spec in io.inputs
        if per_position(spec)
    ]
    return f"{{{', '.join(shown)}}}"


def _bounds(example: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value of floats that their example shows to be bounded: never negative, or in ±1."""
    known = example[np.isfinite(example)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if low < high and (low >= 0 or (low >= -1 and high <= 1)):
        return low, high
    return -math.inf, math.inf


def _rising_axis(example: np.ndarray, spec: TensorSpec) -> int | None:
    """The axis along which each value of an example, of three at least, is larger than the one before it.

    That of the positions; of a fixed window any but the batch.
    """
    first = int(spec.batched)
    axes = range(first, example.ndim) if spec.time_axis is None else [spec.time_axis]
    rising = (a for a in axes if example.shape[a] > 2 and (np.diff(example, axis=a) > 0).all())
    return next(rising, None)


def _rising(
    example: np.ndarray, axis: int, own_rows: bool, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """First positions of the example, and steps from position to position that are drawn from its own.

    Args:
        example: of an input.
        axis: along which it rises.
        own_rows: whether its first axis is the batch.
        shape: of the result.
        rng: generator of the draws.
    """
    batched = example if own_rows else example[None]
    at = axis if own_rows else axis + 1
    count, length = shape[0] if own_rows else 1, shape[axis]
    rows = rng.integers(0, len(batched), count)
    known = np.moveaxis(batched, at, 1)[rows]  # (count, positions, ...)
    steps = np.diff(known, axis=1)
    chosen = rng.integers(0, steps.shape[1], (count, length - 1))
    drawn = steps[np.arange(count)[:, None], chosen]
    found = np.cumsum(np.concatenate([known[:, :1], drawn], axis=1, dtype=np.float64), axis=1)
    made: np.ndarray = np.moveaxis(found.astype(example.dtype), 1, at)
    return np.asarray(made if own_rows else made[0], order="C")


def _noisy(
    example: np.ndarray, spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Rows and positions of the example, drawn at random, with noise of the spread that each element has."""
    axes = [axis for axis in (0 if spec.batched else None, spec.time_axis) if axis is not None]
    front = list(range(len(axes)))
    rest = [size for axis, size in enumerate(example.shape) if axis not in axes]
    flat = np.moveaxis(example, axes, front).reshape(-1, *rest)
    chosen = flat[rng.integers(0, len(flat), [shape[axis] for axis in axes])]
    spread = flat.std(axis=0)
    noise = rng.standard_normal(chosen.shape) * np.where(spread > 0, spread, 1.0)
    found: np.ndarray = np.moveaxis((chosen + noise).astype(spec.dtype), front, axes)
    return np.asarray(found, order="C")
