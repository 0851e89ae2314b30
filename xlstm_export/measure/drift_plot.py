"""Drift as a picture: errors over positions, both axes logarithmic, a colour per candidate."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import readable_os_errors
from ..errors import SetupError, UsageError
from .drift_result import FREE, TEACHER, Drift

# Format → metadata that would otherwise hold a date or a version.
FORMATS: dict[str, dict[str, str | None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
}
STYLES = {TEACHER: "-", FREE: "--"}
DPI = 120


def plot_drift(drifts: Drift | Mapping[str, Drift], path: Path) -> None:
    """Draw errors of outputs and the worst states; one file gives the same bytes each time.

    Args:
        drifts: one, or several by the name of the candidate.
        path: of a .png or .svg file.

    Raises:
        UsageError: another ending, or nothing to draw.
        SetupError: matplotlib is not installed, the file cannot be written.
    """
    named = {"": drifts} if isinstance(drifts, Drift) else drifts
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS or not named:
        raise UsageError(f"{path}, {len(named)} drifts: no picture", f"endings are {', '.join(FORMATS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError(f"matplotlib cannot be imported: {error}", "pip install matplotlib") from error
    # A salt of our own makes the identifiers in an SVG the same each time.
    with matplotlib.rc_context({"svg.hashsalt": "drift", "font.family": "DejaVu Sans"}):
        figure = _picture(Figure(figsize=(10, 5), layout="constrained"), named)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with readable_os_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(temporary, format=kind, dpi=DPI, metadata=FORMATS[kind])
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def _picture(figure: Any, named: Mapping[str, Drift]) -> Any:
    outputs, states = figure.subplots(1, 2)
    _draw(outputs, named, states=False)
    _draw(states, named, states=True)
    for axes, title in ((outputs, "outputs"), (states, "states, worst of all blocks")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="position", ylabel="relative L2 error")
        axes.grid(True, which="major", alpha=0.3)
    figure.legend(*outputs.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _draw(axes: Any, named: Mapping[str, Drift], *, states: bool) -> None:
    for color, (name, drift) in enumerate(named.items()):
        for mode, style in STYLES.items():
            series = [s for s in drift.series if s.mode == mode and (s.block is not None) == states]
            if not series:
                continue
            worst = np.array([s.errors for s in series]).max(axis=0)
            # Neither zero nor infinity has a place on a logarithmic axis.
            shown = [e if math.isfinite(e) and e > 0 else math.nan for e in worst]
            label = f"{name}, {mode}" if name else mode
            axes.plot(series[0].horizons, shown, style, marker="o", color=f"C{color % 10}", label=label)
