"""Run a pipeline step by step; steps that are done and whose inputs are unchanged are skipped.

After each step a record is written beside its results: a hash of everything it depends on, and the hashes of
the files it wrote. The stages write their results atomically, and the record is written last. So a run that
was killed at any moment repeats only the step it was in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import sha256, sha256_of_all, write_json
from ..checks import Verdict
from ..errors import ExportError, SetupError, UsageError
from ..load.hub import commit_of, hub_id
from ..load.local_code import code_hashes
from ..options import FILES, Context, How, Options, Progress
from ..runfolder import MANIFEST, made_hash, read_manifest, versions
from .data_check import check_data
from .plan import Pipeline, Step, require_out
from .table import STAGES, Done, Job

if TYPE_CHECKING:
    from ..load.loaded import Loaded

RECORDS = ".pipeline"


@dataclass(frozen=True)
class Outcome:
    """Result of a step.

    Attributes:
        name, variant: those of the step.
        state: "done"; "unchanged"; "to do" in a dry run; "not asked" after the last requested step;
            "left out" if a run folder that it needs has failed verification.
        folder: the run folder it worked on.
        result: result of the stage; None if it was not run.
    """

    name: str
    state: str
    folder: Path
    variant: str = ""
    result: object = None


def run_pipeline(
    pipeline: Pipeline, how: How = How(), progress: Progress = Context().progress
) -> list[Outcome]:
    """Run the steps of a pipeline.

    Args:
        pipeline: as `schema.read_pipeline` or `deploy.deploy_pipeline` make it.
        how: which steps, and in which folder.
        progress: called with the name of each step and of what it does.

    Raises:
        UsageError: no such step, or the run folder exists and neither `resume` nor `force` is set.
        GateError: a verification that stops the run failed.
    """
    names = [step.name for step in pipeline.steps]
    for name in (how.first, how.last):
        if name is not None and name not in names:
            raise UsageError(f"the pipeline has no stage {name}", f"it has {', '.join(names)}")
    require_out(pipeline.out, how)
    return _Run(pipeline, how, progress).all()


class _Run:
    def __init__(self, pipeline: Pipeline, how: How, progress: Progress) -> None:
        self._pipeline, self._how, self._progress = pipeline, how, progress
        self._folder = pipeline.out  # run folder of the current precision
        self._before = ""  # hash of all steps so far
        self._again = how.force
        self._ended: set[str] = set()  # variants that failed verification
        self._checked = False  # that the data fit the model, which is loaded for it; `deploy` has done it
        self._searched = any(step.stage == "sensitivity" for step in pipeline.steps)

    def all(self) -> list[Outcome]:
        found: list[Outcome] = []
        for step in self._pipeline.steps:
            found.append(self._one(step))
            if step.name == self._how.last:
                break
        rest = self._pipeline.steps[len(found) :]
        return [*found, *(Outcome(step.name, "not asked", self._folder, step.variant) for step in rest)]

    def _one(self, step: Step) -> Outcome:
        if self._left_out(step):
            return Outcome(step.name, "left out", self._folder, step.variant)
        self._again = self._again or step.name == self._how.first
        inputs = self._inputs(step)
        unchanged = not self._again and self._recorded(step, inputs)
        names = [other.name for other in self._pipeline.steps]
        if not unchanged and self._how.first and names.index(step.name) < names.index(self._how.first):
            raise UsageError(f"stage {step.name} is not done, or has changed", "run without --from")
        result: object = None
        if not unchanged:
            self._again = True  # all later steps depend on it
            if not self._how.dry_run:
                result = self._do(step, inputs).result
        state = "unchanged" if unchanged else "to do" if self._how.dry_run else "done"
        self._advance(step)
        if isinstance(result, Verdict) and not result.passed:
            self._ended.add(step.variant)
        return Outcome(step.name, state, self._folder, step.variant, result)

    def _left_out(self, step: Step) -> bool:
        """Whether a run folder that the step needs, its own or the FP32 export, has failed verification."""
        stage, base = STAGES[step.stage], self._pipeline.steps[0].variant
        if base in self._ended and step.variant != base:
            return True
        return stage.verified and step.variant in self._ended

    @cached_property
    def _loaded(self) -> Loaded:
        from ..load.checkpoint import load
        from ..options import ExportOptions

        if self._pipeline.loaded is not None:
            return self._pipeline.loaded
        source, first = self._pipeline.source, self._pipeline.steps[0].options
        stateless = first.stateless if isinstance(first, ExportOptions) else None
        return load(
            source.get("checkpoint"),
            source.get("module"),
            source.get("weights"),
            stateless=stateless,
            alias=source.get("alias"),
        )

    @cached_property
    def _commit(self) -> str | None:
        """Commit of a model of the Hub, whose branch may have moved since it was exported."""
        asked = hub_id(self._pipeline.source.get("checkpoint", ""))
        if asked is None:
            return None
        known: object = None
        with contextlib.suppress(ExportError):
            known = read_manifest(self._pipeline.out).get("origin", {}).get("checkpoint")
        before = str(known).partition("@")
        return commit_of(asked, before[2] if before[0] == asked.repo and before[2] else None)

    def _inputs(self, step: Step) -> str:
        """Hash of all that a step depends on: options, contents of files, versions, earlier steps."""
        values, files = _plain(step.options)
        if step.stage == "export":
            files += [v for k, v in self._pipeline.source.items() if k in ("checkpoint", "weights")]
        factory = self._pipeline.source.get("module") if step.stage == "export" else None
        depends = [
            step.stage,
            values,
            step.seed,
            dict(self._pipeline.source),
            versions(),
            # A name of the Hub is no file; its commit counts.
            {file: sha256_of_all(Path(file)) for file in files if Path(file).exists()},
            code_hashes(factory) if factory else {},
            self._before,
            *([self._commit] if step.stage == "export" and self._commit else []),
        ]
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _recorded(self, step: Step, inputs: str) -> bool:
        """Whether a step was done with these inputs, and its results are unchanged since."""
        try:
            record = json.loads(self._record(step).read_text(encoding="utf-8"))
            folder = Path(record["folder"])
            return record["inputs"] == inputs and all(
                _written(folder / file) == digest for file, digest in record["outputs"].items()
            )
        except (ExportError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def _do(self, step: Step, inputs: str) -> Done:
        """Run a step and write its record; a failed verification leaves no record."""
        if self._pipeline.loaded is None and not self._checked:
            check_data(self._loaded, self._pipeline.steps)
            self._checked = True
        self._progress(step.name)
        stage = STAGES[step.stage]
        context = Context(
            threads=self._pipeline.threads,
            seed=step.seed,
            command=self._pipeline.command,
            progress=lambda what: self._progress(f"{step.name}: {what}"),
            count=lambda done, total: self._progress(f"{step.name}: {done:,} of {total:,}"),
        )
        self._record(step).unlink(missing_ok=True)
        job = Job(
            load=lambda: self._loaded,
            base=self._pipeline.out,
            folder=self._folder,
            context=context,
            stops=step.stops,
            searched=self._searched,
        )
        done = stage.run(job, step.options)
        if isinstance(done.result, Verdict) and not done.result.passed:
            return done
        wrote = self._pipeline.out if stage.on_base else done.folder
        if lost := [str(wrote / name) for name in stage.writes if not (wrote / name).exists()]:
            raise SetupError(f"{lost[0]} could not be written", "free space, or choose another output folder")
        outputs = {name: _written(wrote / name) for name in stage.writes}
        record = {"inputs": inputs, "folder": str(wrote), "outputs": outputs, "run": str(done.folder)}
        write_json(self._record(step), record)
        return done

    def _advance(self, step: Step) -> None:
        """Set the current run folder to the result of a step, if the step has been done."""
        try:
            record = json.loads(self._record(step).read_text(encoding="utf-8"))
            self._folder = Path(record["run"])
            if STAGES[step.stage].builds:
                self._before = hashlib.sha256(
                    json.dumps([self._before, record["inputs"], record["outputs"]], sort_keys=True).encode()
                ).hexdigest()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return

    def _record(self, step: Step) -> Path:
        return self._pipeline.out / RECORDS / f"{step.name}.json"


def _plain(options: Options) -> tuple[dict[str, object], list[str]]:
    """Options as JSON values, and the names of those that are existing files."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    known = options.table()
    files = [
        str(value)
        for name, value in values.items()
        if value is not None and (known[name].kind in (*FILES, "text", "data")) and Path(str(value)).exists()
    ]
    return {n: str(v) if isinstance(v, Path) else v for n, v in values.items()}, files


def _written(path: Path) -> str:
    """Hash of a file that a step wrote, without what later steps add to it."""
    return made_hash(path.parent) if path.name == MANIFEST else sha256(path)
