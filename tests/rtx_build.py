"""Parse and build one ONNX file with NVIDIA's own parser and builder (tensorrt-rtx); run in a subprocess.

    python tests/rtx_build.py model.onnx

No GPU or driver is needed: the compute capability is set by hand and the plan is never run. The plan's
size is printed; a parse or build error is printed and ends in exit code 1. A subprocess, because a
native abort must not take the test run with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tensorrt_rtx as trt

MAX_BATCH, MAX_LENGTH = 4, 512


def main(path: Path) -> int:
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        for index in range(parser.num_errors):
            print(parser.get_error(index))
        return 1
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
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        print("the builder returned no plan")
        return 1
    print(json.dumps({"layers": network.num_layers, "plan_bytes": plan.nbytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
