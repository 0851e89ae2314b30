"""What commands share: options, loading the model of a run folder, progress, output."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import GateError

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

checkpoint_argument = click.argument("checkpoint", required=False)
run_argument = click.argument("run", type=click.Path(path_type=Path))


def source_options(command: F) -> F:
    """How to load the model: CHECKPOINT, or --module with --weights."""
    command = click.option("--module", help="factory of your own module, as package.module:function")(command)
    return click.option("--weights", help="weights for --module (.safetensors or state_dict)")(command)


def horizon_options(command: F) -> F:
    """How far the drift of a half or quantized export is followed."""
    command = click.option("--horizon", type=int, help="positions of the drift; default 16000")(command)
    return click.option("--free-horizon", type=int, help="of free-running drift; default: the same")(command)


def run_options(command: F) -> F:
    """Options of everything that runs a model."""
    command = click.option("--threads", default=0, help="CPU threads; all cores by default")(command)
    return click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")(command)


def load(
    checkpoint: str | None, module: str | None, weights: str | None, stateless: bool | None = None
) -> Any:
    from ..load.checkpoint import load

    return load(checkpoint, module, weights, stateless=stateless)


def load_for(run: Path, checkpoint: str | None, module: str | None, weights: str | None) -> Any:
    """The model of a run folder, in the form it was exported in."""
    from ..runfolder import read_manifest

    manifest = read_manifest(run)
    stateless = bool(manifest.get("options", {}).get("stateless"))
    if checkpoint is None and module is None:
        origin = manifest["origin"]
        weights = weights or origin.get("weights")
        return load(origin.get("checkpoint"), origin.get("module"), weights, stateless)
    return load(checkpoint, module, weights, stateless)


def require_passed(passed: bool, run: Path, precision: str = "fp32") -> None:
    """Raise GateError, which is exit code 1, unless a verdict is good."""
    if not passed:
        what = "equal to the PyTorch model" if precision == "fp32" else "within the limits of its precision"
        raise GateError(f"{run} is not {what}", f"details: {run}/verify/report.json")


def emit(data: Any, as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    from rich.console import Console

    show(Console())


def command_line() -> str:
    return shlex.join(["xlstm-export", *sys.argv[1:]])


@contextlib.contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A spinner with the stage and the time it has taken, on stderr."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting")
        yield lambda stage: progress.update(task, description=stage)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time that is left, on stderr, for a loop of known length."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
