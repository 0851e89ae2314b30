"""The table of stages: what each takes, what it calls, what it writes, in the order they can run.

`deploy` and pipeline files are lists of these. Add a stage here: one entry, and its options in `options.py`.
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
    """What a step works on.

    Attributes:
        load: gives the model; it is read once.
        base: run folder of the FP32 export.
        folder: run folder of the precision at hand.
        context: as everywhere.
        stops: whether a verification that fails raises.
        searched: `sensitivity` has found a recipe, which `quantize` goes by unless its options name one.
    """

    load: Callable[[], Loaded]
    base: Path
    folder: Path
    context: Context
    stops: bool = True
    searched: bool = False


@dataclass(frozen=True)
class Done:
    """What a step leaves: the run folder from then on, and the result of its stage."""

    folder: Path
    result: object = None


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        options: class of its options.
        run: does it.
        writes: the files it leaves behind, in the folder it works on or made.
        on_base: it works on the FP32 export whatever precision is at hand.
        verified: it needs that what it works on has verified.
        builds: later steps depend on what it writes. Reports, and results with times in them, are results
            that nobody builds on.
        seeded: a pipeline file may give it a seed.
        needs: options that must be given in a pipeline file.
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
    # The runner has asked for the folder to be replaced, or found that there is none.
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
    """A candidate is held against the FP32 export, which must have been verified itself."""
    chosen = cast(VerifyOptions, options)
    if job.folder != job.base and not _is_verified(job.base):
        # Its limits are its own, and it does not drift.
        base = VerifyOptions(data=chosen.data, calib=chosen.calib, metric=chosen.metric)
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
        raise GateError(f"{folder}: {failed} is beyond its limit", f"details: {folder}/{VERDICT}")


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
