"""Forecasts as CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from ..atomic import write_text
from ..errors import UsageError
from .forecast import Forecast


def write_csv(made: Sequence[Forecast], path: Path, *, every: bool = False) -> None:
    """Write forecasts as CSV, one row per row ahead; with `every`, one row per row of the input.

    Where there are several series, the first column has their names.

    Raises:
        UsageError: `every` is set, and the model gives one forecast per call.
        SetupError: the file cannot be written.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    several = len(made) > 1
    for number, one in enumerate(made):
        head, *rows = _every(one) if every else _ahead(one)
        if number == 0:
            writer.writerow(["series", *head] if several else head)
        writer.writerows([one.name, *row] if several else row for row in rows)
    write_text(path, stream.getvalue())


def _ahead(made: Forecast) -> list[list[str]]:
    """Header and rows: how far ahead, the time where it is known, and the outputs."""
    timed = [[time] for time in made.times] or [[]] * len(made.values)
    rows = zip(range(1, len(made.values) + 1), timed, made.values.tolist(), strict=True)
    head = ["ahead", *(["time"] if made.times else []), *made.names]
    return [head, *([str(ahead), *time, *map(_number, values)] for ahead, time, values in rows)]


def _every(made: Forecast) -> list[list[str]]:
    """Header and rows: the forecast after each row of the input."""
    if made.every is None:
        if made.calls > 1:
            ahead = -(-len(made.values) // made.calls)
            raise UsageError(
                f"forecasts after each row are those of one call; {len(made.values)} rows need {made.calls}",
                f"run without --every, or without --horizon: one call gives {ahead} rows or more",
            )
        raise UsageError("the model gives one forecast per call", "run without --every")
    _, ahead, outputs = made.every.shape
    plain = outputs == 1
    names = [f"ahead_{a}" if plain else f"ahead_{a}_{n}" for a in range(1, ahead + 1) for n in made.names]
    names = list(dict.fromkeys(names))
    labels = made.series.labels or tuple(str(number + 1) for number in range(len(made.every)))
    rows = zip(labels, made.every.reshape(len(made.every), -1).tolist(), strict=True)
    return [["row", *names], *([label, *map(_number, values)] for label, values in rows)]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
