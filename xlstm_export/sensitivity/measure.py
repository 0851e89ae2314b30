"""Measures one candidate of the sensitivity search: quantize, run, compare with the FP32 export, delete.

The outputs and states of the FP32 export are recorded once (`record`) and replayed for every candidate, as a
`Session` that `measure_drift` uses like the real one. All functions take paths and plain data, so that they
also run in other processes and on other machines.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import readable_os_errors
from ..errors import BuildError
from ..graph.files import load_graph
from ..inputs import Arrays, length_of, rolled, save_arrays
from ..measure.data import EvalData
from ..measure.drift import measure_drift
from ..measure.drift_plan import WINDOW, DriftPlan
from ..measure.drift_result import Drift, judged_growth
from ..quantize.quantize import quantize
from ..quantize.recipe import Recipe
from ..runfolder import MODEL
from ..sessions import OrtSession, Session
from ..specs import IoSpec, Json, JsonMapping

if TYPE_CHECKING:
    from ..calibration.scales import Scales

SPREAD = 16  # growth is measured from a 16th of the horizon to the horizon
FLOOR = 1e-5  # smaller errors count as this large in growth; FP32 itself has 1e-6
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Setup:
    """Settings that all candidates share.

    Attributes:
        folder: run folder of the FP32 export.
        reference: file of `record`.
        data: data that metric and drift are measured on.
        scales: calibrated ranges; None if no candidate quantizes activations.
        horizon: positions of one carried stream after which drift is measured.
        seed: seed of the stretch of data that drift is measured on.
        threads: CPU threads of ONNX Runtime, per candidate.
        scratch: folder of candidates while they are measured; None: the system's temporary folder.
    """

    folder: str
    reference: str
    data: EvalData
    scales: Scales | None
    horizon: int
    seed: int = 0
    threads: int = 1
    scratch: str | None = None


@dataclass(frozen=True)
class Measured:
    """Measurements of a candidate; NaN or infinite if its results are not finite.

    Attributes:
        metric: task metric as a loss, lower is better.
        drift: relative L2 of the worst output at the horizon.
        state_drift: gauge-free relative L2 of the worst block state at the horizon.
        worst_state: name of that state.
        growth: the largest of outputs and states, from a 16th of the horizon to the horizon, without the
            part that harder data explain (`drift_result.judged_growth`).
        bytes: size of all weights and scales.
        failure: why the candidate could not be built; empty if it was.
    """

    metric: float
    drift: float
    state_drift: float
    worst_state: str
    growth: float
    bytes: int
    failure: str = ""

    def to_json(self) -> Json:
        """Plain data; NaN and infinity are null."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }

    @staticmethod
    def from_json(data: JsonMapping) -> Measured:
        """The inverse of `to_json`; null is infinity."""
        values: dict[str, Any] = {k: math.inf if v is None else v for k, v in data.items()}
        return Measured(**values)

    @staticmethod
    def failed(reason: str) -> Measured:
        """Measurements of a candidate that cannot be built: all infinite."""
        return Measured(math.inf, math.inf, math.inf, "", math.inf, 0, reason)


def measure(setup: Setup, recipe: Recipe) -> Measured:
    """Write the candidate of `recipe`, measure it, delete it.

    A recipe that cannot be built gives a result with `failure`; other problems raise.

    Raises:
        InputError: the export or the ranges cannot be used.
        SetupError: the disk has no space for the candidate.
    """
    try:
        return _measure(setup, recipe)
    except BuildError as error:
        return Measured.failed(error.message)


def _measure(setup: Setup, recipe: Recipe) -> Measured:
    with tempfile.TemporaryDirectory(prefix="candidate.", dir=setup.scratch) as scratch:
        out = quantize(Path(setup.folder), recipe, scales=setup.scales, out=Path(scratch) / "run")
        # Overflow is expected: the metric of a broken candidate is not finite.
        with (
            OrtSession(out, setup.data.rows, setup.threads, rounding=True) as session,
            np.errstate(all="ignore"),
        ):
            metric = setup.data.loss(setup.data.run(session))
            with Replay(session.io, setup.data.rows, Path(setup.reference)) as reference:
                drift = measure_drift(reference, session, stretch(setup), DriftPlan(horizons(setup.horizon)))
        return _measured(metric, drift, stored_bytes(out))


def horizons(horizon: int) -> tuple[int, int]:
    """The two horizons at which errors are measured: an early one, and the last."""
    return max(1, horizon // SPREAD), horizon


def stretch(setup: Setup) -> Arrays:
    """The data (N, S, ...) from the position on at which the stream for the drift starts."""
    spare = max(0, setup.data.length - setup.horizon)
    start = int(np.random.default_rng(setup.seed).integers(spare + 1))
    return {x.name: rolled(setup.data.inputs[x.name], x, start) for x in setup.data.io.inputs}


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights of a run folder, without padding."""
    model = load_graph(folder / MODEL)
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _measured(metric: float, drift: Drift, size: int) -> Measured:
    outputs = [s for s in drift.series if s.block is None]
    states = [s for s in drift.series if s.block is not None]
    worst = max(states, key=lambda s: s.errors[-1])
    return Measured(
        metric=metric,
        drift=max(s.errors[-1] for s in outputs),
        state_drift=worst.errors[-1],
        worst_state=f"block {worst.block} {worst.tensor}",
        growth=max(judged_growth(s, FLOOR) for s in drift.series),
        bytes=size,
    )


# --- the reference ------------------------------------------------------------------------------------


def record(setup: Setup) -> float:
    """Run the FP32 export once, and write its results to `setup.reference`.

    Returns:
        Its metric.
    """
    data, path = setup.data, Path(setup.reference)
    ends = horizons(setup.horizon)
    with OrtSession(Path(setup.folder), data.rows, setup.threads, rounding=True) as session:
        metric = data.loss(data.run(session))
        recorder = _Recorder(session, [range(max(0, end - WINDOW), end) for end in ends])
        silent = _Zeros(session.io, data.rows)
        with np.errstate(all="ignore"):
            measure_drift(recorder, silent, stretch(setup), DriftPlan(ends))
    with readable_os_errors(path):
        save_arrays(path, recorder.arrays)
    return metric


def data_hash(data: EvalData, io: IoSpec) -> str:
    """Hash of inputs and metric. The targets enter by the score of noise, since only the metric has them."""
    digest = hashlib.sha256()
    for name, array in sorted(data.inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    rng = np.random.default_rng(0)
    shapes = {x.name: x.sized(data.rows, data.length) for x in io.outputs}
    noise = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    digest.update(json.dumps([data.metric, data.score(noise)]).encode())
    return digest.hexdigest()


class _Zeros(Session):
    """A session that returns zeros and counts the positions it has read."""

    def __init__(self, io: IoSpec, batch: int) -> None:
        super().__init__(io, batch)
        self._position = 0

    def _prefill(self, inputs: Arrays) -> Arrays:
        length = length_of(inputs, self.io.inputs)
        self._position += length
        return {
            x.name: np.broadcast_to(np.zeros((), x.dtype), x.sized(self.batch, length))
            for x in self.io.outputs
        }

    def _state(self) -> Arrays:
        return {s.past: np.zeros((self.batch, *s.shape), s.dtype) for s in self.io.states}

    def _store(self, name: str, value: np.ndarray) -> None:
        pass  # the state is always zero

    def _clear(self, rows: np.ndarray) -> None:
        self._position = 0


class _Recorder(_Zeros):
    """A session around another one that records outputs inside some windows, and every state read."""

    def __init__(self, session: Session, windows: Sequence[range]) -> None:
        super().__init__(session.io, session.batch)
        self.arrays: Arrays = {}
        self._session, self._windows = session, windows

    def _prefill(self, inputs: Arrays) -> Arrays:
        start = self._position
        super()._prefill(inputs)
        outputs = self._session.prefill(inputs)
        if any(start in window for window in self._windows):
            self.arrays.update({_key(start, name): value for name, value in outputs.items()})
        return outputs

    def _state(self) -> Arrays:
        state = self._session.state()
        self.arrays.update({_key(self._position, name): value for name, value in state.items()})
        return state

    def _clear(self, rows: np.ndarray) -> None:
        super()._clear(rows)
        self._session.reset(rows)


class Replay(_Zeros):
    """The recorded session: the same calls give the same results, or zeros outside the windows.

    Args:
        io: inputs, outputs and states of the export.
        batch: rows it was recorded with.
        path: file of `record`; arrays are read when needed.
    """

    def __init__(self, io: IoSpec, batch: int, path: Path) -> None:
        super().__init__(io, batch)
        self._arrays = np.load(path, allow_pickle=False)

    def _prefill(self, inputs: Arrays) -> Arrays:
        start = self._position
        blank = super()._prefill(inputs)
        return {name: self._arrays.get(_key(start, name), value) for name, value in blank.items()}

    def _state(self) -> Arrays:
        return {s.past: self._arrays[_key(self._position, s.past)] for s in self.io.states}

    def _close(self) -> None:
        self._arrays.close()


def _key(position: int, name: str) -> str:
    return f"{position}/{name}"
