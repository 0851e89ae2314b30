"""Derive the decode graph: the function of an exported graph for one position of a fixed number of streams.

At S = 1 a recurrence needs no Scan, and with B and S known every shape is a constant: only arithmetic is
left. The time of a small model's step depends on the number of operators, so this makes it much faster.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from ...ops import bodies as functions
from ...specs import OP_DOMAIN, multiple_of, steps_of
from .fused import drop_bodies
from .merge_static_views import merge_static_views


def decode_graph(path: Path, batch: int) -> bytes:
    """Serialized ONNX of the graph at `path` for S = 1 and B = `batch`; weights stay in their file.

    Args:
        path: model.onnx of a run folder.
        batch: number of streams.
    """
    model = ir.load(path)
    fix_one_position(model, batch)
    return bytes(ir.to_proto(model).SerializeToString())


def fix_one_position(model: ir.Model, batch: int, *, fused: bool = False) -> None:
    """Make a graph that computes in FP32 the graph for S = 1 and B = `batch`, in place.

    Args:
        model: an exported graph, or one lowered by `sessions/cpu/lower.py`.
        batch: number of streams.
        fused: leave the recurrence operators to kernels, see `fused.py`; else their step bodies are inlined.
    """
    patched = False
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        patched |= any(steps_of(str(d)) > 1 for d in value.shape)
        sizes = {str(d): multiple_of(str(d), "B") * batch + steps_of(str(d)) for d in value.shape}
        value.shape = ir.Shape([d if isinstance(d, int) else sizes[str(d)] or d for d in value.shape])
    if not patched or _see_one_position(model):
        _use_step_bodies(model)
    if not fused:
        common.InlinePass()(model)
    common.ShapeInferencePass()(model)  # through the bodies, where they are not inlined
    if fused:
        drop_bodies(model)
    merge_static_views(model)


def _see_one_position(model: ir.Model) -> bool:
    """Whether every recurrence has a single position: with several to a step, the cells may see them all."""
    common.ShapeInferencePass()(model)
    first = (node.inputs[0] for node in model.graph if node.domain == OP_DOMAIN)
    return all(x is not None and x.shape is not None and x.shape[1] == 1 for x in first)


def _use_step_bodies(model: ir.Model) -> None:
    bodies = {proto.name: proto for proto in functions.functions_of(model.graph, "step")}
    for identifier, function in list(model.functions.items()):
        if function.domain == OP_DOMAIN and function.name in bodies:
            body = ir.serde.deserialize_function(bodies[function.name])
            body.opset_imports[""] = model.opset_imports[""]  # inlining requires equal versions
            model.functions[identifier] = body
