"""Small half and quantized graphs from ONNX text, run as `OrtSession` runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from xlstm_export.sessions.cpu import lower

Arrays = dict[str, np.ndarray]


def model_of(signature: str, body: str, opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text: `signature` is "(inputs) => (outputs)", weights are added by name."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def options(dump: Path | None = None) -> onnxruntime.SessionOptions:
    result = onnxruntime.SessionOptions()
    result.log_severity_level = 3
    result.intra_op_num_threads = 1
    if dump is not None:
        result.optimized_model_filepath = str(dump)
    return result


def native(model: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    """What ONNX Runtime gives for the graph by itself."""
    source = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def run(
    model: ir.Model,
    inputs: Arrays,
    *,
    rounding: bool = True,
    batch: int | None = None,
    dump: Path | None = None,
) -> list[np.ndarray]:
    """Outputs of the lowered graph."""
    model = ir.from_proto(ir.to_proto(model))
    session = lower.open_session(model, Path(), options(dump), rounding=rounding, batch=batch)
    return session.run(None, inputs)
