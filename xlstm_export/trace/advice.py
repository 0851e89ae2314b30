"""What to do about a model that cannot be streamed: each way is tried before it is recommended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import BuildError, CannotStreamError, ExportError
from ..lift.model import lift_apart
from ..lift.passes import watch_calls
from ..load.loaded import Dims, Loaded
from ..specs import TensorSpec
from .apart import APART, SECOND, called, met_at, rows_are_apart, second_axis
from .memory import check_memory

log = logging.getLogger(__name__)
ROWS = (
    "a row of the batch alone fails, or gives other values than among others; rows must not meet in forward"
)
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
    given = _as_given(loaded)
    dims = _fixed(given)
    fixed = replace(given, dims={**loaded.dims, **dims})
    lengths = _lengths(loaded)
    problem = _problem(loaded, trace) if not lengths else "forward does not take other lengths"
    if not problem:
        hint = (
            error.hint
            if advised
            else f"export with --stateless: then every call starts fresh; or {error.hint}"
        )
    elif dims and not _one_position(given) and not (problem := _problem(fixed, trace)):
        declared = ", ".join(f'"{name}": {_shown(shape)}' for name, shape in dims.items())
        hint = (
            f"forward works for {lengths or ONLY}; declare it: the factory returns "
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


def _as_given(loaded: Loaded) -> Loaded:
    """The model with the user's example where that was doubled, and forward does not take it: an image."""
    if not _one_position(loaded) or called(loaded, loaded.inputs) is not None:
        return loaded
    specs = {name: TensorSpec(name, "", loaded.input_dims(name)) for name in loaded.inputs}
    halved = {
        name: x if (axis := specs[name].time_axis) is None else x.narrow(axis, 0, specs[name].steps)
        for name, x in loaded.inputs.items()
    }
    return replace(loaded, inputs=halved)


def _problem(loaded: Loaded, trace: Works) -> str:
    """Why a model cannot be traced without states, or what couples its rows; empty where it works."""
    try:
        trace(loaded)
    except Exception as error:
        log.debug("not recommended, because it fails", exc_info=True)
        if not isinstance(error, ExportError):
            return f"{type(error).__name__}: {error}"
        return error.message + (error.hint and f"; there, {error.hint}")
    if rows_are_apart(loaded):
        return ""
    return second_axis(loaded) or f"{met_at(loaded) or ROWS}: {APART}"


LONG = 256  # positions; more than the longest call of `verify`
ONLY = "the example's number of positions only"


def _lengths(loaded: Loaded) -> str:
    """Which numbers of positions forward takes; empty where it takes one, twice the example's, and many."""

    def one(x: Tensor, spec: TensorSpec) -> Tensor:
        known = loaded.ranges.get(spec.name)
        if known is not None and known.to_length is not None:  # lengths and indices of positions
            x = x.clamp(max=1 + known.to_length)
        return x if spec.time_axis is None else x.narrow(spec.time_axis, 0, spec.steps)

    def twice(x: Tensor, spec: TensorSpec) -> Tensor:
        return x if spec.time_axis is None else torch.cat([x, x], spec.time_axis)

    specs = {name: TensorSpec(name, "", loaded.input_dims(name)) for name in loaded.inputs}

    def long(x: Tensor, spec: TensorSpec) -> Tensor:
        if spec.time_axis is None:
            return x
        times = -(-LONG * spec.steps // x.shape[spec.time_axis])
        return torch.cat([x] * times, spec.time_axis).narrow(spec.time_axis, 0, LONG * spec.steps)

    def taken(change: Callable[[Tensor, TensorSpec], Tensor]) -> bool:
        return called(loaded, {n: change(x, specs[n]) for n, x in loaded.inputs.items()}) is not None

    if not (taken(one) and taken(twice)):
        return ONLY
    many = {n: long(x, specs[n]) for n, x in loaded.inputs.items()}
    return "" if _lifted_runs(loaded, many) else f"the example's number of positions, but not for {LONG}"


def _lifted_runs(loaded: Loaded, inputs: dict[str, Tensor]) -> bool:
    """Whether forward runs with the cells of an export, which know no context length."""
    try:
        with torch.no_grad():
            watch_calls(lift_apart(loaded).module, loaded.call(inputs), inputs[loaded.batched])
    except Exception:
        log.debug("forward does not run on many positions", exc_info=True)
        return False
    return True


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
