"""The rows that follow a series, by a model that forecasts; the same on the workstation and on a board.

Beyond the rows that one call gives there are two ways on, and every forecast says which it took. A model of
patches (TiRex) is given further patches without any known value. Any other model is given its own forecast,
which it can if it forecasts every column that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from ..inputs import per_position
from ..specs import RUNNING, IoSpec, Json, TensorSpec
from .files import SCALES, is_scaled, location_and_scale
from .protocol import Session
from .table import Table, read_tables


@dataclass(frozen=True)
class Layout:
    """How a forecaster reads a series.

    Attributes:
        columns: number of columns that are read at once.
        patch: rows per position of the model; 0 if each row is a position. A model with patches (TiRex) reads
            one column, accepts gaps, and gives quantiles of the next patch.
        context: rows that a model with patches was trained with; 0 if that is not known.
        scaled: location and scale of the series are inputs of their own.
        gaps: a model without patches takes missing values, too.
        streams: a model with patches carries states.
    """

    columns: int
    patch: int = 0
    context: int = 0
    scaled: bool = False
    gaps: bool = False
    streams: bool = False


def layout(io: IoSpec, context_length: int | None = None) -> Layout:
    """The layout that a run folder's model reads.

    Args:
        io: inputs and outputs of the run folder.
        context_length: positions it was trained with.

    Raises:
        UsageError: the model is not a forecaster: it has several inputs, or reads no real numbers.
    """
    spec, shape = io.inputs[0], io.outputs[0].shape
    scaled = is_scaled(io)
    real = len(io.inputs) == (3 if scaled else 1) and spec.dtype.startswith("float") and per_position(spec)
    size = spec.shape[3 - (spec.time_axis or 1)] if len(spec.shape) == 3 else 1
    runs = io.outputs[0].meaning.scaler == RUNNING
    patches = len(shape) == 4 and shape[1] == "S" and shape[3] == size and (scaled or runs or not io.states)
    if not real or len(spec.shape) > 3 or not isinstance(size, int) or (scaled and not patches):
        found = ", ".join(f"{x.name} {x.dtype} {list(x.shape)}" for x in io.inputs)
        raise UsageError(
            f"the model reads {found}", "a forecast needs one input of real numbers (B, S, F) or (B, S)"
        )
    if patches:
        return Layout(1, size, size * (context_length or 0), scaled, streams=scaled or runs)
    return Layout(size, gaps=spec.gaps)


def read_series(path: Path, form: Layout, columns: Sequence[str] | None = None) -> list[Table]:
    """The series of a CSV file, each with the columns that the model reads.

    A model of one column forecasts every column as a series of its own.

    Args:
        path: the file.
        form: layout, as from `layout`.
        columns: names of the columns to read, in the model's order; by default all of numbers.

    Raises:
        InputError: see `table.read_tables` and `Table.chosen`.
    """
    gaps = form.gaps or form.patch > 0
    found: list[Table] = []
    for table in read_tables(path):
        if form.columns > 1:
            found.append(table.chosen(form.columns, columns, gaps=gaps))
            continue
        names = tuple(columns or table.columns)
        if not names:
            raise InputError(f"{path} has no column of numbers", "give one column for each series")
        for name in names:
            title = " ".join(part for part in (table.name, name) if part) if len(names) > 1 else table.name
            found.append(replace(table.chosen(1, [name], gaps=gaps), name=title))
    return found


@dataclass(frozen=True)
class Forecast:
    """Forecast of the rows that follow the last one of a series.

    Attributes:
        series: the rows that were read.
        names: of the outputs: levels of quantiles ("q0.1"), columns, or "forecast".
        values: (ahead, outputs), a row per row ahead.
        quantiles: levels, one per output; empty where the outputs are none.
        times: of the rows ahead, as the file writes them; empty where it has no times at equal steps.
        how: how the rows were made, as a sentence.
        every: (rows, ahead, outputs), the forecast after each row; None if the model gives only the last, or
            if more than one call was needed.
        calls: number of calls that were needed.
        unit: of the values; empty where it is not known.
    """

    series: Table
    names: tuple[str, ...]
    values: np.ndarray
    quantiles: tuple[float, ...] = ()
    times: tuple[str, ...] = ()
    how: str = ""
    every: np.ndarray | None = None
    calls: int = 1
    unit: str = ""

    @property
    def median(self) -> int:
        """The output that is the likeliest course: the level nearest to 0.5, or the first."""
        return int(np.argmin([abs(level - 0.5) for level in self.quantiles])) if self.quantiles else 0

    def to_json(self) -> Json:
        """The forecast as plain values, NaN as null."""
        return {
            "series": self.name,
            "how": self.how,
            "times": list(self.times),
            "outputs": list(self.names),
            "unit": self.unit,
            "values": [[None if math.isnan(x) else x for x in row] for row in self.values.tolist()],
        }

    @property
    def name(self) -> str:
        """Name of the series, or of its first column."""
        return self.series.name or self.series.columns[0]


def forecast(
    session: Session, io: IoSpec, series: Table, form: Layout, horizon: int | None = None
) -> Forecast:
    """Forecast the rows after a series.

    Args:
        session: session of one stream, which begins afresh.
        io: inputs and outputs of the run folder.
        series: rows, as from `read_series`.
        form: layout, as from `layout`.
        horizon: rows ahead; by default as many as one call of the model gives.

    Raises:
        UsageError: the model cannot go on to the horizon.
    """
    session.reset()
    model = _Patches if form.patch else _Rows
    made = model(session, io, series, form).made(horizon)
    stamps = None if series.times is None else series.times.after(len(made.values))
    meaning = io.outputs[0].meaning
    if series.times is not None and stamps is not None:
        made = replace(made, times=series.times.text(stamps))
        step = series.times.step
        if meaning.seconds and step is not None and step.total_seconds() != meaning.seconds:
            note = (
                f"the model forecasts rows of {meaning.step} each, those of {series.source} are {step} apart"
            )
            made = replace(made, series=replace(series, notes=(*series.notes, note)))
    return replace(made, unit=meaning.unit)


def remarks(made: Sequence[Forecast]) -> list[str]:
    """What a user should know: how the files were read, and how each forecast was made; each once."""
    lines: dict[str, list[str]] = {}
    for one in made:
        for note in one.series.notes:
            lines.setdefault(note, [])
        lines.setdefault(one.how, []).append(one.name)
    return [
        f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}: {line}" if names else line
        for line, names in lines.items()
    ]


class _Rows:
    """A model whose positions are rows."""

    def __init__(self, session: Session, io: IoSpec, series: Table, form: Layout) -> None:
        self.session, self.series, self.columns = session, series, form.columns
        self.spec, self.output, self.states = io.inputs[0], io.outputs[0], bool(io.states)

    def made(self, horizon: int | None) -> Forecast:
        rows = self.series.values.astype(self.spec.dtype)
        every = self._call(rows)
        last, levels = every[-1], self.output.meaning.quantiles
        ahead, wanted = len(last), horizon or len(last)
        made = Forecast(self.series, self._names(last.shape[1]), last, levels)
        if wanted <= ahead:
            per_row = self.output.time_axis is not None and self.spec.steps == 1
            how = f"{wanted} {'' if wanted == ahead else f'of the {ahead} '}rows that one call gives"
            kept = every[:, :wanted] if per_row else None
            return replace(made, values=last[:wanted], how=how, every=kept)
        fed = self._fed(made, wanted)
        parts = [last]
        while len(parts) * ahead < wanted:
            back = parts[-1][:, fed].astype(rows.dtype)
            rows = back if self.states else np.concatenate([rows, back])
            parts.append(self._call(rows)[-1])
        way = "with the state carried on" if self.states else "behind the rows, which are read again"
        what = f"its {made.names[made.median]}" if levels else "its forecast"
        how = f"{len(parts)} calls of {ahead} row{'s' * (ahead > 1)}: the model is given {what}, {way}"
        if levels:
            how += "; later quantiles do not contain the uncertainty of what was given"
        return replace(made, values=np.concatenate(parts)[:wanted], how=how, calls=len(parts))

    def _fed(self, made: Forecast, wanted: int) -> list[int]:
        """The outputs that are given back as the next rows, one per column."""
        ahead, outputs = made.values.shape
        if self.columns == 1 and (made.quantiles or outputs == 1):
            fed = [made.median]
        elif self.columns == outputs and not made.quantiles:
            fed = list(range(outputs))
        else:
            fed = []
        if fed and ahead % self.spec.steps == 0:
            return fed
        reason = f"it reads {self.columns} columns" if not fed else f"it reads {self.spec.steps} rows at once"
        raise UsageError(
            f"the model forecasts {ahead} rows, and cannot be given its own forecast to reach {wanted}: "
            f"{reason}, and does not forecast all of that",
            f"--horizon {ahead} or less",
        )

    def _names(self, outputs: int) -> tuple[str, ...]:
        levels = self.output.meaning.quantiles
        if levels:
            return tuple(f"q{level:g}" for level in levels)
        if outputs == 1:
            return ("forecast",)
        if outputs == self.columns:
            return self.series.columns
        return tuple(f"forecast_{number}" for number in range(outputs))

    def _call(self, rows: np.ndarray) -> np.ndarray:
        """Rows (S, F) → forecasts (S, ahead, outputs); (1, ahead, outputs) where there is only the last."""
        spec, output = self.spec, self.output
        x = rows[None, len(rows) % spec.steps :]  # (1, S, F), whole steps of the stream
        x = np.moveaxis(x, 1, spec.time_axis or 1) if len(spec.shape) == 3 else x[..., 0]
        found = self.session.prefill({spec.name: x})[output.name]
        return np.stack([self._two_axes(row) for row in _by_position(found, output)])

    def _two_axes(self, value: np.ndarray) -> np.ndarray:
        """What the model gives after a position, as (ahead, outputs)."""
        levels = len(self.output.meaning.quantiles)
        if levels:
            axis = self.output.meaning.axis(self.output.shape) or 0
            before = [0, *([] if self.output.time_axis is None else [self.output.time_axis])]
            if self.output.time_axis is None and self.output.shape[1:2] == (1,):
                before.append(1)
            axis -= sum(other < axis for other in before)
            return np.moveaxis(value, axis, -1).reshape(-1, levels)
        if value.ndim == 0 or (value.ndim == 1 and len(value) == self.columns > 1):
            return value.reshape(1, -1)  # the next row
        return value.reshape(len(value), -1)


def _by_position(found: np.ndarray, output: TensorSpec) -> np.ndarray:
    """The output (1, ...) with its positions first; with one position where it has none."""
    if output.time_axis is not None:
        return np.moveaxis(found[0], output.time_axis - 1, 0)
    return found[0][-1:] if output.shape[1:2] == (1,) else found[:1]


class _Patches:
    """A model of patches of one column, which takes missing values (TiRex)."""

    def __init__(self, session: Session, io: IoSpec, series: Table, form: Layout) -> None:
        self.session, self.series, self.form = session, series, form
        self.spec, self.output = io.inputs[0], io.outputs[0]

    def made(self, horizon: int | None) -> Forecast:
        patch, levels = self.form.patch, self.output.meaning.quantiles
        wanted = horizon or patch
        count = -(-wanted // patch)
        rows = self.series.values[:, 0]
        if self.form.streams:
            parts, way = self._streamed(rows, count), "the state carried on"
        else:
            calls = (np.concatenate([rows, np.full(number * patch, np.nan)]) for number in range(count))
            parts = [self._last({self.spec.name: self._context(each)}) for each in calls]
            way = "the context read again for each"
        values = np.concatenate(parts)[:wanted]  # (ahead, Q)
        names = tuple(f"q{level:g}" for level in levels)
        names = names or tuple(f"forecast_{number}" for number in range(values.shape[1]))
        how = f"{wanted} of the {patch} rows of a patch"
        if count > 1:
            how = f"{count} patches of {patch} rows rolled out as missing values, {way}"
        if self.output.meaning.scaler == RUNNING:
            how += "; each patch is scaled with the values until then, not with those of the whole context"
        return Forecast(self.series, names, values, levels, how=how)

    def _streamed(self, rows: np.ndarray, count: int) -> list[np.ndarray]:
        context = self._context(rows)
        scales = {}
        if self.form.scaled:
            both = location_and_scale(context, self.output.meaning.scaler)
            scales = {n: np.array([[x]], context.dtype) for n, x in zip(SCALES, both, strict=True)}
        missing = np.full((1, 1, self.form.patch), np.nan, context.dtype)
        calls = [context, *[missing] * (count - 1)]
        return [self._last({self.spec.name: x, **scales}) for x in calls]

    def _last(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The forecast after the last patch, (P, Q)."""
        return np.array(self.session.prefill(inputs)[self.output.name][0, -1].T)

    def _context(self, values: np.ndarray) -> np.ndarray:
        """The end of a series as patches (1, S, P), padded in front with missing values."""
        patch = self.form.patch
        rows = self.form.context or -(-len(values) // patch) * patch
        values = values[-rows:].astype(self.spec.dtype)
        padded = np.concatenate([np.full(rows - len(values), np.nan, values.dtype), values])
        return padded.reshape(1, -1, patch)
