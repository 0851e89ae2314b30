"""Times as people write them in tables: read, their step found, and continued in the same form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

# Names under which plain integers are times: seconds since 1970, or 20240131.
NAMES = ("time", "timestamp", "date", "datetime", "day", "ds", "unix", "epoch", "unix_time", "unixtime", "ts")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_SECONDS = r"(?::(?P<S>\d{2})(?:[.,](?P<f>\d{1,9}))?)?"
_CLOCK = rf"(?:(?P<gap>[ T]+|, )(?P<H>\d{{1,2}}):(?P<M>\d{{2}}){_SECONDS} ?(?P<p>[AaPp][Mm])?)?"
_ZONE = r"(?P<zone> ?(?:Z|UTC|GMT|[+-]\d{2}:?\d{2}|[+-]\d{2}))?"
_YEAR_FIRST = re.compile(
    rf"(?P<Y>\d{{4}})(?P<sep>[-/.])(?P<a>\d{{1,2}})(?:(?P=sep)(?P<b>\d{{1,2}}))?{_CLOCK}{_ZONE}"
)
_YEAR_LAST = re.compile(
    rf"(?P<a>\d{{1,2}})(?P<sep>[-/.])(?P<b>\d{{1,2}})(?P=sep)(?P<Y>\d{{4}}|\d{{2}}){_CLOCK}{_ZONE}"
)
_NAMED = re.compile(
    rf"(?P<a>\d{{1,2}})(?P<sep>[- ])(?P<b>[A-Za-z]{{3}})(?P=sep)(?P<Y>\d{{4}}){_CLOCK}{_ZONE}"
)
_COMPACT = re.compile(r"(?P<Y>\d{4})(?P<a>\d{2})(?P<b>\d{2})(?:T?(?P<H>\d{2})(?P<M>\d{2})(?P<S>\d{2})?)?")
ORDERS = ("dm", "md")  # of 01/02/2024; which of them it is, a whole column says
EPOCH = datetime(1970, 1, 1)
UNITS = {9: 1_000_000, 10: 1_000_000, 12: 1000, 13: 1000, 16: 1, 19: 0}  # digits → microseconds; 0: ns


@dataclass(frozen=True)
class Times:
    """A column of times.

    Attributes:
        stamps: (rows,) datetime64[us]; where the file names an offset from UTC, in UTC.
        pattern: how the file writes them, for `strftime`; "epoch" for seconds since 1970 and their parts.
        zone: what the file writes behind each, such as "Z" or "+01:00".
        offset: minutes of that zone.
        unit: microseconds per unit of an epoch; 0 for nanoseconds.
    """

    stamps: np.ndarray
    pattern: str
    zone: str = ""
    offset: int = 0
    unit: int = 1_000_000

    @property
    def months(self) -> int:
        """Months from row to row, for monthly, quarterly and yearly series; 0 for any other step."""
        stamps = self.stamps
        month = stamps.astype("datetime64[M]")
        day = stamps - month
        last = (month + 1).astype("datetime64[D]").astype(stamps.dtype) - stamps <= np.timedelta64(1, "D")
        steps = np.diff(month.astype(np.int64))
        if not len(steps) or (steps != steps[0]).any() or not ((day == day[0]).all() or last.all()):
            return 0
        return max(int(steps[0]), 0)

    @property
    def step(self) -> timedelta | None:
        """From row to row: the one that most rows have; None if there is none, or months that differ."""
        steps = np.diff(self.stamps).astype(np.int64)
        if not len(steps):
            return None
        values, counts = np.unique(steps, return_counts=True)
        usual = int(values[counts.argmax()])
        if usual <= 0 or 2 * counts.max() < len(steps):
            return None
        return timedelta(microseconds=usual)

    @property
    def regular(self) -> bool:
        """Whether all rows have the same step, or the same number of months."""
        return self.months > 0 or (self.step is not None and len(np.unique(np.diff(self.stamps))) == 1)

    def after(self, count: int) -> np.ndarray | None:
        """The times of the `count` rows behind the last, datetime64[us]; None without a step."""
        last, rows = self.stamps[-1], np.arange(1, count + 1)
        if not self.months:
            return None if self.step is None else np.asarray(last + np.timedelta64(self.step) * rows)
        month, day = last.astype("datetime64[M]"), last.astype("datetime64[D]")
        ahead = month + self.months * rows
        longest = (ahead + 1).astype("datetime64[D]") - ahead.astype("datetime64[D]") - np.timedelta64(1, "D")
        ends = (month + 1).astype("datetime64[D]") - day == np.timedelta64(1, "D")
        days = longest if ends else np.minimum(day - month.astype("datetime64[D]"), longest)
        return np.asarray(ahead.astype("datetime64[us]") + days + (last - day))

    def text(self, stamps: np.ndarray) -> tuple[str, ...]:
        """Times as the file writes them."""
        moved = (stamps + np.timedelta64(self.offset, "m")).astype("datetime64[us]")
        if self.pattern == "epoch":
            whole = moved.astype(np.int64)
            return tuple(str(int(x) // self.unit if self.unit else int(x) * 1000) for x in whole)
        return tuple(x.strftime(self.pattern) + self.zone for x in moved.tolist())


def read_times(cells: Sequence[str], name: str) -> Times | None:
    """A column of a table as times; None if it is something else, or its order of day and month is open.

    Args:
        cells: one per row, without surrounding spaces.
        name: of the column: integers are times only where it says so.
    """
    if not cells or not all(cells):
        return None
    if all(cell.isdecimal() and cell.isascii() for cell in cells):
        return _numbers(cells) if name.strip().lower() in NAMES else None
    candidates = [found for order in ORDERS if (found := _column(cells, order)) is not None]
    if len(candidates) == 2 and (candidates[0].stamps != candidates[1].stamps).any():
        steady = [
            found for found in candidates if found.regular and (found.step or timedelta(1)) > timedelta()
        ]
        return steady[0] if len(steady) == 1 else None
    return candidates[0] if candidates else None


def is_time(cell: str) -> bool:
    """Whether a cell could be a time, in some order of day and month."""
    return any(_column([cell], order) is not None for order in ORDERS)


def _column(cells: Sequence[str], order: str) -> Times | None:
    stamps, widest, zones = [], None, set()
    for cell in cells:
        parts = _YEAR_FIRST.fullmatch(cell) or _YEAR_LAST.fullmatch(cell) or _NAMED.fullmatch(cell)
        if parts is None or (stamp := _stamp(parts, order)) is None:
            return None
        stamps.append(stamp)
        zones.add(parts["zone"] or "")
        if widest is None or len(cell) > len(widest.group()):
            widest = parts
    assert widest is not None
    values = np.array(stamps, "datetime64[us]")
    zone = zones.pop() if len(zones) == 1 else "+00:00"
    return Times(values, _pattern(widest, order), zone, _offset(zone))


def _stamp(parts: re.Match[str], order: str) -> datetime | None:
    found = parts.groupdict()
    first, second = found["a"], found["b"] or "1"
    if not second.isdigit():
        if second.lower() not in MONTHS:
            return None
        day, month = int(first), MONTHS.index(second.lower()) + 1
    elif len(found["Y"]) == 4 and parts.start("Y") == 0:
        month, day = int(first), int(second)
    else:
        if found["sep"] == "." and order != "dm":
            return None
        day, month = (int(first), int(second)) if order == "dm" else (int(second), int(first))
    year, hour = int(found["Y"]), int(found["H"] or 0)
    year += 2000 if len(found["Y"]) == 2 else 0
    if found["p"]:
        hour = hour % 12 + 12 * (found["p"].lower() == "pm")
    fraction = int((found["f"] or "0").ljust(6, "0")[:6])
    try:
        late = timedelta(days=1) if hour == 24 else timedelta()  # 24:00 is the end of a day
        made = datetime(year, month, day, hour % 24, int(found["M"] or 0), int(found["S"] or 0), fraction)
        return made + late - timedelta(minutes=_offset(found["zone"] or ""))
    except (ValueError, OverflowError):
        return None


def _offset(zone: str) -> int:
    """Minutes ahead of UTC of a written zone."""
    digits = zone.strip().lstrip("+-").replace(":", "")
    if not digits.isdigit():
        return 0
    minutes = int(digits[:2]) * 60 + int(digits[2:] or 0)
    return -minutes if "-" in zone else minutes


def _pattern(parts: re.Match[str], order: str) -> str:
    found = parts.groupdict()
    sep, year = found["sep"], "%Y" if len(found["Y"]) == 4 else "%y"
    if parts.start("Y") == 0:
        day = sep.join(["%Y", "%m", *(["%d"] if found["b"] else [])])
    elif not found["b"].isdigit():
        day = sep.join(["%d", "%b", "%Y"])
    else:
        day = sep.join([*(("%d", "%m") if order == "dm" else ("%m", "%d")), year])
    if not found["H"]:
        return day
    clock = (
        ("%I" if found["p"] else "%H") + ":%M" + (":%S" if found["S"] else "") + (".%f" if found["f"] else "")
    )
    return day + found["gap"] + clock + (" %p" if found["p"] else "")


def _numbers(cells: Sequence[str]) -> Times | None:
    """20240131, 20240131T1200 without its T, or a number of seconds, ms, µs or ns since 1970."""
    digits = {len(cell) for cell in cells}
    if digits <= {8, 12, 14} and all((parts := _COMPACT.fullmatch(cell)) and _plain(parts) for cell in cells):
        stamps = [_plain(parts) for cell in cells if (parts := _COMPACT.fullmatch(cell))]
        pattern = "%Y%m%d" + {8: "", 12: "%H%M", 14: "%H%M%S"}[max(digits)]
        return Times(np.array(stamps, "datetime64[us]"), pattern)
    if len(digits) > 1 or (unit := UNITS.get(digits.pop())) is None:
        return None
    micros = [int(cell) * unit if unit else int(cell) // 1000 for cell in cells]
    return Times(np.array(micros, np.int64).astype("datetime64[us]"), "epoch", unit=unit)


def _plain(parts: re.Match[str]) -> datetime | None:
    try:
        year, month, day, hour, minute, second = (int(part or 0) for part in parts.groups())
        return datetime(year, month, day, hour, minute, second)
    except ValueError:
        return None
