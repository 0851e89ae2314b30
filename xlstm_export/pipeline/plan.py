"""A pipeline as data: a model, a run folder, and steps in the order they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import CalibrateOptions, DeployOptions, How, Options, VerifyOptions

if TYPE_CHECKING:
    from ..load.loaded import Loaded
    from ..quantize.recipe import Recipe

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


def require_usable(options: Options) -> None:
    """Raise for what is seen to be wrong with the options of a stage before anything heavy is imported.

    Raises:
        UsageError: calibration has no data, or quantization none to calibrate with.
        InputError: a file is of a kind that is not read, or a gate file holds something else.
    """
    if isinstance(options, CalibrateOptions):
        require_ranges(options)
    if isinstance(options, DeployOptions):
        deployed(options)
    for name in ("data", "calib", "avoid"):
        if path := getattr(options, name, None):
            from ..sessions.files import check_kind

            check_kind(Path(path))
    if isinstance(options, VerifyOptions) and options.gate is not None:
        from ..verify.gate_file import read_gate

        read_gate(options.gate)


def require_ranges(options: CalibrateOptions) -> None:
    """Raise UsageError unless there is one source of calibration data."""
    if (options.data is not None) == options.random_data:
        raise UsageError(
            "calibration needs data"
            if options.data is None
            else "--data and --random-data exclude each other",
            "give --data, or --random-data, which every report states",
        )


def deployed(options: DeployOptions) -> Recipe:
    """The recipe of what `deploy` makes.

    Raises:
        UsageError: the options contradict each other, or calibration data are missing.
    """
    from ..quantize.recipe import preset, read_recipe

    chosen = read_recipe(options.recipe) if options.recipe else preset(options.precision, options.base)
    if options.precision not in ("fp32", chosen.precision):
        raise UsageError(f"{options.recipe} is a recipe for {chosen.precision}, not for {options.precision}")
    if chosen.needs_scales and options.calib is None and not options.random_data:
        raise UsageError(
            f"precision {chosen.precision} quantizes activations and needs calibration data",
            "give --calib DATA (or --random-data, which every report states)",
        )
    return chosen
