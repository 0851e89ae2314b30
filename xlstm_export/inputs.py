"""Inputs of a model as arrays: which of them have positions, and how to cut those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .specs import IoSpec, TensorSpec

Arrays = dict[str, np.ndarray]


def per_position(spec: TensorSpec) -> bool:
    """Whether a tensor is (B, S, ...)."""
    return spec.shape[1:2] == ("S",)


def has_positions(io: IoSpec) -> bool:
    """Whether any input is a sequence; without one, calls do not depend on each other."""
    return any(map(per_position, io.inputs))


def cut(inputs: Mapping[str, np.ndarray], io: IoSpec, start: int, end: int) -> Arrays:
    """Positions start … end - 1; an input without positions is passed on whole, in every piece."""
    return {
        spec.name: np.ascontiguousarray(inputs[spec.name][:, start:end])
        if per_position(spec)
        else inputs[spec.name]
        for spec in io.inputs
    }


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an .npz file by their names."""
    # NumPy before 2.1 has no `allow_pickle` here, and its type checker sees that name in every mapping.
    np.savez(path, **arrays)  # type: ignore[arg-type]
