"""Axes: positions of values, ticks, and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .element import Svg, tag, text

TINY = 1e-290  # ticks are rounded to 300 digits after the point; what is smaller is drawn as zero
TICKS = 7  # at most, or one or two more
PADDING = 0.03  # of the range, beyond the smallest and the largest value
CHARACTER = 6.8  # width of a character of 12 px, on average, in px


@dataclass(frozen=True)
class Axis:
    """From values to positions.

    Attributes:
        low, high: values at its ends; logarithms to base 10 where `log`.
        start, end: positions of both ends, in px.
        ticks: values with a label.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool

    def at(self, value: float) -> float:
        """Position of a value, in px."""
        where = math.log10(value) if self.log else value
        return self.start + (self.end - self.start) * (where - self.low) / (self.high - self.low)

    @property
    def powers(self) -> bool:
        """Whether ticks are written as powers of ten: they would need many digits."""
        sizes = [abs(tick) for tick in self.ticks if tick] or [1.0]
        return max(sizes) >= 1e6 or (min(sizes) if self.log else max(sizes)) < 1e-3

    def label(self, tick: float) -> Svg:
        """A tick as text."""
        if tick == 0 or not self.powers:
            return text(plain(tick))
        exponent = math.floor(math.log10(abs(tick)) + 1e-9)
        mantissa = tick / _power(exponent)
        times = "" if round(mantissa, 6) == 1 else f"{_minus(f'{mantissa:.6g}')} × "
        return Svg(text(f"{times}10") + tag("tspan", text(_minus(str(exponent))), dy="-5", font_size="9"))

    def label_width(self) -> float:
        """About how wide the widest label is, in px."""
        if self.powers:
            return CHARACTER * (5 if all(math.log10(abs(t)) % 1 == 0 for t in self.ticks if t) else 10)
        return CHARACTER * max(len(plain(tick)) for tick in self.ticks)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis for values above zero, with ticks at powers of ten, or closer ones where it spans less."""
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 0.01:
        low, high = low - 0.15, high + 0.15
    pad = PADDING * (high - low)
    low, high = max(low - pad, -320.0), min(high + pad, 308.0)  # what a float holds
    decades = range(math.floor(low), math.ceil(high) + 1)
    if high - low < 1:
        ticks = linear_ticks(10.0**low, 10.0**high)
    elif high - low < 3:
        ticks = [mantissa * _power(k) for k in decades for mantissa in (1, 2, 5)]
    else:
        every = math.ceil((high - low) / TICKS)
        ticks = [_power(k) for k in decades if k % every == 0]
    return Axis(
        low, high, start, end, tuple(t for t in ticks if t > 0 and low <= math.log10(t) <= high), True
    )


def linear_axis(values: Sequence[float], start: float, end: float, pad: bool = True) -> Axis:
    """An axis for any finite values, with ticks at round numbers."""
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), TINY):
        size = 0.1 * abs(high) if abs(high) > TINY else 1.0
        low, high = low - size, high + size
    more = PADDING * (high - low) if pad else 0.0
    low, high = low - more, high + more
    return Axis(low, high, start, end, tuple(linear_ticks(low, high)), False)


def linear_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    rough = (high - low) / TICKS
    power = _power(math.floor(math.log10(rough)))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(n * step, min(digits, 300)) + 0.0 for n in range(first, last + 1)]


def _power(exponent: int) -> float:
    return float(f"1e{exponent}")  # exact, where 10.0**-5 is not


def plain(value: float) -> str:
    """A number in digits, as many as it needs up to six."""
    return _minus(f"{value:,.6g}" if abs(value) < 1e3 else f"{value:,.6f}".rstrip("0").rstrip("."))


def _minus(digits: str) -> str:
    return digits.replace("-", "−")
