"""All stages in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import trace
from .bench import BenchReport, bench
from .checks import Report
from .loaded import Loaded
from .verify_blocks import verify_any


@dataclass(frozen=True)
class Deployment:
    """What `deploy` did; `benchmark` is None when verification failed, because then nothing is timed."""

    folder: Path
    verification: Report
    benchmark: BenchReport | None

    @property
    def written(self) -> list[Path]:
        names = (
            "model.onnx",
            "model.onnx.data",
            "io.json",
            "manifest.json",
            "verify/report.json",
            "bench/bench.json",
        )
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "written": [str(path) for path in self.written],
            "verification": self.verification.to_json(),
            "benchmark": self.benchmark.to_json() if self.benchmark else None,
        }


def deploy(
    loaded: Loaded,
    out: Path,
    *,
    data: Path | None = None,
    force: bool = False,
    threads: int = 0,
    command: str = "",
    progress: Callable[[str], None] = lambda stage: None,
) -> Deployment:
    """Export into `out`, verify, and bench what verified. Arguments as in those stages."""
    folder = trace.export(loaded, out, force=force, command=command, progress=progress)
    verification = verify_any(
        folder, loaded, data=data, threads=threads, progress=lambda stage: progress(f"verify: {stage}")
    )
    benchmark = None
    if verification.passed:
        benchmark = bench(folder, loaded, threads=threads, progress=lambda stage: progress(f"bench: {stage}"))
    return Deployment(folder, verification, benchmark)
