"""The recurrence operators as one kernel each in ONNX Runtime's CPU provider, where the library is built.

A function body has about thirty operators, each of which ONNX Runtime runs over all threads, and the step
body moves the matrix memory four times. The kernels (`plugins/mlstm/cpu*`, `plugins/slstm/cpu*`) read and
write it once, in place. They take FP32 only; every graph is lowered to that first (`sessions/cpu/lower.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ...graph.files import load_graph
from ...graph.values import recurrence
from ...plugins.inventory import unknown_attributes
from ...runfolder import MODEL
from ...specs import OP_DOMAIN


def library() -> Path | None:
    """The library for this machine and these sources, if it is built."""
    from ...plugins import locate

    return locate.OWN.find("ort-cpu")


def library_for(folder: Path) -> Path | None:
    """The library, if it is built and computes what the recurrences of a run folder ask for.

    Raises:
        InputError: the graph cannot be read.
    """
    return None if why_bodies(folder) else library()


def why_bodies(folder: Path) -> str:
    """Why the recurrences of a run folder run as function bodies; empty where they run as kernels.

    A kernel sees those attributes only that it asks for. So a library of other sources, which an environment
    variable may name, would leave out an attribute that it does not know, and compute another function.

    Raises:
        InputError: the graph cannot be read.
    """
    path = library()
    if path is None:
        return "the fused operators are not built here"
    unknown = unknown_attributes(path)
    if unknown:  # of these sources none is, and nothing has to be read
        unknown &= attributes_of(load_graph(folder / MODEL))
    return f"the fused operators of {path} do not compute {', '.join(sorted(unknown))}" if unknown else ""


def attributes_of(model: ir.Model) -> frozenset[str]:
    """The attributes that make recurrences of a graph another function than the one of every version."""
    found: set[str] = set()
    for node in model.graph:
        operator = recurrence(node)
        if operator is not None:
            declared = {x.name for x in operator.attributes if x.declared}
            found |= operator.given(node.attributes) - declared
    return frozenset(found)


def drop_bodies(model: ir.Model) -> None:
    """Remove the function bodies of a graph: ONNX Runtime would inline them instead of using a kernel."""
    for identifier, function in list(model.functions.items()):
        if function.domain == OP_DOMAIN:
            del model.functions[identifier]


def states_in_place(model: ir.Model, pairs: Mapping[str, str]) -> frozenset[str]:
    """Names of the graph inputs that hold a state which only one recurrence operator reads and updates.

    Their buffer may serve as the output's too: the kernels read every element before they write it.

    Args:
        model: graph whose recurrences run as kernels.
        pairs: past name → present name of every state.
    """
    names = set()
    for node in model.graph:
        operator = recurrence(node)
        for past, present in operator.states if operator is not None else ():
            source, result = node.inputs[past], node.outputs[present]
            if source is None or source not in model.graph.inputs or not result.is_graph_output():
                continue
            alone = len(source.uses()) == 1 and not result.uses() and not source.is_graph_output()
            if alone and pairs.get(source.name or "") == result.name:
                names.add(source.name or "")
    return frozenset(names)
