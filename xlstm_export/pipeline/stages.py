"""Stages as the command line and `deploy` call them: a run folder, a model, and where the data is.

Each opens what it is given and calls one function of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..load.loaded import Loaded
from ..options import Context, SensitivityOptions, VerifyOptions
from ..quantize.quantize import quantize
from ..quantize.recipe import choose_recipe
from ..runfolder import RunFolder

if TYPE_CHECKING:
    from ..calibration.scales import Scales
    from ..calibration.sets import CalibrationSet
    from ..checks import Verdict
    from ..sensitivity import Sensitivity

Count = Callable[[int, int], None]


def calibration_set(
    loaded: Loaded,
    folder: Path,
    source: str | None,
    *,
    tokenizer: Path | None = None,
    seed: int = 0,
    avoid: Path | None = None,
    **size: int | None,
) -> CalibrationSet:
    """See `calibration.sets.for_run`."""
    from ..calibration import sets

    return sets.for_run(loaded, folder, source, tokenizer=tokenizer, seed=seed, avoid=avoid, **size)


def verify(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
) -> Verdict:
    """See `verify.verify.verify_run`."""
    from ..verify.verify import verify_run

    return verify_run(run, loaded, options, context)


def calibrate(
    folder: Path,
    loaded: Loaded,
    *,
    data: str | None = None,
    random_data: bool = False,
    avoid: Path | None = None,
    tokenizer: Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    method: str = "max",
    percentile: float = 99.99,
    resume: bool = True,
    threads: int = 0,
    progress: Count = lambda done, total: None,
) -> Scales:
    """Run an FP32 export over data and write `scales.json` into its run folder.

    Args:
        data: see `calibration.sets.load`.
        random_data: made-up data instead.
        Others: as in `calibration_set` and `calibration.observers.calibrate`.

    Raises:
        UsageError: neither data nor `random_data`, or both.
    """
    from ..calibration import observers

    if (data is None) != random_data:
        raise UsageError(
            "calibration needs data" if data is None else "--data and --random-data exclude each other",
            "give --data, or --random-data, which every report will say",
        )
    chosen = calibration_set(
        loaded, folder, data, tokenizer=tokenizer, seed=seed, avoid=avoid, samples=samples, length=length
    )
    return observers.calibrate(
        folder,
        chosen,
        method=method,
        percentile=percentile,
        threads=threads,
        resume=resume,
        progress=progress,
    )


def bundle(folder: Path, loaded: Loaded, out: Path, *, calib: str | None = None, **options: Any) -> Path:
    """`bundle.bundle`; streams are taken from the calibration data where there is no held-out data.

    Args:
        folder: run folder.
        loaded: its model.
        out: folder to make, or a file ending in .tar.gz.
        calib: calibration data, see `calibration_set`.
        options: of `bundle.bundle`.
    """
    from ..bundle import make as bundles

    if calib is not None and options.get("data") is None:
        options["calibration"] = calibration_set(loaded, folder, calib).inputs
    return bundles.bundle(folder, loaded, out, **options)


def quantize_run(
    folder: Path,
    loaded: Loaded | None = None,
    *,
    precision: str | None = None,
    recipe: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    force: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda stage: None,
    **choices: Any,
) -> Path:
    """`quantize.quantize` with the recipe that options describe and the ranges `calibrate` has written.

    Args:
        loaded: the model; needed with `data`.
        data: what the drift of a state in half is measured on, as for `calibrate`.
        choices: of `choose_recipe`.
    """
    from ..calibration.scales import Scales

    chosen = choose_recipe(precision, recipe, **choices)
    scales = Scales.read(folder) if chosen.needs_scales else None
    judge = None
    if data is not None and loaded is not None and chosen.state_dtype != "fp32":
        from ..verify.drift_gate import state_judge

        judge = state_judge(calibration_set(loaded, folder, str(data), samples=2).inputs)
    return quantize(
        folder, chosen, scales=scales, out=out, force=force, judge=judge, command=command, progress=progress
    )


def find_recipe(
    run: RunFolder | Path,
    loaded: Loaded,
    options: SensitivityOptions = SensitivityOptions(),
    context: Context = Context(),
) -> Sensitivity:
    """`sensitivity.sensitivity` with the ranges `calibrate` has written, on data with the task's targets.

    Raises:
        UsageError: there are no data.
    """
    from ..calibration.scales import Scales
    from ..measure import data as evaluation
    from ..sensitivity import sensitivity

    if options.data is None:
        raise UsageError("sensitivity needs data with the task's targets", "give --data")
    run = RunFolder.of(run)
    targets = evaluation.load(options.data, run.io, vocab_size=loaded.vocab_size)
    return sensitivity(run, options, context, data=targets, scales=Scales.read(run.path))
