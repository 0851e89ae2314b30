"""Which verification fits a run folder, and whether memory suffices for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..checks import Verdict
from ..errors import SetupError, UsageError
from ..inputs import Arrays
from ..load.loaded import Loaded
from ..runfolder import read_manifest
from .by_block import verify_per_block
from .first_blocks import verify_first_blocks
from .fp32 import verify
from .gate_file import read_gate
from .precision import verify_precision


def verify_any(
    folder: Path,
    loaded: Loaded,
    *,
    num_blocks: int | None = None,
    per_block: bool = False,
    data: Path | None = None,
    calibration: Arrays | None = None,
    metric: str | None = None,
    gate: Path | None = None,
    horizon: int | None = None,
    free_horizon: int | None = None,
    **options: Any,
) -> Verdict:
    """The verification that was asked for: of the whole, of the first blocks, or block by block; that of
    `verify_precision` for a half or quantized run folder.

    Raises:
        UsageError: the options exclude each other.
        SetupError: the whole was asked for and does not fit the memory.
    """
    options["gate"] = None if gate is None else read_gate(gate)
    on_data: dict[str, Any] = {"data": data, "calibration": calibration, "metric": metric}
    precision = read_manifest(folder).get("options", {}).get("precision")
    if precision is not None:
        if per_block or num_blocks is not None:
            raise UsageError(f"{folder} is {precision}: it is verified as a whole, against FP32")
        return verify_precision(
            folder, loaded, horizon=horizon, free_horizon=free_horizon, **on_data, **options
        )
    if horizon is not None or free_horizon is not None:
        raise UsageError(
            "--horizon is for half and quantized run folders", "FP32 must be equal at any length"
        )
    if per_block:
        if num_blocks is not None or data is not None or calibration is not None:
            raise UsageError("--per-block goes with none of --num-blocks, --data and --calib")
        return verify_per_block(folder, loaded, **options)
    if num_blocks is not None:
        return verify_first_blocks(folder, loaded, num_blocks, **on_data, **options)
    _require_memory(loaded)
    return verify(folder, loaded, **on_data, **options)


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
