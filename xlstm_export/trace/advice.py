"""What to do about a model that cannot be streamed: each way is tried before it is recommended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..distance import difference
from ..errors import BuildError, CannotStreamError, ExportError
from ..load.loaded import Dims, Loaded
from ..load.signature import leaves
from ..specs import TensorSpec
from .memory import check_memory

log = logging.getLogger(__name__)
LIMIT = 1e-4  # relative L2 in FP32, as in streaming.py

ROWS = (
    "a row of the batch alone fails, or gives other values than among others: rows must not meet in forward"
)
SECOND = "the batch is the second axis"
Works = Callable[[Loaded], object]


def wants_advice(error: BuildError) -> bool:
    """Whether an error is about states that cannot be carried, or recommends to leave them out."""
    return isinstance(error, CannotStreamError) or "--stateless" in (error.hint or "")


def with_advice(error: BuildError, loaded: Loaded, trace: Works) -> BuildError:
    """The error to report, with a hint that begins with what works, and does not say what does not.

    Args:
        error: why the model cannot be streamed.
        loaded: the model.
        trace: traces a model without states; raises an exception where that fails.
    """
    loaded = loaded.in_form(True)
    advised = "--stateless" in (error.hint or "")
    others = "; or ".join(x for x in (error.hint or "").split("; or ") if "--stateless" not in x)
    try:
        check_memory(loaded)
    except BuildError as memory:
        return BuildError(f"{error.message}; and {memory.message}", memory.hint)
    dims = _fixed(loaded)
    fixed = replace(loaded, dims={**loaded.dims, **dims})
    problem = _problem(loaded, trace) if _any_length(loaded) else "forward does not take other lengths"
    if not problem:
        hint = (
            error.hint
            if advised
            else f"export with --stateless: then every call starts fresh; or {error.hint}"
        )
    elif dims and not _one_position(loaded) and not (problem := _problem(fixed, trace)):
        declared = ", ".join(f'"{name}": {_shown(shape)}' for name, shape in dims.items())
        hint = (
            "forward works for the example's number of positions only; declare it: the factory returns "
            f"{{{declared}}} as its third element (dims= in Python), and every call has so many and starts "
            "fresh"
        )
        hint += f"; or {others}" if advised and others else ""
    else:
        hint = others or "write an adapter for what has the state (docs/adapters.md)"
        hint = (
            problem
            if problem.startswith(SECOND)
            else f"{hint}; it does not export without states either: {problem}"
        )
    return BuildError(error.message, hint)


def _one_position(loaded: Loaded) -> bool:
    """Whether the user's example may have had a single position: it was doubled for tracing then."""
    specs = {name: TensorSpec(name, "", loaded.input_dims(name)) for name in loaded.inputs}
    axes = {name: spec.time_axis for name, spec in specs.items()}
    return any(a is not None and loaded.inputs[n].shape[a] == 2 * specs[n].steps for n, a in axes.items())


def _problem(loaded: Loaded, trace: Works) -> str:
    """Why a model cannot be traced without states, or what couples its rows; empty where it works."""
    try:
        trace(loaded)
    except Exception as error:
        log.debug("not recommended, because it fails", exc_info=True)
        return error.message if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
    if _rows_are_apart(loaded):
        return ""
    if not _rows_are_apart(loaded, axis=1):
        return ROWS
    name = loaded.batched
    return (
        f"{SECOND} of {name}, and must be the first: give {name} with its first two axes swapped, and swap "
        f"them back where forward begins: {name} = {name}.transpose(0, 1); "
        "if a recurrence only lacks batch_first=True, pass that instead and train again"
    )


def _any_length(loaded: Loaded) -> bool:
    """Whether forward takes one position, and twice as many as the example has."""

    def one(x: Tensor, spec: TensorSpec) -> Tensor:
        known = loaded.ranges.get(spec.name)
        if known is not None and known.to_length is not None:  # lengths and indices of positions
            x = x.clamp(max=1 + known.to_length)
        return x if spec.time_axis is None else x.narrow(spec.time_axis, 0, spec.steps)

    def twice(x: Tensor, spec: TensorSpec) -> Tensor:
        return x if spec.time_axis is None else torch.cat([x, x], spec.time_axis)

    specs = {name: TensorSpec(name, "", loaded.input_dims(name)) for name in loaded.inputs}
    return all(
        _run(loaded, {name: change(x, specs[name]) for name, x in loaded.inputs.items()}) is not None
        for change in (one, twice)
    )


def _rows_are_apart(loaded: Loaded, axis: int = 0) -> bool:
    """Whether the first and the last row of the batch give alone what they give beside the others.

    Args:
        loaded: the model.
        axis: of the inputs, taken for the batch.
    """
    whole = _run(loaded, loaded.inputs)
    rows = {n: x for n, x in loaded.inputs.items() if loaded.input_dims(n)[:1] == ("B",) and x.ndim > axis}
    batch = rows[loaded.batched].shape[axis] if loaded.batched in rows else 1
    for row in (0, batch - 1):
        alone = _run(loaded, {**loaded.inputs, **{n: x.narrow(axis, row, 1) for n, x in rows.items()}})
        if batch < 2 or whole is None or alone is None:
            return False
        if not all(_is_part(x, y, row, batch) for x, y in zip(whole, alone, strict=True) if x.ndim):
            return False
    return True


def _is_part(whole: Tensor, alone: Tensor, row: int, batch: int) -> bool:
    """Whether an output for one row of the batch is the part of it in that for all rows.

    Its batch may be a later axis, and may have several rows to a stream, beside each other or apart.
    """
    if whole.shape == alone.shape:
        return bool(torch.allclose(whole, alone, rtol=LIMIT, atol=LIMIT * float(whole.abs().max())))
    axes = [a for a in range(min(whole.ndim, alone.ndim)) if whole.shape[a] != alone.shape[a]]
    if whole.ndim != alone.ndim or len(axes) != 1 or whole.shape[axes[0]] != batch * alone.shape[axes[0]]:
        return False
    rows, each = whole.movedim(axes[0], 0), alone.shape[axes[0]]
    parts = (rows[row * each : (row + 1) * each], rows[row::batch])
    mine = alone.movedim(axes[0], 0).numpy()
    return any(difference(part.numpy(), mine).relative_l2 <= LIMIT for part in parts)


def _run(loaded: Loaded, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The tensors that forward returns; None where it fails."""
    args, kwargs = loaded.call(inputs)
    try:
        with torch.no_grad():
            return [x for _, x in leaves(loaded.module(*args, **kwargs)) if isinstance(x, Tensor)]
    except Exception:
        log.debug("forward does not run on these inputs", exc_info=True)
        return None


def _fixed(loaded: Loaded) -> dict[str, Dims]:
    """Dims of the inputs that have positions, with the example's number of them."""
    given = {name: loaded.input_dims(name) for name in loaded.inputs}
    return {
        name: tuple(
            n if isinstance(d, str) and d != "B" else d
            for d, n in zip(dims, loaded.inputs[name].shape, strict=True)
        )
        for name, dims in given.items()
        if TensorSpec(name, "", dims).time_axis is not None
    }


def _shown(dims: Dims) -> str:
    return "(" + ", ".join(f'"{d}"' if isinstance(d, str) else str(d) for d in dims) + ")"
