"""Graph passes: one short function per file, whose docstring lists its cases, and the order they run in.

A pass takes a model, changes it in place and returns how often it fired. No pass reads the values of a large
weight. All passes except those in `ROUNDING` keep every bit of the results, if the graph is computed as
written. ONNX Runtime then finds more fusions of its own, which may round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ...errors import BuildError
from .cancel_casts import cancel_casts
from .cancel_concats import cancel_concats
from .cancel_transposes import cancel_transposes
from .canonical_gelu import canonical_gelu
from .canonical_rms_norm import canonical_rms_norm
from .conditions import require_kept, require_traced
from .copy_dims_in_reshape import copy_dims_in_reshape
from .drop_expands import drop_expands
from .drop_unused import drop_unused
from .fold_weight_transposes import fold_weight_transposes
from .fuse_layer_norm import fuse_layer_norm
from .fuse_projections import fuse_projections
from .merge_views import merge_views
from .name_boundaries import name_boundaries
from .sink_splits import sink_splits

Pass = Callable[[ir.Model], int]

# Run in this order, repeatedly, until none fires. Each pass removes something that no other adds again
# (nodes, steps of a chain, computed shapes), so this ends.
PASSES: tuple[Pass, ...] = (
    fold_weight_transposes,
    cancel_casts,
    cancel_transposes,
    copy_dims_in_reshape,
    merge_views,
    drop_expands,
    fuse_layer_norm,
    canonical_rms_norm,
    canonical_gelu,
    fuse_projections,
    sink_splits,
    cancel_concats,
    drop_unused,
)
ROUNDING = frozenset({"fuse_layer_norm", "canonical_rms_norm"})


# Models of all families need two rounds, also with 24 blocks: one that fires and one that finds nothing.
# Longer chains of a user's operators may need more. Beyond this limit, two passes must be undoing each other.
MAX_ROUNDS = 50


def run_passes(model: ir.Model, order: Sequence[Pass] | None = None) -> dict[str, int]:
    """Apply the passes in place until none fires any more, `name_boundaries` at the end.

    Values must have their shapes, as tracing gives them, and dimensions their names. Inputs and outputs do
    not change, and the graph is well-formed after every pass; both are checked (`conditions.py`).

    Args:
        model: changed in place.
        order: the passes to run; all of them by default.

    Returns:
        How often each pass fired, by name, in the order they run.

    Raises:
        BuildError: a pass broke the graph, or the passes do not end.
    """
    order = PASSES if order is None else order
    before = require_traced(model)

    def apply(graph_pass: Pass) -> int:
        count = graph_pass(model)
        if count:
            require_kept(model, before, graph_pass.__name__)
        return count

    fired = {graph_pass.__name__: 0 for graph_pass in order}
    for _ in range(MAX_ROUNDS):
        latest = {graph_pass.__name__: apply(graph_pass) for graph_pass in order}
        if not any(latest.values()):
            return {**fired, name_boundaries.__name__: apply(name_boundaries)}
        for name, count in latest.items():
            fired[name] += count
    restless = ", ".join(name for name, count in latest.items() if count)
    raise BuildError(
        f"the graph passes do not end: after {MAX_ROUNDS} rounds {restless} still find something to do",
        "please report this graph",
    )
