"""Where calibration data comes from: files, folders and generators → arrays that fit the model's inputs."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_export.errors import ExportError, InputError, UsageError
from xlstm_export.inputs import Arrays, batch_of, length_of, per_position
from xlstm_export.load.user_code import described, load_function
from xlstm_export.sessions.codec import read_text
from xlstm_export.specs import IoSpec, Json, JsonMapping, TensorSpec

PICTURE = (
    "give an .npz file with the model's inputs (N, S, ...), a folder of such files, an .npy file, a text "
    "file for a language model, a .csv time series with a header, or package.module:generator"
)
_GENERATOR = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """Data as it was read.

    Attributes:
        name: label in reports; without a path, so that results do not depend on the folder.
        parts: inputs by name, each (N, S, ...); parts may differ in N and S.
        notes: what a user should know about how the file was read.
    """

    name: str
    parts: tuple[Arrays, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads data for one model.

    Attributes:
        io: the model's inputs.
        vocab_size: of a language model; token ids are checked against it.
        tokenizer: tokenizer.json of a Hugging Face checkpoint, or the folder that holds it.
    """

    io: IoSpec
    vocab_size: int | None = None
    tokenizer: Path | None = None

    def read(self, source: str | Path, rows: int) -> Source:
        """Read `source`, all of it; of a generator, which may be endless, until `rows` sequences are there.

        Raises:
            InputError: it does not exist, is damaged, or does not fit the model.
            UsageError: this kind of file makes no sense for the model, or a tokenizer is lacking.
            SetupError: the package `tokenizers` is needed and cannot be imported.
        """
        path = Path(source)
        if not path.exists():
            if _GENERATOR.fullmatch(str(source)):
                return Source(str(source), tuple(self._generated(str(source), rows)))
            raise InputError(f"{source} does not exist", PICTURE)
        if path.is_dir():
            return self._folder(path)
        notes: tuple[str, ...] = ()
        if path.suffix == ".npz":
            arrays = _npz(path)
        elif path.suffix == ".npy":
            arrays = {self._only_input(path).name: _npy(path)}
        elif path.suffix == ".csv":
            spec = self._only_input(path)
            values, notes = self._csv(path, spec)
            arrays = {spec.name: values}
        else:
            arrays = {self._only_input(path).name: self._text(path)}
        return Source(path.name, (self.fit(arrays, str(path)),), notes)

    def fit(self, arrays: JsonMapping, where: str) -> Arrays:
        """The model's inputs out of `arrays`, in the model's types; others (`target`) are left out.

        A single sequence may lack the leading axis.

        Raises:
            InputError: a name, shape, type or value does not fit.
        """
        fitted: Arrays = {}
        for spec in self.io.inputs:
            if spec.name not in arrays:
                raise InputError(
                    f"{where} lacks input {spec.name}", f"it holds {', '.join(sorted(map(str, arrays)))}"
                )
            fitted[spec.name] = _fit(np.asarray(arrays[spec.name]), spec, where)
        first = self.io.inputs[0]
        for spec in self.io.inputs:
            pair = [s for s in (first, spec) if s.batched]
            timed = [s for s in (first, spec) if s.time_axis is not None]
            rows = {fitted[s.name].shape[0] for s in pair}
            if len(rows) > 1 or len({length_of(fitted, [s]) for s in timed}) > 1:
                raise InputError(
                    f"{where}: {spec.name} has shape {fitted[spec.name].shape}, but {first.name} has "
                    f"shape {fitted[first.name].shape}",
                    "all inputs have the same number of sequences and of positions",
                )
        self._check_tokens(fitted, where)
        return fitted

    def _check_tokens(self, arrays: Arrays, where: str) -> None:
        integers = [spec.name for spec in self.io.inputs if np.issubdtype(spec.dtype, np.integer)]
        if self.vocab_size is None or len(integers) != 1:
            return  # with several inputs it is not clear whose vocabulary it is
        tokens = arrays[integers[0]]
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise InputError(
                f"{where}: {integers[0]} holds {tokens[at]} at {list(at)}, the vocabulary has "
                f"{self.vocab_size} tokens",
                "the data was made with the tokenizer of another model",
            )

    def _only_input(self, path: Path) -> TensorSpec:
        if len(self.io.inputs) != 1:
            names = ", ".join(spec.name for spec in self.io.inputs)
            raise UsageError(
                f"{path} is for a model with one input, this one has {len(self.io.inputs)}: {names}",
                "give an .npz file with an array for each",
            )
        return self.io.inputs[0]

    def _folder(self, path: Path) -> Source:
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InputError(f"{path} holds no .npz file", PICTURE)
        return Source(path.name, tuple(self.fit(_npz(file), str(file)) for file in files))

    def _generated(self, spec: str, rows: int) -> Iterator[Arrays]:
        count = 0
        for index, item in enumerate(_items(spec)):
            if not isinstance(item, Mapping):
                raise InputError(
                    f"{spec}: item {index} is {type(item).__name__}", "yield a dict of input name → array"
                )
            arrays = self.fit(item, f"{spec}, item {index}")
            yield arrays
            count += batch_of(arrays, self.io.inputs)
            if count >= rows:
                return
        if not count:
            raise InputError(f"{spec} yields nothing", "yield dicts of input name → array")

    def _text(self, path: Path) -> np.ndarray:
        spec = self._only_input(path)
        if not np.issubdtype(spec.dtype, np.integer) or len(spec.shape) != 2:
            raise UsageError(f"{path} is read as text, but the model takes no tokens", PICTURE)
        return np.asarray(read_text(path, self.vocab_size, self.tokenizer), spec.dtype)

    def _csv(self, path: Path, spec: TensorSpec) -> tuple[np.ndarray, tuple[str, ...]]:
        if not np.issubdtype(spec.dtype, np.floating) or len(spec.shape) != 3 or not per_position(spec):
            raise UsageError(f"{path} is read as a time series, but the model's input is {spec}", PICTURE)
        axis = 3 - (spec.time_axis or 1)  # of the channels
        values, notes = _read_csv(path, int(spec.shape[axis]), spec.name)
        values = values[: len(values) // spec.steps * spec.steps]
        return (values if axis == 2 else values.T), notes


def _fit(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """One input: leading axis, shape, type, finite values."""
    given = array.shape
    if spec.batched and array.ndim == len(spec.shape) - 1:
        array = array[None]
    expected = ", ".join(map(str, ("N", *spec.shape[1:]) if spec.batched else spec.shape))
    fits = array.ndim == len(spec.shape) and 0 not in array.shape
    if fits:
        fits = array.shape == spec.sized(
            array.shape[0] if array.ndim else 1, length_of({spec.name: array}, [spec])
        )
    if not fits:
        raise InputError(f"{where}: {spec.name} has shape {given}, expected ({expected})")
    wanted = np.dtype(spec.dtype)
    kinds = {"f": "biuf", "i": "iu", "u": "iu", "b": "b"}[wanted.kind]
    if array.dtype.kind not in kinds:
        raise InputError(f"{where}: {spec.name} holds {array.dtype}, the model takes {spec.dtype}")
    with np.errstate(over="ignore"):  # reported below, with the place
        array = np.ascontiguousarray(array.astype(wanted))
    if wanted.kind == "f" and not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"{where}: {spec.name} holds {array[at]} at {list(at)}",
            "fill the gaps: a range cannot be taken from what is missing",
        )
    return array


def _npz(path: Path) -> Json:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise many types for a damaged archive
        raise InputError(f"{path} is not a readable .npz file: {error}", PICTURE) from error


def _npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # as above
        raise InputError(f"{path} is not a readable .npy file: {error}", PICTURE) from error


def _read_csv(path: Path, channels: int, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Rows → positions (S, channels); a leading column of text (a time) is left out, with a note."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a readable .csv file: {error}", PICTURE) from error
    if len(lines) < 2:
        raise InputError(f"{path} holds no rows below its header", PICTURE)
    header = lines[0]
    if all(_number(cell) is not None for cell in header):
        raise InputError(f"{path} has no header: line 1 holds numbers", "name the columns in the first line")
    leading = lines[1][0].strip() if lines[1] else ""
    skip = int(bool(leading) and _number(leading) is None)
    notes = (f"column {header[0]} of {path.name} is text and was left out",) if skip else ()
    if len(header) - skip != channels:
        raise InputError(
            f"{path} has {len(header) - skip} columns of numbers ({', '.join(header[skip:])}), "
            f"{name} has {channels} channels",
            "one column per channel, in the model's order; a first column of text is left out",
        )
    values = np.empty((len(lines) - 1, channels))
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise InputError(f"{path}, line {number}: {len(line)} cells, the header has {len(header)}")
        for column, cell in enumerate(line[skip:]):
            value = _number(cell)
            if value is None or not np.isfinite(value):
                raise InputError(
                    f"{path}, line {number}, column {header[column + skip]}: "
                    f"{cell.strip() or 'an empty cell'} is no finite number",
                    "fill the gaps: a range cannot be taken from what is missing",
                )
            values[number - 2, column] = value
    return values, notes


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _items(spec: str) -> Iterable[Any]:
    """What the generator yields; an error in it is reported as the user's code."""
    generator = load_function(spec, spec)
    try:
        yield from generator()
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"{spec} raised {described(error)}",
            "it takes no arguments and returns an iterable of dicts of input name → array",
        ) from error
