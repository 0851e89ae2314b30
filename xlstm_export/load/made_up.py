"""Made-up inputs for a model without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..inputs import Arrays
from ..specs import IoSpec, TensorSpec

if TYPE_CHECKING:
    from .loaded import Loaded


def random_inputs(loaded: Loaded, io: IoSpec, batch: int, length: int, rng: np.random.Generator) -> Arrays:
    """Inputs (batch, length, ...) without data: uniform tokens, or example positions with noise."""
    inputs: Arrays = {}
    integers = [spec.name for spec in io.inputs if np.issubdtype(spec.dtype, np.integer)]
    for spec in io.inputs:
        example = loaded.inputs[spec.name].numpy()
        shape = spec.sized(batch, length)
        if spec.dtype == "bool":
            inputs[spec.name] = rng.random(shape) < 0.5
        elif spec.name in integers:
            # An embedding table gives the number of tokens; with several inputs it is not clear of which.
            high = loaded.vocab_size if len(integers) == 1 else None
            high = high or int(example.max()) + 1
            inputs[spec.name] = rng.integers(0, high, shape).astype(spec.dtype)
        else:
            inputs[spec.name] = _noisy(example, spec, shape, rng)
    return inputs


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
