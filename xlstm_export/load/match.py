"""Names in weight files → names of the model's own tensors.

Training adds parts to names: DistributedDataParallel, torch.compile and Lightning wrap the model, a
checkpoint nests it under a key, averaging keeps a second copy. A model may have such a wrapper of its own,
too. So a file is never judged alone: its names and the model's are compared as trees, and the alignment with
the fewest wrong names is taken, of several the one with the fewest changes. A change is a part that the file
has and the model lacks, or the other way round: in front of all names, or anywhere as the only part at its
place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from .find import Candidate, several
from .weights import Weights, open_weights

# A second copy of a model, kept beside the one that is trained.
_COPIES = re.compile(r"(^|[._])(ema|swa|averaged?|teacher|target|momentum|shadow)([._]|$)", re.I)
# Numbers about the training, beside the tensors of a flat file.
_RECORDS = re.compile(r"^[^.]*(loss|acc|score|metric|epoch|step|lr)[^.]*$", re.I)


@dataclass(frozen=True)
class Matched:
    """Weights under the model's own names.

    Attributes:
        weights: what the file has, also what the model lacks; tensors that the model ties have all names.
        files: the files they are in.
        notes: what was done to the names, and what was left unused; empty where nothing was.
    """

    weights: Weights
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def match(candidates: Sequence[Candidate], module: nn.Module, optional: Iterable[str] = ()) -> Matched:
    """Find the weights of `module` among the candidates, and give them its names.

    Names that stay wrong are not an error here; `loaded.check_fit` says what is.

    Args:
        candidates: from `find.find_weights`.
        module: the model; its tensors may be on the meta device.
        optional: names of its tensors that a file may lack.

    Raises:
        InputError: several candidates fit, or several parts of one, and they differ.
    """
    model = _Model.of(module, frozenset(optional))
    found = [(candidate, _choose(candidate, model)) for candidate in candidates]
    found.sort(key=lambda pair: pair[1].wrong)
    candidate, best = found[0]
    equal = [other for other, fit in found if fit.wrong == best.wrong and not any(best.wrong)]
    if len(equal) > 1:
        raise several(candidate.files[0].parent, [other.files[0] for other in equal])
    file = candidate.files[0]
    notes = [f"{file.name}: {best.note}"] if best.note else []
    if len(found) > 1:
        notes.insert(0, f"{file.parent}: of {len(found)} files {file.name} is used; it alone fits the model")
    return Matched(_renamed(candidate.weights, best, model), candidate.files, tuple(notes))


def extract(path: Path | str, prefix: str, out: Path | str) -> None:
    """Save the tensors of a weight file whose names begin with `prefix` as safetensors of their own."""
    from safetensors.torch import save_file

    weights = open_weights(Path(path))
    chosen = {n.removeprefix(f"{prefix}."): w for n, w in weights.items() if n.startswith(f"{prefix}.")}
    save_file({name: weight.read().contiguous().clone() for name, weight in chosen.items()}, out)


# --- Trees of names -----------------------------------------------------------------------------------


@dataclass
class _Node:
    """A part of names: tensors by their last part, and further parts; `minor` ones may be absent."""

    tensors: dict[str, str] = field(default_factory=dict)
    parts: dict[str, _Node] = field(default_factory=dict)
    minor: set[str] = field(default_factory=set)
    size: int = 0  # tensors below that are not minor

    @staticmethod
    def of(names: Iterable[str], minor: frozenset[str]) -> _Node:
        root = _Node()
        for name in names:
            *parts, last = name.split(".")
            node = root
            node.size += name not in minor
            for part in parts:
                node = node.parts.setdefault(part, _Node())
                node.size += name not in minor
            node.tensors[last] = name
            if name in minor:
                node.minor.add(last)
        return root

    def needed(self) -> Iterator[str]:
        """Full names of the tensors that are not minor."""
        yield from (name for last, name in self.tensors.items() if last not in self.minor)
        for child in self.parts.values():
            yield from child.needed()

    def only_part(self) -> str | None:
        """The part that everything here is in, if there is one."""
        filled = [part for part, child in self.parts.items() if child.size]
        return filled[0] if len(filled) == 1 and not set(self.tensors) - self.minor else None


@dataclass(frozen=True)
class _Model:
    """The model's side: its names as a tree, their shapes, and groups of names of one tensor."""

    tree: _Node
    shapes: Mapping[str, tuple[int, ...]]
    tied: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(module: nn.Module, optional: frozenset[str]) -> _Model:
        tensors = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        # Buffers that are not persistent now may have been when the file was written.
        extra = {n: t for n, t in module.named_buffers(remove_duplicate=False) if n not in tensors}
        optional |= extra.keys()
        tensors |= extra
        groups: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)
        minor = optional | {name for names in tied for name in names}
        tree = _Node.of(tensors, minor)
        return _Model(tree, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tied)


@dataclass(frozen=True)
class _Alignment:
    """How names correspond: model → file, what is wrong, and which parts were left out or put in."""

    names: Mapping[str, str]
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    prefix: str = ""  # in front of all names in the file
    misshaped: int = 0
    note: str = ""

    @property
    def wrong(self) -> tuple[int, int]:
        return len(self.missing) + len(self.surplus), self.misshaped

    @property
    def cost(self) -> tuple[int, int, bool, int]:
        steps = len(self.changes) + (self.prefix.count(".") + 1 if self.prefix else 0)
        return (*self.wrong, bool(_COPIES.search(self.prefix)), steps)


def _align(model: _Node, file: _Node, place: str = "", *, leave: bool = False) -> _Alignment:
    """The best alignment of two trees, with parts put in from here on, and parts of the file left out.

    Where `leave` is not set, none is left out here: prefixes of all names are tried elsewhere.
    """
    best = _as_they_are(model, file, place)
    if not any(best.wrong):
        return best
    where = f" after {place}" if place else ""
    inner = file.only_part()
    if leave and inner is not None and not inner.isdigit():
        without = _align(model, file.parts[inner], place, leave=True)
        best = min(best, _changed(without, f"without {inner}.{where}"), key=_cost)
    for part, merged in _dissolved(model, file):
        best = min(best, _changed(_as_they_are(model, merged, place), f"without {part}.{where}"), key=_cost)
    inner = model.only_part()
    if inner is not None and not (place and inner.isdigit()):
        put_in = _align(model.parts[inner], file, f"{place}{_pattern(inner)}.")
        best = min(best, _changed(put_in, f"with {inner}.{where or ' in front'}"), key=_cost)
    return best


def _dissolved(model: _Node, file: _Node) -> Iterator[tuple[str, _Node]]:
    """The file's tree without one part, its content moved up, where the model has that beside the rest."""
    known, beside = {*model.parts, *model.tensors}, {*file.parts, *file.tensors}
    for part, node in file.parts.items():
        inside = {*node.parts, *node.tensors}
        if part not in known and known & beside and inside <= known - beside:
            rest = {name: child for name, child in file.parts.items() if name != part}
            tensors = {**file.tensors, **node.tensors}
            yield part, _Node(tensors, {**rest, **node.parts}, file.minor | node.minor, file.size)


def _cost(alignment: _Alignment) -> tuple[int, int, bool, int]:
    return alignment.cost


def _changed(inner: _Alignment, change: str) -> _Alignment:
    return replace(inner, changes=(change, *(c for c in inner.changes if c != change)))


def _as_they_are(model: _Node, file: _Node, place: str) -> _Alignment:
    names = {name: file.tensors[last] for last, name in model.tensors.items() if last in file.tensors}
    missing = [n for last, n in model.tensors.items() if last not in {*file.tensors, *model.minor}]
    surplus = [n for last, n in file.tensors.items() if last not in {*model.tensors, *file.minor}]
    changes: dict[str, None] = {}
    for part, child in model.parts.items():
        if part not in file.parts:
            missing += child.needed()
            continue
        inner = _align(child, file.parts[part], f"{place}{_pattern(part)}.", leave=True)
        names.update(inner.names)
        missing += inner.missing
        surplus += inner.surplus
        changes |= dict.fromkeys(inner.changes)
    for part, child in file.parts.items():
        if part not in model.parts:
            surplus += child.needed()
    return _Alignment(names, tuple(missing), tuple(surplus), tuple(changes))


def _pattern(part: str) -> str:
    """The same change in every block is one change."""
    return "*" if part.isdigit() else part


# --- Choosing -----------------------------------------------------------------------------------------


def _choose(candidate: Candidate, model: _Model) -> _Alignment:
    """The best alignment of one candidate over all prefixes of its names, with its note."""
    weights = candidate.weights
    # Counters and records: batches seen, models averaged, the best loss. No model computes with an extra one.
    counters = frozenset(
        name
        for name, weight in weights.items()
        if not weight.shape and (not weight.dtype.is_floating_point or _RECORDS.search(name))
    )
    found = [_judged(a, weights, model) for a in _below_prefixes(_Node.of(weights, counters), model)]
    found.sort(key=_cost)
    best = found[0]
    rivals = [a for a in found[1:] if not any(best.wrong) and a.wrong == best.wrong]
    rivals = [a for a in rivals if set(a.names.values()) != set(best.names.values())]
    rivals = [a for a in rivals if not _equal(a, best, weights)]
    undecided = [best.prefix, *(a.prefix for a in rivals if a.cost == best.cost)]
    if len(undecided) > 1:
        raise InputError(
            f"{candidate.files[0]}: the model's names fit {' and '.join(f'{p}.' for p in undecided)}",
            f"save the part you mean: {_extract_command(candidate.files[0], undecided[0])}",
        )
    return replace(best, note=_note(best, rivals, candidate, counters))


def _below_prefixes(tree: _Node, model: _Model) -> Iterator[_Alignment]:
    """Alignments of the model with the whole file and with what is below each prefix in it."""
    waiting = [("", tree)]
    while waiting:
        prefix, node = waiting.pop(0)
        found = replace(_align(model.tree, node), prefix=prefix)
        yield found
        if any(found.wrong):
            waiting += [
                (f"{prefix}.{part}" if prefix else part, child)
                for part, child in node.parts.items()
                if 2 * child.size >= model.tree.size and child.size
            ]


def _judged(found: _Alignment, weights: Weights, model: _Model) -> _Alignment:
    """With tensors counted that are missing under each of their names, and shapes that differ."""
    lost = tuple(group[0] for group in model.tied if not any(name in found.names for name in group))
    wrong = sum(weights[stored].shape != model.shapes[name] for name, stored in found.names.items())
    return replace(found, missing=found.missing + lost, misshaped=wrong)


def _equal(a: _Alignment, b: _Alignment, weights: Weights) -> bool:
    """Whether two alignments mean the same values."""
    return a.names.keys() == b.names.keys() and all(
        torch.equal(weights[stored].load(), weights[b.names[name]].load()) for name, stored in a.names.items()
    )


def _note(
    best: _Alignment, rivals: Sequence[_Alignment], candidate: Candidate, counters: frozenset[str]
) -> str:
    """What was done to the names, what else fits, and what is not used."""
    said = [f"without the prefix {best.prefix}."] if best.prefix else []
    said += best.changes
    text = f"names fit the model's {', '.join(said)}" if said else ""
    if rivals:
        other = rivals[0].prefix
        command = _extract_command(candidate.files[0], other)
        return f"{text}; {other}. fits too and is not used (to use it: {command})"
    start = f"{best.prefix}." if best.prefix else ""
    outside = [n for n in candidate.weights if not n.startswith(start) and n not in counters]
    groups = dict.fromkeys(_first_outside(name.split("."), best.prefix.split(".")) for name in outside)
    return f"{text}; not used: {', '.join(list(groups)[:4])}" if groups else text


def _first_outside(name: Sequence[str], prefix: Sequence[str]) -> str:
    """A name up to the part with which it leaves the prefix."""
    shared = next(i for i, (a, b) in enumerate(zip((*name, ""), prefix, strict=False)) if a != b)
    return ".".join(name[: shared + 1])


def _extract_command(file: Path, prefix: str) -> str:
    return (
        'python -c "from xlstm_export.load.match import extract; '
        f"extract('{file}', '{prefix}', 'weights.safetensors')\""
    )


def _renamed(weights: Weights, found: _Alignment, model: _Model) -> Weights:
    """The weights under the model's names, what it lacks under what is left of theirs."""
    start = f"{found.prefix}." if found.prefix else ""
    named = {name: weights[stored] for name, stored in found.names.items()}
    for group in model.tied:
        shared = next((named[name] for name in group if name in named), None)
        if shared is not None:
            named.update({name: shared for name in group if name not in named})
    return {**{n.removeprefix(start): weights[n] for n in found.surplus}, **named}
