"""The table of stages, in the order they can run: their options, what they call, what they write.

`deploy` and pipeline files are lists of stages. To add a stage, add an entry here and its options in
`options.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import GateError
from ..options import (
    BenchOptions,
    BundleOptions,
    CalibrateOptions,
    Context,
    ExportOptions,
    Options,
    QuantizeOptions,
    SensitivityOptions,
    VerifyOptions,
)
from ..runfolder import IO, MANIFEST, MODEL, MODEL_DATA, VERDICT
from . import stages

if TYPE_CHECKING:
    from ..checks import Verdict
    from ..load.loaded import Loaded

BUNDLE = "bundle.tar.gz"
RECIPE, EVIDENCE = "sensitivity/recipe.yaml", "sensitivity/evidence.json"


@dataclass(frozen=True)
class Job:
    """Inputs of a step.

    Attributes:
        load: returns the model, which is read once.
        base: run folder of the FP32 export.
        folder: run folder of the current precision.
        context: shared settings.
        stops: whether a failed verification raises.
        searched: `sensitivity` has found a recipe; `quantize` uses it unless its options name one.
    """

    load: Callable[[], Loaded]
    base: Path
    folder: Path
    context: Context
    stops: bool = True
    searched: bool = False


@dataclass(frozen=True)
class Done:
    """Output of a step: the run folder for the next steps, and the result of its stage."""

    folder: Path
    result: object = None


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        options: class of its options.
        run: function that runs it.
        writes: the files it writes, relative to the folder it works on or makes.
        on_base: it works on the FP32 export, whatever the current precision.
        verified: the run folder that it works on must have passed verification.
        builds: later steps depend on the files it writes; false for reports and timings.
        seeded: it takes a seed in a pipeline file.
        needs: options that are required in a pipeline file.
    """

    options: type[Options]
    run: Callable[[Job, Options], Done]
    writes: tuple[str, ...]
    on_base: bool = False
    verified: bool = False
    builds: bool = False
    seeded: bool = False
    needs: tuple[str, ...] = ()


def _export(job: Job, options: Options) -> Done:
    # Forced: the runner has checked that the folder is new or may be replaced.
    made = stages.export(job.load(), job.base, cast(ExportOptions, options), job.context, force=True)
    return Done(made)


def _calibrate(job: Job, options: Options) -> Done:
    chosen = cast(CalibrateOptions, options)
    return Done(job.folder, stages.calibrate(job.base, job.load(), chosen, job.context))


def _sensitivity(job: Job, options: Options) -> Done:
    chosen = cast(SensitivityOptions, options)
    return Done(job.folder, stages.sensitivity(job.base, job.load(), chosen, job.context))


def _quantize(job: Job, options: Options) -> Done:
    chosen = cast(QuantizeOptions, options)
    if job.searched and chosen.recipe is None and chosen.precision is None:
        chosen = replace(chosen, recipe=job.base / RECIPE)
    return Done(stages.quantize(job.base, job.load(), chosen, job.context, force=True))


def _verify(job: Job, options: Options) -> Done:
    """A candidate is compared with the FP32 export, which must have been verified itself."""
    # A pipeline says itself what it verifies on.
    chosen = replace(cast(VerifyOptions, options), repeat=False)
    if job.folder != job.base and not _is_verified(job.base):
        # Without the gate file and the horizons, which are for the candidate.
        base = VerifyOptions(
            data=chosen.data,
            calib=chosen.calib,
            metric=chosen.metric,
            positions=chosen.positions,
            repeat=False,
        )
        _require(stages.verify(job.base, job.load(), base, job.context), job.base)
    verdict = stages.verify(job.folder, job.load(), chosen, job.context)
    if job.stops:
        _require(verdict, job.folder)
    return Done(job.folder, verdict)


def _is_verified(folder: Path) -> bool:
    from ..verify.verdict import require_verified

    try:
        require_verified(folder)
    except GateError:
        return False
    return True


def _require(verdict: Verdict, folder: Path) -> None:
    if not verdict.passed:
        failed = next(check.name for check in verdict.checks if not check.passed)
        raise GateError(f"{folder}: {failed} exceeds its limit", f"details: {folder}/{VERDICT}")


def _bench(job: Job, options: Options) -> Done:
    chosen = cast(BenchOptions, options)
    return Done(job.folder, stages.bench(job.folder, job.load(), chosen, job.context))


def _bundle(job: Job, options: Options) -> Done:
    chosen, out = cast(BundleOptions, options), job.folder / BUNDLE
    return Done(job.folder, stages.bundle(job.folder, job.load(), out, chosen, job.context, force=True))


def _report(job: Job, options: Options) -> Done:
    return Done(job.folder, stages.report(job.folder))


_MODEL = (MODEL, MODEL_DATA, IO, MANIFEST)

STAGES: dict[str, Stage] = {
    "export": Stage(ExportOptions, _export, _MODEL, on_base=True, builds=True),
    "calibrate": Stage(
        CalibrateOptions,
        _calibrate,
        ("scales.json", "channels.safetensors"),
        on_base=True,
        builds=True,
        seeded=True,
    ),
    "sensitivity": Stage(
        SensitivityOptions,
        _sensitivity,
        (RECIPE, EVIDENCE),
        on_base=True,
        builds=True,
        seeded=True,
        needs=("data",),
    ),
    "quantize": Stage(QuantizeOptions, _quantize, _MODEL, builds=True),
    "verify": Stage(VerifyOptions, _verify, (VERDICT,), seeded=True),
    "bench": Stage(BenchOptions, _bench, ("bench/bench.json",), verified=True),
    "bundle": Stage(BundleOptions, _bundle, (BUNDLE,), verified=True),
    "report": Stage(Options, _report, ("report.html",)),
}
