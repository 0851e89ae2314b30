"""Plot of a drift: errors over positions, both axes logarithmic, a colour per candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ..atomic import write_text
from ..errors import UsageError
from ..plot.figures import Limit, Line, LinePlot
from ..plot.file import require_svg, svg_file
from .drift_result import FREE, TEACHER, Drift

WIDTH = 560  # px of each plot


def plot_drift(
    drifts: Drift | Mapping[str, Drift], path: Path, limits: tuple[float, float] | None = None
) -> None:
    """Write a plot of the errors of outputs and worst states. The same drift gives the same bytes.

    Args:
        drifts: one drift, or several by name of the candidate.
        path: .svg file to write.
        limits: largest errors of outputs and of states that pass; drawn where given.

    Raises:
        UsageError: the path has another suffix, or there is nothing to draw.
        SetupError: the file cannot be written.
    """
    named = {"": drifts} if isinstance(drifts, Drift) else drifts
    require_svg(path)
    if not named:
        raise UsageError(f"{path}: there is no drift to draw")
    output, state = (None, None) if limits is None else limits
    plots = (_plot(named, output, states=False), _plot(named, state, states=True))
    write_text(path, svg_file("", plots, WIDTH))


def _plot(named: Mapping[str, Drift], limit: float | None, *, states: bool) -> LinePlot:
    lines = [
        line
        for colour, (name, drift) in enumerate(named.items())
        for mode in (TEACHER, FREE)
        for line in _line(drift, name, mode, colour, states)
    ]
    return LinePlot(
        "States, worst of all blocks" if states else "Outputs",
        f"Error of the {'states' if states else 'outputs'} against FP32 over the positions of one stream.",
        "position",
        "relative L2 error",
        tuple(lines),
        limits=() if limit is None else (Limit("limit", limit),),
    )


def _line(drift: Drift, name: str, mode: str, colour: int, states: bool) -> list[Line]:
    """A line of the largest error at each horizon; none if the mode was not measured."""
    series = [s for s in drift.series if s.mode == mode and (s.block is not None) == states]
    if not series:
        return []
    worst = [_largest(errors) for errors in zip(*(s.errors for s in series), strict=True)]
    label = f"{name}, {mode}" if name else mode
    xs = tuple(float(horizon) for horizon in series[0].horizons)
    return [Line(label, xs, tuple(worst), mode == FREE, colour)]


def _largest(errors: tuple[float, ...]) -> float:
    return math.nan if any(map(math.isnan, errors)) else float(max(errors))
