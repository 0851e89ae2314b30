"""`deploy.py run`: text from a language model, forecasts of series, or arrays through any model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..atomic import require_writable
from ..errors import UsageError
from ..inputs import batch_of, save_arrays
from ..options import ForecastOptions, GenerateOptions
from ..runfolder import RunFolder
from ..sessions import forecast as forecasts
from ..sessions.codec import codec_of
from ..sessions.cpu_graph import vocabulary
from ..sessions.files import InputFiles, check_file
from ..sessions.forecast_csv import write_csv
from ..sessions.protocol import Session, resume, save_state
from ..sessions.text import Writer, require_language_model
from . import integrity
from .arguments import add_options, options_of

DRAWN = ("plot", "target")  # options of a plot, which a board does not make
OpenSession = Callable[[int], Session]  # of so many streams


@dataclass(frozen=True)
class Files:
    """What `run` reads and writes.

    Attributes:
        bundle: its folder.
        text: what a language model continues.
        data: inputs of the model.
        table: CSV file of series to forecast.
        out: for the outputs.
        state: continued from if it is there, written at the end.
        as_json: the result as JSON on stdout.
    """

    bundle: Path
    text: str | None
    data: Path | None
    table: Path | None
    out: Path | None
    state: Path | None
    as_json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`; the options are those of `xlstm-export generate` and `forecast`."""
    parser.add_argument("--text", help="what a language model continues; - reads it from standard input")
    parser.add_argument("--data", type=Path, help="inputs: .npz, .npy, .csv of numbers, or text")
    parser.add_argument("--csv", type=Path, help="CSV file of series to forecast, with a header")
    parser.add_argument("--out", type=Path, help=".npz for the outputs of --data, or CSV for the forecast")
    parser.add_argument("--state", type=Path, help="continue from this file if it is there; saved at the end")
    add_options(parser.add_argument_group("text"), GenerateOptions)
    add_options(parser.add_argument_group("forecast"), ForecastOptions, leave=DRAWN)


def run(given: argparse.Namespace, open_session: OpenSession) -> None:
    """Run what the arguments say; results are written before the state is saved.

    Raises:
        UsageError, InputError, SetupError: see the parts.
    """
    files = Files(given.bundle, given.text, given.data, given.csv, given.out, given.state, given.json)
    if sum(source is not None for source in (files.text, files.data, files.table)) != 1:
        raise UsageError(
            "give one of --text, --data and --csv", "--text for a language model, --csv for a forecaster"
        )
    for option, path, kind in (("data", files.data, "npz"), ("csv", files.table, "csv")):
        if path is not None:
            check_file(path)
        if path is not None and files.out is None:
            raise UsageError(f"--{option} needs --out FILE.{kind} for the outputs", "name a file")
    if files.table is not None and files.state is not None:
        raise UsageError("--csv begins afresh with each series", "leave out --state")
    for path in (files.out, files.state):
        if path is not None:
            require_writable(path)
    if files.text is not None:
        _write_text(files, options_of(GenerateOptions, given), open_session)
    elif files.table is not None:
        _write_forecasts(files, options_of(ForecastOptions, given), open_session)
    else:
        _write_outputs(files, open_session)


def _write_text(files: Files, options: GenerateOptions, open_session: OpenSession) -> None:
    run_folder = RunFolder.open(files.bundle)
    require_language_model(run_folder.io)
    codec = codec_of(files.bundle, integrity.read(files.bundle).get("vocab_size"))
    prompt = sys.stdin.read() if files.text == "-" else files.text or ""
    with open_session(1) as session:
        resume(session, files.state)
        writer, pieces = Writer(session, run_folder.io, codec, options), []
        for piece in writer.write(prompt):
            pieces.append(piece)
            if not files.as_json:
                print(piece, end="", flush=True)
        result = {"text": "".join(pieces), "tokens": writer.drawn, "ended": writer.ended}
        print(json.dumps(result, indent=1) if files.as_json else "", flush=True)
        if files.state is not None:
            save_state(session, files.state)


def _write_outputs(files: Files, open_session: OpenSession) -> None:
    assert files.data is not None
    assert files.out is not None
    opened = RunFolder.open(files.bundle)
    found = InputFiles(opened.io, vocabulary(opened.manifest), opened.tokenizer).read(files.data)
    inputs = found.single(files.data)
    print(*found.notes, sep="\n", end="\n" * bool(found.notes), file=sys.stderr)
    with open_session(batch_of(inputs, opened.io.inputs)) as session:
        resume(session, files.state)
        outputs = session.prefill(inputs)
        save_arrays(files.out, outputs)
        if files.as_json:
            print(json.dumps({"out": str(files.out), "outputs": {k: v.shape for k, v in outputs.items()}}))
        print(f"wrote {files.out}", file=sys.stderr)
        if files.state is not None:
            save_state(session, files.state)


def _write_forecasts(files: Files, options: ForecastOptions, open_session: OpenSession) -> None:
    assert files.table is not None
    assert files.out is not None
    opened = RunFolder.open(files.bundle)
    form = forecasts.layout(opened.io, opened.context_length)
    columns = options.columns.split(",") if options.columns else None
    series = forecasts.read_series(files.table, form, columns)
    with open_session(1) as session:
        made = [forecasts.forecast(session, opened.io, one, form, options.horizon) for one in series]
    print(*forecasts.remarks(made), sep="\n", file=sys.stderr)
    if files.as_json:
        print(json.dumps({"series": [one.to_json() for one in made]}, indent=1))
    write_csv(made, files.out, every=options.every)
    print(f"wrote {files.out}", file=sys.stderr)
