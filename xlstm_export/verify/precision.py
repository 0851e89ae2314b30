"""Is a quantized or half export good enough, and does it stay so? Checks with limits, as `verify` for FP32.

The reference is the FP32 model: the export it was made from, where that has been verified, else PyTorch in
FP32. Rounding sets a candidate apart from it, so two questions take the place of one: do the ways of calling
the candidate agree with each other, and how far is it from FP32 in the task's metric and along one stream.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import runfolder
from ..checks import Check, Verdict
from ..errors import GateError, InputError, UsageError
from ..graph.files import load_graph
from ..graph.stored_types import DTYPES
from ..inputs import Arrays, cut, per_position
from ..load.loaded import Loaded
from ..measure.cell_gates import audit, memory_checks
from ..measure.data import PIECE, EvalData
from ..measure.drift import HORIZONS, measure_drift
from ..measure.drift_plot import plot_drift
from ..measure.drift_result import TEACHER, Drift, token_feedback
from ..quantize.fences import check_fences
from ..quantize.legality import check_legality
from ..sessions import OrtSession, Session, TorchSession
from ..specs import IoSpec
from .drift_gate import drift_checks
from .gate_file import Gate
from .limits import PRECISION_LIMITS, PrecisionLimits, drift_limits
from .parts import Source, audited, finish, load_data, metric_checks
from .ways import BATCH, RAGGED, StreamChecks

DRIFT_ROWS = 2  # streams the drift is measured over
MADE_UP_DRIFT = 4096  # positions of a made-up stream, which then begins anew


def verify_precision(
    folder: Path,
    loaded: Loaded,
    *,
    data: Path | None = None,
    calibration: Arrays | None = None,
    metric: str | None = None,
    gate: Gate | None = None,
    seed: int = 0,
    threads: int = 0,
    horizon: int | None = None,
    free_horizon: int | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Verdict:
    """Verify a run folder of `quantize`; writes `verify/report.json` and `verify/drift.csv`.

    Args:
        folder: run folder.
        loaded: the checkpoint its FP32 export was made from.
        data: held-out data for the task metric; also what the drift is measured on.
        calibration: inputs (N, S, ...) of a calibration set, which are taken for it where there is no data.
        metric: of `metrics.METRICS`; by default what the targets suggest.
        gate: limits in place of the built-in ones.
        seed: of the inputs, the cuts of the stream and the draws of tokens.
        threads: of ONNX Runtime.
        horizon: longest stream of the drift, in positions; 16,000 by default.
        free_horizon: the same of the free-running mode, which goes step by step; `horizon` by default.
        progress: called with the name of each stage.
    """
    with closing(_Run(Path(folder), loaded, data, calibration, metric, seed, threads)) as run:
        return _verdict(run, gate, horizon, free_horizon, progress)


def _verdict(
    run: _Run,
    gate: Gate | None,
    horizon: int | None,
    free_horizon: int | None,
    progress: Callable[[str], None],
) -> Verdict:
    folder = run.folder
    progress("fences and rules of TensorRT")
    checks = run.check_graph()
    for name, stage in run.streams.stages():
        progress(name)
        checks += stage()
    drift: Drift | None = None
    if run.io.states and any(map(per_position, run.io.inputs)):
        horizon = horizon or HORIZONS[-1]
        drift = run.measure(horizon, free_horizon or horizon, progress)
        drift.write_csv(folder / "verify" / "drift.csv")
        plot_drift({run.precision: drift}, folder / "verify" / "drift.svg")
        checks += drift_checks(drift, run.drift_limits)
    else:
        checks += run.check_level()
    gates, more = run.check_gates(progress)
    checks += more
    measured: dict[str, Any] = {}
    if run.data is not None:
        progress("task metric")
        more, measured = run.check_metric(run.data)
        checks += more
    return finish(
        Verdict(
            tuple(checks),
            measured,
            runfolder.hashes(folder),
            run.source.name,
            gates=gates,
            precision=run.describe(drift),
        ),
        folder / "verify" / "report.json",
        gate,
    )


@dataclass(frozen=True)
class Reference:
    """The FP32 model a candidate is held against.

    Attributes:
        name: what it is, for the report.
        open: makes a session of some streams.
        folder: its run folder, where it is an export.
    """

    name: str
    open: Callable[[int], Session]
    folder: Path | None = None


def fp32_reference(folder: Path, loaded: Loaded, threads: int = 0) -> Reference:
    """The FP32 export that `folder` was made from if it has passed `verify`, else PyTorch in FP32."""
    from .verdict import require_verified

    made_from = runfolder.read_manifest(folder).get("quantized_from", {})
    base = (folder / made_from.get("folder", "")).resolve()
    try:
        require_verified(base)
        same = runfolder.hashes(base)[runfolder.MODEL_DATA]["sha256"] == made_from.get("sha256")
    except (GateError, InputError, OSError):
        same = False
    if same:
        return Reference("FP32 export", lambda batch: OrtSession(base, batch, threads), base)
    return Reference("PyTorch FP32", lambda batch: TorchSession(loaded, batch, "float32"))


class _Run:
    """What the checks share."""

    def __init__(
        self,
        folder: Path,
        loaded: Loaded,
        data: Path | None,
        calibration: Arrays | None,
        metric: str | None,
        seed: int,
        threads: int,
    ) -> None:
        manifest = runfolder.read_manifest(folder)
        options = manifest.get("options", {})
        self.folder, self.threads, self.seed = folder, threads, seed
        self.loaded = loaded.stored_as(str(options.get("dtype", "fp32")))
        self.io: IoSpec = runfolder.read_io(folder)
        if [x.name for x in self.io.inputs] != list(loaded.inputs):
            raise UsageError(f"{folder} was not made from this model", "give the checkpoint it was made from")
        self.precision = str(options["precision"])
        self.state_dtype = str(options.get("state_dtype", "fp32"))
        self.limits: PrecisionLimits = PRECISION_LIMITS[self.precision]
        self.drift_limits = drift_limits(self.precision, self.state_dtype)
        self.max_drop = float(manifest.get("max_drop") or self.limits.metric)
        self.reference = fp32_reference(folder, self.loaded, threads)
        self.rng = np.random.default_rng(seed)
        self.last_only = {x.name for x in self.io.outputs[:1] if options.get("last_logits")}
        self.data = load_data(data, self.io, loaded, metric)
        self.source = Source(self.loaded, self.io, self.rng, self.data, calibration)
        self._own: dict[int, tuple[Arrays, Arrays]] = {}
        self.streams = StreamChecks(
            folder,
            self.io,
            inputs=self.source.batch(max(RAGGED)),
            make_inputs=self.source.batch,
            expected=self._at_once,
            limits={"output": self.limits.ways, "state": self.limits.ways, "rows": self.limits.ways},
            last_only=self.last_only,
            rng=self.rng,
            threads=threads,
        )

    def close(self) -> None:
        """Close the session that the checks share."""
        self.streams.close()

    def check_graph(self) -> list[Check]:
        """The fences are proven again, on the very file; and what TensorRT's parser would refuse."""
        path = self.folder / runfolder.MODEL
        fences = check_fences(load_graph(path), DTYPES[self.state_dtype])
        detail = {"proven": fences.proven, "violations": list(fences.violations[:20])}
        broken = [str(found) for found in check_legality(path) if found.severity == "error"]
        return [
            Check("values below FP32 that feed back", float(len(fences.violations)), 0.0, detail),
            Check("rules of TensorRT 10.3 broken", float(len(broken)), 0.0, {"violations": broken[:20]}),
        ]

    def measure(self, horizon: int, free: int, progress: Callable[[str], None]) -> Drift:
        """Error against FP32 along one stream, on real data where there is enough of it."""
        rows = DRIFT_ROWS
        inputs = self.source.streams(rows, min(horizon, MADE_UP_DRIFT))
        with (
            self.reference.open(rows) as reference,
            OrtSession(self.folder, rows, self.threads) as candidate,
        ):
            return measure_drift(
                reference,
                candidate,
                inputs,
                horizons=_steps(horizon),
                feedback=token_feedback(self.io, self.loaded.vocab_size),
                free_horizons=_steps(free),
                progress=lambda stage: progress(f"drift: {stage}"),
            )

    def check_level(self) -> list[Check]:
        """Without a stream to drift along: one call against FP32."""
        from ..checks import output_check

        with self.reference.open(BATCH) as session:
            reference = session.prefill(self.streams.inputs)
        found = self._at_once(max(self.streams.lengths))[0]
        limit = self.drift_limits.output
        return [output_check(f"one call: {name}", found[name], reference[name], limit) for name in reference]

    def check_metric(self, data: EvalData) -> tuple[list[Check], dict[str, Any]]:
        """By how much the task's metric got worse, or merely other, than that of FP32."""
        piece = 1 if self.last_only else PIECE
        with self.reference.open(data.rows) as reference:
            expected = data.run(reference, piece)
        with OrtSession(self.folder, data.rows, self.threads) as candidate:
            found = data.run(candidate, piece)
        limits = {"metric": self.max_drop, "kl": self.limits.kl, "top1": self.limits.top1}
        return metric_checks(data, found, expected, "fp32", limits)

    def check_gates(self, progress: Callable[[str], None]) -> tuple[dict[str, Any], list[Check]]:
        """Stabilizers, and how long each head remembers beside FP32."""
        inputs = self.source.stretch()
        found, checks = audited(self.folder, inputs, self.threads, progress)
        if self.reference.folder is None:
            return found.to_json(), checks
        expected = audit(self.reference.folder, inputs, threads=self.threads, progress=progress)
        return found.to_json(expected), checks + memory_checks(found, expected, self.limits.memory)

    def describe(self, drift: Drift | None) -> dict[str, Any]:
        """What the report says beyond checks."""
        manifest = runfolder.read_manifest(self.folder)
        return {
            "precision": self.precision,
            "base": manifest["options"].get("base"),
            "sites": manifest.get("sites", {}),
            "state_dtype": self.state_dtype,
            "reference": self.reference.name,
            "random_calibration": bool((manifest.get("calibration") or {}).get("random", False)),
            "forced": manifest.get("forced", []),
            "drift": drift.to_json() if drift is not None else None,
        }

    def _at_once(self, length: int) -> tuple[Arrays, Arrays]:
        """The candidate's own outputs and state after one call from a fresh start."""
        if length not in self._own:
            with OrtSession(self.folder, BATCH, self.threads, fused=False) as session:
                outputs = session.prefill(cut(self.streams.inputs, self.io, 0, length))
                self._own[length] = (outputs, session.state())
        return self._own[length]


def _steps(horizon: int) -> tuple[int, ...]:
    return (*(h for h in HORIZONS if h < horizon), horizon)


def drift_at(report: Verdict, horizon: int) -> float | None:
    """The teacher-forced error of the first output at a horizon; None where it was not measured."""
    drift = (report.precision or {}).get("drift")
    for row in drift["rows"] if drift else ():
        if row["mode"] == TEACHER and row["block"] is None and row["horizon"] == horizon:
            return row["error"]  # type: ignore[no-any-return]
    return None
