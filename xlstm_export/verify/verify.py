"""The verification that fits a run folder, and where one that fails goes wrong."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..atomic import write_json
from ..calibration import sets
from ..checks import Verdict
from ..errors import ExportError, SetupError, UsageError
from ..inputs import Arrays
from ..load.loaded import Loaded
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from .bisect import search
from .by_block import verify_per_block
from .first_blocks import verify_first_blocks
from .fp32 import verify
from .precision import verify_precision


def verify_run(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
) -> Verdict:
    """The verification that was asked for: of the whole, of the first blocks, or block by block; that of
    `verify_precision` for a half or quantized run folder.

    Where the whole fails, the place where it leaves its reference is searched for, unless `options.bisect` is
    off.

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from.
        options: what is verified, and on which data.
        context: as everywhere; the seed is of the inputs and the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, to take sequences from where there are no data;
            by default those of `options.calib`.

    Raises:
        UsageError: the options exclude each other.
        InputError: data or gate file cannot be used.
        SetupError: the whole was asked for and does not fit the memory.
    """
    run = RunFolder.of(run)
    if calibration is None and options.calib is not None and options.data is None:
        calibration = sets.for_run(loaded, run, options.calib).inputs
    verdict = _verified(run, loaded, options, context, calibration)
    in_parts = options.per_block or options.num_blocks is not None
    if verdict.passed or not options.bisect or in_parts:
        return verdict
    try:
        found = search.bisect(run, loaded, replace(context, seed=0)).to_json()
    except ExportError as error:  # the verdict stands without it
        found = {"block": None, "sentence": f"it could not be found out where: {error.message}"}
    verdict = replace(verdict, bisect=found)
    write_json(run.verdict, verdict.to_json())
    return verdict


def _verified(
    run: RunFolder, loaded: Loaded, options: VerifyOptions, context: Context, calibration: Arrays | None
) -> Verdict:
    """The verdict of the verification that fits."""
    in_parts = options.per_block or options.num_blocks is not None
    if run.options.precision is not None:
        if in_parts:
            raise UsageError(f"{run.path} is {run.precision}: it is verified as a whole, against FP32")
        return verify_precision(run, loaded, options, context, calibration=calibration)
    if options.horizon is not None or options.free_horizon is not None:
        raise UsageError(
            "--horizon is for half and quantized run folders", "FP32 must be equal at any length"
        )
    if options.per_block:
        if options.num_blocks is not None or options.data is not None or calibration is not None:
            raise UsageError("--per-block goes with none of --num-blocks, --data and --calib")
        return verify_per_block(run, loaded, options, context)
    if options.num_blocks is not None:
        return verify_first_blocks(run, loaded, options, context, calibration=calibration)
    _require_memory(loaded)
    return verify(run, loaded, options, context, calibration=calibration)


def _require_memory(loaded: Loaded) -> None:
    """The model in float32, twice in float64 (upstream and lifted), and packed weights of the runtime."""
    needed = sum(t.numel() for t in loaded.skeleton.parameters()) * (4 + 2 * 8 + 2 * 4)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    # What the system caches of files is free for the asking, but how much of it is not known everywhere.
    if needed > max(available, total * 0.8):
        raise SetupError(
            f"verifying {loaded.name} as a whole takes about {needed / 1e9:.0f} GB of memory, "
            f"this machine has {total / 1e9:.0f} GB",
            "use --per-block (one block at a time) or --num-blocks N (the first N blocks)",
        )
