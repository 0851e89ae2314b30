"""Reads the files of a run folder for its report; damaged files are errors, missing ones are None."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.result import RESULT, SCHEMA
from ..errors import InputError
from ..runfolder import RunFolder
from ..specs import Json

VERIFIED = "verify/report.json"
SCALES = "scales.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunData:
    """Content of the files of a run.

    Attributes:
        folder: the run folder, with the manifest and io.json, which every run has.
        verification: result of `verify`; `current` is true if it belongs to the present files.
        bench: result of `bench`; None also if an older version wrote it, then `old_bench` is true.
        scales, recipe: results of `calibrate` and `quantize`.
    """

    folder: RunFolder
    verification: dict[str, Any] | None
    current: bool
    bench: dict[str, Any] | None
    old_bench: bool
    scales: dict[str, Any] | None
    recipe: str | None

    @property
    def precision(self) -> str:
        return self.folder.precision

    @property
    def passed(self) -> bool | None:
        """Whether verification passed; None if the present files were not verified."""
        if self.verification is None or not self.current:
            return None
        return bool(self.verification.get("passed"))

    def to_json(self) -> Json:
        """All data as one JSON object."""
        return {
            "schema": 1,
            "passed": self.passed,
            "precision": self.precision,
            "manifest": dict(self.folder.manifest),
            "io": self.folder.io.to_json(),
            "verification": self.verification,
            "verified_files_are_current": self.current,
            "bench": self.bench,
            "scales": self.scales,
            "recipe": self.recipe,
        }


def read_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        InputError: it is not a run folder, or one of its files is damaged.
    """
    folder = Path(folder)
    run = RunFolder.open(folder)
    verification = _json(folder / VERIFIED)
    bench = _json(folder / RESULT)
    old = bench is not None and bench.get("schema") != SCHEMA
    # The ranges of the FP32 export are used by all precisions made from it.
    scales = _json(folder / SCALES)
    recipe = folder / RECIPE
    current = verification is not None and verification.get("files") == run.hashes()
    return RunData(
        run,
        verification,
        current,
        None if old else bench,
        old,
        scales,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    )


def number(value: object) -> float | None:
    """A value of a JSON file as a number; None if it is not one."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _json(path: Path) -> Json | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "run the stage that writes it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", "run the stage that writes it again")
    return data
