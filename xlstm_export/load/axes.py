"""The symbolic shape of inputs: declared and checked, or found by running forward at other lengths.

"B" is the batch, the first axis. "S" is the number of positions of the stream, at most one axis of an input;
"4*S" is an axis with four of its own positions per position of the stream, as for a model that joins patches.
Without a declaration an input is (B, S, ...), if forward takes it at other lengths. Else the lengths that it
takes show the patch length, or that another axis has the positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..specs import Json, JsonMapping, steps_of
from .example import result_of, shadow
from .loaded import Dims
from .signature import Signature, leaves, names_of

# Positions of the stream at which forward is tried, if it takes that few. Far enough apart to tell an output
# of a fixed length from one that is rounded.
TRIED = (5, 13)
MOST_PATCHES = 64  # tried as patch length


@dataclass(frozen=True)
class Axes:
    """Symbolic shape per input, and what the user should know of how it was found."""

    dims: dict[str, Dims]
    notes: tuple[str, ...] = ()


def axes_of(
    module: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], declared: JsonMapping, label: str
) -> Axes:
    """The symbolic shape of every input.

    Args:
        module: in eval mode.
        signature: how forward takes `inputs`.
        inputs: examples by name.
        declared: shapes that the user gave, by input name.
        label: beginning of messages.

    Raises:
        InputError: a shape does not fit its example, the examples do not fit each other, or it is not clear
            which axis has the positions; the hint says what to declare.
    """
    declared = by_input(declared, inputs, label, "dims")
    batch = _batch(inputs, declared)
    dims = {name: _symbolic(name, x, declared.get(name), batch, label) for name, x in inputs.items()}
    free = [name for name in inputs if name not in declared and len(dims[name]) > 1]
    if not any(shape[:1] == ("B",) for shape in dims.values()):
        raise InputError(f"{label}: no input has a batch", 'declare one whose first axis is "B"')
    search = _Search(module, signature, inputs, dims, free)
    _require_equal(search, label)
    if not free:
        return Axes(dims)
    found = list(itertools.islice(search.accepted(), 3))
    if not found or found[0] == dims:
        return Axes(dims)  # with nothing found, lifting and tracing have clearer messages
    _require_clear(found, inputs, free, label)
    shown = ", ".join(f"{name} is {_shown(found[0][name])}" for name in free)
    return Axes(found[0], (f"found by running forward at other lengths: {shown}; dims declare others",))


class _Search:
    """Runs forward at other lengths, to find the axis that has the positions and how many to a step."""

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, Dims],
        free: list[str],
    ) -> None:
        self._module, self._signature, self._free = module, signature, free
        self.inputs, self.dims = inputs, dims

    @cached_property
    def _base(self) -> list[tuple[int, ...]]:
        """Shapes of what forward returns for the example; none where it fails."""
        return self._sizes(self.inputs)

    @cached_property
    def _copy(self) -> nn.Module:
        return shadow(self._module)

    def accepted(self) -> Iterator[dict[str, Dims]]:
        """Shapes that forward agrees with, those on the second axis first."""
        if not self._base:
            return
        rank = min(self.inputs[name].ndim for name in self._free)
        for axis in range(1, rank):
            sizes = {self.inputs[name].shape[axis] for name in self._free}
            if len(sizes) > 1:
                continue
            length = sizes.pop()
            patches = [k for k in range(1, min(length, MOST_PATCHES) + 1) if length % k == 0]
            dims = next((d for k in patches if self._agrees(d := self._with(axis, k), length // k)), None)
            if dims is None:
                continue
            if axis > 1 or rank == 2 or (other := self._another(dims)) is None:
                yield dims
            else:
                yield other
            if axis == 1:
                return

    def _another(self, usual: dict[str, Dims]) -> dict[str, Dims] | None:
        """Shapes with the positions on a later axis, where these carry something on, the usual ones nothing.

        Where channels are rows of their own, forward takes any number of them, and any number of positions.
        """
        if any(d[1] != "S" for n, d in usual.items() if n in self._free) or self._carries_on(usual):
            return None
        rank = min(self.inputs[name].ndim for name in self._free)
        for axis in range(2, rank):
            lengths = {self.inputs[name].shape[axis] for name in self._free}
            dims = self._with(axis, 1)
            if len(lengths) == 1 and self._agrees(dims, lengths.pop()) and self._carries_on(dims):
                return dims
        return None

    def _carries_on(self, dims: Mapping[str, Dims]) -> bool:
        """Whether an output at later positions depends on the first one, or has no positions to tell."""
        length = TRIED[-1]
        longer = {name: resized(x, dims[name], length) for name, x in self.inputs.items()}
        other = dict(longer)
        for name in self._free:
            axis = next(i for i, d in enumerate(dims[name]) if i and isinstance(d, str))
            first = torch.arange(longer[name].shape[axis]) == 0
            first = first.reshape([-1 if i == axis else 1 for i in range(longer[name].ndim)])
            x = longer[name]
            # Noise: a forward that subtracts a mean, over rows or channels, takes no notice of a constant.
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            other[name] = torch.where(first, x + noise if x.is_floating_point() else x.flip(axis), x)
        found, changed = (result_of(self._copy, *self._signature.bind(x)) for x in (longer, other))
        pairs = [
            (a, b)
            for (_, a), (_, b) in zip(leaves(found), leaves(changed), strict=False)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        ]
        timed = [(a, b, axis) for a, b in pairs for axis in range(1, a.ndim) if a.shape[axis] == length]
        return not timed or any(
            not torch.allclose(a.narrow(axis, 1, length - 1), b.narrow(axis, 1, length - 1))
            for a, b, axis in timed
        )

    def advice(self, positions: Mapping[str, int]) -> str:
        """What to declare where the examples have different lengths: what forward agrees with, if anything.

        Args:
            positions: of each input that has any.
        """
        usual = max(positions.values(), key=list(positions.values()).count)
        odd = [name for name in self._free if positions[name] != usual]
        if not odd:
            return ""
        sides = {name: ("B", *self.inputs[name].shape[1:]) for name in odd}
        options = [(sides, usual)]
        most = math.gcd(*positions.values())
        for length in (n for n in range(most, 1, -1) if most % n == 0):
            at = {n: symbol(positions[n] // length) for n in self._free}
            options.append(({n: ("B", at[n], *self.inputs[n].shape[2:]) for n in self._free}, length))
        fitting = [
            dims for dims, length in options if self._base and self._agrees({**self.dims, **dims}, length)
        ]
        shown = [", ".join(f'"{n}": {_shown(d)}' for n, d in dims.items()) for dims in fitting or [sides]]
        return f"; return dims as the third element, such as {{{shown[0]}}}"

    def _with(self, axis: int, steps: int) -> dict[str, Dims]:
        def shape(x: Tensor) -> Dims:
            return ("B", *x.shape[1:axis], symbol(steps), *x.shape[axis + 1 :])

        return {**self.dims, **{name: shape(self.inputs[name]) for name in self._free}}

    def _agrees(self, dims: dict[str, Dims], length: int) -> bool:
        """Whether forward takes other lengths, and every output follows them or is of a fixed size."""
        if {positions_of(d, self.inputs[name]) for name, d in dims.items()} - {0, length}:
            return False
        found = {length: self._base}
        for tried in (*TRIED, length - 1, length + 1, length - 2):
            if tried >= 1 and tried not in found and len(found) < 3:
                sizes = self._sizes({n: _shortened(x, dims[n], tried) for n, x in self.inputs.items()})
                if sizes:
                    found[tried] = sizes
                elif tried == length + 1 and len(found) == 1:
                    return False
        return len(found) > 2 and _follow(found)

    def _sizes(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        """Shapes of the tensors that forward returns; none where it fails."""
        found = result_of(self._copy, *self._signature.bind(inputs))
        return [tuple(x.shape) for _, x in leaves(found) if isinstance(x, Tensor)]


def _follow(found: Mapping[int, list[tuple[int, ...]]]) -> bool:
    """Whether each axis of each output is a whole multiple of the length, or of a fixed size."""
    if len({tuple(map(len, shapes)) for shapes in found.values()}) > 1:
        return False
    for place in range(len(next(iter(found.values())))):
        for sizes in zip(*(shapes[place] for shapes in found.values()), strict=True):
            ratios = {size / length for size, length in zip(sizes, found, strict=True)}
            follows = len(ratios) == 1 and ratios.pop().is_integer()
            if 0 in sizes or not (len(set(sizes)) == 1 or follows):
                return False
    return True


def symbol(steps: int) -> str:
    """The dimension of an axis with so many positions to a step of the stream."""
    return "S" if steps == 1 else f"{steps}*S"


def resized(x: Tensor, dims: Dims, length: int) -> Tensor:
    """An example of another length: its positions repeated or cut off."""
    for axis, dim in enumerate(dims):
        if isinstance(dim, str) and dim != "B":
            x = x.index_select(axis, torch.arange(length * steps_of(dim)) % x.shape[axis])
    return x


def _shortened(x: Tensor, dims: Dims, length: int) -> Tensor:
    """An example of another length; integers beside it, which may be lengths or indices, are within that."""
    if any(map(steps_of, dims)) or x.is_floating_point() or x.dtype == torch.bool:
        return resized(x, dims, length)
    return x.clamp(max=max(1, length - 1))


def _require_clear(
    found: list[dict[str, Dims]], inputs: Mapping[str, Tensor], free: list[str], label: str
) -> None:
    """Raise InputError where shapes other than the usual (B, S, ...) are only one way to read the model."""
    name = free[0]
    dims = found[0][name]
    axis = next(i for i, dim in enumerate(dims) if isinstance(dim, str) and i > 0)
    fixed = ("B", *inputs[name].shape[1:])
    if len(found) == 1 and (axis == 1 or inputs[name].shape[axis] >= max(inputs[name].shape[1:axis])):
        return
    options = " or ".join(f'{{"{name}": {_shown(d[name])}}}' for d in found)
    raise InputError(
        f"{label}: it is not clear which axis of input {name} {tuple(inputs[name].shape)} has the positions: "
        f"forward takes axis 1 only at {inputs[name].shape[1]}, and axis {axis} at other lengths",
        f'return dims as the third element: {{"{name}": {_shown(fixed)}}} where every call has exactly that '
        f"shape (a fixed window), or {options} where that axis is time",
    )


def _shown(dims: Dims) -> str:
    return "(" + ", ".join(f'"{dim}"' if isinstance(dim, str) else str(dim) for dim in dims) + ")"


def by_input(declared: JsonMapping, inputs: Mapping[str, Tensor], label: str, what: str) -> Json:
    """What was declared by input name; that of a dict input may stand in a dict of the same keys."""
    found: dict[str, Any] = {}
    strangers = []
    for place, dims in _flat(declared):
        name = next((n for n in (*names_of([place]), "_".join(place)) if n in inputs), None)
        if name is None:
            strangers.append(".".join(place))
        else:
            found[name] = dims
    if strangers:
        raise InputError(
            f"{label}: {what} given for {', '.join(sorted(strangers))}, which is no example input",
            f"the example inputs are {', '.join(inputs)}",
        )
    return found


def _flat(declared: JsonMapping, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in declared.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*place, str(key)))
        else:
            yield (*place, str(key)), value


def _batch(inputs: Mapping[str, Tensor], declared: JsonMapping) -> int | None:
    """The batch of the examples, of the first input that has one."""
    for name, x in inputs.items():
        given = declared.get(name)
        batched = x.ndim > 1 if given is None else isinstance(given, (tuple, list)) and "B" in given[:1]
        if batched and x.ndim:
            return int(x.shape[0])
    return None


def _symbolic(name: str, example: Tensor, given: Any, batch: int | None, label: str) -> Dims:
    """The symbolic shape of an input, checked against its example; (B, S, ...) where none is given."""
    shape = tuple(example.shape)
    if 0 in shape:
        raise InputError(
            f"{label}: example input {name} of shape {shape} is empty", "every dimension needs a size"
        )
    if given is None:
        if len(shape) == 1:
            fitting = ("B",) if shape[0] == batch else shape
            raise InputError(
                f"{label}: example input {name} has shape {shape}",
                "inputs are (B, S, ...): batch first, then sequence; others need dims beside them, such as "
                f'{{"{name}": ({_shown(fitting)[1:-1]},)}}',
            )
        return ("B", "S", *shape[2:]) if shape else ()
    dims: Dims = tuple(map(_normal, given)) if isinstance(given, (tuple, list)) else ()
    if "B" in dims[1:] and len(dims) == len(shape):
        raise InputError(
            f"{label}: dims of input {name} are {given!r}: the batch is not its first axis",
            f"give it as {_shown(('B', *(d for d in dims if d != 'B')))}, and swap the axes where forward "
            f"begins: {name} = {name}.transpose(0, {dims.index('B')})",
        )
    moving = [axis for axis, dim in enumerate(dims) if isinstance(dim, str) and dim != "B"]
    own_rows = dims[:1] == ("B",)
    fits = len(dims) == len(shape) and len(moving) <= own_rows and (own_rows or shape[:1] != (batch,))
    for dim, size in zip(dims, shape, strict=False):
        whole = isinstance(dim, str) and (dim == "B" or (steps_of(dim) > 0 and size % steps_of(dim) == 0))
        fits = fits and (whole or (type(dim) is int and dim == size))
    if not fits:
        raise InputError(
            f"{label}: dims of input {name} are {given!r}, its example has shape {shape}",
            '"B" first, "S" second or where else its positions are, "4*S" where four of them make one step '
            "of the stream, and the sizes of the example for all others",
        )
    return dims


def _normal(dim: Any) -> Any:
    """One dimension as it is stored: "4 * S" and "S*4" as "4*S"."""
    if not isinstance(dim, str):
        return dim
    factors = sorted(dim.replace(" ", "").split("*"))
    return (
        symbol(int(factors[0])) if len(factors) == 2 and factors[0].isdecimal() and factors[1] == "S" else dim
    )


def positions_of(dims: Dims, example: Tensor) -> int:
    """Positions of the stream in an example; 0 where it has none."""
    return sum(size // steps_of(d) for d, size in zip(dims, example.shape, strict=True) if steps_of(d))


def _require_equal(search: _Search, label: str) -> None:
    """Raise InputError unless all examples have one batch B, and as many positions S."""
    rows = {name: x.shape[0] for name, x in search.inputs.items() if search.dims[name][:1] == ("B",)}
    positions = {name: n for name, x in search.inputs.items() if (n := positions_of(search.dims[name], x))}
    for letter, found in (("B", rows), ("S", positions)):
        if len(set(found.values())) < 2:
            continue
        sizes = ", ".join(f"{name} {size}" for name, size in found.items())
        advice = search.advice(found) if letter == "S" else ""
        raise InputError(
            f"{label}: {letter} differs between the example inputs: {sizes}",
            "all inputs of one call have the same batch B and the same number of positions S" + advice,
        )
