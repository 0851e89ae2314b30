"""Recurrences without an adapter: found by the names of their classes, and named where they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from ..errors import BuildError
from .adapter import ADAPTERS

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


def unknown(
    module: nn.Module, covered: Collection[str], cells: Collection[str], others: Mapping[str, str]
) -> BuildError | None:
    """Refusal of modules that look recurrent, are not known, and do not merely contain known cells.

    A subclass of a known cell that was not replaced has its own forward. It is recurrent, and not known. Of
    modules inside each other, the innermost are named, all of one class together.

    Args:
        module: the user's module.
        covered: paths that are replaced.
        cells: paths of recurrent cells among them; a norm or a convolution makes no recurrence known.
        others: class path → why it is not the known class whose name it has.
    """
    found = {
        path: child
        for path, child in module.named_modules()
        if _suspect(path, child, (covered, cells), others)
    }
    inner = {
        path: child
        for path, child in found.items()
        if not any(other.startswith(f"{path}.") or (path == "" != other) for other in found)
    }
    if not inner:
        return None
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


def _suspect(
    path: str,
    child: nn.Module,
    known: tuple[Collection[str], Collection[str]],
    others: Collection[str],
) -> bool:
    covered, cells = known
    inside = any(parent in ("", path) or path.startswith(f"{parent}.") for parent in covered)
    contains = any(cell == path or cell.startswith(f"{path}.") or path == "" for cell in cells)
    derived = any(f"{cls.__module__}.{cls.__qualname__}" in ADAPTERS for cls in type(child).__mro__)
    if inside or (contains and not derived):
        return False
    standard = isinstance(child, (nn.RNNBase, nn.RNNCellBase))
    named = f"{type(child).__module__}.{type(child).__qualname__}" in others
    return derived or standard or named or looks_recurrent(type(child).__name__)
