"""Repeat the recorded calls of a bundle on the target, and compare the results.

Two gates: against the results of this export on the machine where it was verified, and against the model in
float64, with the limits of the precision. Besides, all ways of calling must agree: single steps, resumed from
a file, after a reset. And late positions must not drift further than they did on that machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Check
from ..distance import compare_states, difference
from ..errors import InputError
from ..inputs import Arrays, cut, joined, per_position
from ..sessions.protocol import Session, load_state, save_state
from ..specs import IoSpec, TensorSpec

FOLDER = "goldens"
SCHEMA = 1
KEPT = 4  # positions of a call that are recorded, and more where they are small
KEPT_ELEMENTS = 1 << 15  # of an output that are recorded of a call
JUDGED_FROM = 100  # errors of the first positions are those of single tokens, see drift_report.py
SINGLY = 160  # positions that are also called one by one
# A late position may be this much further from the model than it was where the export was verified.
DRIFT = 1.5

Recording = tuple[list[Arrays], dict[str, Arrays]]


@dataclass(frozen=True)
class Goldens:
    """The content of `goldens/`.

    Attributes:
        inputs: one stream, each (1, S, ...).
        calls: lengths of the calls on it.
        export, reference: recorded outputs of each call, and states where the first call ends ("prefill") and
            at the end of the stream ("end").
        limits: relative L2, "same_…" against the export, "reference_…" against the model in float64.
    """

    inputs: Arrays
    calls: list[int]
    export: Recording
    reference: Recording
    limits: dict[str, float]
    model: str = "the model in float64"  # what the reference is, for the names of checks

    def until(self, horizon: int | None) -> int:
        """How many of the calls end within `horizon` positions; at least one."""
        if horizon is None:
            return len(self.calls)
        ends = np.cumsum(self.calls)
        return max(1, int((ends <= horizon).sum()))


def read_goldens(bundle: Path, backend: str) -> Goldens:
    """Read the goldens of a bundle for a backend.

    Raises:
        InputError: they are missing, damaged, or of another version.
    """
    path = bundle / FOLDER
    try:
        description = json.loads((path / "goldens.json").read_text(encoding="utf-8"))
        if description["schema"] != SCHEMA:
            raise ValueError(f"schema {description['schema']}, this version reads {SCHEMA}")
        with np.load(path / "goldens.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        calls = [int(length) for length in description["calls"]]
        return Goldens(
            {name.split("/", 1)[1]: x for name, x in arrays.items() if name.startswith("input/")},
            calls,
            _recording(arrays, backend, len(calls)),
            _recording(arrays, "reference", len(calls)),
            {str(name): float(limit) for name, limit in description["limits"][backend].items()},
            # Where the user's code does not run in float64, the reference is less exact.
            *([] if description.get("reference") == "PyTorch, float64" else ["the model in PyTorch"]),
        )
    except Exception as error:  # NumPy and zipfile raise many types for a damaged archive
        raise InputError(f"{path} cannot be read: {error!r}", "copy the bundle again") from error


def _recording(arrays: Arrays, side: str, calls: int) -> Recording:
    outputs: list[Arrays] = [{} for _ in range(calls)]
    states: dict[str, Arrays] = {"prefill": {}, "end": {}}
    for key, value in arrays.items():
        first, *rest = key.split("/", 2)
        if first == side:
            outputs[int(rest[0])][rest[1]] = value
        elif first == f"{side}_state":
            states[rest[0]][rest[1]] = value
    return outputs, states


def kept_positions(length: int, spec: TensorSpec) -> list[int]:
    """Which positions of a call are recorded of an output: all where they are few or small, else some.

    The first and the last are always among them.
    """
    size = int(np.prod([dim for dim in spec.shape[1:] if isinstance(dim, int)])) * spec.steps
    most = max(KEPT, KEPT_ELEMENTS // max(1, size))
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _places(positions: Sequence[int], spec: TensorSpec) -> list[int]:
    """Where positions of the stream are along the time axis of a tensor."""
    return [at * spec.steps + offset for at in positions for offset in range(spec.steps)]


def keep(outputs: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec], length: int) -> Arrays:
    """The recorded part of the outputs of a call."""
    kept = {}
    for name, value in outputs.items():
        spec = specs[name]
        if spec.time_axis is not None:
            value = np.take(value, _places(kept_positions(length, spec), spec), axis=spec.time_axis)
        elif spec.shape[1:2] == (1,):  # of the last position; the model itself gives all of them
            value = value[:, -1:]
        kept[name] = value.copy()
    return kept


def run_calls(
    session: Session,
    inputs: Mapping[str, np.ndarray],
    calls: Sequence[int],
    outputs: Sequence[TensorSpec] = (),
) -> Recording:
    """Make the calls on a fresh stream and return the parts that are recorded.

    Args:
        session: of one stream.
        inputs: each (1, S, ...).
        calls: their lengths; those of one position are steps.
        outputs: the model's; by default as the session describes them.
    """
    session.reset()
    specs = {spec.name: spec for spec in outputs or session.io.outputs}
    recorded: list[Arrays] = []
    states: dict[str, Arrays] = {}
    start = 0
    for length in calls:
        piece = cut(inputs, session.io, start, start + length)
        given = session.step(piece) if length == 1 else session.prefill(piece)
        recorded.append(keep(given, specs, length))
        if start == 0:
            states["prefill"] = session.state()
        start += length
    states["end"] = session.state()
    return recorded, states


def replay(
    bundle: Path,
    open_session: Callable[[], Session],
    backend: str,
    *,
    horizon: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Check]:
    """Make the recorded calls and judge the results.

    Args:
        bundle: unpacked bundle.
        open_session: a session of one stream over it.
        backend: what runs it, "onnxruntime" or "tensorrt": each has recordings and limits of its own.
        horizon: use the calls within that many positions; all by default.
        progress: called with the name of each stage.

    Raises:
        InputError: the goldens cannot be read.
    """
    goldens = read_goldens(bundle, backend)
    with open_session() as session:
        return _Replay(goldens, session, open_session, goldens.until(horizon), progress).run()


class _Replay:
    def __init__(
        self,
        goldens: Goldens,
        session: Session,
        open_session: Callable[[], Session],
        count: int,
        progress: Callable[[str], None],
    ) -> None:
        self._goldens, self._open, self._progress = goldens, open_session, progress
        self._calls = goldens.calls[:count]
        self._session = session
        self._io: IoSpec = session.io
        self._limits = goldens.limits

    def run(self) -> list[Check]:
        self._progress("calls as recorded")
        found = run_calls(self._session, self._goldens.inputs, self._calls)
        checks = self._against_export(found) + self._against_reference(found)
        if not self._io.states:
            return checks
        self._progress("step by step")
        checks.append(self._singly())
        self._progress("resumed from a file")
        checks += self._resumed()
        self._progress("after a reset")
        outputs, states = run_calls(self._session, self._goldens.inputs, self._calls[:1])
        export = self._goldens.export
        checks.append(self._outputs("reset", outputs, export[0][:1], self._limits["same_output"]))
        return checks + self._states("reset", states["end"], export[1]["prefill"], "same_state")

    def _against_export(self, found: Recording) -> list[Check]:
        outputs, states = found
        expected = self._goldens.export
        checks = []
        for name, numbers in self._groups().items():
            part, whole = ([side[n] for n in numbers] for side in (outputs, expected[0]))
            checks.append(self._outputs(f"{name}, this export", part, whole, self._limits["same_output"]))
        checks += self._states(
            "prefill, this export", states["prefill"], expected[1]["prefill"], "same_state"
        )
        if len(self._calls) == len(self._goldens.calls):
            checks += self._states("end, this export", states["end"], expected[1]["end"], "same_state")
        return checks

    def _against_reference(self, found: Recording) -> list[Check]:
        limit = self._limits["reference_output"]
        outputs, states = found
        reference = self._goldens.reference
        late = self._late()
        checks = [
            self._outputs(
                f"stream, {self._goldens.model}",
                [outputs[n] for n in self._judged()],
                [reference[0][n] for n in self._judged()],
                limit,
            )
        ]
        if late:
            ours, theirs, exact = (
                [side[n] for n in late] for side in (outputs, self._goldens.export[0], reference[0])
            )
            had = max(_distance(theirs, exact).values())
            # Rounding differs between processors: below the first gate's limit nothing has drifted.
            checks.append(self._outputs("drift", ours, exact, max(DRIFT * had, self._limits["same_output"])))
        if len(self._calls) == len(self._goldens.calls):
            checks += self._states(
                f"end, {self._goldens.model}", states["end"], reference[1]["end"], "reference_state"
            )
        return checks

    def _singly(self) -> Check:
        """Single steps from a fresh stream against what the calls gave at the same positions."""
        self._session.reset()
        found: list[Arrays] = []
        expected: list[Arrays] = []
        start = 0
        for length, recorded in zip(self._calls, self._goldens.export[0], strict=False):
            if start + length > SINGLY:
                break
            kept: dict[int, Arrays] = {}
            for offset in range(length):
                place = start + offset
                given = self._session.step(cut(self._goldens.inputs, self._io, place, place + 1))
                kept[offset] = {name: value.copy() for name, value in given.items()}
            found.append(self._joined(kept, length))
            expected.append(recorded)
            start += length
        return self._outputs("step by step", found, expected, self._limits["same_output"])

    def _joined(self, kept: Mapping[int, Arrays], length: int) -> Arrays:
        found = {}
        for spec in self._io.outputs:
            at = kept_positions(length, spec) if per_position(spec) else [length - 1]
            parts = [kept[offset][spec.name] for offset in at]
            found[spec.name] = joined(parts, spec)
        return found

    def _resumed(self) -> list[Check]:
        """The state written to a file after half of the calls; a new session reads it and goes on."""
        half = max(1, len(self._calls) // 2)
        if half == len(self._calls):
            return []
        run_calls(self._session, self._goldens.inputs, self._calls[:half])
        start = sum(self._calls[:half])
        found: list[Arrays] = []
        with self._open() as fresh:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "state.npz"
                save_state(self._session, path)
                load_state(fresh, path)
            for length in self._calls[half:]:
                piece = cut(self._goldens.inputs, self._io, start, start + length)
                given = fresh.step(piece) if length == 1 else fresh.prefill(piece)
                found.append(keep(given, {spec.name: spec for spec in self._io.outputs}, length))
                start += length
        expected = self._goldens.export[0][half : len(self._calls)]
        return [self._outputs("resumed from a file", found, expected, self._limits["same_output"])]

    def _groups(self) -> dict[str, list[int]]:
        """Calls by kind: numbers of the first, of single steps, and of the others."""
        rest = range(1, len(self._calls))
        groups = {
            "prefill": [0],
            "steps": [n for n in rest if self._calls[n] == 1],
            "pieces": [n for n in rest if self._calls[n] > 1],
        }
        return {name: numbers for name, numbers in groups.items() if numbers}

    def _judged(self) -> list[int]:
        """Calls that end late enough to be judged by level; all where the stream is short."""
        ends = np.cumsum(self._calls)
        return [n for n, end in enumerate(ends) if end > JUDGED_FROM] or list(range(len(self._calls)))

    def _late(self) -> list[int]:
        """Calls in the last quarter of a stream that is long enough to speak of drift."""
        ends = np.cumsum(self._calls)
        if ends[-1] < 4 * JUDGED_FROM:
            return []
        return [n for n, end in enumerate(ends) if end > 0.75 * ends[-1]]

    def _outputs(self, name: str, found: Sequence[Arrays], expected: Sequence[Arrays], limit: float) -> Check:
        worst, detail = -1.0, {}
        for output, value in _distance(found, expected).items():
            if not value <= worst:
                worst, detail = value, {"output": output}
        return Check(name, worst, limit, detail)

    def _states(self, name: str, found: Arrays, expected: Arrays, limit: str) -> list[Check]:
        if not self._io.states:
            return []
        errors = compare_states(found, expected, self._io.states)
        worst = max(errors, key=lambda past: _order(errors[past].relative_l2))
        return [Check(f"{name}: states", errors[worst].relative_l2, self._limits[limit], {"state": worst})]


def _order(value: float) -> float:
    return np.inf if np.isnan(value) else value


def _distance(found: Sequence[Arrays], expected: Sequence[Arrays]) -> dict[str, float]:
    """Relative L2 of each output over all recorded positions."""
    result: dict[str, Any] = {}
    for name in expected[0]:
        ours, theirs = (np.concatenate([call[name].ravel() for call in side]) for side in (found, expected))
        result[name] = difference(ours, theirs).relative_l2
    return result
