"""Commands that run what was exported: generate, forecast."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from .common import load_for, run_argument

BACKENDS = ("onnxruntime", "pytorch", "tensorrt")
backend_option = click.option(
    "--backend", type=click.Choice(BACKENDS), default="onnxruntime", show_default=True, help="what runs it"
)
threads_option = click.option("--threads", default=0, help="CPU threads; all cores by default")


@click.command()
@run_argument
@click.option("--prompt", required=True, help="text to continue; - reads it from standard input")
@click.option("--tokens", type=click.IntRange(0), default=200, show_default=True, help="how many to write")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True, help="0: likeliest")
@click.option("--top-k", type=click.IntRange(1), help="draw among the likeliest only")
@click.option("--seed", default=0, show_default=True, help="equal seeds write equal texts")
@click.option("--state", type=click.Path(path_type=Path), help="state to resume from, if there, and to save")
@backend_option
@threads_option
def generate(
    run: Path, prompt: str, state: Path | None, backend: str, threads: int, tokens: int, **options: Any
) -> None:
    """Continue a prompt with the language model in RUN, as it is written."""
    from ..inference.generate import codec_for
    from ..inference.generate import generate as generate_
    from ..inference.open import open_session
    from ..runfolder import read_io
    from ..sessions import load_state, save_state

    io = read_io(run)
    codec = codec_for(run, io)
    with open_session(run, backend, lambda: load_for(run, None, None, None), threads) as session:
        if state is not None and state.exists():
            load_state(session, state)
        text = sys.stdin.read() if prompt == "-" else prompt
        start = time.perf_counter()
        for piece in generate_(session, io, codec, text, tokens=tokens, **options):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        if state is not None:
            save_state(session, state)
    click.echo(f"{tokens / max(time.perf_counter() - start, 1e-9):,.0f} tokens per second", err=True)


@click.command()
@run_argument
@click.option("--input", "source", required=True, type=click.Path(path_type=Path), help="CSV with a header")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="CSV to write")
@click.option("--columns", help="names of the columns the model reads, in its order: a,b,c")
@click.option("--every", is_flag=True, help="the forecast after each row, not only the last")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="picture to write, .svg")
@click.option("--target", help="column that is forecast, for the plot; default the first")
@backend_option
@threads_option
def forecast(
    run: Path,
    source: Path,
    out: Path,
    columns: str | None,
    every: bool,
    picture: Path | None,
    target: str | None,
    backend: str,
    threads: int,
) -> None:
    """Forecast what follows the rows of a CSV file with the model in RUN."""
    from ..inference import forecast as forecasts
    from ..inference.open import open_session
    from ..plot.file import require_svg
    from ..runfolder import read_io, read_manifest

    if picture is not None:
        require_svg(picture)
    io = read_io(run)
    form = forecasts.layout(io, read_manifest(run).get("context_length"))
    names = columns.split(",") if columns else None
    series = forecasts.read_series(source, form.columns, names, gaps=form.patch > 0)
    with open_session(run, backend, lambda: load_for(run, None, None, None), threads) as session:
        made = forecasts.forecast(session, io, series, form)
    forecasts.write_csv(made, out, every=every)
    click.echo(f"wrote {out}", err=True)
    if picture is not None:
        forecasts.plot(made, picture, target)
        click.echo(f"wrote {picture}", err=True)
