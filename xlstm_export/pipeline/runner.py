"""Run a pipeline, stage by stage; what is done and has not changed is not done again.

After each stage a record is written beside its results: a hash of everything it depended on, and the hashes
of what it wrote. Results are written atomically by the stages themselves, and the record last, so a run
that was killed at any moment repeats the stage it was in and no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..atomic import sha256, write_json
from ..errors import UsageError
from ..runfolder import versions
from ..sensitivity.report import FOLDER, RECIPE
from .schema import Pipeline
from .steps import FILES, STEPS, Context

RECORDS = ".pipeline"


@dataclass(frozen=True)
class Stage:
    """What became of a stage: "done", "unchanged", with `dry_run` "to do", behind --until "not asked"."""

    name: str
    state: str
    folder: Path


def run_pipeline(
    pipeline: Pipeline,
    *,
    first: str | None = None,
    last: str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[Stage]:
    """Run what a pipeline says.

    Args:
        pipeline: of `read_pipeline`.
        first: this stage and all after it are done even where nothing changed; those before must be done.
        last: stop after this stage.
        resume: go on in an existing run folder.
        force: begin anew in one.
        dry_run: only say what would be done.
        progress: called with the name of each step.

    Raises:
        UsageError: no such stage, or the run folder exists and neither `resume` nor `force` is set.
    """
    names = list(pipeline.stages)
    for name in (first, last):
        if name is not None and name not in names:
            raise UsageError(f"the pipeline has no stage {name}", f"it has {', '.join(names)}")
    if pipeline.out.exists() and not (resume or force or dry_run or first):
        raise UsageError(f"{pipeline.out} exists", "--resume goes on there, --force begins anew")
    run = _Run(pipeline, progress)
    again = force
    found: list[Stage] = []
    for name in names:
        again = again or name == first
        inputs = run.inputs(name)
        unchanged = not again and run.recorded(name, inputs)
        if not unchanged and first is not None and names.index(name) < names.index(first):
            raise UsageError(f"stage {name} is not done, or has changed", "leave --from away")
        if not unchanged:
            again = True  # everything behind it depends on it
            if not dry_run:
                run.do(name, inputs)
        state = "unchanged" if unchanged else "to do" if dry_run else "done"
        run.advance(name)
        found.append(Stage(name, state, run.folder))
        if name == last:
            break
    return [*found, *(Stage(name, "not asked", run.folder) for name in names[len(found) :])]


class _Run:
    def __init__(self, pipeline: Pipeline, progress: Callable[[str], None]) -> None:
        self._pipeline, self._progress = pipeline, progress
        self.folder = pipeline.out  # the run folder so far; quantize moves on to another
        self._before = ""  # hash of everything up to here

        @cache
        def load() -> Any:
            from ..load.checkpoint import load

            model = pipeline.model
            stateless = pipeline.stages["export"].get("stateless")
            return load(
                model.get("checkpoint"), model.get("module"), model.get("weights"), stateless=stateless
            )

        self._context = Context(
            load,
            pipeline.out,
            pipeline.data,
            f"xlstm-export run {pipeline.path}",
            pipeline.threads,
            progress,
            pipeline.out / FOLDER / RECIPE if "sensitivity" in pipeline.stages else None,
            pipeline.stages.get("calibrate", {}).get("data"),
        )

    def inputs(self, name: str) -> str:
        """Hash of all that a stage depends on: options, contents of files, versions, what came before."""
        step, options = STEPS[name], self._pipeline.stages[name]
        files = [str(options[key]) for key in options if step.keys[key] in FILES]
        if name == "export":
            files += [v for k, v in self._pipeline.model.items() if k in ("checkpoint", "weights")]
        if step.reads_data and self._pipeline.data is not None:
            files.append(str(self._pipeline.data))
        told = [
            name,
            dict(options),
            dict(self._pipeline.model),
            versions(),
            {file: _content(Path(file)) for file in files},
            self._before,
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def recorded(self, name: str, inputs: str) -> bool:
        """Whether a stage was done with these inputs, and its results are as it left them."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            folder = Path(record["folder"])
            return record["inputs"] == inputs and all(
                sha256(folder / file) == digest for file, digest in record["outputs"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def do(self, name: str, inputs: str) -> None:
        """Run a stage and write its record."""
        self._progress(name)
        context = self._context
        told = replace(context, progress=lambda stage: self._progress(f"{name}: {stage}"))
        self._record(name).unlink(missing_ok=True)
        folder = STEPS[name].run(told, dict(self._pipeline.stages[name]), self.folder)
        wrote = context.out if name in ("calibrate", "sensitivity") else folder
        outputs = {str(path.relative_to(wrote)): sha256(path) for path in STEPS[name].writes(wrote)}
        write_json(
            self._record(name),
            {"inputs": inputs, "folder": str(wrote), "outputs": outputs, "run": str(folder)},
        )

    def advance(self, name: str) -> None:
        """Go on behind a stage that is done; behind one that only would be, the folder stays."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            self.folder = Path(record["run"])
            # Reports with times in them are results nobody builds on.
            if name in ("export", "calibrate", "sensitivity", "quantize"):
                self._before = hashlib.sha256(
                    json.dumps([self._before, record["inputs"], record["outputs"]], sort_keys=True).encode()
                ).hexdigest()
        except (OSError, ValueError, KeyError):
            return

    def _record(self, name: str) -> Path:
        return self._pipeline.out / RECORDS / f"{name}.json"


def _content(path: Path) -> str:
    """Hash of a file, or of all files in a folder with their names."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\0".encode())
    return digest.hexdigest()
