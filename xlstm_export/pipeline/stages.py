"""The stages as functions of a run folder, its model, typed options and the shared context.

Each opens the run folder and calls one function of the stage's own folder. The command line, the pipeline
runner and the Python API call these functions.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import (
    BenchOptions,
    BundleOptions,
    CalibrateOptions,
    Context,
    ExportOptions,
    QuantizeOptions,
    SensitivityOptions,
    VerifyOptions,
)
from ..runfolder import CALIBRATED_ON, RunFolder, record, recorded_file
from ..targets import require_target

if TYPE_CHECKING:
    from ..bench.result import BenchReport
    from ..calibration.scales import Scales
    from ..checks import Verdict
    from ..load.loaded import Loaded
    from ..report.write import Written
    from ..sensitivity import Sensitivity

log = logging.getLogger(__name__)
Run = RunFolder | Path
BUNDLE = "bundle"


def export(
    loaded: Loaded,
    out: Path,
    options: ExportOptions = ExportOptions(),
    context: Context = Context(),
    *,
    force: bool = False,
) -> Path:
    """Write the run folder `out`; see `trace.export.export`."""
    from ..trace.export import export as export_

    return export_(loaded, out, options, context, force=force)


def calibrate(
    run: Run, loaded: Loaded, options: CalibrateOptions = CalibrateOptions(), context: Context = Context()
) -> Scales:
    """Run an FP32 export over data and write `scales.json` into its run folder.

    Raises:
        UsageError: neither data nor `random_data`, or both.
        InputError: data or export are unusable.
    """
    from ..calibration import observers, sets
    from .plan import require_ranges

    require_ranges(options)
    run = RunFolder.of(run)
    chosen = sets.for_run(
        loaded,
        run,
        options.data,
        sets.Selection(options.samples, options.length, context.seed, options.avoid),
        tokenizer=options.tokenizer,
    )
    scales = observers.calibrate(run, chosen, options, context)
    record(run.path, {CALIBRATED_ON: recorded_file(options.data) if options.data is not None else None})
    _warn_of_silence(run, scales)
    return scales


def _warn_of_silence(run: RunFolder, scales: Scales) -> None:
    """Warn of activations that were always zero: the weights they meet have never been at work."""
    if not scales.silent:
        return
    from ..graph.files import load_graph
    from ..graph.sites import activation_names

    names = activation_names(load_graph(run.model))
    log.warning(
        "zero in all calibration data: the input of %s. If the model is trained, calibrate with data that "
        "reach that part of it; its range is taken to be 1.",
        ", ".join(names.get(name, name) for name in scales.silent),
    )


def sensitivity(
    run: Run,
    loaded: Loaded,
    options: SensitivityOptions = SensitivityOptions(),
    context: Context = Context(),
) -> Sensitivity:
    """Search for a recipe, on data with the task's targets and with the ranges that `calibrate` wrote.

    Raises:
        UsageError: no data are given.
    """
    from ..calibration.scales import Scales
    from ..measure import data
    from ..sensitivity import sensitivity as sensitivity_

    if options.data is None:
        raise UsageError("sensitivity needs data with the task's targets", "give --data")
    run = RunFolder.of(run)
    targets = data.load(options.data, run.io, vocab_size=loaded.vocab_size, tokenizer=run.tokenizer)
    return sensitivity_(run, options, context, data=targets, scales=Scales.read(run.path))


def quantize(
    run: Run,
    loaded: Loaded | None = None,
    options: QuantizeOptions = QuantizeOptions(),
    context: Context = Context(),
    *,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Make a run folder of another precision, by the recipe that the options describe.

    Args:
        run: FP32 run folder of `export`, with the ranges of `calibrate` if activations are quantized.
        loaded: its model; needed with `options.data`.
        options: options of the stage.
        context: shared settings.
        out: folder to make; by default a subfolder of the run, named after the precision.
        force: replace `out`, and accept a state that drifts, which is recorded.
    """
    from ..calibration import sets
    from ..calibration.scales import Scales
    from ..quantize.quantize import quantize as quantize_
    from ..quantize.recipe import choose_recipe

    run = RunFolder.of(run)
    recipe = choose_recipe(options)
    scales = Scales.read(run.path) if recipe.needs_scales else None
    judge = None
    if options.data is not None and loaded is not None and recipe.state_dtype != "fp32":
        from ..verify.drift_gate import state_judge

        stream = sets.for_run(loaded, run, str(options.data), sets.Selection(samples=2)).inputs
        judge = state_judge(stream)
    return quantize_(run, recipe, context, scales=scales, out=out, force=force, judge=judge)


def verify(
    run: Run,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
) -> Verdict:
    """Compare a run folder with its model; see `verify.verify.verify_run`.

    With `options.repeat`, what is not given is that of the recorded verification; see `recorded.repeated`.
    """
    from ..verify.verify import verify_run
    from .recorded import repeated

    run = RunFolder.of(run)
    options = repeated(run, options)
    if options.seed is not None:
        context = replace(context, seed=options.seed)
    return verify_run(run, loaded, options, context)


def bench(
    run: Run, loaded: Loaded, options: BenchOptions = BenchOptions(), context: Context = Context()
) -> BenchReport:
    """Time a verified run folder; see `bench.bench.bench`."""
    from ..bench.bench import bench as bench_

    return bench_(run, loaded, options, context)


def bundle(
    run: Run,
    loaded: Loaded,
    out: Path | None = None,
    options: BundleOptions = BundleOptions(),
    context: Context = Context(),
    *,
    force: bool = False,
) -> Path:
    """Make a bundle of a verified run folder for a board, as a folder or an archive.

    Args:
        run: run folder.
        loaded: its model.
        out: folder to make, or a file ending in .tar.gz; by default `bundle` in the run folder.
        options: options of the stage. Streams are recorded on calibration data if there are no held-out data;
            with `options.repeat`, on what the run folder was verified on if neither are given.
        context: shared settings.
        force: replace `out`.

    Raises:
        UsageError: the target is unknown.
        InputError: recorded data are nowhere to be found.
    """
    from ..bundle.make import bundle as bundle_
    from ..calibration import sets
    from .recorded import with_data

    require_target(options.target)
    run = RunFolder.of(run)
    options = with_data(run, options)
    calibration = None
    if options.calib is not None and options.data is None:
        calibration = sets.for_run(loaded, run, options.calib).inputs
    return bundle_(
        run, loaded, out or run.path / BUNDLE, options, context, calibration=calibration, force=force
    )


def report(run: Run) -> Written:
    """Write the report of a run folder; see `report.write.write_report`."""
    from ..report.write import write_report

    return write_report(RunFolder.of(run).path)
