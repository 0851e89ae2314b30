"""`verify`: choose the verification that fits a run folder; on failure, find the first wrong value."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..calibration import sets
from ..checks import Verdict
from ..errors import ExportError, SetupError, UsageError
from ..inputs import Arrays
from ..load.loaded import Loaded
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from ..specs import Json
from . import evidence
from .bisect import search
from .by_block import verify_per_block
from .first_blocks import verify_first_blocks
from .fp32 import verify
from .identity import DIFFERENCES, key_of, prove
from .parts import Proof
from .precision import verify_precision


def verify_run(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
) -> Verdict:
    """Verify a run folder: as a whole, its first blocks, or block by block, as the options say.

    A half or quantized run folder is verified by `verify_precision`. If the verification of a whole model
    fails, the first value that differs from the reference is searched for, unless `options.bisect` is off.

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from.
        options: options of the stage.
        context: shared settings; the seed is for the inputs and for the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, to take sequences from if there are no held-out
            data; by default those of `options.calib`.

    Raises:
        UsageError: the options exclude each other.
        InputError: data or gate file cannot be used.
        SetupError: the model is to be verified as a whole and does not fit the memory.
    """
    run = RunFolder.of(run)
    loaded = loaded.in_form(run.options.stateless)
    if calibration is None and options.calib is not None and options.data is None:
        calibration = sets.for_run(loaded, run, options.calib).inputs
    key = key_of(run, loaded)
    behaves: list[bool] = []

    def proof(verdict: Verdict) -> Verdict:
        behaves.append(verdict.passed)
        return prove(run, loaded, context, key).judged(verdict)

    verdict = _verified(run, loaded, options, context, calibration, proof)
    in_parts = options.per_block or options.num_blocks is not None
    if in_parts or all(behaves) or not options.bisect:
        return verdict  # what identity finds is named already
    verdict = replace(verdict, bisect=_place(run, loaded, context, verdict))
    evidence.rewrite(run, verdict)
    return verdict


def _place(run: RunFolder, loaded: Loaded, context: Context, verdict: Verdict) -> Json:
    """The first value that differs, for a model that does not behave as it should."""
    failed = [check for check in verdict.checks if not check.passed and check.name != DIFFERENCES]
    try:
        found = search.bisect(run, loaded, context, failed=failed).to_json()
    except ExportError as error:  # the verdict is valid without the place
        found = {"block": None, "sentence": f"it could not be found out where: {error.message}"}
    if found["block"] is None:
        named = [*verdict.identity.get("differences", ())[:1], f"what fails is “{failed[0].name}”"]
        found["sentence"] = "; ".join([found["sentence"], *named])
    return found


def _verified(
    run: RunFolder,
    loaded: Loaded,
    options: VerifyOptions,
    context: Context,
    calibration: Arrays | None,
    proof: Proof,
) -> Verdict:
    """Run the verification that fits, and return its verdict."""
    in_parts = options.per_block or options.num_blocks is not None
    if run.options.precision is not None:
        if in_parts:
            raise UsageError(f"{run.path} is {run.precision}: it is verified as a whole, against FP32")
        return verify_precision(run, loaded, options, context, calibration=calibration, proof=proof)
    if options.horizon is not None or options.free_horizon is not None:
        raise UsageError(
            "--horizon is for half and quantized run folders", "FP32 must be equal at any length"
        )
    if options.per_block:
        if options.num_blocks is not None or options.data is not None or calibration is not None:
            raise UsageError("--per-block cannot be combined with --num-blocks, --data or --calib")
        return verify_per_block(run, loaded, options, context, proof=proof)
    if options.num_blocks is not None:
        return verify_first_blocks(run, loaded, options, context, calibration=calibration)
    _require_memory(loaded)
    return verify(run, loaded, options, context, calibration=calibration, proof=proof)


def _require_memory(loaded: Loaded) -> None:
    """Raise SetupError if verifying the whole model does not fit the memory.

    It takes the weights in float32, twice in float64 (upstream and lifted), and packed by the runtime.
    """
    needed = sum(t.numel() for t in loaded.skeleton.parameters()) * (4 + 2 * 8 + 2 * 4)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    # Total instead of free memory: the part that file caches would give back is not known on every system.
    if needed > max(available, total * 0.8):
        raise SetupError(
            f"verifying {loaded.name} as a whole takes about {needed / 1e9:.0f} GB of memory, "
            f"this machine has {total / 1e9:.0f} GB",
            "use --per-block (one block at a time) or --num-blocks N (the first N blocks)",
        )
