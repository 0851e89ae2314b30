"""The command that runs a pipeline file."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import How
from .common import emit, spinner, stage_options


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--from", "first", help="repeat this stage and all after it")
@click.option("--until", "last", help="stop after this stage")
@stage_options(How, leave=("first", "last"), into="how")
@click.option(
    "--set", "changes", multiple=True, help="replace a value of the file: stages.quantize.precision=fp16"
)
def run(pipeline: Path, changes: tuple[str, ...], how: How) -> None:
    """Run PIPELINE, a YAML file: export, calibrate, sensitivity, quantize, verify, bench, bundle, report.

    The file is checked as a whole before anything starts. Its keys: model (checkpoint, or module and
    weights), out, data, threads, stages. After `sensitivity`, `quantize` uses the recipe that it found.
    """
    from ..pipeline.runner import run_pipeline
    from ..pipeline.schema import read_pipeline
    from .tables import show_outcomes

    read = read_pipeline(pipeline, changes)
    with spinner() as stage:
        outcomes = run_pipeline(read, how, stage)
    emit([], False, lambda console: show_outcomes(console, outcomes))
