"""Derive the graphs that ONNX Runtime's CPU provider runs: prefill and decode, with kernels or without.

`OrtSession` derives a graph when it opens it; `write_prepared` derives all, for machines without onnx-ir.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ...graph.files import load_graph
from ...runfolder import MODEL
from ...specs import IoSpec
from ..cpu_graph import FOLDER, PREPACKING, CpuGraph
from . import fused as fused_operators
from . import lower
from .decode import decode_graph, fix_one_position

WEIGHTS = f"{FOLDER}/weights.bin"
IN_MESSAGE = 1024  # elements; what shapes are inferred from is smaller
ALIGNMENT = 4096  # of an array in the file, so that it can be mapped


def derive(
    folder: Path, io: IoSpec, batch: int, *, decode: bool, rounding: bool = True, fused: bool = False
) -> CpuGraph:
    """The graph for prefill or decode of a run folder.

    Args:
        folder: run folder.
        io: inputs, outputs and states of the run folder.
        batch: number of streams of a decode graph.
        decode: for one position; else for any number.
        rounding: see `OrtSession`.
        fused: leave the recurrence operators to kernels.

    Raises:
        InputError: the file is missing or no ONNX.
    """
    path = folder / MODEL
    model = load_graph(path)
    if lower.needs_lowering(model):
        graph = lower.cpu_graph(model, rounding=rounding, batch=batch if decode else None, fused=fused)
    else:
        graph = _fp32_graph(model, path, batch, decode=decode, fused=fused)
    if not fused:
        return graph
    pairs = {s.past: s.present for s in io.states}
    attributes = fused_operators.attributes_of(model)
    return replace(graph, in_place=fused_operators.states_in_place(model, pairs), attributes=attributes)


def _fp32_graph(model: ir.Model, path: Path, batch: int, *, decode: bool, fused: bool) -> CpuGraph:
    # Packed weights make a step 7% faster; prefill packs them piece by piece in any case, and reads them from
    # the mapped file.
    config = {PREPACKING: "0" if decode else "1"}
    if not fused:
        return CpuGraph(decode_graph(path, batch) if decode else str(path), config)
    if decode:
        fix_one_position(model, batch, fused=True)
    else:
        fused_operators.drop_bodies(model)
    return CpuGraph(bytes(ir.to_proto(model).SerializeToString()), config)
