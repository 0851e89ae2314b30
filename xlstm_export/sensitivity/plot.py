"""The picture of a sensitivity search: what each unit does alone, and what the recipe made of it.

Same result, same bytes: no date, no font outlines, no settings of the user. Imports matplotlib.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Sensitivity

COLORS = {"int8": "#2a7f62", "int8-wo": "#8fc1a9", "int4-wo": "#4c78a8", "float": "#c8553d"}
WORDS = {"int8": "INT8", "int8-wo": "INT8 weights", "int4-wo": "INT4 weights", "float": "left as it is"}


def draw(result: Sensitivity) -> bytes:
    """SVG with a bar per unit: drop of the metric and drift of the outputs at the horizon, each alone."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [unit.name for unit in result.units]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "sensitivity", "svg.fonttype": "none", "font.size": 8})
        figure = Figure(figsize=(11, 1.6 + 0.2 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        alone = [result.alone[name] for name in names]
        _bars(left, result, [100 * c.drop for c in alone], f"{result.metric}: % worse than FP32")
        left.axvline(100 * result.limits.max_drop, color="black", linestyle=":", linewidth=1)
        _bars(
            right, result, [c.measured.drift for c in alone], f"error of outputs at {result.about['horizon']}"
        )
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        used = [choice for choice in COLORS if choice in result.choices.values()]
        handles = [matplotlib.patches.Patch(color=COLORS[choice], label=WORDS[choice]) for choice in used]
        right.legend(handles=handles, title="in the recipe", frameon=False)
        figure.suptitle(f"each weight alone; the recipe as a whole {result.found.drop:+.3%}")
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _bars(axes: Any, result: Sensitivity, values: list[float], title: str) -> None:
    colors = [COLORS[result.choices[unit.name]] for unit in result.units]
    finite = [value if math.isfinite(value) else 0.0 for value in values]  # a broken one has no length
    axes.barh(range(len(values)), finite, color=colors)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
