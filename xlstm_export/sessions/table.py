"""Tables of numbers: the one reader of CSV files, on a workstation and on a board.

It takes files as spreadsheets, pandas and loggers write them: commas, semicolons or tabs; decimal points or
decimal commas; UTF-8, UTF-16 or Latin-1; with or without a header; times, row numbers and names beside the
numbers; words for gaps; several series side by side, or one below the other.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from .times import Times, is_time, read_times

_WORDS = "na n/a #n/a #na nan -nan <na> null none nil nd missing ? - -- . .."
GAPS = frozenset(("", *_WORDS.split()))
DELIMITERS = (";", "\t", ",", "|")  # where several fit, the first: with a semicolon a comma is a decimal one
PICTURE = "give a table as text: .csv with one row per position and one column per value"
SNIFFED = 200  # lines that decide on the delimiter
MOST_INSERTED = 0.5  # share of rows that the file lacks, beyond which its step is not its own
UNNAMED = ("", "unnamed: 0")  # names of a column without one
CLOCK = re.compile(r"\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?")
_POINT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d*),\d+([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Table:
    """One series of a file: rows in the order of time, and columns of numbers.

    Attributes:
        source: path of the file, for messages.
        columns: names of the columns of numbers.
        values: (rows, columns) float64; NaN where there is a gap.
        lines: of the file, one per row; 0 for a row that was inserted.
        cells: the text of the cells that hold no finite number, by row and column.
        times: times of the rows; None if the file has none.
        labels: text of the rows, such as their times; empty if there is no such column.
        name: of the series, where the file has several below each other.
        left: names of the columns that hold no numbers.
        notes: what a user should know about how the file was read.
    """

    source: str
    columns: tuple[str, ...]
    values: np.ndarray
    lines: tuple[int, ...]
    cells: dict[tuple[int, int], str]
    times: Times | None = None
    labels: tuple[str, ...] = ()
    name: str = ""
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def ahead(self, count: int) -> tuple[str, ...]:
        """Labels of the `count` rows behind the last: times at the series' own step, else +1, +2, ..."""
        stamps = None if self.times is None else self.times.after(count)
        if self.times is None or stamps is None:
            return tuple(f"+{step}" for step in range(1, count + 1))
        return self.times.text(stamps)

    def chosen(self, count: int | None, columns: Sequence[str] | None = None, *, gaps: bool = False) -> Table:
        """The columns that a model reads, in its order.

        Args:
            count: number of columns that the model reads; None for any.
            columns: their names; by default all columns of numbers, which must be `count`.
            gaps: the model takes NaN; rows that the file lacks are then inserted as such.

        Raises:
            InputError: a column is missing, there are more or fewer than `count`, or a cell is no number.
        """
        names = list(columns) if columns else list(self.columns)
        for name in names:
            if name not in self.columns:
                kind = "which holds no numbers" if name in self.left else f"it has {', '.join(self.columns)}"
                raise InputError(f"{self.source} has no column {name} of numbers", kind)
        if count is not None and len(names) != count:
            raise InputError(
                f"{self.source} has {len(names)} columns of numbers ({', '.join(names)}), the model reads "
                f"{count}",
                "one column per channel, in the model's order; columns of text are left out",
            )
        places = [self.columns.index(name) for name in names]
        for (row, place), cell in sorted(self.cells.items()):
            if place in places and not (gaps and cell.lower() in GAPS):
                raise InputError(
                    f"{self.source}, line {self.lines[row]}, column {self.columns[place]}: "
                    f"{cell or 'an empty cell'} is no finite number",
                    "the model takes no gaps: fill them, for example with the value before"
                    if cell.lower() in GAPS
                    else "numbers are written like 1.5 or 1e-3; or leave the column out",
                )
        cells = {(row, places.index(at)): cell for (row, at), cell in self.cells.items() if at in places}
        made = replace(self, columns=tuple(names), values=self.values[:, places], cells=cells)
        return made._filled() if gaps else made._warned()

    def _filled(self) -> Table:
        """With the rows that the file lacks, as gaps."""
        if self.times is None or self.times.regular or self.times.step is None:
            return self._warned()
        stamps, step = self.times.stamps, np.timedelta64(self.times.step)
        places, odd = np.divmod((stamps - stamps[0]).astype(np.int64), step.astype("m8[us]").astype(np.int64))
        count = int(places[-1]) + 1
        fits = (np.diff(places) > 0).all() and not odd.any()
        if not fits or count - len(stamps) > MOST_INSERTED * count:
            return self._warned()
        values, lines = np.full((count, len(self.columns)), np.nan), np.zeros(count, int)
        values[places], lines[places] = self.values, self.lines
        whole = replace(self.times, stamps=stamps[0] + step * np.arange(count))
        return replace(
            self,
            values=values,
            lines=tuple(lines.tolist()),
            cells={(int(places[row]), at): cell for (row, at), cell in self.cells.items()},
            times=whole,
            labels=whole.text(whole.stamps),
            notes=(*self.notes, f"{count - len(stamps)} rows that {self.source} lacks were taken as gaps"),
        )

    def _warned(self) -> Table:
        if self.times is None or self.times.regular or len(self.lines) < 3:
            return self
        note = f"the times in {self.source} are not at equal steps; the model sees row after row"
        return replace(self, notes=(*self.notes, note))


def read_table(path: Path) -> Table:
    """The only series of a file.

    Raises:
        InputError: as `read_tables`, or there are several below each other.
    """
    tables = read_tables(path)
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables[:5])
        raise InputError(
            f"{path} holds {len(tables)} series below each other ({names})", "give a file with one of them"
        )
    return tables[0]


def read_tables(path: Path) -> tuple[Table, ...]:
    """The series of a CSV file: one, with a column per value; or several that lie below each other.

    Raises:
        InputError: the file is missing, no text, or no table.
    """
    text, notes = read_lines(path)
    file = _parsed(path, text)
    columns = [[row[at] for row in file.rows] for at in range(len(file.header))]
    times = _times(file.header, columns)
    kinds = {at: "time" for at in times}  # of the columns that hold no numbers of the model
    for at, name in enumerate(file.header):
        if name.lower() in UNNAMED and (not any(columns[at]) or _counts(columns[at])):
            kinds[at] = "none"  # behind a delimiter at the end of each line; row numbers that pandas writes
    rest = {at: cells for at, cells in enumerate(columns) if at not in kinds}
    point = _decimal_point(path, file, rest)
    texts = [at for at, cells in rest.items() if _is_text(cells, point)]
    numbers = [at for at in rest if at not in texts]
    values, odd = np.empty((len(file.rows), len(numbers))), {}
    for place, at in enumerate(numbers):
        for row, cell in enumerate(columns[at]):
            value = _number(cell, point)
            values[row, place] = math.nan if value is None else value
            if value is None:
                odd[row, place] = cell
    stamps = next(iter(times.values()), None)
    if stamps is None and texts and all(map(is_time, columns[texts[0]])):
        open_ = f"which are days and which months in column {file.header[texts[0]]} is open: write 2024-01-31"
        notes = (*notes, open_)
    label = next(iter(times), next(iter(texts), None))
    whole = Table(
        str(path),
        tuple(file.header[at] for at in numbers),
        values,
        file.lines,
        odd,
        stamps,
        ()
        if label is None
        else stamps.text(stamps.stamps)
        if stamps and len(times) > 1
        else tuple(columns[label]),
        left=tuple(file.header[at] for at in sorted((*kinds, *texts)) if file.header[at]),
        notes=notes,
    )
    groups = _groups([columns[at] for at in texts], whole)
    return tuple(_ordered(_rows(whole, rows, name)) for name, rows in groups.items())


def read_lines(path: Path) -> tuple[str, tuple[str, ...]]:
    """The text of a file in the encoding it has, and notes on that.

    Raises:
        InputError: it is missing, a folder, or no text.
    """
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {kind}", PICTURE)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", PICTURE) from error
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16"), ()
        if b"\0" in content or content.startswith((b"PK\x03\x04", b"\x1f\x8b")):
            raise InputError(
                f"{path} is no text, whatever its name says", "save it as CSV, or unpack it first"
            )
        return content.decode("utf-8-sig"), ()
    except UnicodeDecodeError:
        return content.decode("latin-1"), (f"{path} is not UTF-8 and was read as Latin-1",)


@dataclass(frozen=True)
class _File:
    """Cells of a file: the names of its columns, its rows, and the line of each row."""

    header: list[str]
    rows: list[list[str]]
    lines: tuple[int, ...]
    delimiter: str


def _parsed(path: Path, text: str) -> _File:
    body = list(io.StringIO(text, newline=None))
    first = body[0].strip().lower() if body else ""
    given = first[4:5] if first.startswith("sep=") else ""  # a line of spreadsheets
    start = int(bool(given))
    comments = 0
    while start + comments < len(body) and body[start + comments].lstrip().startswith("#"):
        comments += 1
    start += comments
    delimiter = given or _delimiter(body[start : start + SNIFFED])
    try:
        reader = csv.reader(body[start:], delimiter=delimiter, skipinitialspace=True)
        found = [
            (start + reader.line_num, [cell.strip().replace("\u2212", "-") for cell in row]) for row in reader
        ]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable .csv file: {error}", PICTURE) from error
    found = [(line, row) for line, row in found if any(row)]
    named = bool(found) and not _is_row(found[0][1])
    if named:
        header = found.pop(0)[1]
    if not found:
        raise InputError(f"{path} holds no rows{' below its header' * named}", PICTURE)
    if not named:
        header = [f"column_{at + 1}" for at in range(len(found[0][1]))]
        above = [cell.strip() for cell in body[start - 1].strip(" #\n").split(delimiter)] if comments else []
        if len(above) == len(header) and not _is_row(above):  # as numpy.savetxt writes a header
            header = above
    for line, row in found:
        while len(row) > len(header) and not row[-1]:  # a delimiter at the end of each line
            row.pop()
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(row)} cells, the header has {len(header)}",
                "every row has a cell for each column; an empty one is a gap",
            )
    return _File(header, [row for _, row in found], tuple(line for line, _ in found), delimiter)


def _delimiter(lines: Sequence[str]) -> str:
    """The delimiter that gives all lines the same number of cells; else that of most cells in the first."""
    lines = [line for line in lines if line.strip()]
    counts = {}
    for delimiter in DELIMITERS:
        try:
            rows = [len(row) for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
        except csv.Error:
            continue
        if rows and rows[0] > 1:
            if len(set(rows)) == 1:
                return delimiter
            counts[delimiter] = rows[0]
    if "," in counts and all(_COMMA.fullmatch(line.strip()) for line in lines[1:]):
        return ";"  # one column of decimal commas below a name
    return max(counts, key=lambda key: counts[key]) if counts else ";"


def _is_row(cells: Sequence[str]) -> bool:
    """Whether a first line is one of values already, not of names."""
    values = [cell for cell in cells if cell.lower() not in GAPS]
    plain = [c for c in values if any(_number(c, point) is not None for point in (True, False))]
    if not plain:
        return False
    # Beside a text, whole numbers are names: pandas numbers columns, and stations have numbers.
    fractions = any(not cell.isdecimal() for cell in plain)
    return fractions or len(plain) + sum(map(is_time, values)) >= len(values)


def _times(header: Sequence[str], columns: Sequence[Sequence[str]]) -> dict[int, Times]:
    """The columns of times; one of dates and one of clock times beside it are one."""
    found: dict[int, Times] = {}
    for at, (name, cells) in enumerate(zip(header, columns, strict=True)):
        clock = columns[at + 1] if at + 1 < len(columns) else []
        if clock and not any(":" in cell for cell in cells) and all(map(CLOCK.fullmatch, clock)):
            both = read_times([f"{day} {time}" for day, time in zip(cells, clock, strict=True)], name)
            if both is not None:
                return {at: both, at + 1: both}
        if (times := read_times(cells, name)) is not None:
            found[at] = times
    return found


def _decimal_point(path: Path, file: _File, columns: Mapping[int, Sequence[str]]) -> bool:
    """Whether numbers have a decimal point, not a decimal comma; a file has one of them.

    Raises:
        InputError: it has both.
    """
    commas = [cell for cells in columns.values() for cell in cells if "," in cell and _COMMA.fullmatch(cell)]
    if file.delimiter == "," and all(len(cell.rpartition(",")[2]) == 3 for cell in commas):
        return True  # "1,234" may be a thousand and something
    for at, cells in columns.items():
        for row, cell in enumerate(cells):
            if commas and cell not in GAPS and "." in cell and _POINT.fullmatch(cell):
                raise InputError(
                    f"{path}, line {file.lines[row]}, column {file.header[at]}: {cell} has a decimal point, "
                    f"{commas[0]} elsewhere a decimal comma",
                    "write all numbers in one way",
                )
    return not commas


def _number(cell: str, point: bool) -> float | None:
    """A finite number, or None."""
    if _POINT.fullmatch(cell):
        value = float(cell)
    elif not point and _COMMA.fullmatch(cell):
        value = float(cell.replace(".", "").replace(",", "."))
    else:
        return None
    return value if math.isfinite(value) else None


def _counts(cells: Sequence[str]) -> bool:
    return list(cells) in ([str(row + first) for row in range(len(cells))] for first in (0, 1))


def _is_text(cells: Sequence[str], point: bool) -> bool:
    """Whether a column is text: it has other cells than gaps, and none of them is a number."""
    values = [cell.lower() for cell in cells if cell.lower() not in GAPS]
    return bool(values) and all(
        _number(cell, point) is None and cell.lstrip("+-") not in ("inf", "infinity") for cell in values
    )


def _groups(texts: Sequence[Sequence[str]], table: Table) -> dict[str, list[int]]:
    """Rows by series: a file has several where times come again, with another name in a column of text."""
    stamps = table.times.stamps if table.times is not None else np.arange(len(table.lines))
    if len(np.unique(stamps)) < len(stamps):
        for names in texts:
            groups: dict[str, list[int]] = {}
            for row, name in enumerate(names):
                groups.setdefault(name, []).append(row)
            if all(len(np.unique(stamps[rows])) == len(rows) for rows in groups.values()):
                return groups
    return {"": list(range(len(stamps)))}


def _rows(table: Table, rows: Sequence[int], name: str) -> Table:
    """Some rows of a table, as a series of that name."""
    new = {row: at for at, row in enumerate(rows)}
    return replace(
        table,
        values=table.values[list(rows)],
        lines=tuple(table.lines[row] for row in rows),
        cells={(new[row], at): cell for (row, at), cell in table.cells.items() if row in new},
        times=None if table.times is None else replace(table.times, stamps=table.times.stamps[list(rows)]),
        labels=tuple(table.labels[row] for row in rows) if table.labels else (),
        name=name,
    )


def _ordered(table: Table) -> Table:
    """A series that begins with its newest row is turned round."""
    steps = np.diff(table.times.stamps).astype(np.int64) if table.times is not None else np.zeros(0)
    if len(steps) < 1 or not (steps < 0).all():
        return table
    turned = _rows(table, range(len(table.lines) - 1, -1, -1), table.name)
    return replace(
        turned, notes=(*table.notes, f"{table.source} begins with its newest row; it was turned round")
    )
