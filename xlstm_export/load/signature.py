"""How a forward is called and what it returns: nests of values, whose tensors get names, and back.

A nest is a tuple, a list, a mapping, a named tuple, a dataclass, a namespace or an object of a class of the
user's own with tensors as attributes, to any depth. Its tensors are
the inputs or outputs of the graph. Everything else in it stays where it is: None, numbers and texts are
constants of the call. A tensor has the name of its place:

- a parameter of forward has its own name, `x`; an output without one `y`;
- inside a nest the keys count, joined by "_": `batch["obs"]["x"]` is `obs_x`;
- where two would be equal, or where there is no key, the whole place counts: `batch_x`, `xs_0`, `y_1`.

Names consist of letters, digits and "_", because they become identifiers and names of files.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# What a user's forward takes or returns: anything. It is examined where its tensors get names.
UserValue: TypeAlias = Any
Place = tuple[str | int, ...]
# Their objects are no plain containers: distributions, caches.
_NOT_THEIRS = frozenset({*sys.stdlib_module_names, "torch", "transformers", "numpy"})
_STATE = re.compile(r"(past|present)_\d+_\w+")
_BETWEEN_BLOCKS = re.compile(r"hidden_\d+")
Call = tuple[tuple[UserValue, ...], dict[str, UserValue]]


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in the nests of a signature."""

    name: str


@dataclass(frozen=True)
class Signature:
    """Arguments of a forward, with a `Slot` in place of each tensor.

    Attributes:
        args, kwargs: positional and keyword arguments.
    """

    args: tuple[UserValue, ...] = ()
    kwargs: Mapping[str, UserValue] = field(default_factory=dict)

    def bind(self, tensors: Mapping[str, Tensor]) -> Call:
        """The arguments of a call with these tensors, by their names."""

        def fill(leaf: UserValue) -> UserValue:
            return tensors[leaf.name] if isinstance(leaf, Slot) else leaf

        args = tuple(rebuilt(value, fill) for value in self.args)
        return args, {key: rebuilt(value, fill) for key, value in self.kwargs.items()}

    @staticmethod
    def of(arguments: Mapping[Place, UserValue]) -> tuple[Signature, dict[str, Tensor]]:
        """The signature of a call, and its tensors by name.

        Args:
            arguments: by place: `(index, name)` for a positional argument, `(name,)` for a keyword argument.
        """
        found = [
            (place[-1:] + inner, leaf)
            for place, value in arguments.items()
            for inner, leaf in leaves(value)
            if isinstance(leaf, Tensor)
        ]
        named = names_of([place for place, _ in found])
        # States have such names.
        names = iter([f"x_{name}" if _STATE.fullmatch(name) else name for name in named])
        tensors: dict[str, Tensor] = {}

        def take(leaf: UserValue) -> UserValue:
            if not isinstance(leaf, Tensor):
                return leaf
            slot = Slot(next(names))
            tensors[slot.name] = leaf
            return slot

        filled = {place: rebuilt(value, take) for place, value in arguments.items()}
        args = tuple(value for place, value in filled.items() if len(place) > 1)
        kwargs = {str(place[0]): value for place, value in filled.items() if len(place) == 1}
        return Signature(args, kwargs), tensors


def entries(value: UserValue) -> list[tuple[str | int, UserValue]] | None:
    """The entries of a nest by key or index; None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return [(str(key), entry) for key, entry in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Slot):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if isinstance(value, types.SimpleNamespace) or _holds_tensors(value):
        return list(vars(value).items())
    return None


def _holds_tensors(value: UserValue) -> bool:
    """Whether a value is an object of the user's own class with tensors as attributes."""
    package = type(value).__module__.partition(".")[0]
    if isinstance(value, (Tensor, nn.Module, type, Slot)) or package in _NOT_THEIRS:
        return False
    return any(isinstance(part, (Tensor, Slot)) for part in getattr(value, "__dict__", {}).values())


def leaves(value: UserValue, place: Place = ()) -> Iterator[tuple[Place, UserValue]]:
    """All that is no nest, with its place, in the order of the nests."""
    inside = entries(value)
    if inside is None:
        yield place, value
        return
    for key, entry in inside:
        # The index in a tuple of one says nothing, except for the result as a whole.
        alone = place and len(inside) == 1 and isinstance(key, int)
        yield from leaves(entry, place if alone else (*place, key))


def rebuilt(value: UserValue, change: Callable[[UserValue], UserValue]) -> UserValue:
    """A nest of the same kinds with every leaf changed; one of which nothing changes is returned itself."""
    inside = entries(value)
    if inside is None:
        return change(value)
    made = [rebuilt(entry, change) for _, entry in inside]
    if all(new is old for new, (_, old) in zip(made, inside, strict=True)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*made)
    if isinstance(value, (tuple, list)):
        return type(value)(made)
    result = copy.copy(value)
    if isinstance(value, Mapping):
        for key, entry in zip(value, made, strict=True):
            result[key] = entry
        return result
    for (name, _), entry in zip(inside, made, strict=True):
        object.__setattr__(result, str(name), entry)
    return result


def names_of(places: Iterable[Place]) -> list[str]:
    """A legal name for each place, all different; see the module's docstring.

    >>> names_of([("x",), ("batch", "obs", "x"), ("xs", 0), ("xs", 1)])
    ['x', 'obs_x', 'xs_0', 'xs_1']
    >>> names_of([("x",), ("batch", "x"), ("other", "x")])
    ['x', 'batch_x', 'other_x']
    """
    places = list(places)
    short = [_joined(_from_first_key(place)) for place in places]
    count = Counter(short)
    names: list[str] = []
    for place, name in zip(places, short, strict=True):
        name = wanted = name if count[name] == 1 else _joined(place)
        number = 1
        while name in names:
            number += 1
            name = f"{wanted}_{number}"
        names.append(name)
    return names


def named_outputs(
    result: UserValue, single: str, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors that a forward returns, by name.

    None, numbers, texts and objects are left out, and inputs that are returned as they are under their own
    names, as by a forward that adds to a dict. The tensors of a plain tuple or list are numbered, y_0, y_1,
    …; a tensor alone, also beside what is left out, has the name `single`.

    Args:
        result: of the forward.
        single: name of a tensor that has no key.
        inputs: of that call, by name.
    """
    known = inputs or {}
    found = [
        (place, leaf)
        for place, leaf in leaves(result)
        if isinstance(leaf, Tensor) and not _handed_back(place, leaf, known)
    ]
    keyless = len(found) == 1 and not any(isinstance(key, str) for key in found[0][0])
    if keyless and not (isinstance(result, (tuple, list)) and len(result) == 1):
        return {single: _readable(found[0][1])}
    names = names_of([(single, *place) for place, _ in found])
    # The values between blocks are named hidden_<k> in every graph.
    names = [f"{single}_{name}" if _BETWEEN_BLOCKS.fullmatch(name) else name for name in names]
    return dict(zip(names, (_readable(leaf) for _, leaf in found), strict=True))


def _readable(x: Tensor) -> Tensor:
    """A tensor of a type that NumPy has: bfloat16 becomes float32, which has all its values."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _handed_back(place: Place, leaf: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    return bool(place) and inputs.get(names_of([("", *place)])[0]) is leaf


def without(value: UserValue, places: Collection[Place]) -> UserValue:
    """A nest with None in place of all that stands at these places."""
    order = iter([any(place[: len(p)] == p for p in places) for place, _ in leaves(value)])
    return rebuilt(value, lambda leaf: None if next(order) else leaf)


def left_out(result: UserValue) -> list[str]:
    """What `named_outputs` leaves out of a result besides None, each as "place (type)"."""
    return [
        f"{'.'.join(map(str, place)) or 'the result'} ({type(leaf).__name__})"
        for place, leaf in leaves(result)
        if leaf is not None and not isinstance(leaf, Tensor)
    ]


def _from_first_key(place: Place) -> Place:
    """The place without what stands before the first key of a nest; the whole place where it has none."""
    first = next((i for i, key in enumerate(place) if i > 0 and isinstance(key, str)), 0)
    return place[first:]


def _joined(place: Place) -> str:
    name = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(map(str, place)))
    return f"y_{name}" if not name or name[0].isdigit() else name
