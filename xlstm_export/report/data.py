"""Reads the files of a run folder for its report; damaged files are errors, missing ones are None."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bench.result import RESULT, SCHEMA
from ..errors import ExportError, InputError
from ..runfolder import MODEL, RunFolder
from ..specs import Json

log = logging.getLogger(__name__)
VERIFIED = "verify/report.json"
SCALES = "scales.json"
RECIPE = "recipe.yaml"
OTHER_FILES = "This was measured with other files than those that are here now; verify again."


@dataclass(frozen=True)
class RunData:
    """Content of the files of a run.

    Attributes:
        folder: the run folder, with the manifest and io.json, which every run has.
        verification: result of `verify`; `current` is true if it belongs to the present files.
        bench: result of `bench`; None also if an older version wrote it, then `old_bench` is true.
        scales, recipe: results of `calibrate` and `quantize`.
        base: the FP32 run folder that this one was made from, where it is still there.
        names: activation → path of the weight that it meets, in the user's module.
    """

    folder: RunFolder
    verification: dict[str, Any] | None
    current: bool
    bench: dict[str, Any] | None
    old_bench: bool
    scales: dict[str, Any] | None
    recipe: str | None
    base: RunFolder | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return self.folder.precision

    @property
    def evidence(self) -> Json | None:
        """The verification, if it belongs to the present files."""
        return self.verification if self.current else None

    @property
    def passed(self) -> bool | None:
        """Whether verification passed; None if the present files were not verified."""
        return None if self.evidence is None else bool(self.evidence.get("passed"))

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
    base = _base(run)
    return RunData(
        run,
        verification,
        current,
        None if old else bench,
        old,
        scales,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        base,
        _names(base or run) if scales is not None else {},
    )


def _base(run: RunFolder) -> RunFolder | None:
    """The FP32 run folder of a quantized one; None if it is gone or was made again."""
    origin = run.manifest.get("quantized_from")
    if not isinstance(origin, dict) or not isinstance(origin.get("folder"), str):
        return None
    try:
        found = RunFolder.open(run.path / origin["folder"])
    except ExportError as error:
        log.info("the FP32 export is gone: %s", error.message)
        return None
    graph = found.files.get(MODEL)
    same = isinstance(graph, dict) and graph.get("sha256") == origin.get("graph_sha256")
    return found if same else None


def _names(run: RunFolder) -> Mapping[str, str]:
    """What activations of a graph are to the user; empty if the graph cannot be read."""
    from ..graph.files import load_graph
    from ..graph.sites import activation_names

    try:
        return activation_names(load_graph(run.model))
    except ExportError as error:
        log.warning("activations keep their names in the graph: %s", error.message)
        return {}


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
