"""What ONNX Runtime's CPU provider runs of an export: graphs for prefill and decode, with kernels or without.

`OrtSession` derives those it needs when it opens them; `write_prepared` derives all for machines that cannot.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from . import fused as fused_operators
from .config import IoSpec
from .decode import decode_graph, fix_one_position
from .graph_cut import load_graph
from .precision import lower
from .precision.lower import MEMORY
from .runfolder import MODEL, read_io, write_json
from .sessions import cpu_graph
from .sessions.cpu_graph import FOLDER, INDEX, PREPACKING, SCHEMA, CpuGraph

WEIGHTS = f"{FOLDER}/weights.bin"
IN_MESSAGE = 1024  # elements; what shapes are inferred from is smaller
ALIGNMENT = 4096  # of an array in the file, so that it can be mapped


def derive(
    folder: Path, io: IoSpec, batch: int, *, decode: bool, rounding: bool = True, fused: bool = False
) -> CpuGraph:
    """The graph for prefill or decode of a run folder.

    Args:
        folder: run folder.
        io: what it describes.
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
    return replace(graph, in_place=fused_operators.states_in_place(model, pairs))


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


def write_prepared(folder: Path, out: Path) -> None:
    """Write the four graphs of a run folder, one stream for decoding, half computed as FP32, into `out`/cpu.

    Args:
        folder: run folder.
        out: folder that holds the same `model.onnx.data`.
    """
    io = read_io(folder)
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    entries = {}
    with (out / WEIGHTS).open("wb") as file:
        weights = _Weights(file)
        for decode in (False, True) if io.states else (False,):
            for fused in (False, True):
                graph = derive(folder, io, 1, decode=decode, rounding=False, fused=fused)
                name = cpu_graph.name_of(decode=decode, fused=fused)
                (out / FOLDER / f"{name}.onnx").write_bytes(weights.relocate(graph))
                entries[name] = cpu_graph.to_json(graph)
    if (out / WEIGHTS).stat().st_size == 0:
        (out / WEIGHTS).unlink()
    write_json(out / INDEX, {"schema": SCHEMA, "graphs": entries})


class _Weights:
    """Arrays of several graphs in one file, equal ones once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def relocate(self, graph: CpuGraph) -> bytes:
        """The graph's message, with arrays that were in memory or in the message in the file."""
        source = graph.source if isinstance(graph.source, bytes) else Path(graph.source).read_bytes()
        model = ir.from_proto(onnx.load_model_from_string(source))
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.size <= IN_MESSAGE:
                continue
            if isinstance(tensor, ir.ExternalTensor) and tensor.location != MEMORY:
                continue  # in the export's own file
            content = graph.arrays[name].tobytes() if name in graph.arrays else tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                offset=self._place(content),
                length=len(content),
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=name,
            )
        return bytes(ir.to_proto(model).SerializeToString())

    def _place(self, content: bytes) -> int:
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]
