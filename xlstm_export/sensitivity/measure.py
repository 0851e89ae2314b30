"""One candidate of the sensitivity search, measured: quantize, run, compare with the FP32 export, delete.

What the FP32 export did over the horizon is recorded once (`record`) and replayed to every candidate, as a
`Session` that `measure_drift` cannot tell from the real one. Everything here takes paths and plain data, so
that it runs as well in a process of its own or on another machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import readable_os_errors
from ..errors import BuildError
from ..graph.files import load_graph
from ..inputs import Arrays, per_position
from ..measure.data import EvalData
from ..measure.drift import measure_drift
from ..measure.drift_plan import WINDOW, DriftPlan
from ..measure.drift_result import Drift, judged_growth
from ..quantize.quantize import quantize
from ..quantize.recipe import Recipe
from ..runfolder import MODEL
from ..sessions import OrtSession, Session
from ..specs import IoSpec, TensorSpec

if TYPE_CHECKING:
    from ..calibration.scales import Scales

SPREAD = 16  # growth is that of the error from a 16th of the horizon to the horizon
FLOOR = 1e-5  # errors count as this large at least where growth is judged: FP32 itself is at 1e-6
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Setup:
    """What all candidates share.

    Attributes:
        folder: run folder of the FP32 export.
        reference: file of `record`.
        data: what the metric and the drift are measured on.
        scales: calibrated ranges; None where no candidate quantizes activations.
        horizon: positions of one carried stream after which drift is measured.
        seed: of the stretch of data that drift is measured on.
        threads: of ONNX Runtime, per candidate.
        scratch: where candidates are written for as long as they are measured; None: the system's own place.
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
    """What a candidate was found to be; NaN and infinity where it computes no numbers.

    Attributes:
        metric: the task's own, lower is better.
        drift: relative L2 of the outputs at the horizon, the worst output.
        state_drift: gauge-free relative L2 of the worst block state there.
        worst_state: which that is.
        growth: the worst of outputs and states, from a 16th of the horizon to the horizon; what harder data
            explain does not count (`drift_report.judged_growth`).
        bytes: of all weights and scales.
        failure: why there is no such candidate; empty where there is one.
    """

    metric: float
    drift: float
    state_drift: float
    worst_state: str
    growth: float
    bytes: int
    failure: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is no finite number is null."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measured:
        """The inverse of `to_json`; null is infinity."""
        values: dict[str, Any] = {k: math.inf if v is None else v for k, v in data.items()}
        return Measured(**values)

    @staticmethod
    def failed(reason: str) -> Measured:
        """A candidate that cannot be built: as bad as can be."""
        return Measured(math.inf, math.inf, math.inf, "", math.inf, 0, reason)


def measure(setup: Setup, recipe: Recipe) -> Measured:
    """Write the candidate of `recipe`, measure it, delete it.

    A recipe that cannot be built is a finding; whatever else goes wrong is an error.

    Raises:
        InputError: the export or the ranges are unusable.
        SetupError: there is no room for the candidate.
    """
    try:
        return _measure(setup, recipe)
    except BuildError as error:
        return Measured.failed(error.message)


def _measure(setup: Setup, recipe: Recipe) -> Measured:
    with tempfile.TemporaryDirectory(prefix="candidate.", dir=setup.scratch) as scratch:
        out = quantize(Path(setup.folder), recipe, scales=setup.scales, out=Path(scratch) / "run")
        # Overflow is a finding, not a mishap: the metric of a broken candidate is no number.
        with OrtSession(out, setup.data.rows, setup.threads) as session, np.errstate(all="ignore"):
            metric = setup.data.loss(setup.data.run(session))
            with Replay(session.io, setup.data.rows, Path(setup.reference)) as reference:
                drift = measure_drift(reference, session, stretch(setup), DriftPlan(horizons(setup.horizon)))
        return _measured(metric, drift, stored_bytes(out))


def horizons(horizon: int) -> tuple[int, int]:
    """Where errors are taken: early, and at the end."""
    return max(1, horizon // SPREAD), horizon


def stretch(setup: Setup) -> Arrays:
    """The data from the place on where the stream begins that drift is measured on, (N, S, ...)."""
    spare = max(0, setup.data.length - setup.horizon)
    start = int(np.random.default_rng(setup.seed).integers(spare + 1))
    return {name: np.roll(x, -start, axis=1) for name, x in setup.data.inputs.items()}


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
    """Run the FP32 export once; write what candidates are compared with to `setup.reference`.

    Returns:
        Its metric.
    """
    data, path = setup.data, Path(setup.reference)
    ends = horizons(setup.horizon)
    with OrtSession(Path(setup.folder), data.rows, setup.threads) as session:
        metric = data.loss(data.run(session))
        recorder = _Recorder(session, [range(max(0, end - WINDOW), end) for end in ends])
        silent = _Zeros(session.io, data.rows)
        with np.errstate(all="ignore"):
            measure_drift(recorder, silent, stretch(setup), DriftPlan(ends))
    with readable_os_errors(path):
        np.savez(path, **recorder.arrays)  # type: ignore[arg-type]
    return metric


def data_hash(data: EvalData, io: IoSpec) -> str:
    """Hash of inputs and metric. Targets are inside the metric: it is asked for the score of noise."""
    digest = hashlib.sha256()
    for name, array in sorted(data.inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    rng = np.random.default_rng(0)
    shapes = {x.name: _shape(x, data.rows, data.length) for x in io.outputs}
    noise = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    digest.update(json.dumps([data.metric, data.score(noise)]).encode())
    return digest.hexdigest()


class _Zeros(Session):
    """A session that answers with zeros and keeps count of the positions it was given."""

    def __init__(self, io: IoSpec, batch: int) -> None:
        super().__init__(io, batch)
        self._position = 0

    def _prefill(self, inputs: Arrays) -> Arrays:
        length = next(inputs[x.name].shape[1] for x in self.io.inputs if per_position(x))
        self._position += length
        return {
            x.name: np.broadcast_to(np.zeros((), x.dtype), _shape(x, self.batch, length))
            for x in self.io.outputs
        }

    def _state(self) -> Arrays:
        return {s.past: np.zeros((self.batch, *s.shape), s.dtype) for s in self.io.states}

    def _store(self, name: str, value: np.ndarray) -> None:
        pass  # zeros whatever came before

    def _clear(self, rows: np.ndarray) -> None:
        self._position = 0


class _Recorder(_Zeros):
    """A session in front of another that keeps outputs inside some windows, and every state asked for."""

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
    """The recorded session: the same calls get the same answers, zeros where nobody compares.

    Args:
        io: of the export.
        batch: rows it was recorded with.
        path: file of `record`; arrays are read when they are asked for.
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


def _shape(spec: TensorSpec, batch: int, length: int) -> tuple[int, ...]:
    sizes = {"B": batch, "S": length}
    return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
