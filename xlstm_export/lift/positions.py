"""Modules that handle one position at a time: `stack.step(x, state)` in a loop, or in a policy.

A loop over positions would be unrolled by tracing, for one length. So such a module is called with one
position, and every position of the call is a row of the batch: what lies between the cells treats rows alike,
and the cells run over the positions of a stream as over a sequence, which is what their `step` computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..load.signature import Place, UserValue, leaves, rebuilt
from ..specs import TensorSpec
from .passes import over_positions


@dataclass(frozen=True)
class OnePosition:
    """Takes the place of a lifted module's forward that handles one position.

    Attributes:
        forward: of the module.
        inputs: each tensor of a call, with its symbolic shape.
        results: the axis of the positions in each tensor of the result; None where it has none.
    """

    forward: Any
    inputs: tuple[TensorSpec, ...]
    results: Mapping[Place, int | None]

    def __call__(self, *args: UserValue, **kwargs: UserValue) -> UserValue:
        tensors = [x for _, x in leaves((args, kwargs)) if isinstance(x, Tensor)]
        pairs = list(zip(tensors, self.inputs, strict=True))
        streams, positions = sizes(pairs)
        folded = iter([_fold(x, spec, positions) for x, spec in pairs])
        args, kwargs = rebuilt((args, kwargs), lambda x: next(folded) if isinstance(x, Tensor) else x)
        with over_positions(streams, positions):
            result = self.forward(*args, **kwargs)
        axes = iter([self.results.get(place) for place, x in leaves(result) if isinstance(x, Tensor)])
        return rebuilt(
            result, lambda x: _unfold(x, next(axes), streams, positions) if isinstance(x, Tensor) else x
        )


def sizes(inputs: Iterable[tuple[Tensor, TensorSpec]]) -> tuple[int, int]:
    """Streams and positions of a call."""
    x, spec = next((x, spec) for x, spec in inputs if spec.batched and spec.time_axis is not None)
    assert spec.time_axis is not None
    return x.shape[0], x.shape[spec.time_axis] // spec.steps


def _fold(x: Tensor, spec: TensorSpec, positions: int) -> Tensor:
    """(B, ..., S, ...) → (B·S, ..., 1, ...); what has no positions goes along with each."""
    if not spec.batched:
        return x
    if spec.time_axis is None:
        return x[:, None].expand(-1, positions, *x.shape[1:]).reshape(-1, *x.shape[1:])
    x = x.movedim(spec.time_axis, 1)
    return x.reshape(-1, spec.steps, *x.shape[2:]).movedim(1, spec.time_axis)


def _unfold(y: Tensor, axis: int | None, streams: int, positions: int) -> Tensor:
    """(B·S, ..., 1, ...) → (B, ..., S, ...); of a result without positions the last."""
    if axis is None:
        return y.reshape(streams, positions, *y.shape[1:])[:, -1]
    y = y.movedim(axis, 1)
    return y.reshape(streams, positions * y.shape[1], *y.shape[2:]).movedim(1, axis)


def first_position(inputs: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """The first position of example inputs."""
    return {
        name: x if (axis := specs[name].time_axis) is None else x.narrow(axis, 0, specs[name].steps)
        for name, x in inputs.items()
    }


def result_axes(whole: UserValue, single: UserValue, positions: int) -> dict[Place, int | None]:
    """The axis of the positions in each result: where the whole has as many times the entries.

    Args:
        whole: what the user's own forward returns for `positions` positions.
        single: what the lifted one returns for one position.
    """
    long = {place: x.shape for place, x in leaves(whole) if isinstance(x, Tensor)}
    axes: dict[Place, int | None] = {}
    for place, x in leaves(single):
        if isinstance(x, Tensor):
            pairs = zip(long.get(place, ()), x.shape, strict=False)
            axes[place] = next(
                (a for a, (many, one) in enumerate(pairs) if a and many == positions * one), None
            )
    return axes


def step_by_step(
    module: nn.Module, inputs: tuple[TensorSpec, ...], results: Mapping[Place, int | None]
) -> None:
    """Make the forward of a lifted module, which handles one position, handle any number; in place."""
    setattr(module, "forward", OnePosition(module.forward, inputs, results))  # noqa: B010 - mypy forbids it
