"""A state that forward takes and returns, `forward(x, state) -> (y, state)`: the graph carries it instead.

It is found by calling forward without a state, and then with what it returned. Afterwards forward has none:
it starts fresh, and what it returned as state is None. Where it takes one position at a time, as policies do,
it takes any number of them then, and hands the state on from one to the next.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .example import POSITIONAL, parameters, result_of, shadow
from .signature import Signature, Slot, UserValue, entries, leaves, rebuilt

# Parameters that may be a state, by their names.
_STATE = re.compile(r"state|hidden|carry|cache|memor|^past|^h[xn0]?$|^hc$|recurrent", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """How a forward hands its state on, and how it is called without.

    Attributes:
        signature, inputs: of the call without a state.
        forward: takes that call.
        added: inputs that were given an axis of positions.
    """

    signature: Signature
    inputs: dict[str, Tensor]
    forward: HandsOn
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class HandsOn:
    """A forward without the state that it takes and returns.

    Attributes:
        forward: of the user's module.
        parameter: name of the state among its parameters.
        key: place of the state in what it returns.
        axes: where forward takes one position at a time: per tensor of a call, whether the second axis has
            the positions (1), was added for them (0), or is another one (None). Empty where it takes many.
    """

    forward: Callable[..., UserValue]
    parameter: str
    key: str | int
    axes: tuple[int | None, ...] = ()

    def __call__(self, *args: UserValue, **kwargs: UserValue) -> UserValue:
        if not self.axes:
            return self._apart(self.forward(*args, **kwargs, **{self.parameter: None}))[0]
        tensors = [x for _, x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        count = next(x.shape[1] for x, axis in zip(tensors, self.axes, strict=True) if axis is not None)
        state: UserValue = None
        results = []
        for t in range(count):
            here = [_at(x, axis, t) for x, axis in zip(tensors, self.axes, strict=True)]
            one, named = _with_tensors((args, kwargs), here)
            result, state = self._apart(self.forward(*one, **named, **{self.parameter: state}))
            results.append(result)
        return _with_tensors(
            results[0], [_joined(parts) for parts in zip(*map(_tensors, results), strict=True)]
        )

    def _apart(self, result: UserValue) -> tuple[UserValue, UserValue]:
        """What forward returned with None in place of the state, and the state."""
        state = dict(entries(result) or [])[self.key]
        if isinstance(result, Mapping):
            rest = copy.copy(result)
            rest[next(key for key in result if str(key) == self.key)] = None  # type: ignore[index]
            return rest, state
        parts: list[UserValue] = [None if key == self.key else x for key, x in entries(result) or []]
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(*parts), state
        if isinstance(result, (tuple, list)):
            return type(result)(parts), state
        rest = copy.copy(result)
        object.__setattr__(rest, str(self.key), None)
        return rest, state


def _at(x: Tensor, axis: int | None, t: int) -> Tensor:
    """One position of an input."""
    return x if axis is None else x[:, t : t + 1] if axis else x[:, t]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """One result of all positions (B, S, ...)."""
    return torch.cat(parts, 1) if parts[0].ndim > 1 and parts[0].shape[1] == 1 else torch.stack(parts, 1)


def find(module: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> Found | None:
    """The state that forward hands on; None where there is none.

    Args:
        module: in eval mode.
        signature: how forward takes `inputs`.
        inputs: examples by name.
    """
    for parameter in parameters(module):
        if not _may_be_state(parameter, signature, module):
            continue
        without = _without(module, signature, parameter.name)
        kept = {slot.name for _, slot in leaves((without.args, without.kwargs)) if isinstance(slot, Slot)}
        rest = {name: x for name, x in inputs.items() if name in kept}
        key = _returned(module, without, rest, parameter.name) if rest else None
        if key is not None:
            return _prepared(module, HandsOn(module.forward, parameter.name, key), without, rest)
    return None


def _may_be_state(parameter: inspect.Parameter, signature: Signature, module: nn.Module) -> bool:
    if not _STATE.search(parameter.name) or parameter.kind not in (*POSITIONAL[1:], parameter.KEYWORD_ONLY):
        return False
    given = _arguments(module, signature)
    return parameter.name in given or parameter.default is None


def _arguments(module: nn.Module, signature: Signature) -> dict[str, UserValue]:
    """The arguments of a call by the names of forward's parameters."""
    names = [p.name for p in parameters(module) if p.kind in POSITIONAL]
    return {**dict(zip(names, signature.args, strict=False)), **signature.kwargs}


def _without(module: nn.Module, signature: Signature, name: str) -> Signature:
    """The call without one argument; those after it go by name."""
    names = [p.name for p in parameters(module) if p.kind in POSITIONAL]
    place = names.index(name) if name in names else len(names)
    after = dict(zip(names[place + 1 :], signature.args[place + 1 :], strict=False))
    kwargs = {key: value for key, value in signature.kwargs.items() if key != name}
    return Signature(signature.args[:place], {**after, **kwargs})


def _returned(
    module: nn.Module, signature: Signature, inputs: Mapping[str, Tensor], parameter: str
) -> str | int | None:
    """Where forward returns its state: what it takes back, and then returns other values with it."""
    trial = shadow(module)

    def call(state: UserValue) -> dict[str | int, UserValue]:
        args, kwargs = signature.bind(inputs)
        # Copies: upstream's convolution writes into its state.
        result = result_of(trial, args, {**kwargs, parameter: rebuilt(state, _cloned)})
        return dict(entries(result[0]) or []) if result else {}

    first = call(None)
    for key, state in list(first.items())[::-1]:
        if not _tensors(state) or len(first) < 2:
            continue
        second = call(state)
        same = [x.shape for x in _tensors(second.get(key))] == [x.shape for x in _tensors(state)]
        others = [(x, second.get(name)) for name, x in first.items() if name != key]
        if same and any(_differ(a, b) for a, b in others):
            return key
    return None


def _prepared(module: nn.Module, forward: HandsOn, signature: Signature, inputs: dict[str, Tensor]) -> Found:
    """The forward for any number of positions."""
    trial = shadow(module)

    def runs(change: Callable[[Tensor], Tensor]) -> bool:
        args, kwargs = signature.bind({name: change(x) for name, x in inputs.items()})
        return bool(result_of(trial, args, {**kwargs, forward.parameter: None}))

    def shorter(x: Tensor) -> Tensor:
        return x[:, : (x.shape[1] + 1) // 2] if x.ndim > 1 else x

    # Shorter as well: times that must increase do not when they are repeated.
    several = any(shorter(x).shape != x.shape for x in inputs.values())
    longer = [x.ndim > 1 for x in inputs.values()]
    if (any(longer) and runs(lambda x: torch.cat([x, x], 1) if x.ndim > 1 else x)) or (
        several and runs(shorter)
    ):
        return Found(signature, inputs, forward)
    single = [name for name, x in inputs.items() if x.ndim > 1 and x.shape[1] == 1]
    batch = max(x.shape[0] for x in inputs.values() if x.ndim)
    added = () if single else tuple(n for n, x in inputs.items() if x.ndim and x.shape[0] == batch)
    axes = tuple(1 if name in single else 0 if name in added else None for name in _order(signature))
    inputs = {name: x[:, None] if name in added else x for name, x in inputs.items()}
    return Found(signature, inputs, replace(forward, axes=axes), added)


def _order(signature: Signature) -> Iterator[str]:
    """Names of the tensors in the order of a call."""
    return (slot.name for _, slot in leaves((signature.args, signature.kwargs)) if isinstance(slot, Slot))


def _tensors(value: UserValue) -> list[Tensor]:
    return [x for _, x in leaves(value) if isinstance(x, Tensor)]


def _with_tensors(value: UserValue, tensors: Sequence[Tensor]) -> UserValue:
    """A nest with other tensors."""
    order = iter(tensors)
    return rebuilt(value, lambda x: next(order) if isinstance(x, Tensor) else x)


def _cloned(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _differ(a: UserValue, b: UserValue) -> bool:
    """Whether two results have tensors of the same shapes and other values."""
    pairs = list(zip(_tensors(a), _tensors(b), strict=False))
    return any(x.shape == y.shape and not torch.equal(x, y) for x, y in pairs)
