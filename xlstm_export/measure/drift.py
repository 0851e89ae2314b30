"""Drift: the error of a candidate against its reference after 1, 10, … 16,000 positions of one stream.

A recurrent model carries its errors along. Three runs separate the causes of an error:

    teacher-forced   both read the same data, each carries its own state from position 0 on
    free-running     after a prompt of data, the candidate reads tokens drawn from its own output, and the
                     reference reads the same tokens. Both carry their own state. So the error is that of
                     the function on the candidate's own text, not the difference of two texts.
    state-forced     with either of the two: the same positions, but the candidate starts each window with
                     the reference's state. This is the error without accumulation.

An error at horizon t is one of a window, the last min(t, `window`) positions, because a single position is
noisy. Outputs: relative L2 over the window and all rows. States: gauge-free relative L2 over all rows, root
mean square of `SAMPLES` evenly spaced positions of the window, the last included. Where a window starts at
position 0, state-forced is the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from ..distance import compare_states
from ..errors import InputError, UsageError
from ..inputs import Arrays, cut, per_position
from ..options import Context
from ..sessions import Session
from ..specs import IoSpec, TensorSpec
from .drift_plan import DriftPlan
from .drift_result import FREE, TEACHER, Drift, Feedback, FreeRun, Series

SAMPLES = 8
NARROW = ("float16", "bfloat16")


def measure_drift(
    reference: Session,
    candidate: Session,
    inputs: Mapping[str, np.ndarray],
    plan: DriftPlan = DriftPlan(),
    context: Context = Context(),
) -> Drift:
    """Run both models over the longest horizon, from a fresh start, and compare on the way.

    Memory does not grow with the horizon: outputs live for one piece, states are compared where they occur.

    Args:
        reference, candidate: two sessions of one model and one batch; both are reset.
        inputs: data by input name, each (batch, N, ...); repeated from the start if N is too short.
        plan: horizons, and the feedback of the free-running mode.
        context: shared settings; only progress is used.

    Raises:
        UsageError: the sessions do not fit each other, or the model does not stream.
        InputError: the data do not fit the model.
    """
    feedback, progress = plan.feedback, context.progress
    _check_pair(reference, candidate, feedback)
    data = _Data(inputs, candidate.io)
    logits = feedback.output if feedback is not None else None
    teacher = _Run(reference, candidate, logits, plan.horizons, plan.window)
    stepwise = plan.stepwise
    if stepwise is None:
        stepwise = any(s.dtype in NARROW for s in candidate.io.states)
    teacher.go(_Teacher(candidate, data, stepwise), plan.piece, lambda at: progress(f"{TEACHER}, {at}"))
    series = teacher.series(TEACHER)
    free_running: FreeRun | str = _why_not_free(candidate.io, feedback)
    if feedback is not None and plan.free:
        free = _Run(reference, candidate, logits, plan.free, plan.window)
        free.go(_Student(candidate, data, feedback), plan.piece, lambda at: progress(f"{FREE}, {at}"))
        series += free.series(FREE)
        free_running = FreeRun(feedback, tuple(free.first_other))
    repeated = data.length < plan.horizons[-1]
    return Drift(tuple(series), candidate.batch, plan.window, data.length, repeated, free_running, stepwise)


def _check_pair(reference: Session, candidate: Session, feedback: Feedback | None) -> None:
    io = candidate.io
    known = {(s.past, s.shape) for s in reference.io.states}
    found = {(s.past, s.shape) for s in io.states}
    if not found or not any(map(per_position, io.inputs)):
        raise UsageError("the model has no states or no positions", "drift needs a model that streams")
    if found != known or reference.batch != candidate.batch:
        raise UsageError(
            f"candidate (batch {candidate.batch}, {len(found)} states) and reference (batch "
            f"{reference.batch}, {len(known)} states) are not the same model",
            "open two sessions of one model with the same batch",
        )
    if feedback is None:
        return
    if feedback.input not in [x.name for x in io.inputs] or feedback.prompt < 1 or feedback.temperature < 0:
        raise UsageError(
            f"feedback of {feedback.output} to {feedback.input}, prompt {feedback.prompt}, temperature "
            f"{feedback.temperature}",
            f"inputs are {', '.join(x.name for x in io.inputs)}; the prompt needs at least one position, the "
            "temperature must not be negative",
        )


def _why_not_free(io: IoSpec, feedback: Feedback | None) -> str:
    if feedback is not None:
        return "not asked for"
    tensors = [
        ", ".join(f"{x.name} {x.dtype} ({', '.join(map(str, x.shape))})" for x in xs)
        for xs in (io.inputs, io.outputs)
    ]
    return (
        f"not applicable: no output is fed back as the next input (inputs {tensors[0]}; outputs {tensors[1]})"
    )


# --- what the candidate reads -----------------------------------------------------------------------


class _Data:
    """Data that are repeated without end, read by positions."""

    def __init__(self, inputs: Mapping[str, np.ndarray], io: IoSpec) -> None:
        lacking = [x.name for x in io.inputs if x.name not in inputs]
        if lacking:
            raise InputError(
                f"no data for input {lacking[0]}", f"the data hold {', '.join(inputs) or 'none'}"
            )
        lengths = {
            x.name: inputs[x.name].shape[x.time_axis : x.time_axis + 1]
            for x in io.inputs
            if x.time_axis is not None
        }
        steps = {x.name: x.steps for x in io.inputs}
        found = {size[0] // steps[name] if size else 0 for name, size in lengths.items()}
        if len(found) != 1 or 0 in found:
            raise InputError(f"data of {lengths} positions", "all inputs need the same number, at least one")
        self.length = found.pop()
        self._inputs, self._io = inputs, io

    def positions(self, start: int, end: int) -> Arrays:
        """Copies of the positions start … end - 1."""
        return {x.name: self._taken(x, start, end) for x in self._io.inputs}

    def _taken(self, spec: TensorSpec, start: int, end: int) -> np.ndarray:
        array = self._inputs[spec.name]
        if spec.time_axis is None:
            return array
        index = np.arange(start * spec.steps, end * spec.steps) % (self.length * spec.steps)
        return np.take(array, index, axis=spec.time_axis)


class _Driver(Protocol):
    """Runs the candidate and returns what it has read.

    Attributes:
        steps: whether the candidate reads one position per call.
        chooses: whether it reads its own choices.
    """

    steps: bool
    chooses: bool

    def drive(self, start: int, end: int, singly: bool) -> tuple[Arrays, Arrays]:
        """Inputs and the candidate's outputs of positions start … end - 1."""
        ...


class _Teacher:
    chooses = False

    def __init__(self, candidate: Session, data: _Data, steps: bool) -> None:
        self._candidate, self._data, self.steps = candidate, data, steps

    def drive(self, start: int, end: int, singly: bool) -> tuple[Arrays, Arrays]:
        inputs = self._data.positions(start, end)
        return inputs, _call(self._candidate, inputs, end - start, singly or self.steps, self._candidate.io)


class _Student:
    """The candidate on its own: a prompt of data, then tokens drawn from its logits."""

    steps = True
    chooses = True

    def __init__(self, candidate: Session, data: _Data, feedback: Feedback) -> None:
        self._candidate, self._data, self._feedback = candidate, data, feedback
        self._rng = np.random.default_rng(feedback.seed)
        self._next: np.ndarray | None = None  # (B,)

    def drive(self, start: int, end: int, singly: bool) -> tuple[Arrays, Arrays]:
        inputs = self._data.positions(start, end)
        tokens = inputs[self._feedback.input]  # (B, S)
        parts = []
        for offset in range(end - start):
            if self._next is not None and start + offset >= self._feedback.prompt:
                tokens[:, offset] = self._next
            outputs = self._candidate.step(cut(inputs, self._candidate.io, offset, offset + 1))
            parts.append({name: x.copy() for name, x in outputs.items()})
            self._next = self._choose(outputs)
        return inputs, _joined(parts, self._candidate.io)

    def _choose(self, outputs: Arrays) -> np.ndarray:
        logits = outputs[self._feedback.output].reshape(self._candidate.batch, -1).astype(np.float64)
        if self._feedback.temperature > 0:
            # The largest of logits with Gumbel noise is a draw from their softmax. It is a valid token even
            # if a broken candidate's logits are NaN.
            logits = logits / self._feedback.temperature + self._rng.gumbel(size=logits.shape)
        return logits.argmax(-1)


def _call(session: Session, inputs: Arrays, length: int, singly: bool, io: IoSpec) -> Arrays:
    """Run positions in one call, or one by one if outputs belong to a whole call; `io` has the outputs."""
    if not singly:
        return session.prefill(inputs)
    parts = []
    for at in range(length):
        outputs = session.step(cut(inputs, session.io, at, at + 1))
        parts.append({name: x.copy() for name, x in outputs.items()})
    return _joined(parts, io)


def _joined(parts: Sequence[Arrays], io: IoSpec) -> Arrays:
    """Outputs of single positions joined along these; an output without such an axis gets one."""
    axes = {x.name: x.time_axis for x in io.outputs}
    result = {}
    for name, x in parts[0].items():
        axis = axes.get(name) or 1
        one = axes.get(name) is not None or x.shape[1:2] == (1,)
        result[name] = (np.concatenate if one else np.stack)([part[name] for part in parts], axis=axis)
    return result


# --- windows, and the sums over them ---------------------------------------------------------


class _Sums:
    """Sums of squared errors over one window, piece by piece."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}  # output → ‖a − b‖², ‖b‖²
        self._states: dict[str, list[float]] = {}
        self._kl, self._agree, self._count = 0.0, 0, 0

    def add_outputs(self, found: Arrays, expected: Arrays, logits: str | None) -> None:
        for name, value in found.items():
            a, b = value.astype(np.float64), expected[name].astype(np.float64)
            error = float(np.square(a - b).sum()) if np.isfinite(a).all() else math.inf
            sums = self._squares.setdefault(name, [0.0, 0.0])
            sums[0] += error
            sums[1] += float(np.square(b).sum())
            if name == logits:
                self._kl += _divergence(a, b) if math.isfinite(error) else math.inf
                self._agree += int((a.argmax(-1) == b.argmax(-1)).sum())
                self._count += a.size // a.shape[-1]

    def add_states(self, errors: Mapping[str, float]) -> None:
        for name, error in errors.items():
            self._states.setdefault(name, []).append(error)

    def errors(self) -> dict[str, float]:
        """Relative L2 by output and past state; infinite if not finite, or if the reference is all zeros."""
        means = {
            name: error / norm if norm else (math.inf if error else 0.0)
            for name, (error, norm) in self._squares.items()
        }
        means.update({name: float(np.mean(np.square(x))) for name, x in self._states.items()})
        return {name: math.inf if math.isnan(x) else math.sqrt(x) for name, x in means.items()}

    def logits(self) -> tuple[float, float]:
        """KL per position and agreement on the first rank."""
        return self._kl / self._count, self._agree / self._count


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Σ KL(softmax b ‖ softmax a) in nats; logits (..., V)."""
    log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    p = np.exp(log_b)
    with np.errstate(invalid="ignore"):
        return max(0.0, float(np.where(p > 0, p * (log_b - log_a), 0.0).sum()))  # not below by rounding


class _Window:
    """The positions start … end - 1 before the horizon `end`."""

    def __init__(self, end: int, length: int) -> None:
        self.start, self.end = max(0, end - length), end
        steps = np.linspace(self.start, end, SAMPLES + 1)[1:]
        self.samples = {math.ceil(x) for x in steps}
        self.own = _Sums()
        self.forced = _Sums() if self.start else self.own
        self.state: Arrays = {}  # of the candidate, started from the reference's state


class _Run:
    """Both models along one stream."""

    def __init__(
        self, reference: Session, candidate: Session, logits: str | None, horizons: Sequence[int], window: int
    ) -> None:
        self._reference, self._candidate, self._logits = reference, candidate, logits
        self._windows = [_Window(horizon, window) for horizon in horizons]
        # An output of a whole call, such as the last position, must be computed one position per call.
        self._singly = not all(map(per_position, (*reference.io.outputs, *candidate.io.outputs)))
        self.first_other: list[int | None] = [None] * candidate.batch

    def go(self, driver: _Driver, piece: int, progress: Callable[[str], None]) -> None:
        self._reference.reset()
        self._candidate.reset()
        total = self._windows[-1].end
        for start, end in self._pieces(piece):
            progress(f"{start:,} of {total:,} positions")
            self._advance(driver, start, end)

    def series(self, mode: str) -> list[Series]:
        """The windows' errors by tensor: outputs first, then states in the order of the graph."""
        horizons = tuple(w.end for w in self._windows)
        own = [w.own.errors() for w in self._windows]
        forced = [w.forced.errors() for w in self._windows]
        states = {s.past: s for s in self._candidate.io.states}
        result = []
        for name in own[0]:
            block, tensor = (states[name].block, states[name].kind) if name in states else (None, name)
            errors = tuple(x[name] for x in own), tuple(x[name] for x in forced)
            pairs = [w.own.logits() for w in self._windows] if name == self._logits else []
            kl, top1 = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
            result.append(Series(mode, block, tensor, horizons, *errors, kl, top1))
        return result

    def _pieces(self, piece: int) -> Iterator[tuple[int, int]]:
        """Stretches of positions inside which no window starts or ends and nothing is compared."""
        cuts = {0, *(x for w in self._windows for x in (w.start, *w.samples))}
        ordered = sorted(cuts)
        for start, end in pairwise(ordered):
            for first in range(start, end, piece):
                yield first, min(first + piece, end)

    def _advance(self, driver: _Driver, start: int, end: int) -> None:
        active = [w for w in self._windows if w.start <= start < w.end]
        for window in active:
            if window.start == start and start:
                window.state = self._reference.state()
        singly = self._singly and (bool(active) or driver.chooses)
        inputs, found = driver.drive(start, end, singly)
        expected = _call(self._reference, inputs, end - start, singly, self._candidate.io)
        if active or driver.chooses:
            _check_outputs(found, expected, self._logits)
        if driver.chooses and self._logits is not None:
            self._note_first_other(found[self._logits], expected[self._logits], start)
        for window in active:
            window.own.add_outputs(found, expected, self._logits)
            if end in window.samples:
                window.own.add_states(self._state_errors(self._candidate.state()))
        for window in active:
            if window.start:
                forced = self._forced(window, inputs, end - start, singly or driver.steps)
                window.forced.add_outputs(forced, expected, None)
                if end in window.samples:
                    window.forced.add_states(self._state_errors(window.state))

    def _forced(self, window: _Window, inputs: Arrays, length: int, singly: bool) -> Arrays:
        """Run the candidate from the window's state and update that; its own state is restored."""
        own = self._candidate.state()
        self._candidate.set_state(window.state)
        outputs = _call(self._candidate, inputs, length, singly, self._candidate.io)
        window.state = self._candidate.state()
        self._candidate.set_state(own)
        return outputs

    def _state_errors(self, state: Arrays) -> dict[str, float]:
        compared = compare_states(state, self._reference.state(), self._candidate.io.states)
        return {name: difference.relative_l2 for name, difference in compared.items()}

    def _note_first_other(self, found: np.ndarray, expected: np.ndarray, start: int) -> None:
        shape = (self._candidate.batch, -1, found.shape[-1])
        other = found.reshape(shape).argmax(-1) != expected.reshape(shape).argmax(-1)  # (B, S)
        for row in np.flatnonzero(other.any(axis=1)):
            if self.first_other[row] is None:
                self.first_other[row] = start + int(other[row].argmax()) + 1


def _check_outputs(found: Arrays, expected: Arrays, logits: str | None) -> None:
    for name, value in found.items():
        if name not in expected or expected[name].shape != value.shape:
            other = expected[name].shape if name in expected else f"only {', '.join(expected)}"
            raise UsageError(
                f"{name}: the candidate gives shape {value.shape}, the reference {other}",
                "both must be the same model",
            )
    if logits is not None and logits not in found:
        raise UsageError(f"there is no output {logits} to feed back", f"the model has {', '.join(found)}")
