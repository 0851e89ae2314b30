"""Files of data → inputs of a model: the one place that reads text, tables and arrays.

Every stage reads data here, and so does a board; what a file holds is checked against the model at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from ..inputs import Arrays, length_of, per_position
from ..specs import FROZEN_BINARY, IoSpec, Json, JsonMapping, TensorSpec
from .arrays import check_finite, check_tokens, token_input
from .codec import read_text
from .table import read_tables

PICTURE = (
    "give an .npz file with the model's inputs (N, S, ...), an .npy file, a text file for a language model, "
    "or a .csv time series"
)
SCALES = ("loc", "scale")  # inputs of a model that is told the location and scale of the series
ARRAYS, TABLES = (".npz", ".npy"), (".csv", ".tsv", ".tab")
# What is often given, and how it becomes one of the above. A model of bytes would read them as text.
OTHERS = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors"), "arrays"),
    **dict.fromkeys(
        (".parquet", ".feather", ".arrow", ".xlsx", ".xls", ".ods", ".h5", ".hdf5", ".mat"), "table"
    ),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar"), "packed"),
}
ADVICE = {
    "arrays": 'save the inputs as arrays: numpy.savez("data.npz", NAME=x.numpy())',
    "table": "save it as CSV, for example with pandas: frame.to_csv(path, index=False)",
    "packed": "unpack it first",
}


@dataclass(frozen=True)
class Found:
    """Data of a file.

    Attributes:
        parts: inputs by name, each (N, S, ...); several only where a table has series below each other.
        others: what an .npz file holds besides the inputs, such as targets.
        notes: what a user should know about how the file was read.
    """

    parts: tuple[Arrays, ...]
    others: Json
    notes: tuple[str, ...] = ()

    def single(self, path: Path) -> Arrays:
        """The only part.

        Raises:
            InputError: the file has several series.
        """
        if len(self.parts) > 1:
            raise InputError(
                f"{path} holds {len(self.parts)} series", "give a file for each; a forecast takes all (--csv)"
            )
        return self.parts[0]


@dataclass(frozen=True)
class InputFiles:
    """Reads files for one model.

    Attributes:
        io: the model's inputs.
        vocab_size: of a language model; tokens are checked against it.
        tokenizer: tokenizer.json that came with the model, or the folder that holds it.
    """

    io: IoSpec
    vocab_size: int | None = None
    tokenizer: Path | None = None

    def read(self, path: Path) -> Found:
        """The inputs that a file holds, all of them.

        Raises:
            InputError: it does not exist, is damaged, or does not fit the model.
            UsageError: this kind of file makes no sense for the model, or a tokenizer is lacking.
            SetupError: text needs the package `tokenizers`, which cannot be imported.
        """
        check_file(path)
        kind = path.suffix.lower()
        if kind in ARRAYS:
            arrays = self.arrays(path)
            names = [spec.name for spec in self.io.inputs]
            others = {name: x for name, x in arrays.items() if name not in names}
            return Found((self.fit(arrays, str(path)),), others)
        if kind in TABLES:
            spec = self.io.inputs[0] if is_scaled(self.io) else self._only_input(path, "a table")
            parts, notes = self._table(path, spec)
            return Found(tuple(self.fit(self._scaled(x), str(path)) for x in parts), {}, notes)
        spec = self._only_input(path, "text")
        if not self.takes_text():
            raise UsageError(f"{path} is read as text, but the model takes no tokens", PICTURE)
        tokens = np.asarray(read_text(path, self.vocab_size, self.tokenizer), spec.dtype)
        if not tokens.size:
            raise InputError(f"{path} is empty", "give a file with text")
        return Found((self.fit({spec.name: tokens}, str(path)),), {})

    def takes_text(self) -> bool:
        """Whether the model reads tokens and nothing else."""
        spec = self.io.inputs[0]
        tokens = np.dtype(spec.dtype).kind in "iu" and len(spec.shape) == 2
        return len(self.io.inputs) == 1 and tokens

    def arrays(self, path: Path) -> Json:
        """All arrays of an .npz file by name; that of an .npy file by the name of the only input."""
        kind = path.suffix.lower()
        alone = self._only_input(path, "one array").name if kind == ".npy" else ""
        try:
            found = np.load(path, allow_pickle=False)
            if isinstance(found, np.ndarray):
                read = {alone: found} if alone else {}
            else:
                with found:
                    read = {name: found[name] for name in found.files}
        except Exception as error:  # NumPy and zipfile raise many types for a damaged archive
            pickled = "allow_pickle" in str(error)
            why = "it holds Python objects, not numbers" if pickled else str(error) or type(error).__name__
            raise InputError(
                f"{path} is not a readable {kind} file: {why}",
                "lists of unequal length become objects: make arrays of numbers, and save them again"
                if pickled
                else PICTURE,
            ) from error
        if not read:
            held = "one array without a name" if isinstance(found, np.ndarray) else "nothing"
            raise InputError(f"{path} is not a readable {kind} file: it holds {held}", PICTURE)
        return read

    def fit(self, arrays: JsonMapping, where: str) -> Arrays:
        """The model's inputs out of `arrays`, in the model's types; others are left out.

        A single sequence may lack the leading axis.

        Raises:
            InputError: a name, shape, type or value does not fit.
        """
        fitted: Arrays = {}
        for spec in self.io.inputs:
            if spec.name not in arrays:
                held, wanted = (
                    ", ".join(sorted(map(str, arrays))),
                    ", ".join(f"{x.name}=…" for x in self.io.inputs),
                )
                raise InputError(
                    f"{where} lacks input {spec.name}",
                    f'it holds {held}; name them as the model does: numpy.savez("data.npz", {wanted})',
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
        tokens = token_input(self.io, self.vocab_size)
        if tokens is not None:
            check_tokens(f"{where}: {tokens.name}", fitted[tokens.name], self.vocab_size)
        return fitted

    def _only_input(self, path: Path, kind: str) -> TensorSpec:
        if len(self.io.inputs) != 1:
            names = ", ".join(spec.name for spec in self.io.inputs)
            raise UsageError(
                f"{path} is {kind}, for a model with one input; this one has {len(self.io.inputs)}: {names}",
                "give an .npz file with an array for each",
            )
        return self.io.inputs[0]

    def _table(self, path: Path, spec: TensorSpec) -> tuple[list[np.ndarray], tuple[str, ...]]:
        """Series (S, ...) of a table: a row per position, a column per channel."""
        shape = spec.shape
        if not np.issubdtype(spec.dtype, np.floating) or len(shape) not in (2, 3) or not per_position(spec):
            raise UsageError(
                f"{path} is read as a time series, but the model's input is {spec.name} {spec.dtype} "
                f"{list(shape)}",
                PICTURE,
            )
        axis = 3 - (spec.time_axis or 1)  # of the channels
        width = int(shape[axis]) if len(shape) == 3 else 1
        parts, notes = [], dict[str, None]()
        for table in read_tables(path):
            patches = self._reads_patches(len(table.columns))
            chosen = table.chosen(None if patches else width, gaps=spec.gaps)
            left = (f"column {name} of {path.name} is text and was left out" for name in chosen.left)
            notes |= dict.fromkeys((*left, *chosen.notes))
            if patches:
                parts += [in_patches(column, width) for column in chosen.values.T]
                notes[f"a position of the model is {width} rows of a column of {path.name}"] = None
                continue
            values = chosen.values[: len(chosen.values) // spec.steps * spec.steps]
            parts.append(values[:, 0] if len(shape) == 2 else values if axis == 2 else values.T)
        return parts, tuple(notes)

    def _scaled(self, series: np.ndarray) -> Arrays:
        """The inputs of a series, with its location and scale where the model is told them."""
        name, *others = (spec.name for spec in self.io.inputs)
        scaler = self.io.outputs[0].meaning.scaler if self.io.outputs else ""
        scales = location_and_scale(series, scaler) if others else ()
        told = {other: np.array([value]) for other, value in zip(others, scales, strict=True)}
        return {name: series, **told}

    def _reads_patches(self, columns: int) -> bool:
        """Whether a position of the model is a patch of one series, so that each column is a series.

        Outputs tell (B, S, Q, P) of patches from channels. Before there is an export they are not known: then
        a model that takes gaps, and has another number of channels than the table, may be one.
        """
        spec = self.io.inputs[0]
        if is_scaled(self.io):
            return True
        if len(spec.shape) != 3 or not spec.gaps or spec.time_axis != 1:
            return False
        if not self.io.outputs:
            return columns != spec.shape[2]
        output = self.io.outputs[0].shape
        return len(output) == 4 and output[1] == "S" and output[3] == spec.shape[2]


def is_scaled(io: IoSpec) -> bool:
    """Whether the model is told location and scale of the series that it reads in patches (TiRex)."""
    return tuple(x.name for x in io.inputs[1:] if x.shape == ("B", 1)) == SCALES and len(io.inputs) == 3


def location_and_scale(context: np.ndarray, scaler: str = "") -> tuple[float, float]:
    """Mean and standard deviation of the known values, as TiRex scales a series.

    Args:
        context: any shape, NaN where missing.
        scaler: that of the model, one of `specs.SCALERS`; empty for TiRex. Those of TiRex-2 take values that
            are all equal by a scale near 0, and a scale of 0 stands for values that are taken as they are.
    """
    known = context[~np.isnan(context)].astype(np.float64)
    if scaler == FROZEN_BINARY and np.isin(known, (0.0, 1.0)).all():
        return 0.0, 0.0
    if not known.size:
        return 0.0, 1.0
    loc = float(known.mean())
    scale = float(known.std())
    if scaler:
        return loc, max(scale, 1e-30) if (known != known[0]).any() else 1e-30
    # Where all values are equal, their spread is zero or a rounding error.
    return loc, scale if (known != known[0]).any() else abs(loc) + 1e-5


def in_patches(values: np.ndarray, patch: int) -> np.ndarray:
    """A series (rows,) as patches (S, patch), padded in front with missing values."""
    rows = -(-len(values) // patch) * patch
    return np.concatenate([np.full(rows - len(values), np.nan), values]).reshape(-1, patch)


def check_file(path: Path) -> None:
    """Find what is wrong with a file of data before anything else is done.

    Raises:
        InputError: it does not exist, is a folder, or of a kind that is not read.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder", PICTURE)
    if not path.is_file():
        raise InputError(f"{path} does not exist", PICTURE)
    check_kind(path)


def check_kind(path: Path) -> None:
    """Raise InputError for a file of a kind that is not read, by its name."""
    kind = OTHERS.get(path.suffix.lower())
    if kind is not None:
        raise InputError(f"{path} is a file of another kind than those that are read", ADVICE[kind])


def _fit(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """One input: leading axis, shape, type, values."""
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
        raise InputError(
            f"{where}: {spec.name} has shape {given}, expected ({expected})",
            "it is empty" if 0 in given else "N sequences of S positions, the other axes as in the model",
        )
    wanted = np.dtype(spec.dtype)
    kinds = {"f": "biuf", "i": "iu", "u": "iu", "b": "b"}[wanted.kind]
    if array.dtype.kind not in kinds:
        raise InputError(
            f"{where}: {spec.name} holds {array.dtype}, the model takes {spec.dtype}",
            f"if the values have that meaning: {spec.name}.astype(numpy.{spec.dtype})"
            if array.dtype.kind in "biuf"
            else "give numbers",
        )
    with np.errstate(over="ignore"):  # reported below, with the place
        converted = np.ascontiguousarray(array.astype(wanted))
    if wanted.kind in "iu" and not np.array_equal(converted, array):
        raise InputError(
            f"{where}: {spec.name} holds integers that {spec.dtype} cannot hold", "check the values"
        )
    check_finite(f"{where}: {spec.name}", spec, converted)
    return converted
