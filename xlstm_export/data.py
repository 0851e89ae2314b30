"""Evaluation data and the task's own metric: bits per byte for language models, MASE for forecasters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import IoSpec
from .errors import InputError, UsageError
from .inputs import Arrays
from .sessions import Session

PIECE = 2048  # positions per call while a metric streams through the data
PICTURE = "text file for a byte-level language model; .npz with the model's inputs (N, S, ...) and `target`"


@dataclass(frozen=True)
class EvalData:
    """Held-out data of a task.

    Attributes:
        inputs: model inputs by name, each (N, S, ...).
        metric: name of the task metric, `score` computes it from the outputs (N, S, ...).
    """

    inputs: Arrays
    metric: str
    score: Callable[[Arrays], float]

    @property
    def rows(self) -> int:
        return int(next(iter(self.inputs.values())).shape[0])

    @property
    def length(self) -> int:
        return int(next(iter(self.inputs.values())).shape[1])

    def sample(self, count: int, length: int, rng: np.random.Generator) -> Arrays:
        """Stretches of `length` positions from random places, (count, length, ...)."""
        starts = rng.integers(0, self.length - length, size=count)
        rows = rng.integers(0, self.rows, size=count)
        return {
            name: np.stack([x[row, start : start + length] for row, start in zip(rows, starts, strict=True)])
            for name, x in self.inputs.items()
        }

    def streams(self, count: int) -> Arrays:
        """Long streams (count, S, ...): different rows, or one row begun at different places."""
        chosen = [row % self.rows for row in range(count)]
        shifts = [self.length * (row // self.rows) // count for row in range(count)]
        return {
            name: np.stack([np.roll(x[row], -shift, 0) for row, shift in zip(chosen, shifts, strict=True)])
            for name, x in self.inputs.items()
        }


def load(path: Path, io: IoSpec, *, vocab_size: int | None = None, limit: int = 16384) -> EvalData:
    """Read evaluation data for a model.

    Args:
        path: a text file (byte-level language models) or an .npz file with the inputs by name and either
            `target` (N, S, ...) with NaN where unknown, plus optional `mase_scale`.
        io: the model's inputs and outputs.
        vocab_size: of a language model.
        limit: at most this many positions per row are used.

    Raises:
        InputError: the file cannot be read or does not fit the model.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist", f"give a {PICTURE}")
    if path.suffix == ".npz":
        return _load_npz(path, io, limit)
    if [spec.dtype for spec in io.inputs] != ["int64"] or vocab_size != 256:
        raise UsageError(
            f"{path} is read as text, but the model is no byte-level language model",
            f"give a {PICTURE}",
        )
    return _byte_text(path, io, limit)


def _byte_text(path: Path, io: IoSpec, limit: int) -> EvalData:
    tokens = np.frombuffer(path.read_bytes()[: limit + 1], dtype=np.uint8).astype(np.int64)
    if len(tokens) < 2:
        raise InputError(f"{path} is empty", "a metric needs at least two bytes of text")
    targets = tokens[None, 1:]
    output = io.outputs[0].name if io.outputs else "logits"

    def bits_per_byte(outputs: Arrays) -> float:
        logits = outputs[output].astype(np.float64)
        peak = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0]
        chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return float((log_sum - chosen).mean() / np.log(2.0))

    return EvalData({io.inputs[0].name: tokens[None, :-1]}, "bits per byte", bits_per_byte)


def _load_npz(path: Path, io: IoSpec, limit: int) -> EvalData:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise InputError(f"{path} is not a readable .npz file: {error}", f"give a {PICTURE}") from error
    inputs: Arrays = {}
    for spec in io.inputs:
        if spec.name not in arrays:
            raise InputError(f"{path} lacks input {spec.name}", f"it holds {', '.join(sorted(arrays))}")
        array = arrays[spec.name]
        if array.ndim != len(spec.shape) or array.shape[2:] != spec.shape[2:] or 0 in array.shape[:2]:
            expected = ", ".join(map(str, ("N", "S", *spec.shape[2:])))
            raise InputError(f"{path}: {spec.name} has shape {array.shape}, expected ({expected})")
        first = arrays[io.inputs[0].name]
        if array.shape[:2] != first.shape[:2]:
            other = f"{io.inputs[0].name} has shape {first.shape}"
            raise InputError(f"{path}: {spec.name} has shape {array.shape}, but {other}")
        if array.dtype.kind not in "biuf":
            raise InputError(f"{path}: {spec.name} holds {array.dtype}, not numbers")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {spec.name} holds NaN or Inf", "fill the gaps before evaluating")
        inputs[spec.name] = np.ascontiguousarray(array[:, :limit].astype(spec.dtype))
    if "target" not in arrays:
        raise InputError(f"{path} lacks `target`", f"it holds {', '.join(sorted(arrays))}")
    target, scale = arrays["target"], arrays.get("mase_scale", np.float64(1.0))
    if target.ndim < 2 or target.dtype.kind not in "biuf":
        raise InputError(f"{path}: target is {target.dtype} of shape {target.shape}, expected (N, S, ...)")
    if scale.ndim or scale.dtype.kind not in "biuf" or not 0 < scale < np.inf:
        raise InputError(f"{path}: mase_scale is {scale}, expected one positive number")
    target = target[:, :limit].astype(np.float64)
    known = np.isfinite(target)
    if not known.any():
        raise InputError(f"{path}: target holds no known value", "NaN marks positions that do not count")
    output = io.outputs[0].name if io.outputs else "y"

    def mean_error(outputs: Arrays) -> float:
        if outputs[output].shape != target.shape:
            raise InputError(
                f"{path}: target has shape {target.shape}, the model gives {outputs[output].shape}"
            )
        return float(np.abs(outputs[output].astype(np.float64) - target)[known].mean() / float(scale))

    return EvalData(inputs, "MASE" if "mase_scale" in arrays else "MAE", mean_error)


def stream(session: Session, inputs: Arrays, piece: int = PIECE) -> Arrays:
    """Run a session over long inputs from a fresh start, in pieces; outputs joined along the sequence."""
    session.reset()
    length = next(iter(inputs.values())).shape[1]
    parts: list[Arrays] = []
    for start in range(0, length, piece):
        parts.append(
            session.prefill({k: np.ascontiguousarray(v[:, start : start + piece]) for k, v in inputs.items()})
        )
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
