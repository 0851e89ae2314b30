"""The values that inputs may have: declared by the user, or shown by what forward does with the example.

Integers are often indices. Those that forward looks up in an embedding table may be any of its rows. Those
that it does not take in a shorter sequence unless they are reduced, as lengths are, belong to the number of
positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..specs import JsonMapping
from .axes import by_input, positions_of, resized
from .example import result_of, shadow
from .loaded import Dims, Range
from .signature import Signature, leaves

PICTURE = '{"lengths": (1, "S"), "x": (0.0, 1.0)}: lowest and highest value, both included'
_TO_LENGTH = {"S": 0, "S-1": -1}


@dataclass(frozen=True)
class Values:
    """What is known of the values that inputs may have.

    Attributes:
        ranges: by input.
        vocabulary: size of that of the input that has tokens.
        gaps: inputs that may hold NaN: all outputs are numbers nevertheless.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    vocabulary: int | None = None
    gaps: frozenset[str] = frozenset()


def values_of(
    module: nn.Module,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    dims: Mapping[str, Dims],
    declared: JsonMapping,
    label: str,
) -> Values:
    """The values that the inputs of a module may have.

    Args:
        module: in eval mode.
        signature: how forward takes `inputs`.
        inputs, dims: examples by name, and their symbolic shapes.
        declared: input name → (lowest, highest).
        label: beginning of messages.

    Raises:
        InputError: a declared range has another form, belongs to no input of numbers, or does not include
            the example.
    """
    ranges = _declared(by_input(declared, inputs, label, "a range"), inputs, dims, label)
    integers = [name for name, x in inputs.items() if _is_integer(x)]
    if not integers:
        return Values(ranges, gaps=_gaps(module, signature, inputs))
    copy, seen = shadow(module), _Lookups()
    with seen:
        runs = bool(result_of(copy, *signature.bind(inputs)))
    rows = {name: tables for name in integers if (tables := seen.rows(inputs[name]))}
    found = {name: Range(0, min(tables) - 1) for name, tables in rows.items()}
    free = [name for name in integers if name not in found and name not in ranges]
    if runs and free:
        found |= _to_length(copy, signature, inputs, dims, free)
    if not runs:
        rows = _guessed(module, {name: inputs[name] for name in integers})
    vocabularies = set().union(*rows.values())
    vocabulary = vocabularies.pop() if len(rows) == len(vocabularies) == 1 else None
    return Values({**found, **ranges}, vocabulary, _gaps(copy, signature, inputs) if runs else frozenset())


def _gaps(module: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Inputs of real numbers in which forward takes NaN: with some in them, all that it returns is finite."""
    found = set()
    for name, x in inputs.items():
        if not x.is_floating_point() or x.dim() < 2 or not x.isfinite().all():
            continue
        given = x.clone(memory_format=torch.contiguous_format)
        given.view(-1)[[given.numel() // 4, given.numel() // 2, -1]] = torch.nan
        for result in result_of(shadow(module), *signature.bind({**inputs, name: given})):
            tensors = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]
            if tensors and all(bool(y.isfinite().all()) for y in tensors):
                found.add(name)
    return frozenset(found)


def _declared(
    given: Mapping[str, Any], inputs: Mapping[str, Tensor], dims: Mapping[str, Dims], label: str
) -> dict[str, Range]:
    """Declared ranges, checked against the examples."""
    found: dict[str, Range] = {}
    for name, limits in given.items():
        pair: list[Any] = (
            list(limits) if isinstance(limits, (tuple, list)) and len(limits) == 2 else [None, 0]
        )
        low, high = pair
        fits = _is_number(low) and (high in _TO_LENGTH or (_is_number(high) and low <= high))
        x = inputs[name]
        if not fits or x.dtype == torch.bool:
            raise InputError(f"{label}: the range of input {name} ({_type(x)}) is {limits!r}", PICTURE)
        found[name] = Range(low, math.inf, _TO_LENGTH[high]) if high in _TO_LENGTH else Range(low, high)
        known = x[torch.isfinite(x)]
        length = max(positions_of(dims[n], inputs[n]) for n in inputs)
        if known.numel() and (known.min() < low or known.max() > found[name].at(length)[1]):
            raise InputError(
                f"{label}: example input {name} holds {known.min().item():g} … {known.max().item():g}, "
                f"outside of its range {limits!r}",
                "widen the range, or change the example",
            )
    return found


def _to_length(
    module: nn.Module,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    dims: Mapping[str, Dims],
    free: list[str],
) -> dict[str, Range]:
    """Ranges of inputs whose values forward does not take in half the positions unless they are reduced."""
    length = max(positions_of(dims[name], x) for name, x in inputs.items())
    half = length // 2
    if half < 1 or len(free) > 3:
        return {}
    cut = {name: resized(x, dims[name], half) for name, x in inputs.items()}
    for offsets in itertools.product((None, 0, -1), repeat=len(free)):
        chosen = {name: offset for name, offset in zip(free, offsets, strict=True) if offset is not None}
        given = {**cut, **{name: cut[name].clamp(max=half + offset) for name, offset in chosen.items()}}
        if result_of(module, *signature.bind(given)):
            return {name: _up_to(inputs[name], length, offset) for name, offset in chosen.items()}
    return {}


def _up_to(x: Tensor, length: int, offset: int) -> Range:
    """From the example's lowest value to its highest, or to the last position if that is its highest."""
    low, high = int(x.min()), int(x.max())
    return Range(low, math.inf if high == length + offset else high, offset)


def _guessed(module: nn.Module, integers: Mapping[str, Tensor]) -> dict[str, set[int]]:
    """Where the module does not run: the only integer input indexes tables, if all have as many rows."""
    tables = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    if len(integers) != 1 or len(tables) != 1:
        return {}
    ((name, x),) = integers.items()
    return {name: tables} if x.min() >= 0 and x.max() < max(tables) else {}


class _Lookups(TorchFunctionMode):
    """Notes what is looked up in embedding tables."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, int]] = []  # indices, rows of the table

    def rows(self, x: Tensor) -> set[int]:
        """Numbers of rows of the tables that the values of an input are looked up in, as they are."""
        return {n for y, n in self._found if torch.equal(y.flatten().to(x.dtype), x.flatten())}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.embedding:
            index, weight = (*args, *(kwargs or {}).values())[:2]
            self._found.append((index.detach().clone(), int(weight.shape[0])))
        return func(*args, **(kwargs or {}))


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
