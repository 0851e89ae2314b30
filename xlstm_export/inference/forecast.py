"""Forecasts from a CSV file with one row per position."""

from __future__ import annotations

import csv
import io as text_io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..atomic import write_text
from ..errors import InputError, UsageError
from ..inputs import per_position
from ..plot.figures import Line, LinePlot
from ..plot.file import require_svg, svg_file
from ..sessions.protocol import Session
from ..specs import IoSpec

HISTORY = 168  # rows before the forecast that the plot shows
WIDTH = 860  # px of the plot
GREY, BLUE = 7, 0  # its colours


@dataclass(frozen=True)
class Series:
    """The rows of a CSV file.

    Attributes:
        columns: names of the columns the model reads, in its order.
        values: (rows, columns) float64.
        labels: text of the label column, one per row, such as a time; empty if there is no such column.
    """

    columns: tuple[str, ...]
    values: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """Forecast of the rows that follow the last one.

    Attributes:
        series: the rows that were read.
        values: (ahead, outputs): a row per position ahead, a column per quantile or variable.
        every: (rows, ahead, outputs), the forecast after each row; None if the model gives only the last.
    """

    series: Series
    values: np.ndarray
    every: np.ndarray | None


def read_series(
    path: Path, count: int, columns: Sequence[str] | None = None, *, gaps: bool = False
) -> Series:
    """Read a CSV file with a header.

    Args:
        path: the file; a first column that holds no numbers labels the rows.
        count: number of columns that the model reads.
        columns: their names in the model's order; by default all but the label, which must be `count`.
        gaps: an empty cell is a missing value, NaN.

    Raises:
        InputError: the file cannot be read, a column is missing, or a cell is not a number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a CSV file with a header") from error
    if len(lines) < 2:
        raise InputError(f"{path} holds no rows below its header", "give at least one")
    header = [name.strip() for name in lines[0][1]]
    rows = [row for _, row in lines[1:]]
    labelled = _number(rows[0][0]) is None and header[0] not in (columns or ())
    chosen = list(columns) if columns else header[labelled:]
    unknown = [name for name in chosen if name not in header]
    if unknown:
        raise InputError(f"{path} has no column {unknown[0]}", f"it has {', '.join(header)}")
    if len(chosen) != count:
        raise InputError(
            f"{path}: {len(chosen)} columns ({', '.join(chosen)}), the model reads {count}",
            "name them in the model's order with --columns",
        )
    places = [header.index(name) for name in chosen]
    values = np.empty((len(rows), count))
    for number, (line, row) in enumerate(lines[1:]):
        if len(row) != len(header):
            raise InputError(f"{path}, line {line}: {len(row)} cells, the header has {len(header)}")
        for place, name in enumerate(chosen):
            cell = row[places[place]].strip()
            value = math.nan if gaps and not cell else _number(cell)
            if value is None:
                raise InputError(
                    f"{path}, line {line}, column {name}: {row[places[place]]!r} is no number",
                    "fill gaps before forecasting",
                )
            values[number, place] = value
    return Series(tuple(chosen), values, tuple(row[0] for row in rows) if labelled else ())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Layout:
    """How a forecaster reads a series.

    Attributes:
        columns: number of columns that are read at once.
        patch: rows per position of the model; 0 if each row is a position. A model with patches (TiRex) reads
            one column, accepts gaps, and gives quantiles of the next patch.
        context: rows per call of a model with patches; 0 if any number is accepted.
    """

    columns: int
    patch: int = 0
    context: int = 0


def layout(io: IoSpec, context_length: int | None = None) -> Layout:
    """The layout that a run folder's model reads.

    Args:
        io: inputs and outputs of the run folder.
        context_length: positions it was trained with.

    Raises:
        UsageError: the model is not a forecaster: it has several inputs, or reads no real numbers.
    """
    spec, shape = io.inputs[0], io.outputs[0].shape
    real = len(io.inputs) == 1 and spec.dtype.startswith("float") and per_position(spec)
    size = spec.shape[3 - (spec.time_axis or 1)] if len(spec.shape) == 3 else 1
    if not real or len(spec.shape) > 3 or not isinstance(size, int):
        found = ", ".join(f"{x.name} {x.dtype} {list(x.shape)}" for x in io.inputs)
        raise UsageError(
            f"the model reads {found}",
            "`forecast` needs one input of real numbers (B, S, F) or (B, S); export TiRex as stateless",
        )
    if len(shape) == 4 and shape[1] == "S" and shape[3] == size and not io.states:
        return Layout(1, size, size * (context_length or 0))
    return Layout(size)


def forecast(session: Session, io: IoSpec, series: Series, form: Layout) -> Forecast:
    """Forecast the rows after a series.

    Args:
        session: session of one stream; its state is updated.
        io: inputs and outputs of the run folder.
        series: rows, as from `read_series`.
        form: layout, as from `layout`.
    """
    spec, output = io.inputs[0], io.outputs[0]
    values = series.values.astype(spec.dtype)
    if form.patch:
        last = session.prefill({spec.name: _patches(values[:, 0], form)})[output.name][0, -1]  # (Q, P)
        return Forecast(series, last.T, None)
    x = values[None, len(values) % spec.steps :]  # (1, S, F), whole steps of the stream
    x = np.moveaxis(x, 1, spec.time_axis or 1) if len(spec.shape) == 3 else x[..., 0]
    found = session.prefill({spec.name: x})[output.name][0]
    if output.time_axis is not None:
        found = np.moveaxis(found, output.time_axis - 1, 0)
        if spec.steps > 1:  # a position of the model is not a row of the series
            return Forecast(series, _two_axes(found[-1]), None)
    else:
        last = found[-1] if output.shape[1:2] == (1,) else found
        return Forecast(series, _two_axes(last), None)
    every = np.stack([_two_axes(row) for row in found])
    return Forecast(series, every[-1], every)


def _patches(values: np.ndarray, form: Layout) -> np.ndarray:
    """The end of a series as patches (1, S, P), padded in front with missing values."""
    rows = form.context or -(-len(values) // form.patch) * form.patch
    values = values[-rows:]
    padded = np.concatenate([np.full(rows - len(values), np.nan, values.dtype), values])
    return padded.reshape(1, -1, form.patch)


def _two_axes(values: np.ndarray) -> np.ndarray:
    """An output of the model in the shape (ahead, outputs)."""
    return values.reshape(values.shape[0], -1) if values.ndim else values.reshape(1, 1)


def write_csv(made: Forecast, path: Path, *, every: bool = False) -> None:
    """Write the forecast as CSV, one row per position ahead; with `every`, one row per row of the input.

    Raises:
        UsageError: `every` is set, and the model gives one forecast per call.
        SetupError: the file cannot be written.
    """
    stream = text_io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    outputs = made.values.shape[1]
    if not every:
        writer.writerow(
            ["ahead", *(["forecast"] if outputs == 1 else [f"forecast_{i}" for i in range(outputs)])]
        )
        for ahead, values in enumerate(made.values, 1):
            writer.writerow([ahead, *(f"{value:.6g}" for value in values)])
    else:
        if made.every is None:
            raise UsageError("the model gives one forecast per call", "run without --every")
        steps = range(1, made.values.shape[0] + 1)
        names = [f"ahead_{a}" if outputs == 1 else f"ahead_{a}_{i}" for a in steps for i in range(outputs)]
        writer.writerow(["row", *names])
        labels = made.series.labels or tuple(str(number + 1) for number in range(len(made.every)))
        for label, values in zip(labels, made.every, strict=True):
            writer.writerow([label, *(f"{value:.6g}" for value in values.ravel())])
    write_text(path, stream.getvalue())


def plot(made: Forecast, path: Path, target: str | None = None) -> None:
    """Write a plot of the end of a column and its forecast. The same forecast gives the same bytes.

    Args:
        made: forecast, as from `forecast`.
        path: .svg file to write.
        target: the column that is forecast; by default the first.

    Raises:
        UsageError: the column is unknown, or the path has another suffix.
        SetupError: the file cannot be written.
    """
    require_svg(path)
    columns = made.series.columns
    if target is not None and target not in columns:
        raise UsageError(f"no column {target}", f"there are {', '.join(columns)}")
    name = target or columns[0]
    past = [float(value) for value in made.series.values[-HISTORY:, columns.index(name)]]
    ahead, outputs = made.values.shape
    read = Line(name, tuple(float(x) for x in range(1 - len(past), 1)), tuple(past), colour=GREY)
    steps = tuple(float(x) for x in range(ahead + 1))
    lines = [
        Line(
            "" if output else "forecast", steps, (past[-1], *map(float, made.values[:, output])), colour=BLUE
        )
        for output in range(outputs)
    ]
    figure = LinePlot(
        f"{name}: the last {len(past)} rows and the forecast",
        f"{ahead} positions ahead of the last row, {outputs} value{'s' if outputs > 1 else ''} each.",
        "positions from the last row",
        name,
        (read, *lines),
        log=False,
        x_mark=0.0,
    )
    write_text(path, svg_file("", (figure,), WIDTH))
