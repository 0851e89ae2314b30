"""Small graphs from ONNX text, run in ONNX Runtime before and after a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

Arrays = dict[str, np.ndarray]


def model_of(signature: str, body: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text: `signature` is "(inputs) => (outputs)", weights are added by name."""
    text = f'<ir_version: 10, opset_import: ["" : 18]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    ShapeInferencePass()(model)
    return model


def run(model: ir.Model, inputs: Arrays, *, as_written: bool = False) -> list[np.ndarray]:
    """Outputs in ONNX Runtime, the checker's blessing included; `as_written` without its own fusions."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def kernels(model: ir.Model, path: Path) -> list[str]:
    """What ONNX Runtime makes of the graph, written to `path`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(path).graph.node]


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator stands in the graph, constants and unused nodes left out."""
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return Counter(node.op_type for node in model.graph if node.op_type != "Constant")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def check_exact(
    model: ir.Model, graph_pass: Callable[[ir.Model], int], *inputs: Arrays, fused: bool = False
) -> int:
    """Apply the pass; every bit of every output stays as it was. Returns how often it fired.

    The graph runs as it is written, and with `fused` after ONNX Runtime's own fusions too.
    """
    cases = [(x, as_written) for x in inputs for as_written in ((True, False) if fused else (True,))]
    before = [run(model, x, as_written=as_written) for x, as_written in cases]
    count = graph_pass(model)
    for (x, as_written), expected in zip(cases, before, strict=True):
        for ours, theirs in zip(run(model, x, as_written=as_written), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    return count


def constant_of(model: ir.Model, op_type: str, index: int = 1) -> list[int]:
    """The constant that the graph's only `op_type` reads."""
    (node,) = (node for node in model.graph if node.op_type == op_type)
    return ir.convenience.get_const_tensor(node.inputs[index]).numpy().tolist()
