"""The command that runs a pipeline file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import How
from .common import Source, json_option, stage_options
from .console import emit, spinner

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--from", "first", help="repeat this stage and all after it")
@click.option("--until", "last", help="stop after this stage")
@stage_options(How, leave=("first", "last"), into="how")
@click.option(
    "--set", "changes", multiple=True, help="replace a value of the file: stages.quantize.precision=fp16"
)
@json_option
def run(pipeline: Path, changes: tuple[str, ...], how: How, as_json: bool) -> None:
    """Run PIPELINE, a YAML file: export, calibrate, sensitivity, quantize, verify, bench, bundle, report.

    The file is checked as a whole before anything starts. Its keys: model (checkpoint, or module and
    weights), out, data, threads, stages. After `sensitivity`, `quantize` uses the recipe that it found.
    """
    from ..pipeline.plan import require_out, require_usable
    from ..pipeline.schema import read_pipeline

    read = read_pipeline(pipeline, changes)
    Source(*(read.source.get(name) for name in ("checkpoint", "module", "weights", "alias"))).require()
    require_out(read.out, how)
    for step in read.steps:
        require_usable(step.options)
    from ..pipeline.deploy import deployment
    from ..pipeline.runner import run_pipeline
    from .summary import show_summary, verdict_line
    from .tables import show_deploy, show_outcomes, show_states

    with spinner() as stage:
        outcomes = run_pipeline(read, how, stage)
    result = deployment(outcomes, how)
    steps = [{"name": o.name, "state": o.state, "folder": str(o.folder)} for o in outcomes]

    def show(console: Console) -> None:
        if not result.variants:
            show_outcomes(console, outcomes)
            return
        show_states(console, outcomes)
        show_summary(console, result)

    def details(console: Console) -> None:
        show_outcomes(console, outcomes)
        show_deploy(console, result)

    emit(
        {"steps": steps, **(result.to_json() if result.variants else {})},
        as_json,
        show,
        details=details,
        line=verdict_line(result) if result.variants else None,
    )
