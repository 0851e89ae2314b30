"""The plot of a sensitivity search: the harm of each unit alone, coloured by its choice in the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from ..plot.figures import Bar, BarPlot
from ..plot.file import svg_file
from .result import Sensitivity

# Choice of a recipe → its name in the legend, its colour.
CHOICES = {
    "int8": ("INT8", 2),
    "int8-wo": ("INT8 weights", 5),
    "int4-wo": ("INT4 weights", 0),
    "float": ("left as it is", 1),
}
WIDTH = 620  # px of each plot


def draw(result: Sensitivity) -> str:
    """SVG with a bar per unit: drop of the metric, and drift of the outputs at the horizon, each alone.

    The same result gives the same text.
    """
    alone = [result.alone[unit.name] for unit in result.units]
    drop = BarPlot(
        f"{result.metric}: % worse than FP32",
        "How much worse the metric is where only this weight is quantized.",
        "%",
        _groups(result, [100 * candidate.drop for candidate in alone]),
        axis=f"{result.metric}, % worse than FP32",
        limit=100 * result.limits.max_drop,
        limit_name=f"limit {result.limits.max_drop:.3%}",
    )
    horizon = result.about["horizon"]
    drift = BarPlot(
        f"Error of outputs at position {horizon}",
        "Relative L2 error of the outputs where only this weight is quantized.",
        "",
        _groups(result, [candidate.measured.drift for candidate in alone]),
        axis="relative L2 error",
    )
    whole = f"the recipe as a whole {result.found.drop:+.3%}"
    title = f"Each weight alone, coloured by its choice in the recipe; {whole}"
    return svg_file(title, (drop, drift), WIDTH)


def _groups(result: Sensitivity, values: Sequence[float]) -> tuple[tuple[str, tuple[Bar, ...]], ...]:
    groups = []
    for unit, value in zip(result.units, values, strict=True):
        name, colour = CHOICES[result.choices[unit.name]]
        groups.append((unit.name, (Bar(name, value, colour=colour),)))
    return tuple(groups)
