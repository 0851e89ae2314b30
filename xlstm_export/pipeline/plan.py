"""A pipeline as data: a model, a run folder, and steps in the order they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import How, Options

if TYPE_CHECKING:
    from ..load.loaded import Loaded

Source = Mapping[str, str]  # keys: `checkpoint`, or `module` and optionally `weights`


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline with its options.

    Attributes:
        name: name of the step and of its record, unique in the pipeline.
        stage: key of `table.STAGES`.
        options: options of the stage.
        seed: seed of the stage's random draws.
        variant: the precision it belongs to; a failed verification ends the steps of its variant.
        stops: a failed verification ends the whole run with an error. Otherwise it ends its variant, and
            everything if the variant is the FP32 export.
    """

    name: str
    stage: str
    options: Options
    seed: int = 0
    variant: str = ""
    stops: bool = True


@dataclass(frozen=True)
class Pipeline:
    """A model and the steps to run on it.

    Attributes:
        source: how to load the model.
        out: run folder of the FP32 export.
        steps: in the order they run.
        command: recorded in manifests. Resuming must not change it, so it does not name the options of a run.
        threads: CPU threads of the runtimes.
        loaded: the model, if it is loaded already.
    """

    source: Source
    out: Path
    steps: tuple[Step, ...]
    command: str
    threads: int = 0
    loaded: Loaded | None = field(default=None, compare=False)

    @property
    def stages(self) -> dict[str, Options]:
        """Options by name of the step."""
        return {step.name: step.options for step in self.steps}


def require_out(out: Path, how: How) -> None:
    """Raise UsageError if the run folder exists and nothing says what is to become of it."""
    if out.exists() and not (how.resume or how.force or how.dry_run or how.first):
        raise UsageError(
            f"{out} already exists",
            "choose another output folder, --resume to continue there, or --force to replace it",
        )
