"""Made-up inputs for a model without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..inputs import Arrays, per_position
from ..specs import IoSpec

if TYPE_CHECKING:
    from .loaded import Loaded


def random_inputs(loaded: Loaded, io: IoSpec, batch: int, length: int, rng: np.random.Generator) -> Arrays:
    """Inputs (batch, length, ...) without data: uniform tokens, or example positions with noise."""
    inputs: Arrays = {}
    integers = [spec.name for spec in io.inputs if np.issubdtype(spec.dtype, np.integer)]
    for spec in io.inputs:
        example = loaded.inputs[spec.name].numpy()
        lead = (batch, length) if per_position(spec) else (batch,)
        rest = example.shape[len(lead) :]
        if spec.dtype == "bool":
            inputs[spec.name] = rng.random((*lead, *rest)) < 0.5
        elif spec.name in integers:
            # An embedding table gives the number of tokens; with several inputs it is not clear of which.
            high = loaded.vocab_size if len(integers) == 1 else None
            high = high or int(example.max()) + 1
            inputs[spec.name] = rng.integers(0, high, (*lead, *rest)).astype(spec.dtype)
        else:
            flat = example.reshape(-1, *rest)
            chosen = flat[rng.integers(0, len(flat), lead)]
            spread = flat.std(axis=0)
            noise = rng.standard_normal(chosen.shape) * np.where(spread > 0, spread, 1.0)
            inputs[spec.name] = (chosen + noise).astype(spec.dtype)
    return inputs
