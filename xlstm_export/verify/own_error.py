"""The error of PyTorch's own FP32: where the reference rounds as well, limits are multiples of it."""

from __future__ import annotations

from ..distance import compare_states, difference
from ..inputs import Arrays, has_positions, rows_of, streams_of
from ..load.loaded import Loaded
from ..measure.data import EvalData
from ..sessions import TorchSession
from .limits import LIMITS
from .parts import metric_checks
from .ways import BATCH, StreamChecks


def own_error(loaded: Loaded, streams: StreamChecks, expected: Arrays, state: Arrays) -> dict[str, float]:
    """Error of the lifted module in FP32 on the inputs of the checks: the worst output, the worst state.

    Args:
        loaded: the model.
        streams: the checks of the ways of calling.
        expected, state: outputs and states of the reference after all positions.

    Returns:
        Relative L2 of "output" and "state": the larger one of a call of all positions and of calls that round
        differently, which are those of one position, or of one row where there is no state.
    """
    inputs, batch = streams.inputs, BATCH
    alone_errors: list[float] = []
    with TorchSession(loaded, batch, "float32") as plain:
        found = [(plain.prefill(inputs), plain.state())]
        states = plain.io.states if streams.io.states else ()
        if states and has_positions(plain.io):
            plain.reset()
            found.append((streams.joined([1] * max(streams.lengths), plain.prefill), plain.state()))
    if not states:
        with TorchSession(loaded, 1, "float32") as single:
            for row in range(batch):
                single.reset()
                alone = single.prefill(rows_of(inputs, single.io, slice(row, row + 1)))
                theirs = streams_of(expected, single.io, [row], batch)
                alone_errors += [difference(alone[name], theirs[name]).relative_l2 for name in theirs]
    outputs = [difference(one[name], expected[name]).relative_l2 for one, _ in found for name in expected]
    drifted = [x.relative_l2 for _, s in found for x in compare_states(s, state, states).values()]
    return {"output": max(outputs + alone_errors), "state": max(drifted, default=0.0)}


def own_metric_error(loaded: Loaded, data: EvalData, expected: Arrays) -> dict[str, float]:
    """The same of the task's metric, by the names of the limits "metric", "kl" and "top1".

    Args:
        loaded: the model.
        data: held-out data.
        expected: outputs of the reference on them.
    """
    with TorchSession(loaded, data.rows, "float32") as plain:
        checks, _ = metric_checks(data, data.run(plain), expected, "pytorch", LIMITS)
    return {name: check.value for name, check in zip(("metric", "kl", "top1"), checks, strict=False)}
