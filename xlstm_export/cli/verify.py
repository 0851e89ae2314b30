"""Commands that judge a run folder: verify, bisect where it fails, and the report of it all."""

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
    emit,
    json_option,
    require_passed,
    run_argument,
    source_options,
    spinner,
    stage_options,
)

if TYPE_CHECKING:
    from ..verify.bisect.replay import Runner


@click.command()
@run_argument
@source_options
@stage_options(VerifyOptions)
@context_options(seed="of the inputs and the cuts of the stream")
@json_option
def verify(run: Path, source: Source, options: VerifyOptions, context: Context, as_json: bool) -> None:
    """Compare a run folder with the model it was exported from; the exit code is the gate.

    CHECKPOINT may be left away: the manifest of the run folder names it.
    """
    from ..pipeline import stages
    from . import tables

    opened = RunFolder.open(run)
    loaded = source.load_for(opened)
    with spinner() as stage:
        verdict = stages.verify(opened, loaded, options, replace(context, progress=stage))
    emit(verdict.to_json(), as_json, lambda console: tables.show_verify(console, verdict))
    require_passed(verdict.passed, run, opened.precision)


@click.command()
@run_argument
@source_options
@click.option("--backend", type=click.Choice(["onnxruntime", "tensorrt"]), default="onnxruntime")
@click.option("--plugin", type=click.Path(path_type=Path), help="TensorRT plugin library; else bodies run")
@context_options(seed="of the inputs")
@json_option
def bisect(
    run: Path, source: Source, backend: str, plugin: Path | None, context: Context, as_json: bool
) -> None:
    """Name the first block, then the first value, where a run folder leaves what it should be.

    Exit code 1 where there is such a place.
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
@click.option("--compare", type=click.Path(path_type=Path), help="another run folder, side by side")
@click.option("--html", type=click.Path(path_type=Path), help="where to; default RUN/report.html")
@click.option("--md", type=click.Path(path_type=Path), help="where to; default RUN/report.md")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="default RUN/report.json")
def report(
    run: Path, compare: Path | None, html: Path | None, md: Path | None, json_path: Path | None
) -> None:
    """Write what is known of RUN as one HTML file that opens anywhere, as Markdown and as JSON."""
    from ..report.write import write_report

    written = write_report(run, compare=compare, html=html, md=md, json_path=json_path)
    click.echo(written.verdict)
    for path in written.paths:
        click.echo(f"wrote {path}", err=True)
