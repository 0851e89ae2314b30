"""What a factory returned, or a caller gave beside a live module → arguments of forward, and named inputs."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..specs import JsonMapping
from .signature import Call, Place, Signature, UserValue, entries, leaves, rebuilt

log = logging.getLogger(__name__)

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Given:
    """What a factory returned: a module, its example (None if there is none), dims and ranges by input, and
    what its outputs are, by output."""

    module: nn.Module
    example: UserValue = None
    dims: JsonMapping | None = None
    ranges: JsonMapping | None = None
    outputs: JsonMapping | None = None


def given(result: UserValue, label: str) -> Given:
    """Read what a factory returned.

    A module; or a tuple or list of a module, its example, and where given the dims, the ranges of values, and
    what the outputs are.
    Several tensors after the module are its positional arguments. A class is called without arguments.

    Raises:
        InputError: it is something else.
    """
    if isinstance(result, type) and issubclass(result, nn.Module):
        result = _instance(result, label)
    if isinstance(result, nn.Module):
        return Given(result)
    parts = list(result) if isinstance(result, (tuple, list)) else []
    if parts and isinstance(parts[0], type) and issubclass(parts[0], nn.Module):
        parts[0] = _instance(parts[0], label)
    if not parts or not isinstance(parts[0], nn.Module):
        raise InputError(f"{label}: the factory returned {type(result).__name__}", what_to_return(None))
    module: nn.Module = parts[0]
    if len(parts) > 2 and all(isinstance(part, (Tensor, np.ndarray)) for part in parts[1:]):
        return Given(module, tuple(parts[1:]))
    example = parts[1] if len(parts) > 1 else None
    if len(parts) > 5 or (example is not None and not _has_tensors(example) and _some(example)):
        raise InputError(f"{label}: the factory returned {type(result).__name__}", what_to_return(module))
    dims, ranges, outputs = (*parts[2:], None, None, None)[:3]
    for place, declared in (("third", dims), ("fourth", ranges), ("fifth", outputs)):
        if declared is not None and not isinstance(declared, Mapping):
            raise InputError(
                f"{label}: the {place} element the factory returned is {type(declared).__name__}",
                what_to_return(module),
            )
    return Given(module, example if _some(example) else None, dims, ranges, outputs)


def what_to_return(module: nn.Module | None) -> str:
    """The hint: what a factory returns, with the names of the module's forward where it is known."""
    first = "x" if module is None else next((p.name for p in parameters(module) if _required(p)), "x")
    return (
        f"return (module, {what_to_give(module)}), keyed by forward's parameter names, and as a third "
        f'element {{"{first}": ("B", 3, 32, 32)}} for inputs that are not (B, S, ...), as a fourth '
        f'{{"{first}": (0, 9)}} for the values that made-up inputs may have, as a fifth '
        '{"y": {"quantiles": [0.1, 0.5, 0.9], "step": "1h", "unit": "°C"}} for what the outputs are'
    )


def what_to_give(module: nn.Module | None) -> str:
    """An example for a module as it is written in Python; with its width, where forward takes it."""
    names = [] if module is None else [p.name for p in parameters(module) if _required(p)]
    width = _width(module, names[0]) if module is not None and len(names) == 1 else None
    example = "example tensor" if width is None else f"torch.zeros(2, 16, {width})"
    return "{" + ", ".join(f'"{name}": {example}' for name in names or ["x"]) + "}"


def _width(module: nn.Module, name: str) -> int | None:
    """Channels of a sequence that forward takes as its only input: those of one of its linear layers."""
    widths = dict.fromkeys(m.in_features for m in module.modules() if isinstance(m, nn.Linear))
    copy = shadow(module)
    for width in itertools.islice(widths, 8):
        if result_of(copy, (), {name: torch.zeros(2, 16, width)}):
            return width
    return None


def parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Parameters of a module's forward."""
    return list(inspect.signature(module.forward).parameters.values())


def signature_of(module: nn.Module, example: UserValue, label: str) -> tuple[Signature, dict[str, Tensor]]:
    """How forward takes an example, and the example's tensors by name, in the order of forward.

    A dict is read by parameter names, a tuple or list by position. Where that does not fit, and for anything
    else, the example as a whole is forward's first argument.

    Raises:
        InputError: it fits in no way.
    """
    example = rebuilt(example, _as_tensor)
    possible = list(_readings(module, example))
    readings = [reading for reading in possible if _binds(module, reading)]
    usual = bool(readings) and readings[0] is possible[0]
    keys = isinstance(example, Mapping) and not _by_name(module, example)
    if keys or len(possible) > 1:
        # Not as it usually is: only where forward takes it, else keys or number of arguments are a mistake.
        tried = [reading for reading in readings if result_of(shadow(module), *_call(reading))]
        readings = tried or (readings if usual and not keys else [])
    if not readings:
        names = ", ".join(_shown(p) for p in parameters(module))
        found = (
            sorted(map(str, example)) if isinstance(example, Mapping) else f"of type {type(example).__name__}"
        )
        raise InputError(
            f"{label}: example inputs {found} do not match forward({names})",
            "give an example for each of forward's first parameters, by name",
        )
    return Signature.of(readings[0])


def result_of(
    module: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue]
) -> list[UserValue]:
    """What forward returns, as a list of one; empty where it does not take these arguments."""
    try:
        with torch.no_grad():
            return [module(*args, **kwargs)]
    except Exception:
        log.debug("forward does not take the example in this way", exc_info=True)
        return []


def shadow(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters of `module`; its buffers and attributes are its own."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _instance(cls: type[nn.Module], label: str) -> nn.Module:
    try:
        return cls()
    except TypeError as error:
        raise InputError(
            f"{label}: the factory returned the class {cls.__name__}: {error}",
            f"return an instance, such as {cls.__name__}(...)",
        ) from error


def _some(example: UserValue) -> bool:
    """Whether an example holds anything."""
    return example is not None and next(leaves(example), None) is not None


def _has_tensors(example: UserValue) -> bool:
    return any(isinstance(leaf, (Tensor, np.ndarray)) for _, leaf in leaves(example))


def _as_tensor(leaf: UserValue) -> UserValue:
    return torch.from_numpy(np.array(leaf)) if isinstance(leaf, np.ndarray) else leaf


def _by_name(module: nn.Module, example: Mapping[str, UserValue]) -> bool:
    known = parameters(module)
    names = {p.name for p in known if p.kind is not inspect.Parameter.VAR_KEYWORD}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known)
    return all(isinstance(key, str) and (key in names or open_ended) for key in example)


def _readings(module: nn.Module, example: UserValue) -> Iterator[dict[Place, UserValue]]:
    """The ways in which forward may take an example, the likeliest first."""
    known = parameters(module)
    if isinstance(example, Mapping) and _by_name(module, example):
        yield _named(known, example)
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in known):
            yield {(i, name): value for i, (name, value) in enumerate(example.items())}
        return
    named_tuple = hasattr(example, "_fields")
    if isinstance(example, (tuple, list)) and not named_tuple:
        yield _in_order(known, example)
    first = next((p for p in known if p.kind is not inspect.Parameter.VAR_KEYWORD), None)
    if first is not None:
        alone = first.kind is inspect.Parameter.KEYWORD_ONLY
        yield {(first.name,): example} if alone else {(0, first.name): example}
    if named_tuple:
        yield _in_order(known, example)


def _named(known: list[inspect.Parameter], example: Mapping[str, UserValue]) -> dict[Place, UserValue]:
    """By name: in the order of forward, positional as far as there is no gap."""
    found: dict[Place, UserValue] = {}
    gap = False
    for parameter in known:
        if parameter.name not in example or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            gap = True
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values = [
                entry for _, entry in entries(example[parameter.name]) or [(0, example[parameter.name])]
            ]
            found |= {(len(found) + i, f"{parameter.name}_{i}"): value for i, value in enumerate(values)}
        elif parameter.kind in POSITIONAL and not gap:
            found[len(found), parameter.name] = example[parameter.name]
        else:
            found[(parameter.name,)] = example[parameter.name]
    names = {p.name for p in known if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return {**found, **{(key,): value for key, value in example.items() if key not in names}}


def _in_order(known: list[inspect.Parameter], example: UserValue) -> dict[Place, UserValue]:
    """By position; those beyond forward's own names are numbered after its `*args`."""
    names = [p.name for p in known if p.kind in POSITIONAL]
    more = next((p.name for p in known if p.kind is inspect.Parameter.VAR_POSITIONAL), "argument")
    return {
        (i, names[i] if i < len(names) else f"{more}_{i - len(names)}"): value
        for i, value in enumerate(example)
    }


def _binds(module: nn.Module, reading: Mapping[Place, UserValue]) -> bool:
    args, kwargs = _call(reading)
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _call(reading: Mapping[Place, UserValue]) -> Call:
    args = tuple(value for place, value in reading.items() if len(place) > 1)
    return args, {str(place[0]): value for place, value in reading.items() if len(place) == 1}


def _required(parameter: inspect.Parameter) -> bool:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variable


def _shown(parameter: inspect.Parameter) -> str:
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name
