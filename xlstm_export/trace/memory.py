"""Check that forward remembers nothing but the states of its cells.

A running mean in a buffer, a cache in a list: a graph has none of these, and would keep what they hold today.
So the lifted module is called with the same inputs twice, at once and after other calls, from zero states.
What it stores does no harm where no output depends on it: a table that is filled at the first call,
attention weights that are kept to be looked at.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BuildError
from ..lift.cells.standard import StandardLayer
from ..lift.lift import lift
from ..lift.model import copies_in
from ..lift.passes import watch_calls
from ..lift.starts import other_values, recorded, tensors_of
from ..load.loaded import Loaded
from ..load.signature import UserValue

log = logging.getLogger(__name__)

HISTORY = 3  # calls with other inputs before the one that is compared
LIMIT = 1e-6  # relative; the same operations on the same values give the same results, or nearly
HINT = (
    "make a module of it that is a cell with a state, and register an adapter (docs/adapters.md, Other kinds "
    "of state); or let forward leave it alone in eval mode: `if self.training: ...`"
)
GIVEN = "call {} without a state: the graph carries it from call to call"


def check_memory(loaded: Loaded) -> None:
    """Call the lifted module with and without a history, each time from zero states.

    Raises:
        BuildError: an output depends on the history; the message names what was stored.
    """
    try:
        now, after = _run(loaded, 0), _run(loaded, HISTORY)
        if _same(after.result, now.result) or not _same(_run(loaded, 0).result, now.result):
            return  # the latter: chance in forward
    except Exception:  # the stages that follow report it, with the path of the cell
        log.debug("the lifted module does not run", exc_info=True)
        return
    names = _changed(now.stored, after.stored) or _changed(now.before, after.before)
    what = ", ".join(names[:4]) + (", …" if len(names) > 4 else "") or "something outside of its modules"
    raise BuildError(
        f"forward changes {what}, and what it returns depends on that: a memory that no graph has",
        GIVEN.format(after.given) if after.given else HINT,
    )


@dataclass(frozen=True)
class _Outcome:
    """What the last call returned, what was stored before and after it, and what was given a state."""

    result: UserValue
    before: Mapping[str, Any]
    stored: Mapping[str, Any]
    given: str


def _run(loaded: Loaded, history: int) -> _Outcome:
    """Call forward with the example inputs, after some calls with others.

    It runs in a lifted copy with buffers and attributes of its own.
    """
    shared = {id(p): p for p in loaded.module.parameters()}
    copied = copy.deepcopy(loaded.module, shared)
    module = lift(copied, stateless=not loaded.streams, copies=copies_in(loaded)).module
    layers = [layer for layer in module.modules() if isinstance(layer, StandardLayer)]
    result: UserValue = None
    before: Mapping[str, Any] = {}
    with recorded(layers) as given, torch.no_grad(), torch.random.fork_rng(devices=()):
        for seed in range(history, -1, -1):
            inputs = {n: other_values(x, seed) if seed else x.clone() for n, x in loaded.inputs.items()}
            args, kwargs = loaded.call(inputs)
            torch.manual_seed(seed)
            before = _stored(module)
            result, _ = watch_calls(module, (args, kwargs), inputs[loaded.batched])
    owner = next((layer.owner for layer in layers if layer.path in given), "")
    return _Outcome(result, before, _stored(module), owner)


def _changed(now: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name, value in after.items() if not _equal(now.get(name), value)]


def _same(a: UserValue, b: UserValue) -> bool:
    ours, theirs = list(tensors_of(a)), list(tensors_of(b))
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a, b)
    largest = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=LIMIT * largest, equal_nan=True)


def _stored(module: nn.Module) -> dict[str, Any]:
    """Tensors and numbers in buffers and attributes, and in lists, dicts and objects there, by path."""
    found = _leaves(module, "", set())
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found}


def _leaves(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if isinstance(value, (Tensor, int, float, complex)):
        if not isinstance(value, nn.Parameter):
            yield name, value
        return
    if id(value) in seen or isinstance(value, (str, bytes)):
        return
    seen.add(id(value))
    for key, part in _parts(value):
        yield from _leaves(part, f"{name}{key}".removeprefix("."), seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds: key or attribute as it is written, and the content."""
    if isinstance(value, nn.Module):
        for kind in (value._buffers, value._modules):
            yield from ((f".{key}", part) for key, part in kind.items())
        every = vars(nn.Module())
        yield from ((f".{key}", part) for key, part in vars(value).items() if key not in every)
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, Collection):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif type(value).__module__.partition(".")[0] not in sys.stdlib_module_names and hasattr(
        value, "__dict__"
    ):
        yield from ((f".{key}", part) for key, part in vars(value).items())


def _of_python(kind: type) -> bool:
    """Whether a class is of the standard library: its objects (loggers, locks) are no memory of a model."""
    return kind.__module__.partition(".")[0] in sys.stdlib_module_names
