"""Runs blocks in TensorRT, with inner values as outputs. Tested with stand-ins only, not on hardware.

Each call builds an engine for exactly its shapes, without tuning. A value that is marked as an output cannot
be fused with others. If that makes an error disappear, a fusion causes it; the block's own result, which is
computed without marks, still shows it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...atomic import scratch_folder
from ...board import build
from ...errors import BuildError
from ...inputs import Arrays
from ...runfolder import MODEL, MODEL_DATA
from ...sessions.cpu.fused import drop_bodies
from ...sessions.cuda import Cuda
from ...sessions.tensorrt import TensorRt, import_tensorrt
from ...specs import OP_DOMAIN
from .replay import Feed, Run, Runner

WORKSPACE = 512 << 20


def tensorrt_runner(
    plugin: Path | None = None, *, tensorrt: TensorRt = None, cuda: Cuda | None = None
) -> Runner:
    """A runner for `bisect` that runs the candidate in TensorRT.

    Args:
        plugin: library with the recurrence plugins; None to run their function bodies.
        tensorrt, cuda: stand-ins for tests.

    Raises:
        SetupError: TensorRT or CUDA is not installed.
    """
    trt = tensorrt if tensorrt is not None else import_tensorrt()
    device = cuda or Cuda()

    def open_graph(model: ir.Model, folder: Path, threads: int) -> Run:
        if plugin is not None:
            drop_bodies(model)  # before 10.7 TensorRT prefers a function body to the plugin
        return lambda feed: run(model, folder, feed)

    def run(model: ir.Model, folder: Path, feed: Feed) -> Arrays:
        names = {value.name for value in model.graph.inputs}
        given = {name: np.ascontiguousarray(x) for name, x in feed.items() if name in names}
        recurrences = sum(node.domain == OP_DOMAIN for node in model.graph)
        with scratch_folder(folder / "bisect") as scratch:
            path = scratch / MODEL
            path.write_bytes(ir.to_proto(model).SerializeToString())
            if (folder / MODEL_DATA).is_file():
                os.link(folder / MODEL_DATA, path.with_name(MODEL_DATA))
            shapes = {name: ((x.shape,) * 3,) * 2 for name, x in given.items()}
            plan = build.Plan(path, plugin, shapes, recurrences if plugin is not None else 0, WORKSPACE)
            content = build.serialize(trt, plan, build.logger(trt), say=lambda text: None)
            outputs = [value.name or "" for value in model.graph.outputs]
            return _execute(trt, device, content, given, outputs)

    return open_graph


def _execute(trt: Any, cuda: Cuda, content: bytes, given: Arrays, outputs: list[str]) -> Arrays:
    """One call of an engine."""
    _runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    _engine = _runtime.deserialize_cuda_engine(content)
    if _engine is None:
        raise BuildError("TensorRT cannot load the engine it built", "see its message above")
    addresses: list[int] = []
    stream = cuda.stream()
    try:
        context = _engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(0, stream):
            raise BuildError("TensorRT cannot create an execution context", "free memory")
        done = []
        for name, array in given.items():
            addresses.append(cuda.allocate(array.nbytes))
            cuda.upload(addresses[-1], array, stream)
            done.append(context.set_input_shape(name, array.shape))
            done.append(context.set_tensor_address(name, addresses[-1]))
        found, places = {}, {}
        for name in outputs:
            dtype = np.dtype(trt.nptype(_engine.get_tensor_dtype(name)))
            found[name] = np.empty(tuple(context.get_tensor_shape(name)), dtype)
            places[name] = cuda.allocate(found[name].nbytes)
            addresses.append(places[name])
            done.append(context.set_tensor_address(name, places[name]))
        if not all(done) or not context.execute_async_v3(stream):
            raise BuildError("TensorRT could not run the engine", "see its message above")
        for name, array in found.items():
            cuda.download(array, places[name], stream)
        cuda.synchronize(stream)
        return found
    finally:
        cuda.synchronize(stream)
        for address in addresses:
            cuda.free(address)
        cuda.destroy_stream(stream)
