"""Where the calls of a standard recurrence begin that forward gives a state to.

A state of zeros that forward makes is a fresh start, as a lifted state of zeros is. A state from a parameter
or from an input is where a stream begins. But a state that forward hands through, from an input to an output,
is not a state of the graph. No signature tells these apart, so the lifted module is run on other inputs, and
then with other states behind the recurrence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BuildError
from ..load.signature import Call, UserValue, leaves, rebuilt
from .cells.standard import StandardLayer, States
from .passes import watch_calls

log = logging.getLogger(__name__)

Given = dict[str, list[States]]  # path of a layer → the state that each call is given


@contextlib.contextmanager
def recorded(layers: Sequence[StandardLayer]) -> Iterator[Given]:
    """Context manager that records the states which the layers are given, by path; none if they get none."""
    given: Given = {}

    def before(layer: StandardLayer, args: tuple[Any, ...]) -> None:
        if args[1] is not None:
            given.setdefault(layer.path, []).append(args[1])

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def settle(
    module: nn.Module,
    inputs: Call,
    like: Tensor,
    result: UserValue,
    layers: Sequence[StandardLayer],
    given: Given,
) -> None:
    """Set `start` of every layer that is given a state, and the state "begun" where it is needed.

    Args:
        module: the lifted module.
        inputs, result: arguments of its forward, and what it returns for them.
        like: a tensor among the inputs, whose first axis is the batch.
        layers: its standard recurrences.
        given: from `recorded`, of that run.

    Raises:
        BuildError: a state is handed through forward, and the export is not stateless.
    """
    explicit = [layer for layer in layers if layer.path in given]
    if not explicit or like.is_meta:
        return
    with recorded(layers) as again, contextlib.suppress(Exception), torch.no_grad():
        watch_calls(module, inputs, like)
    with recorded(layers) as moved, contextlib.suppress(Exception), torch.no_grad():
        args, kwargs = rebuilt(inputs, other_values)
        watch_calls(module, (args, kwargs), like, batch=like.shape[0])
    for layer in explicit:
        calls = [value for call in given[layer.path] for value in call]
        others = [value for call in moved.get(layer.path, []) for value in call]
        if not all(map(torch.equal, calls, [value for call in again.get(layer.path, []) for value in call])):
            raise BuildError(
                f"{layer.owner} starts from a state that forward draws at random in every call",
                "start from zeros in eval mode: call it without a state there",
            )
        constant = len(calls) == len(others) and all(map(torch.equal, calls, others))
        if constant and not any(value.any() for value in calls):
            layer.start = "past"
        elif layer.stateless:
            layer.start = "given"
        elif constant or not _matters(module, inputs, like, result, layer):
            layer.start = "begun"
            layer.state_shapes["begun"] = (1,)
        else:
            _refuse(layer, given)


def _refuse(layer: StandardLayer, given: Given) -> None:
    count = len(given[layer.path])
    if count > 1:
        raise BuildError(
            f"{layer.owner} is called {count} times in one forward pass, from the state of the call before: "
            "a loop over positions, which a graph for streams cannot have",
            f"call an nn.{layer.kind.name} on the whole sequence; or declare a fixed number of positions "
            'beside the example, e.g. {"x": ("B", 12, 5)}: then the loop is exported for that number',
        )
    raise BuildError(
        f"{layer.owner} starts from a state that forward takes and returns, so it is no state of the graph",
        "export with --stateless: the state stays an input and an output, to be fed back by the caller; or "
        "call it without a state, and the graph carries it",
    )


def _matters(module: nn.Module, inputs: Call, like: Tensor, result: UserValue, layer: StandardLayer) -> bool:
    """Whether what forward returns depends on the states that a layer returns."""

    def shifted(layer: nn.Module, args: Any, found: tuple[Tensor, States]) -> tuple[Tensor, States]:
        return found[0], tuple(value + 1 for value in found[1])

    hook = layer.register_forward_hook(shifted)
    try:
        with torch.no_grad():
            other, _ = watch_calls(module, inputs, like, batch=like.shape[0])
    except Exception:
        log.debug("forward does not run with other states", exc_info=True)
        return True
    finally:
        hook.remove()
    before, after = list(tensors_of(result)), list(tensors_of(other))
    return len(before) != len(after) or not all(map(torch.equal, before, after))


def other_values(x: UserValue, seed: int = 1) -> UserValue:
    """An input of the same shape and range with other values; a constant as it is."""
    if not isinstance(x, Tensor):
        return x
    generator = torch.Generator().manual_seed(seed)
    if x.dtype == torch.bool:
        return ~x
    if x.is_floating_point():
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype)


def tensors_of(value: UserValue) -> Iterator[Tensor]:
    """The tensors in what forward returns."""
    return (x for _, x in leaves(value) if isinstance(x, Tensor))
