"""`deploy.py run`: text from a language model, or arrays through any model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..atomic import require_writable
from ..errors import InputError, UsageError
from ..inputs import batch_of, save_arrays
from ..options import GenerateOptions
from ..runfolder import RunFolder
from ..sessions import streams
from ..sessions.codec import codec_of
from ..sessions.protocol import Session, resume, save_state
from ..sessions.text import Writer, require_language_model
from . import integrity
from .arguments import add_options, options_of

OpenSession = Callable[[int], Session]  # of so many streams


@dataclass(frozen=True)
class Files:
    """What `run` reads and writes.

    Attributes:
        bundle: its folder.
        text: what a language model continues.
        data: inputs of the model.
        out: for the outputs.
        state: continued from if it is there, written at the end.
        as_json: the result as JSON on stdout.
    """

    bundle: Path
    text: str | None
    data: Path | None
    out: Path | None
    state: Path | None
    as_json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`; those of text are the options of `xlstm-export generate`."""
    parser.add_argument("--text", help="what a language model continues; - reads it from standard input")
    parser.add_argument("--data", type=Path, help=".npz of the inputs by name, or .csv of the only one")
    parser.add_argument("--out", type=Path, help=".npz for the outputs of --data")
    parser.add_argument("--state", type=Path, help="continue from this file if it is there; saved at the end")
    add_options(parser.add_argument_group("text"), GenerateOptions)


def run(given: argparse.Namespace, open_session: OpenSession) -> None:
    """Run what the arguments say; results are written before the state is saved.

    Raises:
        UsageError, InputError, SetupError: see the parts.
    """
    files = Files(given.bundle, given.text, given.data, given.out, given.state, given.json)
    if (files.text is None) == (files.data is None):
        raise UsageError("give either --text or --data", "--text for a language model")
    if files.data is not None and not files.data.exists():
        raise InputError(f"{files.data} does not exist", "give an .npz or .csv of the inputs")
    if files.data is not None and files.out is None:
        raise UsageError("--data needs --out FILE.npz for the outputs", "name a file")
    for path in (files.out, files.state):
        if path is not None:
            require_writable(path)
    if files.text is not None:
        _write_text(files, options_of(GenerateOptions, given), open_session)
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
    io = RunFolder.open(files.bundle).io
    inputs = streams.read_inputs(files.data, io)
    with open_session(batch_of(inputs, io.inputs)) as session:
        resume(session, files.state)
        outputs = session.prefill(inputs)
        save_arrays(files.out, outputs)
        if files.as_json:
            print(json.dumps({"out": str(files.out), "outputs": {k: v.shape for k, v in outputs.items()}}))
        print(f"wrote {files.out}", file=sys.stderr)
        if files.state is not None:
            save_state(session, files.state)
