"""Commands that check a run folder: verify, bisect (find the failing place), report."""

from __future__ import annotations

import shlex
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
@context_options()
@json_option
def verify(run: Path, source: Source, options: VerifyOptions, context: Context, as_json: bool) -> None:
    """Compare a run folder with the model it was exported from; exit code 1 if a check fails.

    CHECKPOINT may be omitted: the manifest of the run folder names it. So may the data, the gate file, the
    horizons and the seed: they are those of the last verification, unless --anew is given. The verdict of a
    verification that rests on less is kept beside that of the stronger one.
    """
    from ..pipeline import recorded, stages

    opened = RunFolder.open(run)
    given, options = options, recorded.repeated(opened, options)
    source.require_for(opened)
    from ..verify import evidence
    from . import tables

    if options != given:
        known = evidence.arguments({name: getattr(options, name) for name in evidence.EVIDENCE})
        click.echo(f"as recorded: {shlex.join(known)}", err=True)
    loaded = source.load_for(opened, options)
    with spinner() as stage:
        chosen = replace(options, repeat=False)
        verdict = stages.verify(opened, loaded, chosen, replace(context, progress=stage))
    stands = evidence.standing(opened) if verdict.weaker else None
    emit(
        {**verdict.to_json(), **({} if stands is None else {"stands": {"passed": stands.passed}})},
        as_json,
        lambda console: tables.show_verdict(console, verdict, stands),
        details=lambda console: tables.show_verify(console, verdict),
        line=tables.verdict_line(verdict, stands),
    )
    passed = verdict.passed and (stands is None or stands.passed)
    failed = verdict if stands is None or not verdict.passed else stands
    require_passed(passed, run, opened.precision, evidence.place(opened, failed))


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
    opened = RunFolder.open(run)
    source.require_for(opened)
    from ..verify.bisect.replay import open_onnxruntime
    from ..verify.bisect.search import bisect as bisect_
    from . import tables

    runner: Runner = open_onnxruntime
    if backend == "tensorrt":
        from ..verify.bisect.on_tensorrt import tensorrt_runner

        runner = tensorrt_runner(plugin)
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
