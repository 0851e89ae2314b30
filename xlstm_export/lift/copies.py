"""Copies of known cells in other packages, recognized by what they compute.

Many projects keep the source of a published package inside their own, as mymodel.xlstm.blocks.mlstm.cell. Its
classes have the names of known cells and are built alike, but nothing says that their code is unchanged. So
the adapter of the known cell is tried: on the calls that the model makes, and in float64 on a copy with all
weights moved and with larger inputs, because gates of a fresh model hide differences. If all agree, the copy
is taken for the known cell. A user can also name a class or package to be taken so (`--alias theirs=known`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..distance import difference
from ..errors import BuildError, ExportError, UsageError
from ..load.signature import Call, UserValue, leaves, rebuilt
from .adapter import ADAPTERS, AdapterFunction, RecurrentCell
from .adapter_check import LIMIT, OriginalCall, is_built_in, original_calls
from .passes import run_alone
from .unknown import looks_recurrent

log = logging.getLogger(__name__)

# Relative L2 in float64. An eps that is added at another place stays below it.
EXACT = 1e-5
HINT = "register an adapter of your own (docs/adapters.md), or use the original where it is meant"
# Classes of PyTorch itself and their namesakes have nothing in common.
_NO_SOURCES = ("torch.",)


@dataclass(frozen=True)
class Copies:
    """Which classes are taken for known ones.

    Attributes:
        aliases: path of a class → path of the known class.
        notes: what was recognized, for the user.
        others: path of a class that has the name of a known cell → why it is not taken for it.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Class:
    """Modules of one class, and the known classes that it may be, the likeliest first."""

    known: Sequence[str]
    namesakes: frozenset[str] = frozenset()  # of `known`, those of the same name
    named: bool = False  # by the user
    paths: list[str] = field(default_factory=list)


def find_copies(module: nn.Module, inputs: Call, named: Mapping[str, str]) -> Copies:
    """Compare classes of `module` with the known ones of the same name.

    Args:
        module: the user's module; unchanged afterwards.
        inputs: arguments of its forward.
        named: prefix of class paths → prefix of known ones, by the user.

    Raises:
        UsageError: a prefix that the user named leads to no known class, or no module has it.
        BuildError: a class that the user named computes something else than the known one.
    """
    classes = _candidates(module, named)
    _require_used(module, named, classes)
    if not classes or any(x.is_meta for x in (*_tensors(inputs), *module.parameters())):
        return Copies({theirs: c.known[0] for theirs, c in classes.items() if c.named})
    paths = [path for c in classes.values() for path in c.paths]
    calls: dict[str, list[OriginalCall]] = {}
    for call in original_calls(module, paths, inputs):
        calls.setdefault(call.path, []).append(call)
    found = {theirs: _compared(module, theirs, c, calls) for theirs, c in classes.items()}
    equal = {theirs: result for theirs, result in found.items() if isinstance(result, _Equal)}
    others = {
        _path(type(module.get_submodule(path))): reason
        for theirs, reason in found.items()
        if isinstance(reason, str) and reason
        for path in classes[theirs].paths
    }
    aliases = {theirs: result.known for theirs, result in equal.items()}
    return Copies(aliases, tuple(_notes(equal)), others)


@dataclass(frozen=True)
class _Equal:
    """The known class that a class is taken for, and how far its results are off."""

    known: str
    gap: float


def _compared(
    module: nn.Module, theirs: str, c: _Class, calls: Mapping[str, Sequence[OriginalCall]]
) -> _Equal | str:
    """What a class is taken for, or why for none; empty where no name suggests it."""
    reason = ""
    for known in c.known:
        try:
            gap = _largest_gap(module, known, c.paths, calls)
        except BuildError as error:
            if c.named:
                raise BuildError(f"{c.paths[0]}: {theirs} {error.message}", error.hint) from error
            if known in c.namesakes and looks_recurrent(_name(known)):
                reason = reason or f"it has the name of {known}, but {error.message}"
            continue
        if gap is not None or c.named:
            return _Equal(known, gap or 0.0)
        if known in c.namesakes and looks_recurrent(_name(known)):
            command = f"--alias {theirs}={known}"
            reason = (
                reason or f"it may be a copy of {known}, but does not run here; {command} takes it for that"
            )
    return reason


def _candidates(module: nn.Module, named: Mapping[str, str]) -> dict[str, _Class]:
    found: dict[str, _Class] = {}
    for path, child in module.named_modules():
        for cls in _forward_classes(child):
            theirs = _path(cls)
            if theirs in ADAPTERS:
                break
            if theirs not in found and (c := _possible(theirs, named)) is not None:
                found[theirs] = c
            if theirs in found:
                found[theirs].paths.append(path)
                break
    return found


def _forward_classes(child: nn.Module) -> Iterator[type]:
    """The class of a module and those of its bases that have the same forward."""
    for cls in type(child).__mro__:
        if issubclass(cls, nn.Module) and type(child).forward is cls.forward:
            yield cls


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _possible(theirs: str, named: Mapping[str, str]) -> _Class | None:
    """The known classes that a class may be: the one the user names, or those of its name, or any cell."""
    for prefix, original in named.items():
        if theirs == prefix or theirs.startswith(f"{prefix}."):
            path = original + theirs[len(prefix) :]
            return _Class([path], named=True) if path in ADAPTERS else None
    if theirs.startswith(_NO_SOURCES):
        return None
    ours = [p for p, adapter in ADAPTERS.items() if is_built_in(adapter) and not p.startswith(_NO_SOURCES)]
    same = [path for path in ours if _name(path) == _name(theirs)]
    same.sort(key=lambda path: -len(_common_end(theirs, path)))
    cells = [path for path in ours if looks_recurrent(_name(path))] if looks_recurrent(_name(theirs)) else []
    known = [*same, *(path for path in cells if path not in same)]
    return _Class(known, frozenset(same)) if known else None


def _name(path: str) -> str:
    """Name of a class, however it is spelled: mLSTMCell, MLSTM_Cell."""
    return path.rpartition(".")[2].replace("_", "").lower().removesuffix("base")


def _common_end(a: str, b: str) -> list[str]:
    """The last parts that two class paths share."""
    common: list[str] = []
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        common.append(x)
    return common


def _require_used(module: nn.Module, named: Mapping[str, str], classes: Mapping[str, _Class]) -> None:
    for prefix, known in named.items():
        under = [t for t, c in classes.items() if c.named and (t == prefix or t.startswith(f"{prefix}."))]
        if under:
            continue
        if not any(path == known or path.startswith(f"{known}.") for path in ADAPTERS):
            packages = sorted({path.partition(".")[0] for path in ADAPTERS})
            raise UsageError(
                f"--alias {prefix}={known}: no known cell is in {known}", f"known: {', '.join(packages)}"
            )
        present = sorted({_path(type(m)) for m in module.modules()})
        present = [path for path in present if not path.startswith(_NO_SOURCES)]
        raise UsageError(
            f"--alias {prefix}={known}: the model has no class in {prefix} that is a known cell in {known}",
            f"its classes are {', '.join(present[:8])}",
        )


def _largest_gap(
    module: nn.Module, known: str, paths: Sequence[str], calls: Mapping[str, Sequence[OriginalCall]]
) -> float | None:
    """The largest relative difference from a known class over all calls of modules; None if none ran.

    Raises:
        BuildError: a difference is too large, or the known class is built otherwise.
    """
    adapter = ADAPTERS[known]
    gaps: list[float] = []
    for path in paths:
        cell = module.get_submodule(path)
        replacement = _built(adapter, cell)
        gaps += [_gap(replacement, call, LIMIT) for call in calls.get(path, ())]
        if calls.get(path):
            gaps += _moved_gap(cell, adapter, calls[path][0])
    return max(gaps, default=None)


def _built(adapter: AdapterFunction, cell: nn.Module) -> nn.Module:
    try:
        replacement = adapter(cell)
    except ExportError as error:
        raise BuildError(error.message, error.hint) from error
    except Exception as error:
        raise BuildError(f"is built otherwise ({type(error).__name__}: {error})", HINT) from error
    for inner, part in replacement.named_modules():
        if isinstance(part, RecurrentCell):
            part.path = inner
    return replacement


def _gap(replacement: nn.Module, call: OriginalCall, limit: float) -> float:
    tensors = list(_tensors((call.args, call.kwargs)))
    try:
        with torch.no_grad():
            found = run_alone(replacement, call.args, call.kwargs, tensors[0])
    except Exception as error:
        raise BuildError(f"is called otherwise ({type(error).__name__}: {error})", HINT) from error
    gap = _distance(call.result, found)
    if not gap <= limit:
        by = "its result has another form" if gap == float("inf") else f"its result is {gap:.1e} off"
        raise BuildError(f"computes something else: {by}", HINT)
    return gap


def _moved_gap(cell: nn.Module, adapter: AdapterFunction, call: OriginalCall) -> list[float]:
    """The same with all weights moved and inputs three times as large, in float64; empty if that fails."""
    generator = torch.Generator().manual_seed(0)
    try:
        moved = copy.deepcopy(cell).double()
        with torch.no_grad():
            for parameter in moved.parameters():
                moves = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(moves, alpha=0.1)
            args, kwargs = rebuilt((call.args, call.kwargs), _thrice)
            result = moved(*args, **kwargs)
    except Exception:  # code that pins float32; the comparison in float32 stands
        log.debug("%s does not run in float64", call.path, exc_info=True)
        return []
    return [_gap(_built(adapter, moved), OriginalCall("", args, kwargs, result), EXACT)]


def _thrice(value: UserValue) -> UserValue:
    """Numbers in float64, three times as large."""
    return 3 * value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(value: UserValue) -> Iterator[Tensor]:
    yield from (x for _, x in leaves(value) if isinstance(x, Tensor))


def _distance(expected: UserValue, found: UserValue) -> float:
    """Relative L2 of the first tensors; infinite where the forms differ. States need not be returned."""
    several = isinstance(expected, (tuple, list))
    if several != isinstance(found, (tuple, list)):
        return float("inf")
    a, b = (next(_tensors(x), None) for x in (expected, found))
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    return difference(b.double().numpy(), a.double().numpy()).relative_l2


def _notes(equal: Mapping[str, _Equal]) -> Iterator[str]:
    """One line per package that was copied."""
    groups: dict[tuple[str, str], list[str]] = {}
    for theirs, result in equal.items():
        groups.setdefault(_packages(theirs, result.known), []).append(theirs)
    for (copied, original), classes in groups.items():
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in classes))
        gap = max(equal[path].gap for path in classes)
        yield (
            f"{copied} is taken for {original}: {names} compute the same, within {gap:.0e} "
            f"(--alias {copied}={original})"
        )


def _packages(theirs: str, known: str) -> tuple[str, str]:
    """What is left of two class paths without their common end; the known one keeps its package."""
    ours, parts = known.split("."), theirs.split(".")
    shared = min(len(_common_end(theirs, known)), len(ours) - 1, len(parts) - 1)
    return ".".join(parts[: len(parts) - shared]), ".".join(ours[: len(ours) - shared])
