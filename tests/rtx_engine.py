"""`board/build.py` on NVIDIA's own parser and builder (tensorrt-rtx), without a GPU; run in a subprocess.

    python tests/rtx_engine.py RUN_FOLDER [MAX_LENGTH]

Prints one line of JSON: bytes of the plan, lines of the log, phases that were told, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorrt_rtx as rtx

from xlstm_export.board import build
from xlstm_export.errors import ExportError
from xlstm_export.runfolder import MODEL, read_io


class Builder(rtx.Builder):  # type: ignore[misc]
    """Builds for a GPU that is named, where there is none to ask."""

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        return config


def main(folder: Path, max_length: int) -> int:
    names = {name: getattr(rtx, name) for name in dir(rtx)}
    trt = SimpleNamespace(**{**names, "Builder": Builder})
    shapes = build.profile_shapes(read_io(folder), max_length, 2)
    plan = build.Plan(folder / MODEL, None, shapes, 0, 256 << 20)
    log = build.logger(trt)
    told: list[str] = []
    try:
        engine = build.serialize(trt, plan, log, cache=folder / "timing.cache", say=told.append)
    except ExportError as error:
        print(json.dumps({"error": error.message, "log": log.lines[-5:]}))
        return error.exit_code
    print(json.dumps({"plan_bytes": len(engine), "log": len(log.lines), "told": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
