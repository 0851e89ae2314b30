"""Find what a trace assumes about sizes that are to stay free.

Where forward decides on a size (`if x.shape[1] != self.positions.shape[1]: ...`), a trace goes the way of
the example. torch's exporter refuses that where it makes a number of a size. Where it only narrows the size,
`S // 4 == 8`, it notes an assertion, which no ONNX graph has: for other sizes the graph would fail, or
compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from ..load.loaded import Dims

FACTORS = (2, 3, 5)  # other sizes than the example's: so many times it, and half of it


def assumed(program: ExportedProgram, dims: Sequence[Dims]) -> str:
    """An assertion of a trace that fails at other sizes; empty where there is none.

    One that only fails at larger sizes, or only at smaller ones, is a bound: a table of positions has an end.

    Args:
        program: with the inputs of the model first, then states.
        dims: of each input of the model.
    """
    inputs = [x for x in _inputs(program) if x is not None]
    sizes = {d.node.expr: d.node.hint for x in inputs for d in x if isinstance(d, torch.SymInt)}
    environment = next((d.node.shape_env for x in inputs for d in x if isinstance(d, torch.SymInt)), None)
    noted: Any = getattr(environment, "deferred_runtime_asserts", {})
    for assertion in (a for group in noted.values() for a in group):
        symbols = assertion.expr.free_symbols
        if not symbols or not symbols <= set(sizes):
            continue
        others = [{s: factor * sizes[s] for s in symbols} for factor in FACTORS]
        others.append({s: max(1, sizes[s] // 2) for s in symbols})
        if not any(assertion.expr.subs(other) for other in others):
            return str(assertion.expr)
    return ""


def _inputs(program: ExportedProgram) -> Iterator[Any]:
    """Shapes of the inputs."""
    given = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in given:
            yield getattr(node.meta.get("val"), "shape", None)
