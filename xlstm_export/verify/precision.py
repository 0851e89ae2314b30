"""Verification of a half or quantized export: checks of accuracy and of drift along a stream, with limits.

The reference is the FP32 model: the export it was made from, where that has been verified, else PyTorch in
FP32. A candidate differs from it by rounding, so there are two questions: whether the ways of calling the
candidate agree with each other, and how far it is from FP32, in the task's metric and along one stream.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import Check, Replay, Verdict, output_check
from ..errors import GateError, InputError
from ..graph.files import load_graph
from ..graph.stored_types import DTYPES
from ..inputs import Arrays, has_positions, rows_of
from ..load.loaded import Loaded
from ..measure.cell_gates import audit, memory_checks
from ..measure.data import PIECE, EvalData
from ..measure.drift import measure_drift
from ..measure.drift_plan import HORIZONS, DriftPlan
from ..measure.drift_plot import plot_drift
from ..measure.drift_result import TEACHER, Drift, token_feedback
from ..options import Context, VerifyOptions
from ..quantize.fences import check_fences
from ..quantize.legality import check_legality, of_both
from ..runfolder import BROKEN, MODEL_DATA, RunFolder
from ..sessions import OrtSession, Session, TorchSession
from ..specs import Json
from . import one_call
from .base import Verification
from .coverage import Call, along, calls, check_shapes, coverage
from .drift_gate import drift_checks, grows, that_grow
from .evidence import evidence, keep
from .gate_file import read_gate
from .limits import PRECISION_LIMITS, drift_limits
from .one_step import EPS, by_sensitivity, moved_export
from .parts import GATE_POSITIONS, Proof, audited, judged, metric_checks, streamed
from .ranges import check_ranges
from .verdict import require_verified
from .ways import BATCH

DRIFT_ROWS = 2  # streams that drift is measured on
MADE_UP_DRIFT = 4096  # positions of a made-up stream, which is then repeated
MOST_MOVED = 1 << 30  # bytes of weights of an FP32 export that is written once more, moved


def verify_precision(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
    proof: Proof | None = None,
) -> Verdict:
    """Verify a run folder of `quantize`; writes the verdict and the drift (`evidence.keep`).

    Args:
        run: run folder.
        loaded: the checkpoint its FP32 export was made from.
        options: drift is measured on `data`; the default of `metric` depends on the targets; `gate` replaces
            built-in limits. `horizon` is the length in positions of the stream that drift is measured on,
            16,000 by default; `free_horizon` is that of the free-running mode, which goes step by step, by
            default the same. The other options are used by `verify_run`.
        context: shared settings; the seed is for the inputs and for the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, used if there are no held-out data.
        proof: adds the proof of identity to a verdict; without it, behaviour alone is verified.

    Raises:
        UsageError: the run folder was not made from this model, or the options do not fit it.
        InputError: data or gate file cannot be used.
    """
    run = RunFolder.of(run)
    rests_on = evidence(options, context)
    gate = None if options.gate is None else read_gate(options.gate)
    loaded = loaded.stored_as(run.options.dtype)
    checked = _Precision(run, loaded, options, context, calibration)
    with closing(checked), checked.source.explained():
        verdict = judged(checked.verdict(), gate, proof)
        return keep(run, verdict, rests_on, replace=options.replace, more=checked.write_drift)


@dataclass(frozen=True)
class Reference:
    """The FP32 model that a candidate is compared with.

    Attributes:
        name: name in the report.
        open: opens a session with a given number of streams.
        folder: its run folder; None if it is the PyTorch model.
    """

    name: str
    open: Callable[[int], Session]
    folder: Path | None = None


def fp32_reference(run: RunFolder | Path, loaded: Loaded, threads: int = 0) -> Reference:
    """Choose the reference: the FP32 export `run` was made from if it passed `verify`, else PyTorch FP32."""
    run = RunFolder.of(run)
    made_from = run.manifest.get("quantized_from", {})
    base = (run.path / made_from.get("folder", "")).resolve()
    try:
        opened = RunFolder.open(base)
        require_verified(opened)
        same = opened.hashes()[MODEL_DATA]["sha256"] == made_from.get("sha256")
    except (GateError, InputError, OSError):
        same = False
    if same:
        return Reference("FP32 export", lambda batch: OrtSession(base, batch, threads, rounding=True), base)
    return Reference("PyTorch FP32", lambda batch: TorchSession(loaded, batch, "float32"))


class _Precision(Verification):
    """Verification against the FP32 reference, with the limits of the precision."""

    def __init__(
        self,
        run: RunFolder,
        loaded: Loaded,
        options: VerifyOptions,
        context: Context,
        calibration: Arrays | None,
    ) -> None:
        self.limits = PRECISION_LIMITS[run.precision]
        self.drift_limits = drift_limits(run.precision, run.options.state_dtype)
        self.max_drop = float(run.manifest.get("max_drop") or self.limits.metric)
        self.drift: Drift | None = None
        self.followed: Replay | None = None  # the stream that drift was measured on
        self.calibration = calibration
        self._own: dict[int, tuple[Arrays, Arrays]] = {}
        self.tried: tuple[Call, ...] = ()  # calls of other lengths and batches
        self.ways: frozenset[str] = frozenset()
        ways = dict.fromkeys(("output", "state", "rows"), self.limits.ways)
        super().__init__(run, loaded, options, context, calibration, ways)
        self.reference = fp32_reference(run, loaded, context.threads)

    def verdict(self) -> Verdict:
        """Run all checks; the drift is also kept as `drift`."""
        run = self.run
        self.context.progress("fences and rules of TensorRT")
        compared, gates, measured = self.compare()
        checks = self.check_graph() + self.of_this_model(compared)
        if self.data is not None:
            self.context.progress("ranges on held-out data")
            checks += check_ranges(run, self.data, self.context)
        about = self.describe(self.drift)
        covered = [self.streams.inputs, *([] if self.data is None else [self.data.inputs])]
        return Verdict(
            tuple(checks),
            measured,
            run.hashes(),
            self.source.name,
            gates=gates,
            precision=about,
            coverage=coverage(self.io, self.loaded, self.tried, self.streams.lengths, covered),
        )

    def of_this_model(self, checks: list[Check]) -> list[Check]:
        """The checks, those that fail with limits by the model's own sensitivity, where it can decide."""
        failed = [check for check in checks if not check.passed]
        if self.reference.folder is None or not all(math.isfinite(x.value) and x.limit for x in failed):
            return checks
        if failed:
            self.context.progress("the model's own sensitivity")
        return by_sensitivity(checks, self.ways, self.moved_checks)

    @contextmanager
    def moved(self, *, weights: bool = True, seed: int = 0) -> Iterator[RunFolder]:
        """The FP32 export moved by half a step, for the block; without `weights`, its activations alone."""
        base = self.reference.folder
        assert base is not None
        # On disk there is one at a time: it is as large as the FP32 export.
        with tempfile.TemporaryDirectory(prefix="xlstm-step.") as scratch:
            yield moved_export(base, self.run, Path(scratch) / "moved", weights=weights, seed=seed)

    def moved_checks(self, weights: bool, seed: int) -> dict[str, float]:
        """Values of the checks of a moved export; of its ways of calling alone without `weights`."""
        context = Context(threads=self.threads, seed=self.context.seed)
        with self.moved(weights=weights, seed=seed) as run:
            moved = _Moved(run, self.loaded, self.options, context, self.calibration)
            moved.reference = self.reference
            with closing(moved):
                checks = moved.compare()[0] if weights else moved.check_ways()
        return {check.name: check.value for check in checks}

    def check_one_call(self) -> list[Check]:
        """One call against FP32, with limits by the model's own sensitivity: narrow where that is low."""
        base, length = self.reference.folder, max(self.streams.lengths)
        if base is None or (base / MODEL_DATA).stat().st_size > MOST_MOVED:
            return []
        self.context.progress(one_call.NAME)
        inputs = self.source.cut(self.streams.inputs, 0, length)
        with self.reference.open(BATCH) as session:
            expected = session.prefill(inputs)

        def moved(seed: int) -> one_call.Errors:
            with (
                self.moved(seed=seed) as run,
                OrtSession(run.path, BATCH, self.threads, fused=False) as session,
            ):
                return one_call.errors(self.io.outputs, expected, session.prefill(inputs))

        found = one_call.errors(self.io.outputs, expected, self.expected(length)[0])
        step = EPS[self.run.options.base or "fp32"]
        return one_call.checks(found, moved, step, self.streams.replay(self.streams.inputs, length))

    def compare(self) -> tuple[list[Check], Json, Json]:
        """Checks of the candidate's values; cell gates and task metric."""
        run = self.run
        checks = self.check_ways()
        self.ways = frozenset(check.name for check in checks)
        checks += self.check_one_call()
        if run.io.states and has_positions(run.io):
            self.drift = self.measure()
            drifted = drift_checks(self.drift, self.drift_limits)
            if grows(drifted):
                drifted = that_grow(drifted, drift_checks(self.measure(again=True), self.drift_limits))
            checks += [replace(check, replay=self.followed) for check in drifted]
        else:
            checks += self.check_level()
        gates, more = self.check_gates()
        checks += more
        measured: dict[str, Any] = {}
        if self.data is not None:
            self.context.progress("task metric")
            more, measured = self.check_metric(self.data)
            checks += more
        return checks, gates, measured

    def check_ways(self) -> list[Check]:
        """Checks that all ways of calling agree, of other lengths and batches too."""
        checks = self.check_streams()
        self.tried = tuple(call for call in calls(self.io, self.rng) if call[0] <= max(self.streams.lengths))
        inputs = self.streams.inputs
        with self.standard() as session:
            expected = along(self.streams, session, inputs, [length for length, _ in self.tried])
        return checks + check_shapes(self.streams, expected, inputs, self.tried)

    def standard(self) -> AbstractContextManager[Session]:
        """What the ways of calling are compared with: the candidate itself."""
        return nullcontext(self.streams.candidate)

    def check_graph(self) -> list[Check]:
        """Check the written graph: its fences, and the rules of TensorRT's parser."""
        path = self.run.model
        fences = check_fences(load_graph(path), DTYPES[self.run.options.state_dtype])
        detail = {"proven": fences.proven, "violations": list(fences.violations[:20])}
        errors = [found for found in check_legality(path) if found.severity == "error"]
        added, kept = of_both(errors, self.run.manifest.get(BROKEN, []))
        broken = {"violations": [str(found) for found in added[:20]], **({"in_fp32": kept} if kept else {})}
        return [
            Check("values below FP32 that feed back", float(len(fences.violations)), 0.0, detail),
            Check("rules of TensorRT 10.3 broken", float(len(added)), 0.0, broken),
        ]

    def measure(self, *, again: bool = False) -> Drift:
        """Measure the error against FP32 along streams; on others `again`. They are of real data if long."""
        rows = DRIFT_ROWS
        horizon = self.options.horizon or HORIZONS[-1]
        inputs = self.source.streams(rows * (1 + again), min(horizon, MADE_UP_DRIFT))
        inputs = rows_of(inputs, self.io, slice(rows * again, None))
        self.followed = self.followed if again else streamed(inputs, self.io, PIECE)
        plan = DriftPlan(
            horizons=_steps(horizon),
            feedback=token_feedback(self.io, self.loaded.vocab_size),
            free_horizons=_steps(self.options.free_horizon or horizon),
        )
        context = Context(progress=lambda stage: self.context.progress(f"drift: {stage}"))
        with (
            self.reference.open(rows) as reference,
            OrtSession(self.run.path, rows, self.threads, rounding=True) as candidate,
        ):
            return measure_drift(reference, candidate, inputs, plan, context)

    def write_drift(self, folder: Path) -> None:
        """The drift as a table and a plot, beside the verdict."""
        if self.drift is not None:
            self.drift.write_csv(folder / "drift.csv")
            limits = (self.drift_limits.output, self.drift_limits.state)
            plot_drift({self.run.precision: self.drift}, folder / "drift.svg", limits)

    def check_level(self) -> list[Check]:
        """For a model that does not stream: compare one call with FP32."""
        with self.reference.open(BATCH) as session:
            reference = session.prefill(self.streams.inputs)
        found = self.expected(max(self.streams.lengths))[0]
        limit = self.drift_limits.output
        checks = [output_check(f"one call: {n}", found[n], reference[n], limit) for n in reference]
        again = self.streams.replay(self.streams.inputs, max(self.streams.lengths))
        return [replace(check, replay=again) for check in checks]

    def check_metric(self, data: EvalData) -> tuple[list[Check], Json]:
        """Checks of the change of the task's metric against FP32, and the metric itself."""
        piece = 1 if self.run.last_only else PIECE
        with (
            self.reference.open(data.rows) as reference,
            OrtSession(self.run.path, data.rows, self.threads, rounding=True) as candidate,
        ):
            compared = data.compare((candidate, piece), (reference, piece), self.context.progress)
        limits = {"metric": self.max_drop, "kl": self.limits.kl, "top1": self.limits.top1}
        return metric_checks(data, compared, "fp32", limits)

    def check_gates(self) -> tuple[Json, list[Check]]:
        """Stabilizers, and the memory length of each head compared with FP32."""
        inputs = self.source.stretch()
        found, checks = audited(self.run, inputs, self.context)
        if self.reference.folder is None:
            return found.to_json(), checks
        expected = audit(self.reference.folder, inputs, self.context)
        memory = memory_checks(found, expected, self.limits.memory)
        again = streamed(inputs, self.io, GATE_POSITIONS)
        return found.to_json(expected), checks + [replace(check, replay=again) for check in memory]

    def describe(self, drift: Drift | None) -> Json:
        """Facts for the verdict besides the checks: precision, base, reference, sites, drift."""
        run, manifest = self.run, self.run.manifest
        return {
            "precision": run.precision,
            "base": run.options.base,
            "sites": manifest.get("sites", {}),
            "state_dtype": run.options.state_dtype,
            "reference": self.reference.name,
            "random_calibration": bool((manifest.get("calibration") or {}).get("random", False)),
            "forced": manifest.get("forced", []),
            "drift": drift.to_json() if drift is not None else None,
        }

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        """Outputs and state of the candidate itself, after one call of `length` positions."""
        if length not in self._own:
            with OrtSession(self.run.path, BATCH, self.threads, fused=False, rounding=True) as session:
                outputs = session.prefill(self.source.cut(self.streams.inputs, 0, length))
                self._own[length] = (outputs, session.state())
        return self._own[length]


class _Moved(_Precision):
    """The FP32 export moved by half a step, as the candidate is verified; ways of calling against FP32."""

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        if length not in self._own:
            with self.standard() as session:
                outputs = session.prefill(self.source.cut(self.streams.inputs, 0, length))
                self._own[length] = (outputs, session.state())
        return self._own[length]

    def standard(self) -> AbstractContextManager[Session]:
        return self.reference.open(BATCH)

    def check_one_call(self) -> list[Check]:
        return []


def _steps(horizon: int) -> tuple[int, ...]:
    return (*(h for h in HORIZONS if h < horizon), horizon)


def drift_at(verdict: Verdict, horizon: int) -> float | None:
    """The teacher-forced error of the first output at a horizon; None if it was not measured."""
    drift = (verdict.precision or {}).get("drift")
    for row in drift["rows"] if drift else ():
        if row["mode"] == TEACHER and row["block"] is None and row["horizon"] == horizon:
            error: float = row["error"]
            return error
    return None
