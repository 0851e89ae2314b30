"""Recurrences without an adapter: found by the names of their classes, and named where they are."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..errors import BuildError
from ..load.signature import Call, UserValue, leaves, rebuilt
from .adapter import ADAPTERS
from .adapter_check import OriginalCall, original_calls

log = logging.getLogger(__name__)

# Class names of modules with a state, as libraries write them: LSTM, MyGRUCell, MambaBlock, Mamba2, S4D, …;
# not names that only contain one, such as xLSTMHead. A cell that this misses fails the streaming check later.
_LOOKS_RECURRENT = re.compile(
    r"(lstm|gru|rnn|sru|lru|recurrent|rwkv|mamba|ssm|^s4d?|^s5|hgrn|retnet|retention|delta_?net|time_?mix|cell)"
    r"_?(cell|layer|block|mixer|unit)?_?v?\d*$",
    re.IGNORECASE,
)
SHOWN = 12  # paths that a message lists


def looks_recurrent(name: str) -> bool:
    """Whether a class of that name has a state, as far as names tell."""
    return bool(_LOOKS_RECURRENT.search(name))


Paths = Collection[str]


def unknown(
    module: nn.Module, inputs: Call, known: tuple[Paths, Paths], others: Mapping[str, str]
) -> BuildError | None:
    """Refusal of modules that look recurrent, are not known, and do not merely contain known cells.

    A subclass of a known cell that was not replaced has its own forward. It is recurrent, and not known. Of
    modules inside each other, the innermost are named, all of one class together. Names do not always tell
    which that is, so what is inside is tried: recurrences make later positions depend on earlier ones.

    Args:
        module: the user's module.
        inputs: arguments of its forward.
        known: paths that are replaced, and paths of recurrent cells; a norm or a convolution that is replaced
            makes no recurrence known.
        others: class path → why it is not the known class whose name it has.
    """
    found = {path: child for path, child in module.named_modules() if _suspect(path, child, known, others)}
    inner = {
        path: child
        for path, child in found.items()
        if not any(other.startswith(f"{path}.") or (path == "" != other) for other in found)
    }
    if not inner:
        return None
    inner = {p: module.get_submodule(p) for path in inner for p in _mixing(module, path, inputs) or [path]}
    cls = type(next(iter(inner.values())))
    paths = [path or "<root>" for path, child in inner.items() if type(child) is cls]
    where = f"{cls.__module__}.{cls.__qualname__}"
    listed = ", ".join(paths[:SHOWN]) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
    why = f" ({others[where]})" if where in others else ""
    return BuildError(
        f"{listed}: recurrent cell {where} is not known{why}; exported as it is, its state would be lost",
        f'register an adapter for it: @xlstm_export.lift.adapter.register("{where}"), docs/adapters.md; or '
        "export with --stateless, where every call starts fresh. An adapter may use the operators if the "
        "forget gate is a sigmoid; one that is exp(f) has no operator",
    )


def _mixing(module: nn.Module, path: str, inputs: Call) -> list[str]:
    """Paths of the innermost modules below `path` that make later positions depend on earlier ones."""
    start = f"{path}." if path else ""
    below = [
        inner
        for inner, child in module.named_modules()
        if inner and inner.startswith(start) and not type(child).__module__.startswith("torch.")
    ]
    if not below or any(x.is_meta for x in module.parameters()):
        return []
    calls = original_calls(module, below, inputs)
    mixing = {
        call.path
        for call in calls
        if not _is_convolution(cell := module.get_submodule(call.path)) and _mixes(cell, call)
    }
    return [p for p in below if p in mixing and not any(other.startswith(f"{p}.") for other in mixing)]


def _is_convolution(module: nn.Module) -> bool:
    """Whether all parameters are those of convolutions: such a module looks back, but is no recurrence."""
    owners = [child for child in module.modules() if list(child.parameters(recurse=False))]
    return bool(owners) and all(isinstance(child, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for child in owners)


def _mixes(cell: nn.Module, call: OriginalCall) -> bool:
    """Whether another first position of the arguments (B, S, ...) changes later positions of the result."""

    def moved(x: UserValue) -> UserValue:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.shape[1] < 2:
            return x
        return torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1)

    args, kwargs = rebuilt((call.args, call.kwargs), moved)
    try:
        with torch.no_grad():
            again = copy.deepcopy(cell)(*args, **kwargs)
    except Exception:
        log.debug("%s does not run alone", call.path, exc_info=True)
        return False
    pairs = zip(leaves(call.result), leaves(again), strict=False)
    return any(
        isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 2 and not torch.equal(x[:, 1:], y[:, 1:])
        for (_, x), (_, y) in pairs
    )


def _suspect(path: str, child: nn.Module, known: tuple[Paths, Paths], others: Paths) -> bool:
    covered, cells = known
    inside = any(parent in ("", path) or path.startswith(f"{parent}.") for parent in covered)
    contains = any(cell == path or cell.startswith(f"{path}.") or path == "" for cell in cells)
    derived = any(f"{cls.__module__}.{cls.__qualname__}" in ADAPTERS for cls in type(child).__mro__)
    if inside or (contains and not derived):
        return False
    standard = isinstance(child, (nn.RNNBase, nn.RNNCellBase))
    named = f"{type(child).__module__}.{type(child).__qualname__}" in others
    return derived or standard or named or looks_recurrent(type(child).__name__)
