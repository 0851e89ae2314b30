"""The command that runs a pipeline file."""

from __future__ import annotations

from pathlib import Path

import click

from .common import emit, spinner


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--from", "first", help="repeat this stage and all after it")
@click.option("--until", "last", help="stop after this stage")
@click.option(
    "--resume", is_flag=True, help="continue in the run folder; stages whose inputs are unchanged are skipped"
)
@click.option("--force", is_flag=True, help="start over in an existing run folder")
@click.option("--dry-run", is_flag=True, help="show what would be done")
@click.option(
    "--set", "changes", multiple=True, help="replace a value of the file: stages.quantize.precision=fp16"
)
def run(
    pipeline: Path,
    changes: tuple[str, ...],
    first: str | None,
    last: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
) -> None:
    """Run PIPELINE, a YAML file: export, calibrate, sensitivity, quantize, verify, bench, bundle, report.

    The file is checked as a whole before anything starts. Its keys: model (checkpoint, or module and
    weights), out, data, threads, stages. After `sensitivity`, `quantize` uses the recipe that it found.
    """
    from ..pipeline.runner import How, run_pipeline
    from ..pipeline.schema import read_pipeline
    from .tables import show_outcomes

    read = read_pipeline(pipeline, changes)
    with spinner() as stage:
        outcomes = run_pipeline(read, How(first, last, resume=resume, force=force, dry_run=dry_run), stage)
    emit([], False, lambda console: show_outcomes(console, outcomes))
