"""Run a user's data through a model: arrays from a file, or text that a language model continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from ..inputs import Arrays, length_of, per_position, piece
from ..specs import IoSpec
from .codec import Codec
from .protocol import Session


def read_inputs(path: Path, io: IoSpec) -> Arrays:
    """Inputs of one stream from a file.

    Args:
        path: .npz with each input by name, in its shape with or without the batch; or .csv with one row of
            numbers per position for a model with one input, a first line without numbers being its header.
        io: the model's inputs.

    Raises:
        InputError: the file cannot be read or does not fit the model.
    """
    names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in io.inputs)
    try:
        if path.suffix == ".csv":
            arrays = {io.inputs[0].name: _read_csv(path)}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise many types for a damaged file
        raise InputError(f"{path} cannot be read: {error}", f"the model takes {names}") from error
    result = {}
    for spec in io.inputs:
        if spec.name not in arrays:
            raise InputError(f"{path} lacks {spec.name}", f"the model takes {names}")
        array = arrays[spec.name]
        rank = len(spec.shape)
        if path.suffix == ".csv" and spec.time_axis == 2:
            array = array.T
        if spec.batched and array.ndim == rank - 1:
            array = array[None]
        fits = array.dtype.kind in "biuf" and array.ndim == rank and 0 not in array.shape
        if not fits or (spec.batched and array.shape[0] != 1):
            found = f"{array.dtype} {array.shape}"
            raise InputError(f"{path}: {spec.name} is {found}", f"the model takes {names}")
        array = piece(array, spec, 0, length_of({spec.name: array}, [spec]))  # whole steps of the stream
        result[spec.name] = np.asarray(array.astype(spec.dtype), order="C")
    return result


def _read_csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    try:
        [float(cell) for cell in first.split(",")]
        header = 0
    except ValueError:
        header = 1
    return np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2)


def continue_text(
    session: Session, codec: Codec, text: str, *, count: int, temperature: float, seed: int
) -> Iterator[str]:
    """The text that a language model generates after `text`, piece by piece.

    Args:
        session: of one stream; its state is updated.
        codec: converts text to tokens and back.
        text: the prompt.
        count: tokens.
        temperature: of sampling; 0 takes the likeliest token.
        seed: equal seeds give equal texts.

    Raises:
        UsageError: the model is no language model, there is nothing to continue, or the text has a token
            beyond the vocabulary.
    """
    io = session.io
    tokens = [x for x in io.inputs if x.dtype == "int64" and per_position(x)]
    if len(io.inputs) != 1 or not tokens:
        raise UsageError("the model is no language model", "give its inputs with --data")
    given = codec.encode(text)
    names = (tokens[0].name, io.outputs[0].name)
    for token in continue_tokens(session, names, given, count=count, temperature=temperature, seed=seed):
        if piece := codec.feed(token):
            yield piece


def continue_tokens(
    session: Session,
    names: tuple[str, str],
    given: Sequence[int],
    *,
    count: int,
    temperature: float,
    seed: int,
    top_k: int | None = None,
) -> Iterator[int]:
    """The tokens that a language model generates after `given`: one prefill, then steps.

    Args:
        session: of one stream; its state is updated.
        names: of the input with the tokens and the output with the logits.
        given: the prompt.
        count, temperature, seed: see `continue_text`.
        top_k: draw among so many of the likeliest only.

    Raises:
        UsageError: there is nothing to continue.
    """
    if not given:
        raise UsageError("there is no text to continue", "give at least one token")
    name, output = names
    rng = np.random.default_rng(seed)
    logits = session.prefill({name: np.array([given], np.int64)})[output]
    for _ in range(count):
        token = choose(logits.reshape(-1, logits.shape[-1])[-1], temperature, rng, top_k)
        yield token
        logits = session.step({name: np.array([[token]])})[output]


def choose(logits: np.ndarray, temperature: float, rng: np.random.Generator, top_k: int | None = None) -> int:
    """A token drawn from softmax(logits / temperature), or the likeliest one where that is 0."""
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    if top_k is not None and top_k < len(scaled):
        scaled[np.argpartition(scaled, -top_k)[:-top_k]] = -np.inf
    weights = np.exp(scaled - scaled.max())
    return int(rng.choice(len(weights), p=weights / weights.sum()))
