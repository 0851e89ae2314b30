"""TensorRT engines of bundles, on a machine that has a GPU and the full package. Not run on hardware.

All of it is `board/build.py`, the code that builds on a board: a graph is built by the same calls wherever
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..board import build as board_build
from ..board import integrity
from ..errors import UsageError
from ..options import BuildOptions

ASSUMED_FREE = 4 << 30  # bytes, where there is no device to ask


@dataclass(frozen=True)
class DryRun:
    """What would be built, and the trtexec command that builds the same."""

    plan: board_build.Plan
    command: str

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values for people."""
        plan = self.plan
        yield "graph", str(plan.model)
        yield "plugin", "none, function bodies" if plan.plugin is None else str(plan.plugin)
        yield "recurrences", str(plan.recurrences)
        yield "workspace", f"{plan.workspace // board_build.MIB} MiB"
        for name, profiles in plan.shapes.items():
            yield name, "; ".join(" … ".join("×".join(map(str, s)) for s in profile) for profile in profiles)

    def to_json(self) -> dict[str, Any]:
        return {**dict(self.rows()), "trtexec": self.command}


def dry_run(
    bundle: Path,
    version: str,
    options: BuildOptions = BuildOptions(),
) -> DryRun:
    """What `build` would do for a TensorRT version, without TensorRT, a GPU or a compiled plugin.

    Args:
        bundle: its folder.
        version: of TensorRT, as "10.3.0".
        options: as for `board.build.plan_build`.

    Raises:
        UsageError: the version is none.
        Others: of `board.build.plan_build`.
    """
    parts = version.split(".")
    if not all(part.isdigit() for part in parts) or len(parts) < 2:
        raise UsageError(f"{version!r} is no version of TensorRT", "such as 10.3.0")
    numbers = tuple(map(int, parts))
    plan = board_build.plan_build(
        bundle,
        numbers,
        ASSUMED_FREE,
        options,
        plugin=Path("libxlstm_trt.so"),
    )
    return DryRun(plan, plan.trtexec(numbers[0]))


def build(
    bundle: Path, options: BuildOptions = BuildOptions(), *, say: Callable[[str], None] = print
) -> Path:
    """Check a bundle, then build its engine for this machine; see `board.build.build_engine`."""
    integrity.check(bundle)
    return board_build.build_engine(bundle, options, say=say)
