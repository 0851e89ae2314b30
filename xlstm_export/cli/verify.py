"""Commands that check a run folder: verify, bisect (find the failing place), report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from .common import (
    Source,
    context_options,
    json_option,
    require_passed,
    run_argument,
    source_options,
    stage_options,
)
from .console import emit, spinner

if TYPE_CHECKING:
    from ..verify.bisect.replay import Runner


@click.command()
@run_argument
@source_options
@stage_options(VerifyOptions)
@context_options(seed="seed of the inputs and of the cuts of the stream")
@json_option
def verify(run: Path, source: Source, options: VerifyOptions, context: Context, as_json: bool) -> None:
    """Compare a run folder with the model it was exported from; exit code 1 if a check fails.

    CHECKPOINT may be omitted: the manifest of the run folder names it.
    """
    from ..pipeline import stages
    from . import tables

    opened = RunFolder.open(run)
    loaded = source.load_for(opened)
    with spinner() as stage:
        verdict = stages.verify(opened, loaded, options, replace(context, progress=stage))
    emit(
        verdict.to_json(),
        as_json,
        lambda console: tables.show_verdict(console, verdict),
        details=lambda console: tables.show_verify(console, verdict),
        line=tables.verdict_line(verdict),
    )
    require_passed(verdict.passed, run, opened.precision)


@click.command()
@run_argument
@source_options
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    help="runtime of the run folder",
)
@click.option(
    "--plugin", type=click.Path(path_type=Path), help="TensorRT plugin library; default: function bodies"
)
@context_options(seed="seed of the inputs")
@json_option
def bisect(
    run: Path, source: Source, backend: str, plugin: Path | None, context: Context, as_json: bool
) -> None:
    """Find the first block, and the first value in it, that differs from the reference.

    Exit code 1 if there is such a value.
    """
    from ..verify.bisect.replay import run_onnxruntime
    from ..verify.bisect.search import bisect as bisect_
    from . import tables

    runner: Runner = run_onnxruntime
    if backend == "tensorrt":
        from ..verify.bisect.on_tensorrt import tensorrt_runner

        runner = tensorrt_runner(plugin)
    opened = RunFolder.open(run)
    loaded = source.load_for(opened)
    with spinner() as stage:
        found = bisect_(opened, loaded, replace(context, progress=stage), runner=runner)
    emit(found.to_json(), as_json, lambda console: tables.show_bisection(console, found))
    require_passed(found.place is None, run)


@click.command()
@run_argument
@click.option("--compare", type=click.Path(path_type=Path), help="run folder to compare with, side by side")
@click.option("--html", type=click.Path(path_type=Path), help="HTML file to write; default RUN/report.html")
@click.option("--md", type=click.Path(path_type=Path), help="Markdown file to write; default RUN/report.md")
@click.option(
    "--json-file",
    "json_path",
    type=click.Path(path_type=Path),
    help="JSON file to write; default RUN/report.json",
)
@json_option
def report(
    run: Path, compare: Path | None, html: Path | None, md: Path | None, json_path: Path | None, as_json: bool
) -> None:
    """Write the report of RUN: one self-contained HTML file, Markdown and JSON."""
    from ..report.write import write_report

    written = write_report(run, compare=compare, html=html, md=md, json_path=json_path)
    result = {
        "verdict": written.verdict,
        "passed": written.passed,
        "files": [str(path) for path in written.paths],
    }
    emit(result, as_json, lambda console: click.echo(written.verdict))
    for path in written.paths:
        click.echo(f"wrote {path}", err=True)
