"""Writes the graphs for ONNX Runtime into a bundle, so that the board need not derive them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from ..atomic import write_json
from ..runfolder import RunFolder
from ..sessions import cpu_graph
from ..sessions.cpu.derive import ALIGNMENT, IN_MESSAGE, WEIGHTS, derive
from ..sessions.cpu.lower import MEMORY
from ..sessions.cpu_graph import FOLDER, INDEX, SCHEMA, CpuGraph


def write_prepared(run: RunFolder | Path, out: Path) -> None:
    """Write the four graphs of a run folder, one stream for decoding, half computed as FP32, into `out`/cpu.

    Args:
        run: run folder.
        out: folder that holds the same `model.onnx.data`.
    """
    run = RunFolder.of(run)
    folder, io = run.path, run.io
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
    """A file with the arrays of several graphs; equal arrays are stored once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def relocate(self, graph: CpuGraph) -> bytes:
        """The graph's ONNX message; arrays in memory or in the message are moved to the file."""
        source = graph.source if isinstance(graph.source, bytes) else Path(graph.source).read_bytes()
        model = ir.from_proto(onnx.load_model_from_string(source))
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.size <= IN_MESSAGE:
                continue
            if isinstance(tensor, ir.ExternalTensor) and tensor.location != MEMORY:
                continue  # it is in the export's own file
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
