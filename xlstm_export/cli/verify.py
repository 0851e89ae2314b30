"""Commands that judge a run folder: verify, bisect where it fails, and the report of it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options import Context, VerifyOptions
from .common import (
    checkpoint_argument,
    emit,
    horizon_options,
    load_for,
    require_passed,
    run_argument,
    run_options,
    source_options,
    spinner,
)


@click.command()
@run_argument
@checkpoint_argument
@source_options
@click.option("--data", type=click.Path(path_type=Path), help="held-out data for the task metric")
@click.option("--calib", help="calibration data, to take sequences from where there is no --data")
@click.option("--metric", help="bits-per-byte, perplexity, accuracy, auroc, mae, mase or quantile-loss")
@click.option("--gate", type=click.Path(path_type=Path), help="YAML file with limits of your own")
@click.option("--seed", default=0, help="of the inputs and the cuts of the stream")
@click.option("--num-blocks", type=int, help="only the first blocks, all checks")
@click.option("--per-block", is_flag=True, help="every block by itself: for models larger than the memory")
@click.option("--bisect/--no-bisect", default=True, help="on failure, name the first value that is wrong")
@horizon_options
@run_options
def verify(
    run: Path, checkpoint: str | None, module: str | None, weights: str | None, as_json: bool, **options: Any
) -> None:
    """Compare a run folder with the model it was exported from; the exit code is the gate.

    CHECKPOINT may be left away: the manifest of the run folder names it.
    """
    from ..pipeline import stages
    from . import tables as report

    loaded = load_for(run, checkpoint, module, weights)
    with spinner() as stage:
        context = Context(threads=options.pop("threads"), seed=options.pop("seed"), progress=stage)
        result = stages.verify(run, loaded, VerifyOptions(**options), context)
    emit(result.to_json(), as_json, lambda console: report.show_verify(console, result))
    require_passed(result.passed, run, result.precision.get("precision", "fp32"))


@click.command()
@run_argument
@checkpoint_argument
@source_options
@click.option("--seed", default=0, help="of the inputs")
@click.option("--backend", type=click.Choice(["onnxruntime", "tensorrt"]), default="onnxruntime")
@click.option("--plugin", type=click.Path(path_type=Path), help="TensorRT plugin library; else bodies run")
@run_options
def bisect(
    run: Path,
    checkpoint: str | None,
    module: str | None,
    weights: str | None,
    backend: str,
    plugin: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Name the first block, then the first value, where a run folder leaves what it should be.

    Exit code 1 where there is such a place.
    """
    from ..verify.bisect.search import bisect as bisect_
    from . import tables as report

    if backend == "tensorrt":
        from ..verify.bisect.on_tensorrt import tensorrt_runner

        runner = tensorrt_runner(plugin)
    else:
        from ..verify.bisect.replay import run_onnxruntime as runner
    loaded = load_for(run, checkpoint, module, weights)
    with spinner() as stage:
        found = bisect_(run, loaded, Context(progress=stage, **options), runner=runner)
    emit(found.to_json(), as_json, lambda console: report.show_bisection(console, found))
    require_passed(found.place is None, run)


@click.command()
@run_argument
@click.option("--compare", type=click.Path(path_type=Path), help="another run folder, side by side")
@click.option("--html", type=click.Path(path_type=Path), help="where to; default RUN/report.html")
@click.option("--md", type=click.Path(path_type=Path), help="where to; default RUN/report.md")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="default RUN/report.json")
def report(run: Path, **options: Any) -> None:
    """Write what is known of RUN as one HTML file that opens anywhere, as Markdown and as JSON."""
    from ..report.write import write_report

    written = write_report(run, **options)
    click.echo(written.verdict)
    for path in written.paths:
        click.echo(f"wrote {path}", err=True)
