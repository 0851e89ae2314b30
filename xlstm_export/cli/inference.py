"""Commands that run an exported model: generate, forecast."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from ..atomic import require_writable
from ..options import ForecastOptions, GenerateOptions
from ..runfolder import RunFolder
from .common import RECORDED, json_option, run_argument, stage_options, threads_option
from .console import emit, output

BACKENDS = ("onnxruntime", "pytorch", "tensorrt")
backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True, help="runtime"
)


@click.command()
@run_argument
@click.option("--prompt", required=True, help="text to continue; - reads it from standard input")
@stage_options(GenerateOptions)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="file of the state: resumed from if it exists, then written",
)
@backend_option
@threads_option
@json_option
def generate(
    run: Path,
    prompt: str,
    options: GenerateOptions,
    state: Path | None,
    backend: str,
    threads: int,
    as_json: bool,
) -> None:
    """Continue a prompt with the language model in RUN; text is printed as it is generated."""
    from ..inference.generate import codec_for
    from ..inference.open import open_session
    from ..sessions.protocol import read_state, resume, save_state
    from ..sessions.text import Writer

    opened = RunFolder.open(run)
    codec = codec_for(run, opened.io)
    if state is not None:
        require_writable(state)
        if state.exists():  # else it is made
            read_state(state)  # before the graph is loaded
    with open_session(run, backend, lambda: RECORDED.load_for(opened), threads) as session:
        resume(session, state)
        text = sys.stdin.read() if prompt == "-" else prompt
        start = time.perf_counter()
        writer, pieces = Writer(session, opened.io, codec, options), []
        for piece in writer.write(text):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False, file=output().stdout)
                output().stdout.flush()
        rate = writer.drawn / max(time.perf_counter() - start, 1e-9)
        result = {
            "text": "".join(pieces),
            "tokens": writer.drawn,
            "ended": writer.ended,
            "tokens_per_second": rate,
        }
        emit(result, as_json, lambda console: click.echo())
        if not as_json:
            click.echo(f"{writer.drawn} tokens, {rate:,.0f} per second", err=True)
        if state is not None:  # after the text is printed: what fails here loses no result
            save_state(session, state)


@click.command()
@run_argument
@click.option("--input", "source", required=True, type=click.Path(path_type=Path), help="CSV with a header")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="CSV to write")
@stage_options(ForecastOptions)
@backend_option
@threads_option
@json_option
def forecast(
    run: Path, source: Path, out: Path, options: ForecastOptions, backend: str, threads: int, as_json: bool
) -> None:
    """Forecast the rows that follow each series of a CSV file, with the model in RUN."""
    from ..inference.forecast import drawn_of, plot
    from ..inference.open import open_session
    from ..plot.file import require_svg
    from ..sessions import forecast as forecasts
    from ..sessions.forecast_csv import write_csv

    if options.plot is not None:
        require_svg(options.plot)
    for path in (out, options.plot):
        if path is not None and path.parent.exists():  # else it is made
            require_writable(path)
    opened = RunFolder.open(run)
    form = forecasts.layout(opened.io, opened.context_length)
    series = forecasts.read_series(source, form, options.columns.split(",") if options.columns else None)
    if options.plot is not None:
        drawn_of(series, options.target)
    with open_session(run, backend, lambda: RECORDED.load_for(opened), threads) as session:
        made = [forecasts.forecast(session, opened.io, one, form, options.horizon) for one in series]
    for line in forecasts.remarks(made):
        click.echo(line, err=True)
    files = [str(path) for path in (out, options.plot) if path is not None]
    emit({"files": files, "series": [one.to_json() for one in made]}, as_json, lambda console: None)
    write_csv(made, out, every=options.every)
    click.echo(f"wrote {out}", err=True)
    if options.plot is not None:
        plot(made, options.plot, options.target)
        click.echo(f"wrote {options.plot}", err=True)
