"""Check whether a model can be streamed: all its memory must be in the states of its cells.

A bidirectional pass, a mean over the sequence, positions counted from its end, or an unknown recurrence give
other results when a sequence arrives in pieces. Such a model can only be exported without states.
"""

from __future__ import annotations

import logging

import numpy as np

from ..distance import difference
from ..errors import CannotStreamError, UserCodeError
from ..inputs import Arrays, cut, has_positions, length_of, rows_of
from ..load.loaded import Loaded
from ..load.made_up import random_inputs
from ..sessions import TorchSession

log = logging.getLogger(__name__)

LENGTH, FIRST = 12, 5
# Relative L2. FP32 rounding in the tested models is below 1e-6, and a model that looks ahead changes outputs
# by more than 1e-2. `verify` decides in float64 about values in between.
LIMIT = 1e-4
# Of an ill-conditioned model, a multiple of its own FP32 error in one call, at most the least that looking
# ahead changes. Measured were 0.8 and 0.9 times.
OWN_ERRORS, MOST = 4.0, 1e-2
HINT = "make a cell of what has to be remembered, with a state of its own (docs/adapters.md)"


def check_streams(loaded: Loaded) -> None:
    """Run the lifted module over a sequence as a whole, and in two pieces with the state carried on.

    Raises:
        CannotStreamError: an output differs, forward does not take the pieces, or no input has positions.
    """
    with TorchSession(loaded, 2, "float32") as session:
        _check_pieces(session, loaded)


def _check_pieces(session: TorchSession, loaded: Loaded) -> None:
    if not has_positions(session.io):
        raise CannotStreamError(f"no input of {loaded.name} has positions, so there is no stream", HINT)
    inputs = random_inputs(loaded, session.io, 2, LENGTH, np.random.default_rng(0))
    length, first = LENGTH, FIRST
    try:
        whole = session.prefill(inputs)
    except UserCodeError:  # forward may not take this length; the example's it does
        log.debug("forward does not take %d positions", LENGTH, exc_info=True)
        inputs = rows_of({name: x.numpy() for name, x in loaded.inputs.items()}, session.io, slice(0, 2))
        length = length_of(inputs, session.io.inputs)
        first = length // 2
        session.reset()
        whole = session.prefill(inputs)
    session.reset()
    pieces = [_call(session, inputs, 0, first), _call(session, inputs, first, length)]
    limits: dict[str, float] = {}
    for name, expected in whole.items():
        found = _joined([piece[name] for piece in pieces], (first, length - first))
        if found.shape != expected.shape or np.isnan(expected).any():
            continue  # tracing and verification report it with clearer messages
        gap = difference(found, expected).relative_l2
        if gap > LIMIT and gap > (limits := limits or _by_own_error(loaded, inputs, whole))[name]:
            raise CannotStreamError(
                f"output {name} does not stream: in two pieces it is {gap:.1e} off the whole; forward "
                "looks ahead, or remembers more than the states of its cells",
                HINT,
            )


def _by_own_error(loaded: Loaded, inputs: Arrays, whole: Arrays) -> dict[str, float]:
    """The limit of each output by the error of FP32 in one call, from float64 as far as that runs."""
    with TorchSession(loaded, 2, "float64") as exact:
        right = exact.prefill(inputs)
    own = {name: difference(x, right[name]).relative_l2 for name, x in whole.items()}
    return {name: min(MOST, max(LIMIT, OWN_ERRORS * error)) for name, error in own.items()}


def _call(session: TorchSession, inputs: Arrays, start: int, end: int) -> Arrays:
    try:
        return session.prefill(cut(inputs, session.io, start, end))
    except UserCodeError as error:
        raise CannotStreamError(
            error.message.replace("fails", f"fails on a piece of {end - start} positions", 1),
            f"take pieces of any length, also of one position, as a stream comes; {error.hint}",
        ) from error


def _joined(parts: list[np.ndarray], lengths: tuple[int, ...]) -> np.ndarray:
    """Outputs of the pieces, joined along the axis of positions; without one, that of the last piece."""
    for axis in range(1, parts[0].ndim):
        steps = {part.shape[axis] / length for part, length in zip(parts, lengths, strict=True)}
        if len(steps) == 1 and steps.pop().is_integer():
            return np.concatenate(parts, axis=axis)
    return parts[-1]
