"""Inputs and outputs as arrays: which of them have positions, and how to cut and join those.

A position is one of the stream: an input (B, 4*S, ...) has four rows to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .specs import IoSpec, TensorSpec

Arrays = dict[str, np.ndarray]


def per_position(spec: TensorSpec) -> bool:
    """Whether a tensor has an axis of positions."""
    return spec.time_axis is not None


def has_positions(io: IoSpec) -> bool:
    """Whether any input is a sequence; without one, calls do not depend on each other."""
    return any(map(per_position, io.inputs))


def piece(array: np.ndarray, spec: TensorSpec, start: int, end: int) -> np.ndarray:
    """A view of positions start … end - 1; of a tensor without positions the whole."""
    if spec.time_axis is None:
        return array
    return array[(slice(None),) * spec.time_axis + (slice(start * spec.steps, end * spec.steps),)]


def cut(inputs: Mapping[str, np.ndarray], io: IoSpec, start: int, end: int) -> Arrays:
    """Positions start … end - 1; an input without positions is passed on whole, in every piece."""
    return {
        spec.name: np.asarray(piece(inputs[spec.name], spec, start, end), order="C")
        if per_position(spec)
        else inputs[spec.name]
        for spec in io.inputs
    }


def length_of(arrays: Mapping[str, np.ndarray], specs: Iterable[TensorSpec]) -> int:
    """Positions of the stream in arrays; 1 where none has an axis of them."""
    lengths = (arrays[x.name].shape[x.time_axis] // x.steps for x in specs if x.time_axis is not None)
    return max(lengths, default=1)


def joined(parts: Sequence[np.ndarray], spec: TensorSpec) -> np.ndarray:
    """One tensor of consecutive calls: joined along its positions; without them that of the last call."""
    return parts[-1] if spec.time_axis is None else np.concatenate(parts, axis=spec.time_axis)


def batch_of(arrays: Mapping[str, np.ndarray], specs: Iterable[TensorSpec]) -> int:
    """Rows of the arrays; 1 where all streams share all of them."""
    return next((int(arrays[x.name].shape[0]) for x in specs if x.batched), 1)


def rows_of(arrays: Mapping[str, np.ndarray], io: IoSpec, rows: slice | list[int]) -> Arrays:
    """The given rows of the batch; an input that all streams share is passed on whole."""
    return {x.name: arrays[x.name][rows] if x.batched else arrays[x.name] for x in io.inputs}


def streams_of(outputs: Mapping[str, np.ndarray], io: IoSpec, rows: list[int], batch: int) -> Arrays:
    """What belongs to the given rows of the batch, of outputs of `batch` rows.

    The batch is the axis "B", which need not be the first (hidden states of nn.LSTM), or one of a multiple of
    it. Outputs without such an axis belong to no row and are left out.
    """
    found = {}
    for spec in io.outputs:
        axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and "B" in dim]
        if axes:
            value = outputs[spec.name]
            each = value.shape[axes[0]] // batch
            found[spec.name] = value.take([row * each + i for row in rows for i in range(each)], axes[0])
    return found


def rolled(array: np.ndarray, spec: TensorSpec, start: int) -> np.ndarray:
    """The tensor from position `start` on, and what was before that at its end."""
    return array if spec.time_axis is None else np.roll(array, -start * spec.steps, axis=spec.time_axis)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an .npz file by their names."""
    with path.open("wb") as file:  # of a path NumPy would make another one, where it does not end in .npz
        # NumPy before 2.1 has no `allow_pickle` here, and its type checker sees that name in every mapping.
        np.savez(file, **arrays)  # type: ignore[arg-type]
