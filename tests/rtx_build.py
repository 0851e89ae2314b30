"""Parse and build ONNX files with NVIDIA's own parser and builder (tensorrt-rtx); run in a subprocess.

    python tests/rtx_build.py model.onnx [more.onnx …]

No GPU or driver is needed: the compute capability is set by hand and the plan is never run. One line of JSON
per file: {"model", "layers", "plan_bytes"}, or {"model", "error"} and exit code 1. Every file is built in a
process of its own, forked after the import, because a native abort must not take the others with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

MAX_BATCH, MAX_LENGTH = 4, 512


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def main(paths: list[Path]) -> int:
    failed = False
    for path in paths:
        result = {"model": str(path), **in_child(path)}
        failed |= "error" in result
        print(json.dumps(result), flush=True)
    return int(failed)


def in_child(path: Path) -> dict[str, Any]:
    """What `build` says, or how its process ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as pipe:
            json.dump(build(path), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"error": f"the process ended with status {status}"}


def build(path: Path) -> dict[str, Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        return {"error": "\n".join(str(parser.get_error(i)) for i in range(parser.num_errors))}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.add_optimization_profile(profile_of(builder, network))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"error": "the builder returned no plan\n" + "\n".join(log.errors)}
    return {"layers": network.num_layers, "plan_bytes": plan.nbytes}


def profile_of(builder: trt.Builder, network: trt.INetworkDefinition) -> trt.IOptimizationProfile:
    """Dynamic second dimensions are lengths, other dynamic ones batch sizes."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes: list[list[int]] = [[], [], []]
        for axis, dim in enumerate(tensor.shape):
            is_length = axis == 1 and dim == -1
            choices = (1, 64, MAX_LENGTH) if is_length else (1, 1, MAX_BATCH) if dim == -1 else (dim,) * 3
            for shape, choice in zip(shapes, choices, strict=True):
                shape.append(choice)
        profile.set_shape(tensor.name, *shapes)
    return profile


if __name__ == "__main__":
    sys.exit(main([Path(path) for path in sys.argv[1:]]))
