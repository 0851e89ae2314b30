"""Builds TensorRT engines of bundles on a machine with a GPU and the full package. Not run on hardware.

It uses `board/build.py`, so that a graph is built by the same calls here and on a board.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..board import build as board_build
from ..board import integrity
from ..errors import UsageError
from ..options import BuildOptions
from ..specs import Json

ASSUMED_FREE = 4 << 30  # bytes; assumed without a device


@dataclass(frozen=True)
class DryRun:
    """The plan of a build, and the trtexec command that builds the same."""

    plan: board_build.Plan
    command: str

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values of the plan as text."""
        plan = self.plan
        yield "graph", str(plan.model)
        yield "plugin", "none, function bodies" if plan.plugin is None else str(plan.plugin)
        yield "recurrences", str(plan.recurrences)
        yield "workspace", f"{plan.workspace // board_build.MIB} MiB"
        for name, profiles in plan.shapes.items():
            yield name, "; ".join(" … ".join("×".join(map(str, s)) for s in profile) for profile in profiles)

    def to_json(self) -> Json:
        return {**dict(self.rows()), "trtexec": self.command}


def dry_run(
    bundle: Path,
    version: str,
    options: BuildOptions = BuildOptions(),
) -> DryRun:
    """Plan what `build` would do for a TensorRT version; needs no TensorRT, GPU or compiled plugin.

    Args:
        bundle: its folder.
        version: version of TensorRT, such as "10.3.0".
        options: as for `board.build.plan_build`.

    Raises:
        UsageError: the version is not a version number.
        Others: those of `board.build.plan_build`.
    """
    parts = version.split(".")
    if not all(part.isdigit() for part in parts) or len(parts) < 2:
        raise UsageError(f"{version!r} is not a version of TensorRT", "give three numbers, such as 10.3.0")
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
