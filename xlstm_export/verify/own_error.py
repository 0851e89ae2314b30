"""The error of PyTorch's own FP32: where the reference rounds as well, limits are multiples of it.

What a float32 forward around the cells rounds is the same in the reference, and would not show. So there are
also calls in which every result is moved by half a unit of its last place, up or down at random.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..distance import compare_states, difference
from ..inputs import Arrays, has_positions, rows_of, streams_of
from ..load.loaded import Loaded
from ..measure.data import PIECE, EvalData
from ..sessions import TorchSession
from .coverage import along
from .limits import LIMITS, MOST_OWN, ONE_POSITION, OwnError
from .parts import metric_checks
from .positions import Positions, ill_conditioned
from .ways import BATCH, Expected, StreamChecks

# A last place decides where forward rounds to an index or compares: such an error says nothing of rounding. A
# wrong gate, mask or carried state gives 1e-3 and more.
MOST_MOVED = 2.5e-5
DRAWS = 3  # calls with moved last places, where the reference is exact

Roundings = tuple[tuple[AbstractContextManager[object], float], ...]
Result = tuple[Arrays, Arrays]  # outputs and states
# Inputs, and the reference's results after so many of their positions.
Long = tuple[Arrays, Mapping[int, Result]]


def own_error(
    loaded: Loaded,
    streams: StreamChecks,
    expected: Expected,
    rounded: Roundings,
    *,
    long: Long | None = None,
) -> OwnError:
    """Error of the lifted module in FP32 on the inputs of the checks.

    The largest one counts of the calls of the checks (after one position, a state may have cancelled to less
    than its rounding), of these moved by the last place, and of calls that round differently, which are those
    of one position, or of one row where there is no state.

    Args:
        loaded: the model.
        streams: the checks of the ways of calling.
        expected: outputs and states of the reference after so many positions.
        rounded: of `roundings`; several draws where the reference is exact.
        long: a longer call: its outputs, and its states after each of the numbers of positions.
    """
    inputs, batch, whole = streams.inputs, BATCH, max(streams.lengths)
    positions = Positions(streams.io.outputs, expected(whole)[0])
    by_position: dict[str, np.ndarray] = {}
    errors: list[float] = []
    states = streams.io.states
    if not states:
        errors += _rows_alone(loaded, inputs, batch, expected(whole)[0])
    drifted: list[float] = []
    for most, length, (outputs, state), (right, after) in _calls(loaded, streams, expected, rounded, long):
        errors += [min(most, difference(outputs[name], right[name]).relative_l2) for name in outputs]
        drifted += [min(most, x.relative_l2) for x in compare_states(state, after, states).values()]
        for name in outputs:
            positions.add("", name, outputs[name], right[name], most=most)
            if length == whole and most == math.inf:
                seen = positions.errors(name, outputs[name], right[name])
                by_position[name] = np.maximum(seen, by_position.get(name, 0.0))
    return OwnError(
        output=max(errors),
        state=max(drifted, default=0.0),
        positions={key: worst.value for key, worst in positions.worst.items()},
        ill_conditioned=tuple(ill_conditioned(by_position)),
    )


def _calls(
    loaded: Loaded, streams: StreamChecks, expected: Expected, rounded: Roundings, long: Long | None
) -> Iterator[tuple[float, int, Result, Result]]:
    """Of each call: the most that counts, its positions (0: the long one), its result, and what is right."""
    whole = max(streams.lengths)
    with TorchSession(loaded, BATCH, "float32") as plain:
        for mode, most in rounded:
            for length in streams.lengths:
                plain.reset()
                with mode:
                    outputs = plain.prefill(streams.source.cut(streams.inputs, 0, length))
                yield most, length, (outputs, plain.state()), expected(length)
        if streams.io.states and has_positions(plain.io):
            plain.reset()
            stepped = streams.joined([1] * whole, plain.prefill)
            yield math.inf, whole, (stepped, plain.state()), expected(whole)
        if long is None:
            return
        for mode, most in rounded if len(rounded) > 2 else rounded[:1]:
            with mode:
                reached = along(streams, plain, long[0], list(long[1]))
            for end, (outputs, state) in reached.items():
                # Outputs are of all positions so far: the last ones have those of the others.
                yield most, 0, (outputs if end == max(reached) else {}, state), long[1][end]


def _rows_alone(loaded: Loaded, inputs: Arrays, batch: int, right: Arrays) -> list[float]:
    """Errors of the rows of a batch that are called one by one."""
    errors: list[float] = []
    with TorchSession(loaded, 1, "float32") as single:
        for row in range(batch):
            single.reset()
            alone = single.prefill(rows_of(inputs, single.io, slice(row, row + 1)))
            theirs = streams_of(right, single.io, [row], batch)
            errors += [difference(alone[name], theirs[name]).relative_l2 for name in theirs]
    return errors


def own_metric_error(loaded: Loaded, data: EvalData, reference: TorchSession) -> dict[str, float]:
    """The same of the task's metric, by the names of the limits "metric", "kl" and "top1".

    Args:
        loaded: the model.
        data: held-out data.
        reference: of as many streams as the data have rows; they begin anew.
    """
    with TorchSession(loaded, data.rows, "float32") as plain:
        compared = data.compare((plain, PIECE), (reference, PIECE))
    checks, _ = metric_checks(data, compared, "pytorch", LIMITS)
    return {name: check.value for name, check in zip(("metric", "kl", "top1"), checks, strict=False)}


def roundings(draws: int | None = None) -> Roundings:
    """Contexts of calls in FP32 that round differently, each with the largest error that counts in it.

    Args:
        draws: calls with moved last places, where the reference is in float64: one call in FP32 may be near
            it by luck where a position is ill-conditioned, and these show what another order of additions
            may give. None where the reference rounds as well, and one such call is made.
    """
    most = MOST_MOVED if draws is None else ONE_POSITION * MOST_OWN
    return (contextlib.nullcontext(), math.inf), *((_LastPlace(seed), most) for seed in range(draws or 1))


class _LastPlace(TorchDispatchMode):
    """Moves every FP32 result of an operator that rounds by half a unit of its last place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = torch.Generator().manual_seed(seed)
        self._moves = self._drawn(1 << 16)
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        rounds = torch.Tag.pointwise in func.tags or func.overloadpacket in _SUMS
        return tree_map_only(Tensor, self._moved, result) if rounds else result

    def _moved(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        count = x.numel()
        if count > len(self._moves):
            self._moves = self._drawn(2 * count)
        if self._next + count > len(self._moves):
            self._next = int(torch.randint(0, len(self._moves) - count + 1, (), generator=self._rng))
        moves = self._moves[self._next : self._next + count]
        self._next += count
        return x * moves.view(x.shape)

    def _drawn(self, count: int) -> Tensor:
        """So many factors. Calls of one position have a thousand small results, which share them."""
        signs = torch.randint(0, 2, (count,), generator=self._rng) * 2 - 1
        return 1 + signs * (torch.finfo(torch.float32).eps / 2)


_ATEN = torch.ops.aten
_SUMS = frozenset({_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.sum, _ATEN.mean, _ATEN.cumsum})
