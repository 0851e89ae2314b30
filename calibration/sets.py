"""Calibration sets: sequences that fit a model, cut, sampled, hashed, and kept apart from evaluation data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from xlstm_export.calibration import overlap
from xlstm_export.calibration.sources import Reader

from xlstm_export.errors import InputError, UsageError
from xlstm_export.inputs import Arrays, batch_of, has_positions, length_of, piece, rows_of
from xlstm_export.load.made_up import random_inputs
from xlstm_export.runfolder import RunFolder
from xlstm_export.specs import IoSpec, Json, TensorSpec

if TYPE_CHECKING:
    from xlstm_export.load.loaded import Loaded

# 65,536 positions. Other sequences, or four times as many, move the ranges of the byte model in examples/ by
# 0.6 to 0.8% (median over its tensors, 12% at most).
SAMPLES, LENGTH = 32, 2048
# The largest value of fewer positions is chance, whatever the method.
MIN_POSITIONS = 256
# Ragged files are cut to the shortest, which may cost this share of the positions at most.
MAX_CUT = 0.5


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences that a model is run over to see the ranges of its activations.

    Attributes:
        inputs: model inputs by name, each (N, S, ...); (N, ...) for an input without positions.
        name: of the file, folder or generator, without its path.
        seed: that chose the sequences, or made them up.
        random: made up, not data; ranges from it are good for tests of speed only.
        notes: what a user should know about how the data was read.
        shared: names of the inputs that have no rows, because all streams share them.
    """

    inputs: Arrays
    name: str
    seed: int = 0
    random: bool = False
    notes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """N, sequences."""
        return next((int(x.shape[0]) for name, x in self.inputs.items() if name not in self.shared), 1)

    def length(self, io: IoSpec) -> int:
        """S, positions per sequence; 1 for a model without positions."""
        return length_of(self.inputs, io.inputs)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: names, types, shapes and values, whatever file they come from."""
        return content_hash(self.inputs)

    def to_json(self, io: IoSpec) -> Json:
        """The entry of the data in scales.json."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "samples": self.samples,
            "positions": self.samples * self.length(io),
            "random": self.random,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Selection:
    """Which sequences of a source are used.

    Attributes:
        samples: number of sequences, chosen by `seed`; by default 32, or all where there are fewer.
        length: positions per sequence; by default as in the source, see `load`.
        seed: of the choice.
        avoid: evaluation data, which must not overlap.
    """

    samples: int | None = None
    length: int | None = None
    seed: int = 0
    avoid: Path | None = None


def for_run(
    loaded: Loaded,
    run: RunFolder | Path,
    source: str | None,
    selection: Selection = Selection(),
    *,
    tokenizer: Path | None = None,
) -> CalibrationSet:
    """Calibration data for a run folder: from `source`, or made up where that is None.

    Args:
        loaded: the model.
        run: run folder.
        source: of `load`.
        selection: which sequences.
        tokenizer: of `load`; by default the one that came with the checkpoint.
    """
    run = RunFolder.of(run)
    if source is None:
        return random_set(loaded, run.io, selection)
    tokenizer = tokenizer or run.tokenizer
    return load(source, run.io, selection, vocab_size=loaded.vocab_size, tokenizer=tokenizer)


def load(
    source: str | Path,
    io: IoSpec,
    selection: Selection = Selection(),
    *,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
) -> CalibrationSet:
    """Read a calibration set for a model.

    Sequences are cut into windows of `length` positions, what is left over is dropped. Without `length`,
    sequences stay whole, cut to the shortest of them; only a single one longer than 2048 positions is cut,
    into equal windows of at most that.

    Args:
        source: `.npz` with the inputs by name (N, S, ...), a folder of such files (read in the order of
            their names), `.npy` for a model with one input, text for a language model, `.csv` (header, one
            column per channel, rows are positions), or `package.module:generator`, a function without
            arguments that returns an iterable of dicts of input name → array.
        io: the model's inputs.
        vocab_size: of a language model; 256 means that text is read as bytes.
        tokenizer: tokenizer.json, or the folder that holds it, for text of other language models.
        selection: which sequences.

    Raises:
        InputError: the data does not exist, does not fit, is too little, or overlaps with `avoid`.
        UsageError: the options or the kind of file make no sense for this model.
        SetupError: text needs the package `tokenizers`, which cannot be imported.
    """
    samples, length, avoid = selection.samples, selection.length, selection.avoid
    _check_options(io, samples, length)
    if avoid is not None:
        overlap.check_files(source, avoid)
    reader = Reader(io, vocab_size, tokenizer)
    read = reader.read(source, samples or SAMPLES)
    sequences = _joined([_windows(part, io, length, str(source)) for part in read.parts], io, str(source))
    if length is None:
        sequences = _cut_single(sequences, io)
    chosen = _chosen(sequences, io, samples, selection.seed, str(source))
    data = CalibrationSet(chosen, read.name, selection.seed, notes=read.notes, shared=_shared(io))
    _check_size(data, io, str(source))
    if avoid is not None:
        heldout = reader.read(avoid, SAMPLES)
        overlap.check_contents(chosen, heldout.parts, io, (str(source), str(avoid)))
    return data


def random_set(loaded: Loaded, io: IoSpec, selection: Selection = Selection()) -> CalibrationSet:
    """Made-up inputs where there is no data; marked as such in scales.json.

    Args:
        loaded: the model, whose example inputs give the range of float inputs.
        io: its inputs.
        selection: by default 4 sequences of 512 positions; of inputs without positions as many as are needed.
    """
    seed = selection.seed
    usual = 4 if has_positions(io) else MIN_POSITIONS
    samples = usual if selection.samples is None else selection.samples
    length = 512 if selection.length is None else selection.length
    inputs = random_inputs(loaded, io, samples, length, np.random.default_rng(seed))
    data = CalibrationSet(inputs, "random", seed, random=True, shared=_shared(io))
    _check_size(data, io, "the random set")
    return data


def _shared(io: IoSpec) -> tuple[str, ...]:
    return tuple(spec.name for spec in io.inputs if not spec.batched)


def content_hash(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_options(io: IoSpec, samples: int | None, length: int | None) -> None:
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, it must be at least 1")
    if length is not None and not has_positions(io):
        raise UsageError("the model's inputs have no positions, so there is no length to cut them to")


def _windows(part: Arrays, io: IoSpec, length: int | None, where: str) -> Arrays:
    """Sequences (N, S, ...) → windows (N · (S // length), length, ...)."""
    if length is None:
        return part
    positions = length_of(part, io.inputs)
    if positions < length:
        raise InputError(
            f"{where} has a sequence of {positions} positions, {length} were asked for",
            "give longer sequences, or a shorter length",
        )
    count = positions // length
    return {spec.name: _split(part[spec.name], spec, count, length) for spec in io.inputs}


def _split(array: np.ndarray, spec: TensorSpec, count: int, length: int) -> np.ndarray:
    """Sequences (N, ...) → their windows (N · count, ...), each of `length` positions of the stream."""
    if not spec.batched:
        return array
    if spec.time_axis is None:
        return np.repeat(array, count, axis=0)
    windows = [piece(array, spec, at * length, (at + 1) * length) for at in range(count)]
    return np.stack(windows, axis=1).reshape(-1, *windows[0].shape[1:])


def _joined(parts: list[Arrays], io: IoSpec, where: str) -> Arrays:
    """Parts one after the other; where lengths differ, all are cut to the shortest."""
    if len(parts) == 1:
        return parts[0]
    lengths = [length_of(part, io.inputs) for part in parts]
    rows = [batch_of(part, io.inputs) for part in parts]
    before = sum(n * s for n, s in zip(rows, lengths, strict=True))
    lost = 1 - min(lengths) * sum(rows) / before
    if lost > MAX_CUT:
        raise InputError(
            f"{where} has sequences of {min(lengths)} to {max(lengths)} positions; cut to the shortest, "
            f"{lost:.0%} of the positions would be lost",
            "give a length to cut all of them into windows, or leave the short ones out",
        )
    return {
        spec.name: np.concatenate([piece(part[spec.name], spec, 0, min(lengths)) for part in parts])
        if spec.batched
        else parts[0][spec.name]
        for spec in io.inputs
    }


def _cut_single(sequences: Arrays, io: IoSpec) -> Arrays:
    """One sequence longer than LENGTH → equal windows of at most that."""
    positions = length_of(sequences, io.inputs)
    if batch_of(sequences, io.inputs) > 1 or positions <= LENGTH:
        return sequences
    return _windows(sequences, io, positions // -(-positions // LENGTH), "")


def _chosen(sequences: Arrays, io: IoSpec, samples: int | None, seed: int, where: str) -> Arrays:
    """`samples` of the sequences, in their order."""
    available = batch_of(sequences, io.inputs)
    if samples is not None and samples > available:
        raise InputError(
            f"{where} gives {available} sequences, {samples} were asked for",
            "give more data, fewer samples, or a shorter length",
        )
    wanted = min(samples or SAMPLES, available)
    rows = np.sort(np.random.default_rng(seed).choice(available, wanted, replace=False))
    return {name: np.asarray(x, order="C") for name, x in rows_of(sequences, io, rows.tolist()).items()}


def _check_size(data: CalibrationSet, io: IoSpec, where: str) -> None:
    length = data.length(io)
    if io.states and length < 2:
        raise InputError(
            f"{where} has sequences of 1 position, at least 2 are needed",
            "the state that later positions meet is never there at the first",
        )
    if data.samples * length < MIN_POSITIONS:
        raise InputError(
            f"{where} gives {data.samples} sequence{'s' * (data.samples > 1)} of {length} "
            f"position{'s' * (length > 1)}, at least {MIN_POSITIONS} positions in all are needed",
            "; ".join(["the largest value of fewer positions is chance", "give more data", *data.notes]),
        )
